"""A section's jobs in a process of its own, started again behind a job that ended it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.jobs import FAILED, NOT_DONE, Job, outcome

LOST = 3  # exit status of a section's process that lost the GPU
PATIENCE = 900  # seconds without a result after which a process is given up


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file; a line that a kill tore off is none."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def add_line(path: Path, result: dict[str, Any]) -> None:
    """Behind a line that may be torn off."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(result) + "\n")


def in_processes(
    section: str,
    jobs: Sequence[Job],
    lines: Path,
    command: Callable[[int], list[str]],
    patience: float = PATIENCE,
) -> None:
    """Run ``command(first)`` for jobs ``first`` and on, again behind one that ended it."""
    barren = 0
    while (done := len(read_lines(lines))) < len(jobs):
        status = watched(command(done), lines, patience)
        now = len(read_lines(lines))
        barren = 0 if now > done else barren + 1
        if now == len(jobs) or (status == LOST and now > done):
            continue
        how = f"no result for {patience:g} s" if status is None else f"exit status {status}"
        add_line(lines, outcome(section, jobs[now], FAILED, message=f"its process ended: {how}"))
        if barren > 1:  # not these jobs' fault
            for job in jobs[now + 1 :]:
                add_line(lines, outcome(section, job, NOT_DONE, message="processes end at once"))


def watched(command: list[str], lines: Path, patience: float) -> int | None:
    """Its exit status, or None if it was killed, because the file did not grow for so long."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = lines.stat().st_size if lines.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                process.kill()
                process.wait()
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(1.0, patience / 10))
    return process.returncode
