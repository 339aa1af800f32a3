"""All pictures, drawn from the results in a folder; nothing is measured here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import memory as memories
from benchmarks import model as whole_models
from benchmarks.contenders import IN_INT8
from benchmarks.layers import PRESETS, Row, exponent, rows_of, widths
from benchmarks.machine import DENSE, read, title

INK, GRID = "#30343b", "#e3e5e8"
DENSE_COLOR, OTHER_COLOR, SLOWER_COLOR = "#8a8f98", "#e0a030", "#d1495b"
EIGHT, TWENTY_ONE = "#0f6ab4", "#7a3aa8"
GREEN, LIGHT = "#2a9d6f", "#b9bdc4"
COLORS = {
    "8x": EIGHT,
    "21x": TWENTY_ONE,
    "8x, eager": "#8db6da",
    "21x, eager": "#bd9cd4",
    "8x by layers": "#8db6da",
    "21x by layers": "#bd9cd4",
    DENSE: DENSE_COLOR,
}
PAIR = ("8x", "21x")
Results = dict[str, Any]
LOOKS = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def draw_all(folder: Path, into: Path) -> list[Path]:
    """Draw every picture whose results are in the folder; return their paths."""
    drawn = []
    for draw, needs, groups in (
        (speed, ("layers", "model"), {"tokens"}),
        (scaling, ("layers",), {"tokens", "width", "compression"}),
        (roofline, ("layers",), {"presets", "feed_forward"}),
        (layers, ("layers",), {"presets"}),
        (model, ("model",), set()),
        (training, ("training", "memory"), set()),
        (forms, ("study", "study_speed"), set()),
    ):
        files = [folder / f"{need}.json" for need in needs]
        if not all(file.exists() for file in files):
            continue
        results = [*map(read, files)]
        if groups <= {row.get("group") for row in results[0].get("rows", [])}:
            drawn.append(into / f"{draw.__name__}.png")
            with plt.rc_context(LOOKS):
                figure = draw(*results)
                figure.savefig(drawn[-1])
                plt.close(figure)
    return drawn


def speed(layer: Results, whole: Results) -> Figure:
    """For the README: layers over their tokens, and the whole model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(1.25, 1))
    over_tokens(left, rows_of(layer, "tokens"))
    threads = f"{layer['machine']['threads']} thread"
    left.set_title(f"Layers: times faster than dense ({threads}, float32)")
    rows = whole_models.rows_of(whole)
    cell = min(rows, key=lambda c: (c["batch"], abs(c["tokens"] - 128)))
    students = (*PAIR, *(f"{name} {IN_INT8}" for name in PAIR))
    dense = [n for n in cell["ms"] if n.startswith("dense") and n != whole_models.OUR_INT8]
    bars(right, cell, [*dense, *students])
    threads = f"{whole['machine']['threads']} thread"
    right.set_title(f"BERT_BASE, {cell['batch']} x {cell['tokens']} tokens ({threads})")
    return signed(figure, layer["machine"], whole["machine"])


def over_tokens(axes: Axes, rows: list[Row]) -> None:
    """Geometric means over a model's three layers: ours, and the usual PyTorch line."""
    plain = "torch: a @ (x @ bᵀ)"
    for times, shapes in (("8x", PRESETS[:3]), ("21x", PRESETS[3:])):
        cells = defaultdict(list)
        for row in rows:
            if row.cell.layers in shapes:
                cells[row.cell.tokens].append(row)
        for name, ls, label in (("auto", "-", "kron_matmul"), (plain, "--", "a @ (x @ bᵀ)")):
            y = [geometric_mean([row.speed("dense", name) for row in c]) for c in cells.values()]
            axes.plot([*cells], y, color=COLORS[times], ls=ls, lw=2, label=f"{times}, {label}")
    axes.axhline(1, color=DENSE_COLOR, lw=1.2)
    log_axes(axes, "tokens", base=4)
    times_axis(axes)
    axes.legend(fontsize=8)


def bars(axes: Axes, cell: dict[str, Any], names: Collection[str]) -> None:
    values = {name: ms[0] for name, ms in reversed(cell["ms"].items()) if name in names}
    kinds = {name: COLORS.get(name.partition(" ")[0], DENSE_COLOR) for name in values}
    colors = [COLORS.get(name, kind) for name, kind in kinds.items()]
    axes.barh(range(len(values)), [*values.values()], color=colors, height=0.66)
    for i, ms in enumerate(values.values()):
        text = f" {ms:.{1 if ms < 100 else 0}f} ms ({values[DENSE] / ms:.1f}x)"
        axes.text(ms, i, text, va="center", color=INK)
    labels = (f"KroneckerBERT {n}" if n.partition(" ")[0] in PAIR else n for n in values)
    axes.set_yticks(range(len(values)), [*labels])
    axes.set_xlim(0, max(values.values()) * 1.3)
    axes.grid(axis="y", visible=False)
    bare(axes)


