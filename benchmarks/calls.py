"""Where the time of one token's call goes: factors so small that nearly all of it is Python's.

``kron_matmul`` with two 2x2 factors and a bias, and ``KroneckerLinear`` of the same, in float32,
without gradients. Steps are timed each by itself, so they need not add up to the call. "once more"
is a call whose sizes are known; "for the first time" is checked, finds its route and is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from benchmarks import machine
from kron_kernels import KroneckerLinear, dispatch, functional, kron_matmul, repeats
from kron_kernels.backends import native
from kron_kernels.timing import interleaved

SECONDS = 10.0


def run(path: Path, threads: int, effort: float) -> None:
    with machine.recording(path, threads) as record, torch.no_grad():
        timings = interleaved(calls(), effort * SECONDS)
        for name, timing in timings.items():
            record.add({"step": name, "us": [round(1e3 * ms, 3) for ms in timing]})


def calls() -> dict[str, Callable[[], Any]]:
    """Whole calls, then the steps of ``kron_matmul``, by name."""
    x, layer, dense = torch.randn(1, 4), KroneckerLinear(4, 4, (2, 2)), nn.Linear(4, 4)
    a, b, bias, weight = layer.a, layer.b, layer.bias, dense.weight
    operands = x, a, b, bias, None
    whole: dict[str, Callable[[], Any]] = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "nn.Linear": lambda: dense(x),
        "kron_matmul, once more": lambda: kron_matmul(x, a, b, bias=bias),
        "kron_matmul, for the first time": lambda: first(x, a, b, bias),
        "KroneckerLinear, once more": lambda: layer(x),
    }
    steps: dict[str, Callable[[], Any]] = {
        "what is active": lambda: dispatch.is_watched() or dispatch.is_active(),
        "key, with what is active": lambda: repeats.call_key(operands, None, "auto"),
        "y": lambda: x.new_empty(1, 4),
        "three parameters of a module": lambda: (layer.a, layer.b, layer.bias),
    }
    again = native.again_matmul(x, (a, b), bias, None, None)
    if native._native is not None and again is not None:
        steps["y and the kernel"] = lambda: again(x, a, b, bias, None)
    return whole | {f"step: {name}": step for name, step in steps.items()}


def first(x: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    """A call that finds no earlier one like it."""
    *factors, bias = operands
    functional._matmuls.clear()
    return kron_matmul(x, *factors, bias=bias)


def tables(results: dict[str, Any]) -> list[Table]:
    heading = f"one token, 2x2 ⊗ 2x2\n{machine.title(results['machine'])}"
    shown = machine.table(heading, ("", "µs", "quartiles"), left=("",))
    for row in results["rows"]:
        median, low, high = row["us"]
        shown.add_row(row["step"], f"{median:.2f}", f"{low:.2f} - {high:.2f}")
    return [shown]
