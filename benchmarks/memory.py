"""Peak memory of training a BERT_BASE: dense, dense with checkpointing, and KroneckerBERT.

Two steps of AdamW on random ids, float32, each contender in a new process: the peak is the largest
resident size in the second step, above what the process had after the imports, before the model.
It contains weights, gradients, AdamW's two averages, activations and buffers. Linux only: the peak
is read from /proc.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import machine, training
from benchmarks.machine import DENSE

CHECKPOINTED = "dense, checkpointing"
CONTENDERS = (DENSE, CHECKPOINTED, *training.PRESETS, "8x, eager", "21x, eager")
BATCHES, TOKENS = (1, 8, 32), 128


def run(path: Path, threads: int, effort: float) -> None:
    spawn = multiprocessing.get_context("spawn")
    with machine.recording(path, threads) as record:
        for batch in BATCHES if effort == 1 else BATCHES[:1]:
            row: dict[str, Any] = {"batch": batch, "tokens": TOKENS, "mb": {}}
            for name in CONTENDERS:
                machine.progress(f"memory: batch {batch}, {name}")
                with ProcessPoolExecutor(1, spawn) as process:
                    row["mb"][name] = process.submit(peak, name, batch, threads).result()
            record.add(row)


def peak(name: str, batch: int, threads: int) -> dict[str, float]:
    """MB of the peak, and of weights, gradients and averages; call it once in a new process."""
    machine.use_threads(threads)
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = training.model(DENSE if name == CHECKPOINTED else name).train()
    if name == CHECKPOINTED:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = training.batch_of(batch, TOKENS)
    training.step(model, optimizer, inputs)  # allocates the optimizer's averages
    ctypes.CDLL(None).malloc_trim(0)  # return what making the model took
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    training.step(model, optimizer, inputs)
    weights = sum(p.nbytes for p in model.parameters())
    return {"peak": round((resident("VmHWM") - before) / 1e6), "states": round(4 * weights / 1e6)}


def resident(kind: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def tables(results: dict[str, Any]) -> list[Table]:
    def peaks(row: dict[str, Any]) -> dict[str, float]:
        return {name: mb["peak"] for name, mb in row["mb"].items()}

    shown = machine.versus_dense("peak memory of a training step, MB", results, peaks)
    states = (str(mb["states"]) for mb in results["rows"][0]["mb"].values())
    shown.add_section()
    shown.add_row("", "weights, gradients, AdamW", *states)
    return [shown]
