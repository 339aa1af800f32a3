"""kron_matmul against dense layers, plain PyTorch and the libraries that offer the product.

    python benchmarks/bench_kron_matmul.py --threads 1 --json now.json --plot now.png
    python benchmarks/bench_kron_matmul.py --only forward --match "32x32.*T=16$" --compare then.json
    python benchmarks/bench_kron_matmul.py --read now.json --plot now.png  # nothing is measured

Every contender is compared with a float64 oracle first, then all take turns in one process. One
that is wrong, raises, or is not installed is named and left out. To have them all:

    pip install lycoris-lora linear_operator cola-ml
    pip install --no-deps pyfastkron  # what it requires would replace torch by a CUDA build

In the table, times are microseconds; "torch" is the fastest of the plain lines; the best other is
the fastest contender that is not ours, dense included; the share is that of the GEMM rate, the best
1536³ float32 matmul of the same process.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import re
import sys
import timeit
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import peers
import torch

import kron_kernels
from kron_kernels.timing import Timing, interleaved

TOKENS = (1, 16, 128, 1024)
# Every proportion of sides, of 768 features to 768, 768 to 3072, and 3072 to 768.
LAYERS = ["384x384 2x2", "2x2 384x384", "32x32 24x24", "96x96 8x8", "48x384 16x2"]
LAYERS += ["64x32 48x24", "1536x384 2x2", "48x384 64x2", "384x96 8x8", "2x2 1536x384"]
LAYERS += ["32x64 24x48", "384x1536 2x2", "384x48 2x64", "96x384 8x8", "2x2 384x1536"]
AT_8192_TOKENS = {*LAYERS[:4], "64x32 48x24", "48x384 64x2", "32x64 24x48"}
# Attention, feed-forward up and down of KroneckerBERT: 8x, 21x.
PRESETS = ["384x384 2x2", "8x2 384x384", "2x8 384x384"]
PRESETS += ["384x48 2x16", "16x2 192x384", "2x16 384x192"]

GROUPS = {
    "forward": [(w, t) for w in LAYERS for t in TOKENS + (8192,) * (w in AT_8192_TOKENS)],
    "training": [*itertools.product(LAYERS, TOKENS)],
    "presets": [*itertools.product(PRESETS, TOKENS)],
    "fastkron": [  # the shapes that FastKron is made for, while x has at most 2^26 elements
        (" ".join([f"{p}x{p}"] * n), t)
        for p, n, t in itertools.product((8, 16, 32, 64), (2, 3, 4), TOKENS)
        if t * p**n <= 2**26
    ],
    "bf16": [*itertools.product([*PRESETS, "32x32 24x24"], TOKENS[1:])],
    "feed_forward": [*itertools.product([", ".join(PRESETS[1:3]), ", ".join(PRESETS[4:])], TOKENS)],
}

OURS = ("auto", "feed_forward", "two calls")  # the first that a row has stands for us
OWN = (*OURS, "eager", "native", "float32")
SLOW = 20  # times as long as the fastest: timed by two calls, or it would take the others' turns


class Cell(NamedTuple):
    group: str
    layers: str
    tokens: int

    @property
    def sides(self) -> list[peers.Sides]:
        layers = self.layers.split(", ")
        return [[tuple(map(int, f.split("x"))) for f in layer.split()] for layer in layers]

    @property
    def flops(self) -> int:
        """With gradients, three times the forward's: two products more for each of its products."""
        passes = 3 if self.group == "training" else 1
        return passes * self.tokens * sum(map(flops_per_token, self.sides))

    @property
    def label(self) -> str:
        return re.sub(r"(?<!,) ", " ⊗ ", self.layers)

    def __str__(self) -> str:
        return f"{self.label}, T={self.tokens}"


def flops_per_token(sides: peers.Sides) -> int:
    """In the cheapest order of the axes."""

    def cost(order: peers.Sides) -> int:
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
            return peers.feed_forward(*cell.sides, cell.tokens, left_out)
    dtype = torch.bfloat16 if cell.group == "bf16" else torch.float32
    return peers.forward(*cell.sides, cell.tokens, dtype, libraries, left_out)


def measure(cell: Cell, libraries: list[peers.Library], seconds: float) -> dict:
    """A row of the results: microseconds as median and quartiles, and who is left out and why."""
    torch.manual_seed(0)
    left_out: peers.LeftOut = {}
    with torch.inference_mode(cell.group != "training"):
        calls, check = prepare(cell, libraries, left_out)
        once = {}
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
    return {**cell._asdict(), "flops": cell.flops, "us": us, "slow": [*slow], "left_out": left_out}


def gemm_rate() -> float:
    """GFLOP/s of the best of 20 products."""
    a, b = torch.randn(2, 1536, 1536)
    return 2e-9 * 1536**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=20))


def machine(threads: int, libraries: list[peers.Library]) -> dict:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "gemm_gflops": 0.0,
        "torch": torch.__version__,
        "kron_kernels": kron_kernels.__version__,
        "peers": peers.versions(libraries),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# From here on everything is read from the results, which are what the JSON holds.


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


