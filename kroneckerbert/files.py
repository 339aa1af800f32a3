"""Output that is checked before the work, never half-written, and shows when it was damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kron_kernels.files import sync

CHECKSUMS = "checksums.json"
_MARK = ".kroneckerbert"  # a file in every folder that was written here
_PARTIAL, _WHOLE = ".kroneckerbert-partial", ".kroneckerbert-whole"  # within replacing_files
_PLAN = ".plan.json"

Order = Callable[[Path, Path], tuple[list[str], list[str]]]


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
    """Give a finished folder its name, and remove the one that had it.

    Args:
        new: The folder, whose files are on the disk before it gets the name.
        folder: The name.
        aside: Where the old folder is in between; all three are on one file system.

    Raises:
        OSError: If a rename fails; then the old folder is back in its place.
    """
    _sync_all(new)
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


@contextmanager
def replacing_files(folder: str | os.PathLike, order: Order | None = None) -> Iterator[Path]:
    """Within, write files to the folder that this gives; at the end they move into ``folder``.

    Other files in ``folder`` stay. No call replaces several files at once, so the new ones are
    first completed in a hidden folder inside ``folder``, which then takes, at once, a name that
    says so. From then on the new state is safe, and ``finish`` brings it about however often a
    process is killed on the way. Before, all is as it was.

    Args:
        folder: Made if it is not there.
        order: Of the folder with the new files and of ``folder``, the names of files in ``folder``
            to remove first, and those of the new files to move, in this order; new files that are
            not among these are dropped. Without it all move.

    Yields:
        An empty folder on the same file system.

    Raises:
        OSError: If the folder cannot be written, or what a killed process left in it is damaged.
    """
    if not os.fspath(folder):  # which is the current folder to Path
        raise FileNotFoundError("the folder's name is empty; give one, or '.' for this folder.")
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder.")
    partial = folder / _PARTIAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finish(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield partial
        remove, move = order(partial, folder) if order else ([], sorted(os.listdir(partial)))
        (partial / _PLAN).write_text(json.dumps({"remove": remove, "move": move}))
        _sync_all(partial)
        partial.rename(folder / _WHOLE)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder)
    try:
        finish(folder)
    except KeyboardInterrupt:
        finish(folder)
        raise


def finish(folder: str | os.PathLike) -> None:
    """Complete what a killed process had begun to put in place in ``folder``, if there is any.

    Raises:
        OSError: If a file cannot be moved.
    """
    folder = Path(folder)
    whole = folder / _WHOLE
    if plan := _plan(folder):
        remove, move = plan["remove"], plan["move"]
        for name in remove:
            if name not in move or (whole / name).exists():  # else it is the new one already
                (folder / name).unlink(missing_ok=True)
        if remove:
            sync(folder)
        for name in move:
            if (whole / name).exists():
                if name == move[-1] and len(move) > 1:
                    sync(folder)  # the last is what the others are read by
                os.replace(whole / name, folder / name)
        sync(folder)
    shutil.rmtree(whole, ignore_errors=True)


def is_between(folder: str | os.PathLike) -> bool:
    """Whether ``folder`` has some of the old files and some of the new, until it is finished."""
    plan, folder = _plan(Path(folder)), Path(folder)
    if not plan:
        return False
    waiting = [name for name in plan["move"] if (folder / _WHOLE / name).exists()]
    untouched = waiting == plan["move"] and all((folder / name).exists() for name in plan["remove"])
    return bool(waiting) and not untouched


def _plan(folder: Path) -> dict[str, list[str]] | None:
    path = folder / _WHOLE / _PLAN
    try:
        plan = read_json(path, "remove", "move")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OSError(f"{error}; remove {path.parent}.") from error
    for names in (plan["remove"], plan["move"]):
        # The folder may have come from elsewhere: nothing outside it is removed or replaced.
        if not isinstance(names, list) or any(
            not isinstance(name, str) or Path(name).name != name or name == ".." for name in names
        ):
            raise OSError(
                f"{path} is damaged: it names {names!r:.80}, which are not all files of the "
                f"folder; remove {path.parent}."
            )
    return plan


def read_json(path: Path, *fields: str) -> dict[str, Any]:
    """The object that a JSON file holds, with at least these fields.

    Raises:
        ValueError: If it holds anything else, in a sentence to which a remedy can be added.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        why = "is nested too deeply to be read"
    except ValueError as error:  # no UTF-8, or no JSON
        why = f"is no JSON ({error})"
    else:
        if not isinstance(content, dict):
            why = f"must be an object with fields, and is {content!r:.80}"
        elif missing := [name for name in fields if name not in content]:
            why = f"lacks {', '.join(missing)}"
        else:
            return content
    raise ValueError(f"{path} is damaged: it {why}")


def write_checksums(folder: Path, **about: Any) -> None:
    """Write the length and a checksum of every file of a folder into the folder.

    Reading and summing up takes a second or two for a GB.

    Args:
        folder: Whose files are complete.
        **about: What else to keep there, as JSON.
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
    """What ``write_checksums`` wrote; None of a folder that has none.

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
    """The first file that is not as ``write_checksums`` found it, and why; None if there is none.

    Files added later are ignored.
    """
    try:
        content = read_checksums(folder)
    except OSError as error:
        return str(error)
    for name, told in (content or {"files": {}})["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != told["bytes"]:
            return f"{path} is damaged: it has {size} bytes, not {told['bytes']}"
        if _sum(path) != told["sha256"]:
            return f"{path} is damaged: its bytes are not those that were written"
    return None


def _text(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


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
