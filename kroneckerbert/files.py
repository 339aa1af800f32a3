"""Output folders that are never half-written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".kroneckerbert"  # a file in every folder that was written here


def writable_folder(folder: Path) -> Path:
    """The absolute path of an output folder, made sure before the work that a new one fits there.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
        OSError: If it cannot be created, see ``replace_folder``.
    """
    folder = Path(folder).resolve()
    if folder.is_dir() and any(folder.iterdir()):
        what = "holds a model" if (folder / "config.json").exists() else "is not empty"
        raise FileExistsError(f"{folder} exists and {what}; remove it or choose another folder.")
    _new_sibling(folder).rmdir()
    return folder


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Within, fill the folder that this gives; at the end it takes the name ``folder`` at once.

    An error or an interruption leaves what was there before. If the process is killed, a hidden
    folder beside ``folder`` remains, which the next call removes. Two processes must not write the
    same folder at the same time.

    Args:
        folder: A new or empty folder, or one that an earlier call wrote, which is replaced.

    Yields:
        An empty folder on the same file system.

    Raises:
        FileExistsError: If ``folder`` is a file, or is not empty and was written by something else.
        OSError: If it cannot be created or replaced.
    """
    folder = Path(folder).resolve()
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise FileExistsError(
            f"{folder} is not empty and was not written by kroneckerbert; remove it or choose "
            "another folder."
        )

    new = _new_sibling(folder)
    try:
        yield new
        (new / _MARK).write_text("Written by kroneckerbert, which may replace this folder.\n")
        # No portable call swaps two folders, but a failure of the second rename can be undone.
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _sibling(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.kroneckerbert-{state}")


def _new_sibling(folder: Path) -> Path:
    """An empty folder beside ``folder``, whose creation proves that one can write there."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder.")
    if folder.is_mount() or folder == Path.cwd():
        raise OSError(
            f"{folder} is the current folder or a mount point, which cannot be replaced; choose a "
            "folder inside it."
        )
    new = _sibling(folder, "partial")
    try:
        if new.exists():  # of a process that was killed
            shutil.rmtree(new)
        new.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"cannot write {folder}: {error.strerror} ({error.filename}); choose a folder in a "
            "place that you can write to."
        ) from error
    return new
