"""Peak memory of BERT_BASE: a step of training, and inference; dense against KroneckerBERT.

Each contender is in a new process, on random ids, float32. The peak is the largest resident size
in one call, above what the process had after the imports, before the model; an equal call came
before. For two steps of AdamW, with and without checkpointing, it contains weights, gradients,
AdamW's two averages, activations and buffers; for inference weights and activations. Linux only:
the peak is read from /proc.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks import contenders, machine, training
from benchmarks.machine import DENSE
from benchmarks.model import BASES, BERT, random_ids

CHECKPOINTED = "dense, checkpointing"
CONTENDERS = (DENSE, CHECKPOINTED, *training.PRESETS, "8x, eager", "21x, eager")
IN_INFERENCE = (
    DENSE,
    *training.PRESETS,
    *(f"{preset} {contenders.IN_INT8}" for preset in training.PRESETS),
    *(f"{preset} {contenders.BY_LAYERS}" for preset in training.PRESETS),
)
BATCHES, TOKENS = (1, 8, 32), 128
TRAINING, INFERENCE = "training", "inference"


def run(path: Path, threads: int, effort: float) -> None:
    spawn = multiprocessing.get_context("spawn")
    batches = BATCHES if effort == 1 else BATCHES[:1]
    cells = [(TRAINING, peak, CONTENDERS, batch) for batch in batches]
    cells += [(INFERENCE, inference_peak, IN_INFERENCE, batch) for batch in batches]
    with machine.recording(path, threads) as record:
        for work, measured, names, batch in cells:
            row: dict[str, Any] = {"work": work, "batch": batch, "tokens": TOKENS, "mb": {}}
            for name in names:
                machine.progress(f"memory: {work}, batch {batch}, {name}")
                with ProcessPoolExecutor(1, spawn) as process:
                    row["mb"][name] = process.submit(measured, name, batch, threads).result()
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
    # The first step allocates the optimizer's averages.
    highest = peak_of_second(partial(training.step, model, optimizer, inputs))
    return {"peak": megabytes(highest - before), "states": megabytes(4 * bytes_of(model))}


def inference_peak(name: str, batch: int, threads: int) -> dict[str, float]:
    """MB of the peak, and of weights; call it once in a new process."""
    machine.use_threads(threads)
    before = resident("VmRSS")
    model = contenders.module(name, BASES[BERT])
    with torch.inference_mode():
        highest = peak_of_second(partial(model, random_ids(batch, TOKENS)))
    return {"peak": megabytes(highest - before), "states": megabytes(bytes_of(model))}


def peak_of_second(call: Callable[[], Any]) -> int:
    """The most bytes in memory during the second of two calls."""
    call()
    ctypes.CDLL(None).malloc_trim(0)  # return what making the model took
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    call()
    return resident("VmHWM")


def resident(kind: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def bytes_of(model: nn.Module) -> int:
    """Of weights; those in int8, and their scales, are buffers."""
    return sum(t.nbytes for t in model.state_dict().values())


def megabytes(size: int) -> int:
    return round(size / 1e6)


def rows_of(results: dict[str, Any], work: str) -> list[dict[str, Any]]:
    """The rows of training, or of inference."""
    return [row for row in results["rows"] if row["work"] == work]


def tables(results: dict[str, Any]) -> list[Table]:
    def peaks(row: dict[str, Any]) -> dict[str, float]:
        return {name: mb["peak"] for name, mb in row["mb"].items()}

    found = []
    for work, heading, states in (
        (TRAINING, "a training step", "weights, gradients, AdamW"),
        (INFERENCE, "inference", "weights"),
    ):
        if rows := rows_of(results, work):
            more = {states: [str(mb["states"]) for mb in rows[0]["mb"].values()]}
            heading = f"peak memory of {heading}, MB"
            only = results | {"rows": rows}
            found.append(machine.versus_dense(heading, only, peaks, more=more))
    return found
