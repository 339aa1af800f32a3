"""Atomic, durable writing of files."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def write_file(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, atomically. An existing file keeps its mode.

    Raises:
        OSError: If it cannot be written; an existing file is then unchanged.
    """
    path = Path(os.path.realpath(path))  # replace the file behind a link, not the link
    exists = path.exists()
    if exists and not path.is_file():  # /dev/stdout or a pipe has no old state to keep
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.touch(0o600 if exists else 0o666)  # never readable to more users than in the end
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
    """Wait until a file's bytes, or a folder's list of names, are on disk.

    Without it, a power failure may keep a rename and lose the bytes of the renamed file.
    """
    if path.is_dir():
        # Windows cannot open folders, and some network file systems cannot sync them.
        with suppress(OSError):
            _sync(path, os.O_RDONLY)
    else:  # Windows only syncs writable files
        _sync(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