def plot(results: dict, path: Path) -> None:
    """Speed over the yardstick: a column for each cell, ours and the best other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = defaultdict(lambda: defaultdict(list))
    for row in map(Row, results["rows"]):
        if not math.isnan(row.speed(row.yardstick)):
            groups[row.cell.group][row.cell.label].append(row)
    layout = [["forward"], ["training"], ["presets", "bf16", "feed_forward"], ["fastkron"]]
    layout = [kept for line in layout if (kept := [g for g in line if g in groups])]
    figure = plt.figure(figsize=(15, 0.7 + 3.6 * len(layout)), layout="constrained")
    parts = figure.subfigures(len(layout), squeeze=False).flat
    for line, part in zip(layout, parts, strict=True):
        columns = [max(15, sum(len(rows) + 1 for rows in groups[g].values())) for g in line]
        axes = part.subplots(1, len(line), width_ratios=columns, squeeze=False).flat
        for group, panel in zip(line, axes, strict=True):
            _panel(panel, group, groups[group])
    facts = results["machine"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    title = f"{facts['cpu']} ({facts['capability']}), {threads}, torch {facts['torch']}"
    figure.suptitle(f"kron_matmul on {title}, {facts['date'][:10]}", fontweight="bold")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


OURS_COLOR, SLOWER_COLOR, OTHER_COLOR = "#0f6ab4", "#d1495b", "#8a8f98"


def _panel(axes, group: str, layers: dict[str, list[Row]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    other = dict(marker="o", ls="", ms=4.5, mfc="white", mec=OTHER_COLOR, mew=1.3, zorder=3)
    own = dict(marker="o", ls="", ms=6, mew=0, zorder=4)

    def mean_speed(rows: list[Row]) -> float:
        return geometric_mean([row.speed(row.yardstick) for row in rows])

    x, ticks = 0, {}
    for label, rows in sorted(layers.items(), key=lambda item: -mean_speed(item[1])):
        one, *more = set(label.split(" ⊗ "))
        short = label.replace(", ", ",\n") if more else f"{label.count(one)} of {one}"
        ticks[x + (len(rows) - 1) / 2] = short
        for row in rows:
            ends = [row.speed(row.yardstick, name) for name in (row.best_other, row.ours)]
            color = OURS_COLOR if row.speed(row.best_other) >= 1 / 1.1 else SLOWER_COLOR
            axes.plot([x, x], ends, color=color, lw=2.2, alpha=0.35, zorder=2)
            axes.plot(x, ends[0], **other)
            axes.plot(x, ends[1], color=color, **own)
            x += 1
        axes.axvline(x, color="#e3e5e8", lw=0.8, zorder=1)
        x += 1
    axes.plot([], [], color=OURS_COLOR, label="kron_matmul", **own)
    axes.plot([], [], color=SLOWER_COLOR, label="over 10 % slower than the best other", **own)
    axes.plot([], [], label="the best other, dense included", **other)
    axes.axhline(1, color="#30343b", lw=1)
    axes.set(xlim=(-1, x - 1), yscale="log")
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.set_xticks([*ticks], [*ticks.values()], rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=8.5)
    axes.grid(axis="y", color="#eceef1", zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"speed over {'a matmul per axis' if group == 'fastkron' else 'dense'}")
    tokens = sorted({row.cell.tokens for rows in layers.values() for row in rows})
    axes.set_title(f"{group}, T = {', '.join(map(str, tokens))}", loc="left", fontsize=10)


def run(cells: list[Cell], threads: int, seconds: float, path: Path | None) -> dict:
    """Measure, and print and write what there is after every group."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that bring an OpenMP of their own
    torch.set_num_threads(threads)
    libraries, missing = peers.installed()
    print("".join(f"{line}\n" for line in missing))
    results = {"machine": machine(threads, libraries), "rows": []}
    facts = results["machine"]  # the GEMM rate is the best of the whole run
    for group, members in itertools.groupby(cells, lambda cell: cell.group):
        facts["gemm_gflops"] = max(facts["gemm_gflops"], round(gemm_rate(), 1))
        rows = []
        for cell in members:
            print(f"{group}: {cell}", file=sys.stderr, flush=True)
            rows.append(measure(cell, libraries, seconds))
        results["rows"] += rows
        if path:
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def report(results: dict) -> str:
    facts = results["machine"]
    lines = [", ".join(f"{k} {v}" for k, v in facts.items() if k != "peers")]
    rows = itertools.groupby(map(Row, results["rows"]), lambda row: row.cell.group)
    groups = {group: list(members) for group, members in rows}
    lines += [f"\n{group}\n{table(rows, facts['gemm_gflops'])}" for group, rows in groups.items()]
    return "\n".join([*lines, "", *itertools.starmap(summary, groups.items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[*GROUPS], metavar="GROUP")
    parser.add_argument("--match", default="", help="of '8x8 ⊗ 4x4, T=1', a regular expression")
    parser.add_argument("--seconds", type=float, default=1.5, help="per cell")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--read", type=Path, help="take the results from here, and time nothing")
    parser.add_argument("--plot", type=Path, help="draw the results here")
    parser.add_argument("--compare", type=Path, help="earlier results")
    args = parser.parse_args()
    cells = [Cell(group, *cell) for group in args.only for cell in GROUPS[group]]
    cells = [cell for cell in cells if re.search(args.match, str(cell))]
    if args.read:
        results = json.loads(args.read.read_text())
        results["rows"] = [row for row in results["rows"] if Row(row).cell in cells]
    else:
        results = run(cells, args.threads, args.seconds, args.json)
    print(report(results))
    if args.plot:
        plot(results, args.plot)
    if args.compare:
        then = json.loads(args.compare.read_text())
        print("\n" + compare([*map(Row, results["rows"])], [*map(Row, then["rows"])]))


if __name__ == "__main__":
    main()
