"""Do plans keep their budgets? Measured on saved and reloaded models.

For each teacher half the dense latency, an eighth of the bytes, and both. The student is compressed
by the plan, saved and reloaded; latency is that of 1 x 128 tokens, in turns with the dense model,
and bytes are those of the files of weights. The plans are written beside the results, as text.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from benchmarks import machine
from kron_kernels.plan import Plan
from kroneckerbert import compress, measure, plan

BUDGETS = ({"latency": "2x"}, {"bytes": "8x"}, {"latency": "2x", "bytes": "8x"})
SECONDS = 10.0  # for each budget


def run(path: Path, threads: int, effort: float, teachers: dict[str, str]) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with machine.recording(path, threads) as record:
        for name, folder in teachers.items():
            model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            for budget in BUDGETS:
                machine.progress(f"budgets: {name}, {budget}")
                begin = time.perf_counter()
                chosen = plan(model, budget)
                seconds = time.perf_counter() - begin
                (path.parent / f"plan-{name}-{'-'.join(budget)}.txt").write_text(f"{chosen}\n")
                row = {"teacher": name, "budget": budget, "seconds": seconds}
                row |= {"error": chosen.totals["error"]}
                record.add(row | follow(model, chosen, effort * SECONDS))


def follow(model: PreTrainedModel, chosen: Plan, seconds: float) -> dict[str, float]:
    """Compress, save, reload and measure: dense against student."""
    with tempfile.TemporaryDirectory() as folder:
        dense, student = Path(folder) / "dense", Path(folder) / "student"
        model.save_pretrained(dense)
        compress(model, chosen).save_pretrained(student)
        loaded = {"dense": model, "student": AutoModel.from_pretrained(student).eval()}
        times = measure.latency(loaded, 1, 128, seconds=seconds)
        return {
            "ms_dense": times["dense"].median,
            "ms": times["student"].median,
            "bytes_dense": measure.bytes_on_disk(dense),
            "bytes": measure.bytes_on_disk(student),
        }


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table."""

    def change(dense: float, student: float) -> str:
        return f"{dense:.1f} to {student:.1f} ({dense / student:.2f}x)"

    body = []
    for r in results["rows"]:
        budget = " and ".join(f"{key} {limit}" for key, limit in r["budget"].items())
        latency = change(r["ms_dense"], r["ms"])
        size = change(r["bytes_dense"] / 1e6, r["bytes"] / 1e6)
        seconds, error = f"{r['seconds']:.0f} s", f"{r['error']:.2f}"
        body.append([r["teacher"], budget, seconds, latency, size, error])
    return ["teacher", "budget", "planned in", "ms", "MB of weights", "layers' mean error"], body


def tables(results: dict[str, Any]) -> list[Table]:
    title = f"budgets of plans\n{machine.title(results['machine'])}"
    return [machine.filled(title, *summary(results), left=("teacher", "budget"))]
