"""kron_matmul against dense layers, plain PyTorch and the libraries that offer the product.

Every contender is first compared with a float64 oracle, then all take turns in one process, each on
sets of operands in rotation: as in a model, a weight has left the caches when its turn comes again.
A contender that is wrong, raises, or is not installed is named and left out.

In the tables times are microseconds; "torch" is the fastest plain PyTorch line; the best other is
the fastest contender that is not ours, dense included; the share is that of the best 1536³ float32
matrix product of the same process.
"""

from __future__ import annotations

import itertools
import math
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, linear_regression
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks import machine, peers
from kron_kernels.shapes import contraction_order
from kron_kernels.timing import Timing, interleaved

TOKENS = (1, 16, 128, 1024)
# Attention, feed-forward up and down of KroneckerBERT: 8x, 21x.
PRESETS = ["384x384 2x2", "8x2 384x384", "2x8 384x384"]
PRESETS += ["384x48 2x16", "16x2 192x384", "2x16 384x192"]
BLOCKS = [", ".join(PRESETS[1:3]), ", ".join(PRESETS[4:])]
# Factors of all proportions, of 768 features to 768, 768 to 3072, and 3072 to 768.
LAYERS = ["384x384 2x2", "2x2 384x384", "32x32 24x24", "96x96 8x8", "48x384 16x2"]
LAYERS += ["64x32 48x24", "1536x384 2x2", "48x384 64x2", "384x96 8x8", "2x2 1536x384"]
LAYERS += ["32x64 24x48", "384x1536 2x2", "384x48 2x64", "96x384 8x8", "2x2 384x1536"]
AT_8192_TOKENS = {*LAYERS[:4], "64x32 48x24", "48x384 64x2", "32x64 24x48"}
# 768 features to 3072, by ever smaller factors.
LADDER = ["4x1 768x768", "4x2 768x384", "8x2 384x384", "16x2 192x384", "16x4 192x192"]
LADDER += ["32x8 96x96", "64x16 48x48", "64x32 48x24"]
# Equal factors, as FastKron has them: how many, of which sides. x has at most 2^21 entries.
EQUAL = {2: (3, 5, 8), 4: (2, 4, 6, 8), 8: (2, 3, 4, 5, 7), 16: (2, 3, 4, 5), 32: (2, 3, 4)}
EQUAL |= {64: (2, 3), 3: (5, 8), 5: (4,), 7: (3,), 11: (3,), 13: (2,)}
EQUAL_IN_FLOAT64 = {2: (8,), 4: (5,), 8: (3, 4), 16: (3,), 32: (2,), 64: (2,), 5: (4,), 11: (3,)}
EQUAL_IN_COLUMNS = {50: (2,), 30: (3,), 8: (4,), 4: (6,), 2: (8,)}
EQUAL_TRAINED = {2: (8,), 4: (5,), 8: (3,), 16: (3,), 32: (2,), 64: (2,), 5: (4,)}
LARGEST_OF_MANY = 2**21
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)


def square(width: int) -> str:
    """Two square factors as equal as powers of two allow: together some 2 width weights."""
    p = 2 ** math.ceil(math.log2(width) / 2)
    return f"{p}x{p} {width // p}x{width // p}"


def of_many(
    counts: dict[int, tuple[int, ...]], tokens: Iterable[int], dtype: str = "float32"
) -> list[tuple[str, int, str]]:
    """Cells of these numbers of equal factors, by their side."""
    cells = [(p, n, t) for p, several in counts.items() for n in several for t in tokens]
    return [
        (" ".join([f"{p}x{p}"] * n), t, dtype) for p, n, t in cells if t * p**n <= LARGEST_OF_MANY
    ]


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
    "many_factors": [
        *of_many(EQUAL, TOKENS),
        *of_many(EQUAL_IN_FLOAT64, (1, 128), "float64"),
    ],
    "many_factors_columns": of_many(EQUAL_IN_COLUMNS, (1, 16, 128), "float64"),
    "many_factors_training": of_many(EQUAL_TRAINED, (16, 128)),
}
DEFAULT = ("presets", "feed_forward", "forward", "tokens", "width", "compression", "equal_size")
SWEEPS = ("tokens", "width", "compression")
SWEPT = ("dense", "auto", "kron", "torch: a @ (x @ bᵀ)")  # the contenders in a sweep

