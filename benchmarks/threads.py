"""What more threads give: one text through BERT_BASE, with 1, 2, 4, … threads.

onnxruntime and PyTorch fix their threads early, so each number of threads has a process. The
processes take turns, several for each length; within its turn a process times all contenders in
turns. A time is the median over a process's turns.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers.utils import logging

from benchmarks import machine
from benchmarks.contenders import BY_LAYERS, INT8, Call, contenders
from benchmarks.machine import DENSE
from benchmarks.model import BASES, BERT, random_ids
from benchmarks.training import PRESETS
from kron_kernels.timing import interleaved

CONTENDERS = (DENSE, INT8, *PRESETS, *(f"{preset} {BY_LAYERS}" for preset in PRESETS))
TOKENS = (16, 128)
TURNS, SECONDS = 4, 4.0  # of each process and length


def run(path: Path, threads: int, effort: float) -> None:
    counts = [2**i for i in range(threads.bit_length())]  # up to `threads`
    spawn = multiprocessing.get_context("spawn")
    with machine.recording(path, threads) as record, ExitStack() as stack:
        processes = {
            count: stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, (count,)))
            for count in counts
        }
        for tokens in TOKENS:
            machine.progress(f"threads: {', '.join(map(str, counts))}, 1 x {tokens}")
            turns = [
                {n: p.submit(turn, tokens, effort * SECONDS).result() for n, p in processes.items()}
                for _ in range(TURNS)
            ]
            ms = {
                str(n): {name: statistics.median(t[n][name] for t in turns) for name in CONTENDERS}
                for n in counts
            }
            record.add({"batch": 1, "tokens": tokens, "ms": ms})


# --- in the processes

_models: dict[str, Call] = {}


def prepare(threads: int) -> None:
    machine.use_threads(threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        _models.update(contenders(CONTENDERS, BASES[BERT], Path(folder), threads))


@torch.inference_mode()
def turn(tokens: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each contender."""
    ids = random_ids(1, tokens)
    calls = {name: partial(model, ids, None) for name, model in _models.items()}
    times = interleaved(calls, seconds, at_least=3)
    return {name: round(time.median, 3) for name, time in times.items()}


def gain(row: dict[str, Any], name: str, threads: str) -> float:
    """Times faster than with one thread."""
    return row["ms"]["1"][name] / row["ms"][threads][name]


def columns(results: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """A row and its number of threads, by heading."""
    return {
        f"1 x {row['tokens']}, {count} thread{'s' * (count != '1')}": (row, count)
        for row in results["rows"]
        for count in row["ms"]
    }


def versus_one(row: dict[str, Any], threads: str, name: str) -> str:
    ms = f"{row['ms'][threads][name]:.1f}"
    return ms if threads == "1" else f"{ms} ({gain(row, name, threads):.2f})"


def tables(results: dict[str, Any]) -> list[Table]:
    heading = "BERT_BASE by threads, median ms (times faster than with one)"
    title = f"{heading}\n{machine.title(results['machine'])}"
    places = columns(results)
    shown = machine.table(title, ("", *places), left=("",))
    for name in results["rows"][0]["ms"]["1"]:
        shown.add_row(name, *(versus_one(*place, name) for place in places.values()))
    return [shown]