def scaling(results: Results) -> Figure:
    """Cost as the work grows: with the tokens, with the width, and against the compression."""
    figure, (tokens, width, compression) = plt.subplots(1, 3, figsize=(14, 4.3))
    for name, shape in (("8x", PRESETS[1]), ("21x", PRESETS[4])):
        members = [row for row in rows_of(results, "tokens") if row.cell.layers == shape]
        x = [row.cell.tokens for row in members]
        if name == "8x":
            tokens.plot(x, [r.us["dense"][0] for r in members], color=DENSE_COLOR, label="dense")
        median, low, high = zip(*(row.us["auto"] for row in members), strict=True)
        tokens.plot(x, median, color=COLORS[name], label=f"{name} up")
        tokens.fill_between(x, low, high, color=COLORS[name], alpha=0.15, lw=0)
    log_axes(tokens, "tokens", base=4)
    tokens.set(ylabel="µs", title="768 → 3072, against tokens")
    tokens.legend()

    colors = {"8x attention": EIGHT, "21x attention": TWENTY_ONE, "square": GREEN}
    for form, members in widths(rows_of(results, "width")).items():
        if form == "square":
            plot_width(width, "dense", members, DENSE_COLOR, "dense")
        label = {"square": "√d x √d ⊗ √d x √d"}.get(form, form)
        plot_width(width, "auto", members, colors[form], label)
    log_axes(width, "width d", base=2)
    width.set(ylabel="µs", title="d → d, 128 tokens; exponents from 1024 on")
    width.legend()

    for count, color in ((128, EIGHT), (1024, TWENTY_ONE)):
        members = [row for row in rows_of(results, "compression") if row.cell.tokens == count]
        x = [row.cell.dense_entries / row.cell.entries for row in members]
        y = [row.speed("dense") for row in members]
        compression.plot(x, y, marker="o", ms=4, color=color, label=f"{count} tokens")
    promised = [row.cell.dense_flops / row.cell.flops for row in members]
    compression.plot(x, promised, color=INK, ls=":", label="what the FLOPs promise")
    log_axes(compression, "times fewer parameters", base=4)
    compression.set_title("768 → 3072: times faster than dense")
    times_axis(compression)
    compression.legend()
    return signed(figure, results["machine"])


def plot_width(
    axes: Axes, name: str, members: list[tuple[int, Row]], color: str, label: str
) -> None:
    costs = {width: row.us[name][0] for width, row in members}
    wide = {width: cost for width, cost in costs.items() if width >= 1024}
    label = f"{label} ~ d^{exponent(wide.keys(), wide.values()):.2f}"
    axes.plot([*costs], [*costs.values()], marker="o", ms=3.5, color=color, label=label)


def roofline(results: Results) -> Figure:
    """Each kernel under this machine's two roofs, its best product and its memory."""
    facts = results["machine"]
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    peak, memory = facts["gemm_gflops"], facts["gb_per_s"]
    left, right = 0.25, 256
    axes.plot([left, peak / memory, right], [memory * left, peak, peak], color=INK, lw=1.6)
    axes.text(right, peak * 1.06, f"{peak:.0f} GFLOP/s, the best product", ha="right")
    axes.text(0.3, memory * 0.3 * 1.5, f"{memory:.0f} GB/s from memory")
    for row in rows_of(results, "presets", "feed_forward"):
        cell = row.cell
        times = "8x" if cell.layers in PRESETS[:3] or "8x2" in cell.layers else "21x"
        marker = "s" if cell.group == "feed_forward" else "o"
        point = row.flops / cell.bytes_moved, row.flops / row.us[row.ours][0] / 1e3
        size = 3 + 1.6 * math.log10(cell.tokens)
        axes.plot(*point, marker, ms=size, color=COLORS[times], alpha=0.75)
        dense_bytes = cell.bytes_moved + 4 * (cell.dense_entries - cell.entries)
        rate = cell.dense_flops / row.us["dense"][0] / 1e3
        axes.plot(cell.dense_flops / dense_bytes, rate, "x", ms=5, color=DENSE_COLOR)
    for times in ("8x", "21x"):
        for marker, kind in (("o", "layer"), ("s", "feed-forward block")):
            axes.plot([], [], marker, color=COLORS[times], label=f"{times} {kind}")
    axes.plot([], [], "x", color=DENSE_COLOR, label="dense")
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s", ylim=(1, peak * 1.6))
    axes.set_xlabel("FLOPs a byte: x, weights and y moved once; larger marks for more tokens")
    axes.legend(loc="lower right")
    return signed(figure, facts)