OURS = ("auto", "feed_forward", "two calls")  # a row's speed is that of the first that it has
OWN = (*OURS, "eager", "native", "float32")
SECONDS = 1.5  # for each cell
# Of up to eight factors; their results are in a file of their own.
MANY = ("many_factors", "many_factors_columns", "many_factors_training")
SLOW = 20  # contenders this many times slower than the fastest are timed by two calls only
# Sets of operands in rotation: as many as a model has layers, but at most 256 MB, and at least 2.
ROTATED, ROTATED_BYTES = 8, 2**28


class Cell(NamedTuple):
    group: str
    layers: str  # shapes of the factors; layers are separated by commas
    tokens: int
    dtype: str = "float32"

    @property
    def sides(self) -> list[peers.Sides]:
        layers = self.layers.split(", ")
        return [[_shape(factor) for factor in layer.split()] for layer in layers]

    @property
    def is_training(self) -> bool:
        return self.group in ("training", "many_factors_training")

    @property
    def flops(self) -> int:
        """Training costs three times the forward: two more products for each of its products."""
        passes = 3 if self.is_training else 1
        return passes * self.tokens * sum(map(flops_per_token, self.sides))

    @property
    def dense_flops(self) -> int:
        return self.flops // sum(map(flops_per_token, self.sides)) * 2 * self.dense_entries

    @property
    def dense_entries(self) -> int:
        return sum(math.prod(m * n for m, n in sides) for sides in self.sides)

    @property
    def entries(self) -> int:
        """Parameters of the factors."""
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
        return f"{self.label}, T={self.tokens}" + f", {self.dtype}" * (self.dtype != "float32")


def _shape(factor: str) -> tuple[int, int]:
    m, n = factor.split("x")
    return int(m), int(n)


def flops_per_token(sides: peers.Sides) -> int:
    """In the cheapest order of the axes."""
    width, total = math.prod(n for _, n in sides), 0
    for i in contraction_order(sides):
        m, n = sides[i]
        total += 2 * m * width
        width = width // n * m
    return total


# --- Measuring


def run(path: Path, threads: int, effort: float, cells: list[Cell]) -> None:
    libraries, missing = peers.installed()
    for line in missing:
        machine.progress(line)
    with machine.recording(path, threads) as record:
        facts = record.machine
        facts["peers"] = peers.versions(libraries)
        for group, members in itertools.groupby(cells, lambda cell: cell.group):
            # The peaks are the best of the whole run.
            facts["gemm_gflops"] = max(facts["gemm_gflops"], round(machine.gemm_rate(), 1))
            facts["gb_per_s"] = max(facts["gb_per_s"], round(machine.bandwidth(), 1))
            for cell in members:
                machine.progress(f"{group}: {cell}")
                record.add(time_cell(cell, libraries, effort * SECONDS))


