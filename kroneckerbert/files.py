"""Output folders that are never half-written, and outputs that are checked before the work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".kroneckerbert"  # a file in every folder that was written here


def writable_folder(folder: Path) -> Path:
    """The absolute path of an output folder, made sure before the work that a new one fits there.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
        OSError: If it cannot be created, see ``replace_folder``.
    """
    folder = resolved(folder)
    if folder.is_dir() and any(folder.iterdir()):
        what = "holds a model" if (folder / "config.json").exists() else "is not empty"
        raise FileExistsError(f"{folder} exists and {what}; remove it or choose another folder.")
    _new_sibling(folder).rmdir()
    return folder


def writable_file(path: Path, inputs: Iterable[Path] = ()) -> Path:
    """The same path, made sure before the work that a file can be written there.

    Folders on the way to it are made.

    Args:
        path: Of a new file, or of one to be overwritten.
        inputs: Files and models' folders that are read; neither one of these files nor one in
            these folders is overwritten.

    Raises:
        FileExistsError: If it is a folder, or an input would be overwritten.
        OSError: If it cannot be created or overwritten.
    """
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            path.unlink()
        elif not os.access(path, os.W_OK):
            os.stat(path)  # of a link that leads nowhere, this says so
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_write(path, error) from error
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file.")
    for source in filter(os.path.exists, inputs if path.exists() else ()):
        if source.samefile(path) or source.samefile(path.parent):
            raise FileExistsError(
                f"{path} is an input, or in the model's folder {source}, and would be overwritten; "
                "choose another name."
            )
    return path


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
    folder = resolved(folder)
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
        raise _cannot_write(folder, error) from error
    return new


def resolved(folder: Path) -> Path:
    """The absolute path of an output.

    Raises:
        OSError: If there can be none, for its name is too long or a link leads to itself.
    """
    try:
        path = Path(folder).resolve()
        path.exists()  # which is an error of names that are too long
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _cannot_write(folder, error) from error
    return path


def _cannot_write(path: Path, error: OSError | RuntimeError) -> OSError:
    reason = getattr(error, "strerror", None) or str(error)
    where = getattr(error, "filename", None)
    return OSError(
        f"cannot write {path}: {reason}{f' ({where})' if where else ''}; choose a name in a place "
        "that you can write to."
    )
