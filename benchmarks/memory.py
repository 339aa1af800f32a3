"""Peak memory of training a BERT_BASE: dense, dense with checkpointing, and KroneckerBERT.

Two steps of AdamW on random ids, float32, each contender in a process of its own: the peak is the
largest resident size in the second step, above what the process had when everything was imported
and no model made. Weights, gradients and AdamW's two averages are counted; the rest is activations
and buffers. Linux only, whose kernel keeps the peak.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import machine, training

CHECKPOINTED = "dense, checkpointing"
CONTENDERS = (training.DENSE, CHECKPOINTED, *training.PRESETS, "8x, eager", "21x, eager")
BATCHES, TOKENS = (1, 8, 32), 128


def run(threads: int, batches: Sequence[int], path: Path) -> dict:
    results: dict = {"machine": machine.facts(threads), "cells": []}
    for batch in batches:
        cell: dict = {"batch": batch, "tokens": TOKENS, "mb": {}}
        for name in CONTENDERS:
            print(f"memory: batch {batch}, {name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.memory", name, str(batch), str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            cell["mb"][name] = json.loads(done.stdout.splitlines()[-1])
        results["cells"].append(cell)
        machine.write(path, results)
    return results


def peak(name: str, batch: int, threads: int) -> dict[str, float]:
    """In MB, in this process, which must be new."""
    machine.use_threads(threads)
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = training.model(training.DENSE if name == CHECKPOINTED else name).train()
    if name == CHECKPOINTED:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = training.batch_of(batch, TOKENS)
    training.step(model, optimizer, inputs)  # the optimizer makes its averages
    ctypes.CDLL(None).malloc_trim(0)  # what making the model took
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    training.step(model, optimizer, inputs)
    weights = sum(p.nbytes for p in model.parameters())
    return {"peak": round((resident("VmHWM") - before) / 1e6), "states": round(4 * weights / 1e6)}


def resident(kind: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def tables(results: dict) -> list[Table]:
    facts = machine.title(results["machine"])
    shown = Table(
        title="peak memory of a training step, MB (times less than dense);"
        f" {TOKENS} tokens a sequence\n{facts}"
    )
    names = list(results["cells"][0]["mb"])
    for heading in ("batch", *names):
        shown.add_column(heading, justify="right")
    for cell in results["cells"]:
        mb = {name: cell["mb"][name]["peak"] for name in names}
        entries = (f"{mb[name]} ({mb[training.DENSE] / mb[name]:.1f})" for name in names)
        shown.add_row(str(cell["batch"]), *entries)
    shown.add_section()
    states = (str(results["cells"][0]["mb"][name]["states"]) for name in names)
    shown.add_row("weights, gradients, AdamW", *states)
    return [shown]


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
