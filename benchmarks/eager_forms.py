"""The eager backend's choice against every form PyTorch offers for (A ⊗ B) x, and against dense.

A row is a shape and a number of tokens. ``kron_matmul`` is the user's call, checks included; the
forms are the bare products. Regret is a form's time over that of the row's best form, the four of
the eager backend included.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.table import Table

from benchmarks import machine, peers
from kron_kernels import KronShape, kron_matmul
from kron_kernels.backends import eager
from kron_kernels.reference import materialize
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved

SHAPES = {
    "8x attention": KronShape(384, 384, 2, 2),
    "8x W1": KronShape(8, 2, 384, 384),
    "8x W2": KronShape(2, 8, 384, 384),
    "21x attention": KronShape(384, 48, 2, 16),
    "21x W1": KronShape(16, 2, 192, 384),
    "21x W2": KronShape(2, 16, 384, 192),
    "8x attention, width 384": KronShape(192, 192, 2, 2),
    "21x attention, width 384": KronShape(192, 24, 2, 16),
    "small factor left": KronShape(2, 2, 384, 384),
    "balanced": KronShape(32, 32, 24, 24),
    "balanced, narrow": KronShape(96, 96, 8, 8),
    "balanced, up": KronShape(64, 32, 48, 24),
    "balanced, down": KronShape(32, 64, 24, 48),
    "skinny": KronShape(48, 384, 64, 2),
    "skinny, mirrored": KronShape(384, 48, 2, 64),
    "5x attention, 4 terms": KronShape(384, 48, 2, 16, 4),
    "5x W1, 4 terms": KronShape(384, 384, 8, 2, 4),
}
TOKENS = (1, 16, 128, 1024, 8192)
SECONDS = 1.5  # for each row
NO_FORMS = ("kron_matmul", "dense")


def run(path: Path, threads: int, effort: float) -> None:
    with machine.recording(path, threads) as record:
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            for tokens in TOKENS:
                machine.progress(f"eager forms: {name}, T={tokens}")
                ms = time_forms(shape, tokens, effort * SECONDS)
                record.add({"shape": name, "sides": shape, "tokens": tokens, "ms": ms})


@torch.inference_mode()
def time_forms(s: KronShape, tokens: int, seconds: float) -> dict[str, float]:
    """Median milliseconds by form, once each form agrees with the oracle."""
    x = torch.randn(tokens, s.in_features)
    a = torch.randn(s.rank, s.m1, s.n1) / s.n1**0.5
    b = torch.randn(s.rank, s.m2, s.n2) / (s.rank * s.n2) ** 0.5
    weight = materialize(a, b)  # formed once: a dense layer would own it
    calls = {"kron_matmul": lambda: kron_matmul(x, a, b), "dense": lambda: x @ weight.T}
    for form in eager.FORMS:
        calls["-".join(form)] = lambda form=form: eager.kron_matmul(x, (a, b), form=form)
    if s.rank == 1:
        calls |= peers.plain(x, a[0], b[0])
        calls["kron"] = peers.kron(x, a[0], b[0])
    sample = slice(0, 64)
    expected = x[sample].double() @ materialize(a.double(), b.double()).T
    for name, call in calls.items():
        assert_close(name, call()[sample], expected, s.rank * (s.n1 + s.n2) + s.in_features)
    return {name: t.median for name, t in interleaved(calls, seconds).items()}


def tables(results: dict[str, Any]) -> list[Table]:
    last = "best form, ours over it"
    headings = ("shape", "tokens", "dense ms", "ours ms", "x dense", "GFLOP/s", last)
    each = machine.table(machine.title(results["machine"]), headings, left=("shape", last))
    regrets = defaultdict(list)
    for row in results["rows"]:
        ms, shape = row["ms"], KronShape(*row["sides"])
        best = min(ms.keys() - NO_FORMS, key=ms.get)
        ours, dense = ms["kron_matmul"], ms["dense"]
        rate = row["tokens"] * shape.flops / ours / 1e6
        numbers = (f"{dense:.3f}", f"{ours:.3f}", f"{dense / ours:.2f}", f"{rate:.0f}")
        choice = f"{best}, {ours / ms[best]:.2f}x its time"
        each.add_row(row["shape"], str(row["tokens"]), *numbers, choice)
        for name in ms:
            limit = min(ms[best], dense if name == "dense" else math.inf)
            regrets[name].append(ms[name] / limit)
    headings = ("form", "geometric mean", "worst", "rows")
    regret = machine.table("regret over the rows that have the form", headings, left=("form",))
    for name, ratios in sorted(regrets.items()):
        mean = geometric_mean(ratios)
        regret.add_row(name, f"{mean:.2f}", f"{max(ratios):.1f}", str(len(ratios)))
    return [each, regret]
