"""The journal: a line for every case that ended, written when it ends.

A run that is stopped or killed keeps what it has, and the next one with the same folder goes on
from there. A line counts as long as its stamp does: another GPU, stack or source makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, NOT_DONE = "passed", "failed", "not done"
NOT_REACHED = "not reached in the time given; the next run with this folder goes on from here"
SOURCES = ("benchmarks/gpu", "csrc", "kron_kernels", "kroneckerbert", "tests/gpu")


class Result(NamedTuple):
    """The outcome of a case."""

    section: str
    name: str  # test_forward[triton-16x2-12x24-...]
    state: str  # PASSED, FAILED or NOT_DONE
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    data: Any = None
    id: str = ""  # as pytest takes it: tests/gpu/test_on_gpu.py::test_forward[...]
    at: float = 0.0  # when it ended, in seconds since 1970
    evidence: dict[str, Any] | None = None  # of a failure, see failures.py

    @property
    def where(self) -> str:
        return self.id or self.name

    @property
    def group(self) -> str:
        """The test's function, and the engine if its first parameter is one."""
        found = re.match(r"(?:test_)?(\w+)(?:\[(?:simulated )?(triton|cuda)\b)?", self.name)
        function, engine = found.groups() if found else (self.name, None)
        words = function.replace("_", " ")
        return f"{engine}: {words}" if engine else words


def stamp(facts: Mapping[str, Any], root: Path) -> str:
    """Identifies the GPU, the versions of the stack, and the sources."""
    keys = ("gpu", "driver_version", "python", "torch", "triton", "cuda")
    text = hashlib.sha256(json.dumps([facts.get(key) for key in keys]).encode())
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".so"):
                text.update(path.read_bytes())
    return text.hexdigest()[:12]


class Journal:
    """Lines of JSON in a file: results, and the cases that a section has."""

    def __init__(self, path: Path, stamp: str):
        self.path, self.stamp = path, stamp

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read() not in (b"", b"\n")
            text = json.dumps({"stamp": self.stamp, **line})
            file.write(b"\n" * torn + text.encode() + b"\n")

    def lines(self) -> Iterable[dict[str, Any]]:
        """Those of this stamp; a line cut short by a kill is left out."""
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line.pop("stamp", None) == self.stamp:
                yield line

    def results(self, section: str) -> list[Result]:
        """The last result of each case, then the cases without one."""
        found: dict[str, Result] = {}
        cases: dict[str, None] = {}
        for line in self.lines():
            if line["section"] != section:
                continue
            if "cases" in line:
                cases |= dict.fromkeys(line["cases"])
            else:
                result = Result(**line)
                found[result.where] = result
        missing = [
            Result(section, name_of(case), NOT_DONE, NOT_REACHED, id=case)
            for case in cases
            if case not in found
        ]
        return [*found.values(), *missing]

    def done(self, section: str, *states: str) -> list[str]:
        """Cases that need not be run again, or those in one of these states."""
        return [r.id for r in self.results(section) if r.state in (states or (PASSED, FAILED))]


def name_of(case: str) -> str:
    return case.split("::", 1)[-1]
