"""Scores of students in float32 and in int8: those that ``benchmarks.distillation`` has trained.

Nothing is calibrated. Each student is read from its job's folder, evaluated, quantised, and
evaluated again on the same test set; teachers, which are dense, too.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from transformers.utils import logging

from benchmarks import machine
from benchmarks.distillation import TASKS, tested
from kroneckerbert import quantize, rounding_errors
from kroneckerbert.loading import load
from kroneckerbert.measure import model_bytes

TEACHER = "teacher"


def run(path: Path, threads: int, effort: float, data: Path, work: Path) -> None:
    """``effort`` is not used: a part of a test set would be another one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with machine.recording(path, threads) as record:
        for name, task, folder in _finished(work):
            machine.progress(f"int8_scores: {name}, {task}")
            floating = load(folder)
            int8 = quantize(floating)
            worst = rounding_errors(floating)[0]
            metric = TASKS[task].metric
            record.add(
                {
                    "student": name,
                    "task": task,
                    "metric": metric,
                    "float32": tested(floating, data, task)[metric],
                    "int8": tested(int8, data, task)[metric],
                    "mb": [model_bytes(model) / 1e6 for model in (floating, int8)],
                    "worst": {"layer": worst.path, "error": worst.weight_error},
                }
            )


def _finished(work: Path) -> list[tuple[str, str, Path]]:
    """Student, task and folder of each job that has a model."""
    found = [(TEACHER, task, work / "teacher" / task) for task in TASKS]
    for task in TASKS:
        found += [
            (file.parent.parent.name, task, file.parent)
            for file in sorted((work / "stage2" / task).glob("*/*/model.safetensors"))
        ]
    return [job for job in found if (job[2] / "model.safetensors").is_file()]


def lost(row: dict[str, Any]) -> float:
    """Points that int8 loses."""
    return 100 * (row["float32"] - row["int8"])


def tables(results: dict[str, Any]) -> list[Table]:
    rows = results["rows"]
    headings = ("", *(f"{task}, {t.metric}" for task, t in TASKS.items()), "mean loss", "MB")
    shown = machine.table("scores in float32, and what int8 changes", headings, left=("",))
    for student in dict.fromkeys(row["student"] for row in rows):
        own = {row["task"]: row for row in rows if row["student"] == student}
        cells = [
            f"{100 * own[t]['float32']:.1f} ({-lost(own[t]):+.1f})" if t in own else "–"
            for t in TASKS
        ]
        floating, int8 = own[next(iter(own))]["mb"]
        shown.add_row(
            student, *cells, f"{mean(map(lost, own.values())):.2f}", f"{floating:.1f} → {int8:.1f}"
        )
    return [shown]
