"""Files that are never half-written and survive a loss of power."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def write_file(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in UTF-8, at once or not at all. One that exists keeps its mode.

    Raises:
        OSError: If it cannot be written; then what was there before is still there.
    """
    path = Path(os.path.realpath(path))  # through a link, whose file is replaced and not the link
    exists = path.exists()
    if exists and not path.is_file():  # /dev/stdout, a pipe: nothing that has an old state
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.touch(0o600 if exists else 0o666)  # never open to more readers than in the end
        aside.write_text(text, encoding="utf-8")
        if exists:
            shutil.copymode(path, aside)
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk.

    Without it a loss of power may keep a rename and lose the bytes of the file that was renamed.
    """
    if path.is_dir():
        # Windows opens no folders, and some network file systems do not sync them.
        with suppress(OSError):
            _sync(path, os.O_RDONLY)
    else:  # Windows syncs only what may be written
        _sync(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