def time_cell(cell: Cell, libraries: list[peers.Library], seconds: float) -> dict[str, Any]:
    """A row: microseconds (median and quartiles) by contender, and why others are left out."""
    torch.manual_seed(0)
    left_out: peers.LeftOut = {}
    operands = 4 * cell.tokens * math.prod(n for _, n in cell.sides[0])
    if cell.group not in MANY:
        operands += 4 * cell.dense_entries
    sets = max(2, min(ROTATED, ROTATED_BYTES // operands))
    with torch.inference_mode(not cell.is_training):
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
        for name in once.keys() - {"dense", *OWN}:  # a second look: the first may be a hiccup
            if once[name] > limit and (again := timeit.timeit(calls[name], number=1)) > limit:
                slow[name] = Timing(*[1e3 * min(once[name], again)] * 3)
        timings = interleaved({n: calls[n] for n in once if n not in slow}, seconds) | slow
    us = {name: [float(f"{1e3 * ms:.5g}") for ms in timings[name]] for name in once}
    row = {**cell._asdict(), "flops": cell.flops, "sets": sets, "us": us}
    return row | {"slow": [*slow], "left_out": left_out}


def prepare(cell: Cell, libraries: list[peers.Library], left_out: peers.LeftOut) -> peers.Problem:
    match cell.group:
        case "training":
            return peers.training(*cell.sides, cell.tokens, libraries, left_out)
        case "feed_forward":
            return peers.feed_forward(*cell.sides, cell.tokens)
        case "equal_size":
            return peers.equal_size(*cell.sides, cell.tokens)
        case "many_factors":
            dtype = getattr(torch, cell.dtype)
            return peers.many_factors(*cell.sides, cell.tokens, dtype, libraries, left_out)
        case "many_factors_columns":
            dtype = getattr(torch, cell.dtype)
            return peers.many_factors_columns(*cell.sides, cell.tokens, dtype, libraries)
        case "many_factors_training":
            return peers.many_factors_training(*cell.sides, cell.tokens, libraries, left_out)
    dtype = torch.bfloat16 if cell.group == "bf16" else torch.float32
    return peers.forward(*cell.sides, cell.tokens, dtype, libraries, left_out)


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that makes these calls in turn."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


# --- Tables


class Row:
    """The results of a cell. Speeds are of our contender unless named; nan if one is absent."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.cell = Cell(*(row[key] for key in Cell._fields if key in row))
        self.flops, self.us = row["flops"], row["us"]
        self.slow, self.left_out = row["slow"], row["left_out"]
        self.ours = next((name for name in OURS if name in self.us), "none of ours")
        self.best_other = self._fastest(name for name in self.us if name not in OWN)
        # Most products of many factors are too large to form.
        self.yardstick = "torch: matmul per axis" if self.cell.group in MANY else "dense"

    def _fastest(self, names: Iterable[str]) -> str | None:
        return min(names, key=lambda name: self.us[name][0], default=None)

    def families(self) -> dict[str, str]:
        """The fastest contender of each family, which is named before a colon."""
        names = defaultdict(list)
        for name in self.us:
            names[name.split(":")[0]].append(name)
        return {family: self._fastest(members) for family, members in names.items()}

    def speed(self, over: str | None, name: str | None = None) -> float:
        name = name or self.ours
        known = over in self.us and name in self.us
        return self.us[over][0] / self.us[name][0] if known else math.nan

    def speed_range(self) -> tuple[float, float]:
        """Speed of ours over the yardstick, from the quartiles of both."""
        _, low, high = self.us[self.yardstick]
        _, own_low, own_high = self.us[self.ours]
        return low / own_high, high / own_low


def rows_of(results: dict[str, Any], *groups: str) -> list[Row]:
    """The rows of these groups; without names, all."""
    rows = map(Row, results["rows"])
    return [row for row in rows if not groups or row.cell.group in groups]


def tables(results: dict[str, Any]) -> list[Table | str]:
    facts = {key: value for key, value in results["machine"].items() if key != "peers"}
    groups = defaultdict(list)
    for row in rows_of(results):
        groups[row.cell.group].append(row)
    shown: list[Table | str] = [", ".join(f"{key} {value}" for key, value in facts.items())]
    for group, rows in groups.items():
        shown += [table(group, rows, facts["gemm_gflops"]), *remarks(rows), ""]
    shown += itertools.starmap(summary, groups.items())
    return shown + growth(groups["width"])


def table(group: str, rows: list[Row], gemm: float) -> Table:
    """A line for each cell, a column for each family of contenders."""
    families = dict.fromkeys(["dense", *(f for row in rows for f in row.families())])
    headings = ("", "T", *families, "x dense", "x best", "GFLOP/s", "share", "best other")
    plain = {"title_justify": "left", "box": None}
    shown = machine.table(group, headings, left=("", "best other"), **plain)

    def entry(value: float, form: str) -> str:
        return "-" if math.isnan(value) else f"{value:{form}}"

    for row in rows:
        fastest = row.families()
        times = [row.us[fastest[f]][0] if f in fastest else math.nan for f in families]
        rate = row.flops / row.us[row.ours][0] / 1e3 if row.ours in row.us else math.nan
        shown.add_row(
            shortened(row.cell),
            str(row.cell.tokens),
            *(entry(us, ".1f" if us < 100 else ".0f") for us in times),
            *(entry(row.speed(over), ".2f") for over in ("dense", row.best_other)),
            *(entry(rate, ".1f"), entry(rate / gemm, ".0%")),
            row.best_other or "-",
        )
    return shown


def shortened(cell: Cell) -> str:
    """The label, or that of equal factors: "5 of 8x8"."""
    factors = cell.layers.split()
    one = len(set(factors)) == 1 and cell.group in MANY
    label = f"{len(factors)} of {factors[0]}" if one else cell.label
    return label + f" {cell.dtype}" * (cell.dtype != "float32")


def remarks(rows: list[Row]) -> list[str]:
    """Contenders that were slow or left out, with the number of cells."""
    cells = defaultdict(list)
    for row in rows:
        for name in row.slow:
            cells[f"{name} timed by two calls, being slow"].append(row.cell)
        for name, why in row.left_out.items():
            cells[f"{name} left out: {why}"].append(row.cell)
    return [f"{text} ({len(at)} cells, the first {at[0]})" for text, at in cells.items()]


def summary(group: str, rows: list[Row]) -> str:
    over = {row: row.speed(row.best_other) for row in rows if row.ours in row.us and row.best_other}
    if not over:
        return f"{group}: nothing to compare"
    means = {"the best other": geometric_mean(over.values())} | mean_speeds([*over])
    worst = min(over, key=over.get)
    slower = sum(speed < 1 / 1.1 for speed in over.values())
    return (
        f"{group}, {len(over)} cells, ours, geometric means: "
        f"{', '.join(f'{mean:.2f}x {name}' for name, mean in means.items())}\n"
        f"  worst against the best other: {over[worst]:.2f}x {worst.best_other} in {worst.cell}\n"
        f"  slower than the best other by more than 10 %: {slower} cells"
    )


def mean_speeds(rows: list[Row]) -> dict[str, float]:
    """Geometric means of the speed of ours over the fastest of each family of others."""
    ratios = defaultdict(list)
    for row in rows:
        for family, name in row.families().items():
            if name not in OWN:
                ratios[family].append(row.speed(name))
    return {family: geometric_mean(speeds) for family, speeds in ratios.items()}


def compare(now: list[Row], then: list[Row]) -> str:
    """Speeds of ours over the yardstick, now and then; a drop is one that noise cannot explain."""
    before = {row.cell: row for row in then}
    lines, drops = [f"{'speed over the yardstick':62}{'then':>8}{'now':>8}{'ratio':>8}"], 0
    for row in now:
        if (old := before.get(row.cell)) is None:
            continue
        was, is_ = old.speed(old.yardstick), row.speed(row.yardstick)
        if math.isnan(is_ / was):
            continue
        dropped = is_ / was < 0.9 and row.speed_range()[1] < old.speed_range()[0]
        drops += dropped
        name = f"{row.cell.group}: {row.cell}"
        lines.append(f"{name:62}{was:8.2f}{is_:8.2f}{is_ / was:8.2f}{'  DROP' * dropped}")
    return "\n".join([*lines, f"{drops} drops: a ratio below 0.9, and disjoint quartiles"])


def exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """p of the power law ``cost ~ size^p`` that fits best: least squares of the logarithms."""
    return linear_regression([*map(math.log, sizes)], [*map(math.log, costs)]).slope


def growth(rows: list[Row]) -> list[str]:
    """Exponents of time over the width, from 1024 on, where the overhead of a call is small."""
    lines = []
    for form, members in widths(rows).items():
        wide = [(width, row) for width, row in members if width >= 1024]
        if len(wide) < 2:
            continue
        sizes = [width for width, _ in wide]
        dense, ours = (
            f"{label} ~ width^{exponent(sizes, [row.us[name][0] for _, row in wide]):.2f}"
            for name, label in (("dense", "dense"), ("auto", "ours"))
        )
        lines.append(f"  {form}: {dense}, {ours}, from {sizes[0]} to {sizes[-1]}")
    return lines


def widths(rows: Iterable[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Rows of the group ``width`` by the form of their factors, each with its width."""
    forms: dict[str, list[tuple[int, Row]]] = {
        "8x attention": [],
        "21x attention": [],
        "square": [],
    }
    for row in rows:
        ((left, right),) = row.cell.sides
        form = {(2, 2): "8x attention", (2, 16): "21x attention"}.get(right, "square")
        forms[form].append((left[0] * right[0], row))
    return forms
