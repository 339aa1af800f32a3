"""Files that are never half-written and survive a loss of power."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_file(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in UTF-8, at once or not at all.

    Raises:
        OSError: If it cannot be written; then what was there before is still there.
    """
    path = Path(os.path.realpath(path))  # through a link, whose file is replaced and not the link
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing that has an old state
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_text(text, encoding="utf-8")
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
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