def layers(results: Results) -> Figure:
    """Ours and the best other over dense, a column for each cell."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(results, "presets", "feed_forward", "forward", "bf16"):
        if not math.isnan(row.speed(row.yardstick)):
            groups[row.cell.group][row.cell.label].append(row)
    lines = [["presets", "feed_forward"], ["forward"], ["bf16"]]
    lines = [kept for line in lines if (kept := [g for g in line if g in groups])]
    figure = plt.figure(figsize=(15, 0.7 + 3.6 * len(lines)))
    parts = figure.subfigures(len(lines), squeeze=False).flat
    for line, part in zip(lines, parts, strict=True):
        columns = [max(12, sum(len(rows) + 1 for rows in groups[g].values())) for g in line]
        panels = part.subplots(1, len(line), width_ratios=columns, squeeze=False).flat
        for group, panel in zip(line, panels, strict=True):
            columns_of(panel, group, groups[group])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"kron_matmul: {title(results['machine'])}", fontweight="bold")
    return figure


def columns_of(axes: Axes, group: str, layers: dict[str, list[Row]]) -> None:
    other = {"marker": "o", "ls": "", "ms": 4.5, "mfc": "white", "mec": DENSE_COLOR, "mew": 1.3}
    own = {"marker": "o", "ls": "", "ms": 6, "mew": 0, "zorder": 4}
    means = {
        label: geometric_mean([row.speed(row.yardstick) for row in rows])
        for label, rows in layers.items()
    }
    x, ticks = 0, {}
    for label in sorted(means, key=means.get, reverse=True):
        rows = layers[label]
        ticks[x + (len(rows) - 1) / 2] = label.replace(", ", ",\n")
        for row in rows:
            ends = [row.speed(row.yardstick, name) for name in (row.best_other, row.ours)]
            color = EIGHT if row.speed(row.best_other) >= 1 / 1.1 else SLOWER_COLOR
            axes.plot([x, x], ends, color=color, lw=2.2, alpha=0.35, zorder=2)
            axes.plot(x, ends[0], zorder=3, **other)
            axes.plot(x, ends[1], color=color, **own)
            x += 1
        axes.axvline(x, color=GRID, lw=0.8, zorder=1)
        x += 1
    axes.plot([], [], color=EIGHT, label="ours", **own)
    axes.plot([], [], color=SLOWER_COLOR, label="over 10 % slower than the best other", **own)
    axes.plot([], [], label="the best other, dense included", **other)
    axes.axhline(1, color=INK, lw=1)
    axes.set(xlim=(-1, x - 1), yscale="log")
    times_axis(axes)
    axes.set_xticks([*ticks], [*ticks.values()], rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    bare(axes)
    axes.tick_params(labelsize=8.5)
    axes.set_ylabel("speed over dense")
    tokens = sorted({row.cell.tokens for rows in layers.values() for row in rows})
    axes.set_title(f"{group}, T = {', '.join(map(str, tokens))}")


def model(results: Results) -> Figure:
    """A panel for each model, batch and number of tokens."""
    cells = results["rows"]
    lines = math.ceil(len(cells) / 3)
    height = 0.4 + 0.24 * max(len(cell["ms"]) for cell in cells)
    figure, panels = plt.subplots(lines, 3, figsize=(13, 0.5 + height * lines), squeeze=False)
    for cell, axes in zip(cells, panels.flat, strict=False):
        bars(axes, cell, cell["ms"])
        size = f"{cell['batch']} x {cell['tokens']} tokens"
        if whole_models.is_real(cell):
            size += f", {cell['real_tokens']} real"
        axes.set_title(f"{cell.get('model', whole_models.BERT)}, {size}")
    for axes in panels.flat[len(cells) :]:
        axes.axis("off")
    figure.suptitle(f"Whole models, ms: {title(results['machine'])}", fontweight="bold")
    return figure


def training(steps: Results, memory: Results) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    ms = [{name: t[0] for name, t in row["ms"].items()} for row in steps["rows"]]
    peaks = memories.rows_of(memory, memories.TRAINING)
    mb = [{name: m["peak"] for name, m in row["mb"].items()} for row in peaks]
    for axes, rows, cells, unit in ((left, steps["rows"], ms, "ms"), (right, peaks, mb, "MB")):
        wide = 0.84 / len(cells[0])
        for i, name in enumerate(cells[0]):
            places = [j + (i - len(cells[0]) / 2 + 0.5) * wide for j in range(len(cells))]
            values, color = [cell[name] for cell in cells], COLORS.get(name, LIGHT)
            axes.bar(places, values, wide * 0.92, color=color, label=name)
        ticks = [f"{row['batch']} x {row['tokens']} tokens" for row in rows]
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(yscale="log", ylabel=unit)
        axes.grid(axis="x", visible=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    left.set_title("A step of training BERT_BASE: time")
    right.set_title("Peak memory of that step")
    return signed(figure, steps["machine"])


# Of the study: a colour for each kind of form, the first that its name contains.
KINDS = {
    "one dense": DENSE_COLOR,
    "two dense": DENSE_COLOR,
    "elsewhere": GREEN,
    "plus low rank": GREEN,
    "planned": INK,
    "products": EIGHT,
    "low rank": OTHER_COLOR,
}
MARKERS = {"8x": "o", "21x": "s"}


def forms(study: Results, speed: Results) -> Figure:
    """STS-B over bytes and over milliseconds in int8; a line joins those that none surpasses."""
    scores = defaultdict(list)
    sizes = {(row["form"], row["size"]): row["bytes"] / 1e6 for row in study["rows"]}
    least = min(row["steps"] for row in study["rows"] if "steps" in row)
    for row in study["rows"]:
        if row.get("steps") == least:  # others were trained for longer
            scores[row["form"], row["size"]].append(100 * row["int8"])
    score = {key: sum(found) / len(found) for key, found in scores.items()}
    ms = {
        (form, row["size"]): row["ms"]["1 int8"]
        for row in speed["rows"]
        for form in (row["form"], *row["also"])
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    labels = ("MB in int8", "ms for a text of 32 tokens, int8, one thread")
    for axes, x, label in zip(panels, (sizes, ms), labels, strict=True):
        points = sorted((x[key], -value, key) for key, value in score.items() if key in x)
        front: list[tuple[float, float, str]] = []
        for at, less, (form, size) in points:
            value = -less
            color = next(color for kind, color in KINDS.items() if kind in form)
            axes.plot(at, value, MARKERS[size], color=color, ms=6)
            if not front or value > front[-1][1]:
                front.append((at, value, form))
        xs, values, names = zip(*front, strict=True)
        axes.plot(xs, values, color=INK, lw=0.8, zorder=0)
        for i, name in enumerate(names):  # the last two are near each other
            above = (4, 4 if i + 1 < len(names) else 9)
            axes.annotate(name, front[i][:2], fontsize=6.5, xytext=above, textcoords=OFFSET)
        axes.set_xlabel(label)
        axes.margins(x=0.2)
    panels[0].set_ylabel("STS-B, Spearman, %")
    panels[0].set_title("Students of MiniLM of equal training, by size")
    panels[1].set_title("... and by time")
    kinds = {"products": EIGHT, "low rank": OTHER_COLOR, "both": GREEN}
    kinds |= {"dense layers": DENSE_COLOR, "planned": INK}
    for kind, color in kinds.items():
        panels[0].plot([], [], "o", color=color, label=kind)
    for size, marker in MARKERS.items():
        panels[0].plot([], [], marker, color=LIGHT, label=size)
    panels[0].legend(fontsize=7.5, loc="lower right")
    return signed(figure, speed["machine"])


OFFSET = "offset points"


def log_axes(axes: Axes, label: str, base: int) -> None:
    axes.set(xscale="log", yscale="log", xlabel=label)
    powers_axis(axes.xaxis, base)


def times_axis(axes: Axes) -> None:
    powers_axis(axes.yaxis, 2, "{:g}x")


def powers_axis(axis: Axis, base: int, form: str = "{:,.0f}") -> None:
    axis.set_major_locator(LogLocator(base=base, numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def signed(figure: Figure, *machines: dict[str, Any]) -> Figure:
    """With the machines of its panels, from the left, as the figure's label."""
    figure.supxlabel(
        "; ".join(dict.fromkeys(map(title, machines))),
        fontsize=7.5,
        color=DENSE_COLOR,
        x=0.99,
        ha="right",
    )
    return figure
