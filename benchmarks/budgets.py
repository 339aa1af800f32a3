"""Whether plans keep their promise: budgets, and what saved, reloaded models then measure.

    python benchmarks/budgets.py NAME=FOLDER … [--threads 1]

For each teacher half the dense latency, an eighth of the bytes, and both. The student is compressed
by the plan, saved and loaded anew; latency is that of 1 x 128 tokens, interleaved with the dense
model's, and bytes are those of the weights' files. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel
from transformers.utils import logging

from kroneckerbert import compress, measure, plan

BUDGETS = ({"latency": "2x"}, {"bytes": "8x"}, {"latency": "2x", "bytes": "8x"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teachers", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/budgets.json"))
    parser.add_argument("--plans", type=Path, help="folder for the printed plans")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name, folder in (teacher.split("=", 1) for teacher in args.teachers):
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        for budget in BUDGETS:
            begin = time.perf_counter()
            chosen = plan(model, budget)
            seconds = time.perf_counter() - begin
            if args.plans:
                args.plans.mkdir(parents=True, exist_ok=True)
                (args.plans / f"{name}-{'-'.join(budget)}.txt").write_text(f"{chosen}\n")
            rows.append({"teacher": name, "budget": budget, "seconds": seconds})
            rows[-1] |= {"error": chosen.totals["error"]} | follow(model, chosen)
            print(rows[-1], flush=True)
    machine = {
        "cpu": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print_table(machine, rows)


def follow(model, chosen) -> dict[str, float]:
    """Compress, save, load, measure: dense against student."""
    with tempfile.TemporaryDirectory() as folder:
        dense, student = Path(folder) / "dense", Path(folder) / "student"
        model.save_pretrained(dense)
        compress(model, chosen).save_pretrained(student)
        loaded = {"dense": model, "student": AutoModel.from_pretrained(student).eval()}
        times = measure.latency(loaded, 1, 128, seconds=10)
        return {
            "ms_dense": times["dense"].median,
            "ms": times["student"].median,
            "bytes_dense": measure.bytes_on_disk(dense),
            "bytes": measure.bytes_on_disk(student),
        }


def print_table(machine: dict, rows: list[dict]) -> None:
    table = Table(title=f"{machine['threads']} threads, {machine['cpu']}, {machine['capability']}")
    for heading in ("teacher", "budget", "planned in", "ms", "MB", "layers' error"):
        table.add_column(heading)
    for r in rows:
        told = " and ".join(f"{key} {limit}" for key, limit in r["budget"].items())
        latency = f"{r['ms_dense']:.1f} to {r['ms']:.1f} ({r['ms_dense'] / r['ms']:.2f}x)"
        size = f"{r['bytes_dense'] / 1e6:.1f} to {r['bytes'] / 1e6:.1f} "
        size += f"({r['bytes_dense'] / r['bytes']:.2f}x)"
        table.add_row(
            r["teacher"], told, f"{r['seconds']:.0f} s", latency, size, f"{r['error']:.3f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
