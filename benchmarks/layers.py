"""kron_matmul against dense layers, plain PyTorch and the libraries that offer the product.

Every contender is compared with a float64 oracle first, then all take turns in one process, each on
sets of operands in rotation: as in a model, a weight has left the caches when its turn comes again.
One that is wrong, raises, or is not installed is named and left out.
"""

from __future__ import annotations

import itertools
import math
import sys
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, peers
from kron_kernels.timing import Timing, interleaved

TOKENS = (1, 16, 128, 1024)
# Attention, feed-forward up and down of KroneckerBERT: 8x, 21x.
PRESETS = ["384x384 2x2", "8x2 384x384", "2x8 384x384"]
PRESETS += ["384x48 2x16", "16x2 192x384", "2x16 384x192"]
BLOCKS = [", ".join(PRESETS[1:3]), ", ".join(PRESETS[4:])]
# Every proportion of sides, of 768 features to 768, 768 to 3072, and 3072 to 768.
LAYERS = ["384x384 2x2", "2x2 384x384", "32x32 24x24", "96x96 8x8", "48x384 16x2"]
LAYERS += ["64x32 48x24", "1536x384 2x2", "48x384 64x2", "384x96 8x8", "2x2 1536x384"]
LAYERS += ["32x64 24x48", "384x1536 2x2", "384x48 2x64", "96x384 8x8", "2x2 384x1536"]
AT_8192_TOKENS = {*LAYERS[:4], "64x32 48x24", "48x384 64x2", "32x64 24x48"}
# 768 features to 3072, by ever smaller factors.
LADDER = ["4x1 768x768", "4x2 768x384", "8x2 384x384", "16x2 192x384", "16x4 192x192"]
LADDER += ["32x8 96x96", "64x16 48x48", "64x32 48x24"]
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)


def square(width: int) -> str:
    """Two factors as equal as powers of two allow: of ``width`` features, 2 width^1.5 weights."""
    p = 2 ** math.ceil(math.log2(width) / 2)
    return f"{p}x{p} {width // p}x{width // p}"


GROUPS = {
    "presets": [*itertools.product(PRESETS, TOKENS)],
    "feed_forward": [*itertools.product(BLOCKS, TOKENS)],
    "forward": [(w, t) for w in LAYERS for t in TOKENS + (8192,) * (w in AT_8192_TOKENS)],
    "tokens": [*itertools.product(PRESETS, [4**i for i in range(8)])],
    "width": [
        (form, 128)
        for d in WIDTHS
        for form in (f"{d // 2}x{d // 2} 2x2", f"{d // 2}x{d // 16} 2x16", square(d))
    ],
    "compression": [*itertools.product(LADDER, (128, 1024))],
    "equal_size": [*itertools.product(PRESETS, TOKENS)],
    "training": [*itertools.product(PRESETS, (128, 1024))],
    "bf16": [*itertools.product([*PRESETS, "32x32 24x24"], TOKENS[1:])],
    "fastkron": [  # the shapes that FastKron is made for, while x has at most 2^26 elements
        (" ".join([f"{p}x{p}"] * n), t)
        for p, n, t in itertools.product((8, 16, 32, 64), (2, 3, 4), TOKENS)
        if t * p**n <= 2**26
    ],
}
DEFAULT = ("presets", "feed_forward", "forward", "tokens", "width", "compression", "equal_size")
SWEEPS = ("tokens", "width", "compression")
SWEPT = ("dense", "auto", "kron", "torch: a @ (x @ bᵀ)")  # who takes part in them

OWN = ("auto", "feed_forward", "two calls", "eager", "native", "float32")
SLOW = 20  # times as long as the fastest: timed by two calls, or it would take the others' turns
ROTATED = 8  # sets of operands, a model's layers as it were ...
ROTATED_BYTES = 2**28  # ... while they are not larger together, and at least 2


