"""Does the Kronecker form earn its place? Forms of one size, distilled by one hand.

The teacher is all-MiniLM-L6-v2. Each student is made in its form and size, trained on the teacher's
sentence vectors at the best of several learning rates, and scored:

STS-B       Spearman's correlation of ratings and cosines, test set
MRPC pairs  the same of "is a paraphrase", train and test set
SST-2, TREC, MRPC
            test accuracy of a linear head on the frozen vectors (of pairs: |u - v| and u v), fitted
            on the train set

A job is one student with one seed. Processes share the jobs: start the command once for each core.
A job that is in the results is not repeated, one that was killed is.
"""

from __future__ import annotations

import statistics
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers.utils import logging

from benchmarks import machine
from benchmarks.study import protocol
from benchmarks.study.forms import SIZES, Student, students
from benchmarks.study.jobs import Rows, lock
from kroneckerbert.distillation.signals import Interrupted

TEACHER = "teacher"
Results = dict[str, Any]


def run(
    path: Path,
    threads: int,
    effort: float,
    data: Path,
    work: Path,
    seeds: list[int],
    only: str | None,
) -> None:
    """``effort`` is not used: less data is another study."""
    machine.use_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, facts = Rows(path, work, protocol.SETTINGS), machine.facts(threads)

    jobs: dict[tuple[str, str, int], Student | None] = {(TEACHER, "1x", 0): None}
    jobs |= {(s.form, s.size, seed): s for seed in seeds for s in students()}
    names = {key: "{}, {}, {}".format(*key) for key in jobs}
    wanted = [key for key, name in names.items() if not only or only in name]
    if not wanted:
        raise ValueError(f"no job has {only!r} in its name; they are: {'; '.join(names.values())}.")
    protocol.check(data)
    for key in wanted:
        student, name = jobs[key], names[key]
        after = student and student.after
        if after and not protocol.folder_of(*after, key[-1], work).exists():
            machine.progress(f"study: {name} waits for {', '.join(after)} in {work}")
            continue
        # The system releases the lock of a process that is killed.
        with lock(work / "locks" / name.replace("/", " ")) as mine:
            if not mine:
                machine.progress(f"study: another process makes {name}")
                continue
            done = {key_of(row): row for row in rows.all()}
            if key in done:
                continue
            machine.progress(f"{time.strftime('%H:%M:%S')} study: {name}")
            try:
                if student is None:
                    row = protocol.teachers_row(data)
                else:
                    first = done.get((student.rate_of or student.form, student.size, 0), {})
                    row = protocol.job(student, key[-1], first.get("rate"), data, work)
            except KeyboardInterrupt as stop:
                kept = f"Finished rows are in {path}; {name} will begin again."
                raise Interrupted(getattr(stop, "number", 2), kept) from None
            rows.add(dict(zip(KEY, key, strict=True)) | row, facts)


KEY = ("form", "size", "seed")


def key_of(row: Results) -> tuple[str, str, int]:
    return row["form"], row["size"], row["seed"]


def in_order(rows: list[Results], size: str) -> list[Results]:
    """The rows of the teacher and of one size, not as they came but form by form."""
    forms = [TEACHER, *(student.form for student in students())]
    own = [row for row in rows if row["size"] in ("1x", size)]
    return sorted(own, key=lambda row: forms.index(row["form"]))


def summary(results: Results, size: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of one size: per cent, the mean and deviation of the seeds."""
    body = []
    for form, group in groupby(in_order(results["rows"], size), lambda row: row["form"]):
        first, *_ = own = list(group)
        cells = [spread([100 * row["scores"][test] for row in own]) for test in protocol.TESTS]
        int8 = spread([100 * row["int8"] for row in own]) if "int8" in first else ""
        start = spread([100 * row["start"] for row in own]) if "start" in first else ""
        rate = f"{first['rate']:.0e}" if "rate" in first else ""
        sizes = [f"{first['parameters'] / 1e6:.2f} M", f"{first['bytes'] / 1e6:.2f}"]
        body.append([form, *sizes, start, *cells, int8, rate])
    heads = [size, "parameters", "MB, int8", "start", *protocol.TESTS, "STS-B, int8", "rate"]
    return heads, body


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def tables(results: Results) -> list[Table]:
    summaries = {size: summary(results, size) for size in SIZES}
    return [
        machine.filled(f"students of {size}, per cent", heads, body, left=(heads[0],))
        for size, (heads, body) in summaries.items()
    ]
