"""Products in int8 against the same products in float32, and dense layers in both.

``kron_matmul`` of KroneckerBERT's layers, and of one dense 384x384 factor, with sets of operands in
rotation as in ``benchmarks.layers``. The time of an int8 product includes the rounding of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.table import Table

from benchmarks import machine
from benchmarks.layers import PRESETS, TOKENS, Cell
from benchmarks.training import medians, rounded
from kron_kernels import kron_matmul
from kron_kernels.backends import native
from kron_kernels.int8 import rounded_factors
from kron_kernels.timing import interleaved

DENSE = "384x384"
SECONDS, ROTATED = 1.5, 8


def run(path: Path, threads: int, effort: float) -> None:
    with machine.recording(path, threads) as record, torch.inference_mode():
        for layer in (*PRESETS, DENSE):
            for tokens in TOKENS:
                cell = Cell("int8", layer, tokens)
                machine.progress(f"int8: {cell}")
                times = interleaved(contenders(cell), effort * SECONDS)
                facts = {"layer": layer, "tokens": tokens, "flops": cell.flops}
                record.add(facts | {"int8": native.int8_products(), "ms": rounded(times)})


def contenders(cell: Cell) -> dict[str, Callable[[], Any]]:
    """By the dtype of the large factor, each through sets of operands."""
    torch.manual_seed(0)
    forms: dict[str, list[Callable[[], Any]]] = {"float32": [], "int8": []}
    for _ in range(ROTATED):
        factors = [torch.randn(1, m, n) for m, n in cell.sides[0]]
        x = torch.randn(cell.tokens, math.prod(f.shape[2] for f in factors))
        forms["float32"].append(partial(kron_matmul, x, *factors))
        forms["int8"].append(partial(kron_matmul, x, *rounded_factors(factors)))
    return {name: _rotate(calls) for name, calls in forms.items()}


def _rotate(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turns = cycle(calls)
    return lambda: next(turns)()


def gain(row: dict[str, Any]) -> float:
    """How many times int8 is as fast as float32."""
    ms = medians(row)
    return ms["float32"] / ms["int8"]


def rate(row: dict[str, Any]) -> float:
    """Multiply-adds of the int8 product, G a second."""
    return row["flops"] / 2e6 / medians(row)["int8"]


def tables(results: dict[str, Any]) -> list[Table]:
    rows = results["rows"]
    how = rows[0]["int8"] if rows else ""
    heading = f"int8 by {how}, times faster than float32\n{machine.title(results['machine'])}"
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    shown = machine.table(heading, ("", *(f"T = {t}" for t in sizes)), left=("",))
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        cells = [f"{gain(row):.2f} ({rate(row):.0f} G/s)" for row in own]
        shown.add_row(layer.replace(" ", " ⊗ "), *cells)
    means = [geometric_mean(gain(r) for r in rows if r["tokens"] == t) for t in sizes]
    shown.add_row("geometric mean", *(f"{mean:.2f}" for mean in means))
    shown.caption = "G/s: multiply-adds of the int8 product, a second"
    return [shown]
