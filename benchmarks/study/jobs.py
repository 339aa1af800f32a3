"""Jobs that several processes share through one file of results."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock; the system releases it if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Rows:
    """The rows of a results file that other processes extend, too.

    Args:
        path: The file; it need not exist.
        work: A folder for locks.
        settings: What the rows depend on.

    Raises:
        ValueError: If the file's rows were made with other settings.
    """

    def __init__(self, path: Path, work: Path, settings: dict[str, Any]) -> None:
        self.path, self.work, self.settings = path, work, json.loads(json.dumps(settings))
        if path.exists() and (found := machine.read(path)["settings"]) != self.settings:
            differing = sorted(k for k in self.settings if found.get(k) != self.settings[k])
            raise ValueError(
                f"{path} has results of other settings ({', '.join(differing)}); give another --to."
            )

    def all(self) -> list[dict[str, Any]]:
        return machine.read(self.path)["rows"] if self.path.exists() else []

    def add(self, row: dict[str, Any], facts: dict[str, Any]) -> None:
        with lock(self.work / "results.lock", wait=True):
            rows = [*self.all(), row]
            machine.write(self.path, {"machine": facts, "settings": self.settings, "rows": rows})
