"""Tables of what layers.py measured, and comparisons; nothing is measured here.

Times are microseconds; "torch" is the fastest of the plain lines; the best other is the fastest
contender that is not ours, dense included; the share is that of the GEMM rate, the best 1536³
float32 product of the same process.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable

from benchmarks.layers import OWN, Cell

OURS = ("auto", "feed_forward", "two calls")  # the first that a row has stands for us


class Row:
    """The results of a cell. A speed is that of ours unless named; nan if a contender is absent."""

    def __init__(self, row: dict) -> None:
        self.cell = Cell(row["group"], row["layers"], row["tokens"])
        self.flops, self.us = row["flops"], row["us"]
        self.slow, self.left_out = row["slow"], row["left_out"]
        self.ours = next((name for name in OURS if name in self.us), "none of ours")
        self.best_other = self.fastest(name for name in self.us if name not in OWN)
        # Most products of FastKron's kind are too large to form.
        self.yardstick = "torch: matmul per axis" if self.cell.group == "fastkron" else "dense"

    def fastest(self, names: Iterable[str]) -> str | None:
        return min(names, key=lambda name: self.us[name][0], default=None)

    def families(self) -> dict[str, str]:
        """The fastest of each: what stands before a colon names it."""
        names = defaultdict(list)
        for name in self.us:
            names[name.split(":")[0]].append(name)
        return {family: self.fastest(members) for family, members in names.items()}

    def speed(self, over: str | None, name: str | None = None) -> float:
        name = name or self.ours
        known = over in self.us and name in self.us
        return self.us[over][0] / self.us[name][0] if known else math.nan

    def speed_range(self) -> tuple[float, float]:
        """Of ours over the yardstick, from the quartiles of both."""
        _, low, high = self.us[self.yardstick]
        _, own_low, own_high = self.us[self.ours]
        return low / own_high, high / own_low


def table(rows: list[Row], gemm: float) -> str:
    """A line for each cell of one group, a column for each family of contenders."""
    families = dict.fromkeys(["dense", *(f for row in rows for f in row.families())])
    grid = [["", "T", *families, "x dense", "x best", "GFLOP/s", "share", "best other"]]
    for row in rows:
        times = [
            row.us[name][0] if name else math.nan for name in map(row.families().get, families)
        ]
        rate = row.flops / row.us[row.ours][0] / 1e3 if row.ours in row.us else math.nan
        speeds = [f"{row.speed(over):.2f}" for over in ("dense", row.best_other)]
        share = [f"{rate:.1f}", f"{rate / gemm:.0%}", row.best_other or "nan"]
        times = [f"{us:.{1 if us < 100 else 0}f}" for us in times]
        grid.append([row.cell.label, str(row.cell.tokens), *times, *speeds, *share])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    aligned = ["<", *">" * (len(widths) - 2), "<"]
    lines = []
    for entries in grid:
        known = ("-" if e.startswith("nan") else e for e in entries)
        line = (f"{e:{a}{w}}" for e, a, w in zip(known, aligned, widths, strict=True))
        lines.append("  ".join(line).rstrip())
    words = defaultdict(list)
    for row in rows:
        for name in row.slow:
            words[f"{name} timed by two calls, being slow"].append(row.cell)
        for name, why in row.left_out.items():
            words[f"{name} left out: {why}"].append(row.cell)
    lines += [f"{word} ({len(at)} cells, the first {at[0]})" for word, at in words.items()]
    return "\n".join(lines)


def summary(group: str, rows: list[Row]) -> str:
    over = {row: row.speed(row.best_other) for row in rows if row.ours in row.us and row.best_other}
    if not over:
        return f"{group}: nothing to compare"
    ratios = defaultdict(list, {"the best other": list(over.values())})
    for row in over:
        for family, name in row.families().items():
            if name not in OWN:
                ratios[family].append(row.speed(name))
    means = ", ".join(f"{geometric_mean(r):.2f}x {name}" for name, r in ratios.items())
    worst = min(over, key=over.get)
    slower = sum(speed < 1 / 1.1 for speed in over.values())
    return (
        f"{group}, {len(over)} cells, ours, geometric means: {means}\n"
        f"  worst against the best other: {over[worst]:.2f}x {worst.best_other} in {worst.cell}\n"
        f"  slower than the best other by more than 10 %: {slower} cells"
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def compare(now: list[Row], then: list[Row]) -> str:
    """Ours over the yardstick, now and then; a drop is one that the noise does not explain."""
    before = {row.cell: row for row in then}
    lines, drops = [f"{'speed over the yardstick':62}{'then':>8}{'now':>8}{'ratio':>8}"], 0
    for row in now:
        old = before.get(row.cell, row)
        was, is_ = old.speed(old.yardstick), row.speed(row.yardstick)
        if old is row or math.isnan(is_ / was):
            continue
        dropped = is_ / was < 0.9 and row.speed_range()[1] < old.speed_range()[0]
        drops += dropped
        name = f"{row.cell.group}: {row.cell}"
        lines.append(f"{name:62}{was:8.2f}{is_:8.2f}{is_ / was:8.2f}{'  DROP' * dropped}")
    last = f"{drops} drops: a ratio below 0.9, and quartiles that do not overlap"
    return "\n".join([*lines, last])


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of the power law ``cost ~ size^p`` that fits best: least squares of the logarithms."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def growth(rows: list[Row]) -> str:
    """How time grows with the width, from 1024 on, where calls cost nothing any more."""
    lines = []
    for form, members in widths(rows).items():
        wide = [row for width, row in members if width >= 1024]
        if len(wide) < 2:
            continue
        sizes = [width for width, _ in members if width >= 1024]
        told = []
        for name in ("dense", "auto"):
            costs = [row.us[name][0] for row in wide]
            told.append(
                f"{'ours' if name == 'auto' else name} ~ width^{exponent(sizes, costs):.2f}"
            )
        lines.append(f"  {form}: {', '.join(told)}, from {sizes[0]} to {sizes[-1]}")
    return "\n".join(lines)


def widths(rows: Iterable[Row]) -> dict[str, list[tuple[int, Row]]]:
    """The rows of the group ``width`` by the form of their factors, with their widths."""
    forms: dict[str, list[tuple[int, Row]]] = {
        "8x attention": [],
        "21x attention": [],
        "square": [],
    }
    for row in rows:
        (sides,) = row.cell.sides
        right = sides[1]
        form = {(2, 2): "8x attention", (2, 16): "21x attention"}.get(right, "square")
        forms[form].append((sides[0][0] * right[0], row))
    return forms


def report(results: dict) -> str:
    machine = results["machine"]
    facts = {key: value for key, value in machine.items() if key != "peers"}
    lines = [", ".join(f"{key} {value}" for key, value in facts.items())]
    groups = defaultdict(list)
    for row in map(Row, results["rows"]):
        groups[row.cell.group].append(row)
    lines += [f"\n{g}\n{table(rows, machine['gemm_gflops'])}" for g, rows in groups.items()]
    lines += ["", *itertools.starmap(summary, groups.items())]
    if "width" in groups:
        lines.append(growth(groups["width"]))
    return "\n".join(lines)