class Cell(NamedTuple):
    group: str
    layers: str  # the factors' shapes, of several layers with commas
    tokens: int

    @property
    def sides(self) -> list[peers.Sides]:
        layers = self.layers.split(", ")
        return [[_shape(factor) for factor in layer.split()] for layer in layers]

    @property
    def flops(self) -> int:
        """With gradients, three times the forward's: two products more for each of its products."""
        passes = 3 if self.group == "training" else 1
        return passes * self.tokens * sum(map(flops_per_token, self.sides))

    @property
    def dense_flops(self) -> int:
        return self.flops // sum(map(flops_per_token, self.sides)) * 2 * self.dense_entries

    @property
    def dense_entries(self) -> int:
        return sum(math.prod(m * n for m, n in sides) for sides in self.sides)

    @property
    def entries(self) -> int:
        """Of all factors: the layer's parameters."""
        return sum(m * n for sides in self.sides for m, n in sides)

    @property
    def bytes_moved(self) -> int:
        """At least, in float32: x, the factors and y once each."""
        ends = math.prod(n for _, n in self.sides[0]) + math.prod(m for m, _ in self.sides[-1])
        return 4 * (self.tokens * ends + self.entries)

    @property
    def label(self) -> str:
        return ", ".join(layer.replace(" ", " ⊗ ") for layer in self.layers.split(", "))

    def __str__(self) -> str:
        return f"{self.label}, T={self.tokens}"


def _shape(factor: str) -> tuple[int, int]:
    m, n = factor.split("x")
    return int(m), int(n)


def flops_per_token(sides: peers.Sides) -> int:
    """In the cheapest order of the axes."""

    def cost(order: Sequence[tuple[int, int]]) -> int:
        width, total = math.prod(n for _, n in sides), 0
        for m, n in order:
            total += 2 * m * width
            width = width // n * m
        return total

    return min(map(cost, itertools.permutations(sides)))


def prepare(cell: Cell, libraries: list[peers.Library], left_out: peers.LeftOut) -> peers.Problem:
    match cell.group:
        case "training":
            return peers.training(*cell.sides, cell.tokens, libraries, left_out)
        case "feed_forward":
            return peers.feed_forward(*cell.sides, cell.tokens)
        case "equal_size":
            return peers.equal_size(*cell.sides, cell.tokens)
    dtype = torch.bfloat16 if cell.group == "bf16" else torch.float32
    return peers.forward(*cell.sides, cell.tokens, dtype, libraries, left_out)


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def measure(cell: Cell, libraries: list[peers.Library], seconds: float) -> dict:
    """A row of the results: microseconds as median and quartiles, and who is left out and why."""
    torch.manual_seed(0)
    left_out: peers.LeftOut = {}
    operands = 4 * (cell.dense_entries + cell.tokens * math.prod(n for _, n in cell.sides[0]))
    sets = max(2, min(ROTATED, ROTATED_BYTES // operands))
    with torch.inference_mode(cell.group != "training"):
        problems = [prepare(cell, libraries, left_out) for _ in range(sets)]
        (first, check), once = problems[0], {}
        names = SWEPT if cell.group in SWEEPS else first
        calls = {name: rotate([p[name] for p, _ in problems]) for name in names if name in first}
        for name, call in calls.items():
            try:
                check(name, call())
            except Exception as error:
                left_out[name] = peers.first_line(error)
            else:
                once[name] = timeit.timeit(call, number=1)
        limit = max(SLOW * min(once.values(), default=0), seconds / SLOW)
        slow = {}
        for name in once.keys() - {"dense", *OWN}:  # looked at twice, for the first may be a hiccup
            if once[name] > limit and (again := timeit.timeit(calls[name], number=1)) > limit:
                slow[name] = Timing(*[1e3 * min(once[name], again)] * 3)
        timings = interleaved({n: calls[n] for n in once if n not in slow}, seconds) | slow
    us = {name: [float(f"{1e3 * ms:.5g}") for ms in timings[name]] for name in once}
    row = {**cell._asdict(), "flops": cell.flops, "sets": sets, "us": us}
    return row | {"slow": [*slow], "left_out": left_out}


def run(cells: list[Cell], threads: int, seconds: float, path: Path) -> dict:
    """Measure all cells; what there is, is written after every group."""
    machine.use_threads(threads)
    libraries, missing = peers.installed()
    print("".join(f"{line}\n" for line in missing), end="")
    facts = machine.facts(threads) | {"peers": peers.versions(libraries)}
    results: dict = {"machine": facts, "rows": []}
    with machine.watched(results):
        for group, members in itertools.groupby(cells, lambda cell: cell.group):
            # The rates are the best of the whole run.
            facts["gemm_gflops"] = max(facts["gemm_gflops"], round(machine.gemm_rate(), 1))
            facts["gb_per_s"] = max(facts["gb_per_s"], round(machine.bandwidth(), 1))
            for cell in members:
                print(f"{group}: {cell}", file=sys.stderr, flush=True)
                results["rows"].append(measure(cell, libraries, seconds))
            machine.write(path, results)
    machine.write(path, results)
    return results
