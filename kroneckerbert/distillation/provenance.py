"""A record in a folder of its inputs: work resumes only if they are unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kron_kernels.files import write_file
from kroneckerbert import files

MADE_OF = "made_of.json"


def identity(source: str | Path) -> str:
    """A hub name as it is; of a folder, a digest of its provenance or else of its files."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    if (folder / MADE_OF).exists():
        return digest((folder / MADE_OF).read_bytes())
    kinds = (".json", ".safetensors", ".bin", ".txt")
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds)
    digests = [f"{path.name} {digest(path.read_bytes())}" for path in files]
    return digest("\n".join(digests).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def is_made_of(folder: Path, made_of: Mapping[str, Any], renew: bool) -> bool:
    """Whether the folder was made from ``made_of``.

    Raises:
        ValueError: If it was made from something else and ``renew`` is false.
    """
    path = folder / MADE_OF
    if not path.exists():
        return False
    changes = list(_changes(read_json(path), made_of))
    if changes and not renew:
        raise ValueError(
            f"{folder} was made with other arguments: {'; '.join(changes)}. Delete {folder} to "
            "start over, undo the change, or choose another output folder."
        )
    return not changes


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key in {**before, **now}:
        old, new = before.get(key, "not set"), now.get(key, "not set")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{where}{key}.")
        elif old != new:
            yield f"{where}{key} was {old} and is {new}"


def read_json(path: Path, *fields: str) -> dict[str, Any]:
    """Read what ``write_json`` wrote.

    Raises:
        ValueError: If the file is damaged or lacks one of the fields.
    """
    try:
        return files.read_json(path, *fields)
    except ValueError as error:
        raise ValueError(f"{error}; delete {path.parent}.") from error


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2) + "\n")
