"""Output that is checked before the work, never half-written, and verifiable afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kron_kernels.files import sync

CHECKSUMS = "checksums.json"
_MARK = ".kroneckerbert"  # a file in every folder that replace_folder wrote


# --- before the work


def writable_folder(folder: Path) -> Path:
    """The absolute path of a new output folder, after a check that it can be written.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
        OSError: If it cannot be created, see ``replace_folder``.
    """
    folder = resolved(folder)
    if folder.is_dir() and any(folder.iterdir()):
        content = "holds a model" if (folder / "config.json").exists() else "is not empty"
        raise FileExistsError(f"{folder} exists and {content}; remove it or choose another folder.")
    _new_sibling(folder).rmdir()
    return folder


def writable_file(path: Path, inputs: Iterable[Path] = ()) -> Path:
    """The same path, after a check that it can be written; its parent folders are made.

    Args:
        path: A new file, or one to be overwritten.
        inputs: Files and models' folders that are read. None of these files, and no file in one of
            these folders, may be overwritten.

    Raises:
        FileExistsError: If ``path`` is a folder, or an input would be overwritten.
        OSError: If it cannot be created or overwritten.
    """
    with naming_output(path):
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            path.unlink()
        elif not os.access(path, os.W_OK):
            os.stat(path)  # raises for a dangling link
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file.")
    for source in filter(os.path.exists, inputs if path.exists() else ()):
        if source.samefile(path) or source.samefile(path.parent):
            raise FileExistsError(
                f"{path} is an input, or in the model's folder {source}, and would be overwritten; "
                "choose another name."
            )
    return path


def resolved(folder: Path) -> Path:
    """The absolute path of an output.

    Raises:
        OSError: If its name is too long, or a link leads to itself.
    """
    with naming_output(folder):
        path = Path(folder).resolve()
        path.exists()  # raises if a name is too long
    return path


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Turn errors of writing into an ``OSError`` that names the output and the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or str(error)
        where = getattr(error, "filename", None)
        raise OSError(
            f"cannot write {path}: {reason}{f' ({where})' if where else ''}; choose a name in a "
            "place that you can write to."
        ) from error


# --- whole folders


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to ``folder`` on success.

    An error or an interruption leaves the old folder. If the process is killed, a hidden folder
    beside ``folder`` remains, which the next call removes. Two processes must not write the same
    folder at the same time.

    Args:
        folder: A new or empty folder, or one from an earlier call, which is replaced.

    Raises:
        FileExistsError: If ``folder`` is a file, or is not empty and not from an earlier call.
        OSError: If it cannot be created or replaced.
    """
    folder = resolved(folder)
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():  # killed between the two renames of put_in_place
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
        put_in_place(new, folder, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put_in_place(new: Path, folder: Path, aside: Path) -> None:
    """Rename a finished folder to ``folder``, and remove the old one.

    Args:
        new: The finished folder; its files are synced to the disk first.
        folder: Its name from now on.
        aside: A free name for the old folder between the two renames; all three are on one file
            system.

    Raises:
        OSError: If a rename fails; then the old folder is back in its place.
    """
    sync_all(new)
    # No portable call swaps two folders, but a failure of the second rename can be undone.
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        if aside.exists():
            aside.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _sibling(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.kroneckerbert-{state}")


def _new_sibling(folder: Path) -> Path:
    """An empty folder beside ``folder``; creating it proves that the place can be written."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder.")
    if folder.is_mount() or folder == Path.cwd():
        raise OSError(
            f"{folder} is the current folder or a mount point, which cannot be replaced; choose a "
            "folder inside it."
        )
    new = _sibling(folder, "partial")
    with naming_output(folder):
        if new.exists():  # left by a killed process
            shutil.rmtree(new)
        new.mkdir(parents=True)
    return new


# --- JSON and checksums


def read_json(path: Path, *fields: str) -> dict[str, Any]:
    """The object in a JSON file, which must have these fields.

    Raises:
        ValueError: If the file holds anything else. The message can be followed by a remedy.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        problem = "is nested too deeply to be read"
    except ValueError as error:  # no UTF-8, or no JSON
        problem = f"is not JSON ({error})"
    else:
        if not isinstance(content, dict):
            problem = f"must be an object with fields, and is {content!r:.80}"
        elif missing := [name for name in fields if name not in content]:
            problem = f"lacks {', '.join(missing)}"
        else:
            return content
    raise ValueError(f"{path} is damaged: it {problem}")


def write_checksums(folder: Path, **about: Any) -> None:
    """Write the length and SHA-256 of every file in a folder to a file in it; seconds per GB.

    Args:
        folder: Its files are complete.
        **about: Further content of that file, as JSON.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CHECKSUMS
    }
    content = {**about, "files": files}
    own = hashlib.sha256(_text(content).encode()).hexdigest()
    (folder / CHECKSUMS).write_text(_text({**content, "sha256": own}), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Any] | None:
    """The content that ``write_checksums`` wrote; None if there is none.

    Raises:
        OSError: If that file is damaged.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        content = read_json(path, "sha256", "files")
    except ValueError as error:
        raise OSError(str(error)) from error
    if content.pop("sha256") != hashlib.sha256(_text(content).encode()).hexdigest():
        raise OSError(f"{path} is damaged: its content has another checksum")
    return content


def damaged(folder: Path) -> str | None:
    """The first file that differs from its checksum, and why; None if there is none.

    Files added after ``write_checksums`` are ignored.
    """
    try:
        content = read_checksums(folder)
    except OSError as error:
        return str(error)
    for name, written in (content or {"files": {}})["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != written["bytes"]:
            return f"{path} is damaged: it has {size} bytes, not {written['bytes']}"
        if _sum(path) != written["sha256"]:
            return f"{path} is damaged: its bytes are not those that were written"
    return None


def _text(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
