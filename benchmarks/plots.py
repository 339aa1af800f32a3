"""All pictures, drawn from the results in a folder; nothing is measured here."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.layer_tables import Row, exponent, geometric_mean, widths
from benchmarks.layers import PRESETS
from benchmarks.machine import title
from benchmarks.model import DENSE

INK, GRID = "#30343b", "#e3e5e8"
DENSE_COLOR, OTHER_COLOR, SLOWER_COLOR = "#8a8f98", "#e0a030", "#d1495b"
EIGHT, TWENTY_ONE = "#0f6ab4", "#7a3aa8"
NAMES = dict(
    zip(
        PRESETS,
        (f"{times} {layer}" for times in ("8x", "21x") for layer in ("attention", "up", "down")),
        strict=True,
    )
)

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
    """Every picture whose results are in the folder; their paths."""
    pictures: list[tuple[Callable, tuple[str, ...], set[str]]] = [
        (speed, ("layers", "model"), {"tokens"}),
        (scaling, ("layers",), {"tokens", "width", "compression"}),
        (roofline, ("layers",), {"presets", "feed_forward"}),
        (layers, ("layers",), {"presets"}),
        (model, ("model",), set()),
        (training, ("training", "memory"), set()),
        (quality, ("distillation",), set()),
    ]
    drawn = []
    for draw, needs, groups in pictures:
        files = [folder / f"{need}.json" for need in needs]
        if not all(file.exists() for file in files):
            continue
        first, *more = (json.loads(file.read_text()) for file in files)
        if groups <= {row["group"] for row in first.get("rows", [])}:
            drawn.append(into / f"{draw.__name__}.png")
            with plt.rc_context(LOOKS):
                figure = draw(first, *more)
                figure.savefig(drawn[-1])
                plt.close(figure)
    return drawn


def rows_of(results: dict, *groups: str) -> list[Row]:
    return [row for row in map(Row, results["rows"]) if row.cell.group in groups]


def speed(layer: dict, whole: dict):
    """For the README: layers over their tokens, and the whole model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(1.25, 1))
    over_tokens(left, rows_of(layer, "tokens"))
    threads = f"{layer['machine']['threads']} thread"
    left.set_title(f"Layers: times faster than dense ({threads}, float32)")
    cell = min(whole["cells"], key=lambda c: (c["batch"], abs(c["tokens"] - 128)))
    bars(right, {name: ms[0] for name, ms in cell["ms"].items()})
    threads = f"{whole['machine']['threads']} thread"
    right.set_title(f"BERT_BASE, {cell['batch']} x {cell['tokens']} tokens ({threads})")
    return signed(figure, layer["machine"])


def over_tokens(axes, rows: list[Row]) -> None:
    """Geometric means over a model's three layers: ours, and the line that most would write."""
    plain = "torch: a @ (x @ bᵀ)"
    for times, shapes, color in (("8x", PRESETS[:3], EIGHT), ("21x", PRESETS[3:], TWENTY_ONE)):
        cells = defaultdict(list)
        for row in rows:
            if row.cell.layers in shapes:
                cells[row.cell.tokens].append(row)
        for name, ls, label in (("auto", "-", "kron_matmul"), (plain, "--", "a @ (x @ bᵀ)")):
            y = [geometric_mean([row.speed("dense", name) for row in c]) for c in cells.values()]
            axes.plot([*cells], y, color=color, ls=ls, lw=2, label=f"{times}, {label}")
    axes.axhline(1, color=DENSE_COLOR, lw=1.2)
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    powers_axis(axes.xaxis, 4)
    times_axis(axes)
    axes.legend(fontsize=8)


def bars(axes, values: dict[str, float]) -> None:
    names = list(values)[::-1]
    colors = [{"8x": EIGHT, "21x": TWENTY_ONE}.get(name, DENSE_COLOR) for name in names]
    axes.barh(range(len(names)), [values[name] for name in names], color=colors, height=0.66)
    reference = values[DENSE]
    for i, name in enumerate(names):
        told = f" {values[name]:.0f} ms ({reference / values[name]:.1f}x)"
        axes.text(values[name], i, told, va="center", color=INK)
    shown = {"8x": "KroneckerBERT 8x", "21x": "KroneckerBERT 21x"}
    axes.set_yticks(range(len(names)), [shown.get(name, name) for name in names])
    axes.set_xlim(0, max(values.values()) * 1.3)
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def scaling(results: dict):
    """Cost as the work grows: with the tokens, with the width, and against the compression."""
    figure, (tokens, width, compression) = plt.subplots(1, 3, figsize=(14, 4.3))
    for row_shape, color in ((PRESETS[1], EIGHT), (PRESETS[4], TWENTY_ONE)):
        members = [row for row in rows_of(results, "tokens") if row.cell.layers == row_shape]
        x = [row.cell.tokens for row in members]
        if row_shape == PRESETS[1]:
            tokens.plot(x, [r.us["dense"][0] for r in members], color=DENSE_COLOR, label="dense")
        name = NAMES[row_shape]
        band = [[row.us["auto"][i] for row in members] for i in (0, 1, 2)]
        tokens.plot(x, band[0], color=color, label=name)
        tokens.fill_between(x, band[1], band[2], color=color, alpha=0.15, lw=0)
    tokens.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs")
    powers_axis(tokens.xaxis, 4)
    tokens.set_title("768 → 3072, against tokens")
    tokens.legend()

    colors = {"8x attention": EIGHT, "21x attention": TWENTY_ONE, "square": "#2a9d6f"}
    forms = widths(rows_of(results, "width"))
    for form, members in forms.items():
        if form == "square":
            plot_width(width, "dense", members, DENSE_COLOR, "dense")
        label = {"square": "√d x √d ⊗ √d x √d"}.get(form, form)
        plot_width(width, "auto", members, colors[form], label)
    width.set(xscale="log", yscale="log", xlabel="width d", ylabel="µs")
    powers_axis(width.xaxis, 2)
    width.set_title("d → d, 128 tokens; exponents from 1024 on")
    width.legend()

    for count, color in ((128, EIGHT), (1024, TWENTY_ONE)):
        members = [row for row in rows_of(results, "compression") if row.cell.tokens == count]
        x = [row.cell.dense_entries / row.cell.entries for row in members]
        y = [row.speed("dense") for row in members]
        compression.plot(x, y, marker="o", ms=4, color=color, label=f"{count} tokens")
    promised = [row.cell.dense_flops / row.cell.flops for row in members]
    compression.plot(x, promised, color=INK, ls=":", label="what the FLOPs promise")
    compression.set(xscale="log", yscale="log", xlabel="times fewer parameters")
    powers_axis(compression.xaxis, 4)
    compression.set_title("768 → 3072: times faster than dense")
    times_axis(compression)
    compression.legend()
    return signed(figure, results["machine"])


def plot_width(axes, name: str, members: list[tuple[int, Row]], color: str, label: str) -> None:
    sizes, costs = [d for d, _ in members], [row.us[name][0] for _, row in members]
    wide = [i for i, d in enumerate(sizes) if d >= 1024]
    p = exponent([sizes[i] for i in wide], [costs[i] for i in wide])
    axes.plot(sizes, costs, marker="o", ms=3.5, color=color, label=f"{label} ~ d^{p:.2f}")


def roofline(results: dict):
    """Each kernel under this machine's two roofs, its best product and its memory."""
    facts = results["machine"]
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    peak, memory = facts["gemm_gflops"], facts["gb_per_s"]
    left, right = 0.25, 256
    axes.plot([left, peak / memory, right], [memory * left, peak, peak], color=INK, lw=1.6)
    axes.text(right, peak * 1.06, f"{peak:.0f} GFLOP/s, the best product", ha="right")
    axes.text(0.3, memory * 0.3 * 1.5, f"{memory:.0f} GB/s from memory")
    for row in rows_of(results, "presets", "feed_forward"):
        times = "8x" if row.cell.layers in PRESETS[:3] or "8x2" in row.cell.layers else "21x"
        color = EIGHT if times == "8x" else TWENTY_ONE
        marker = "s" if row.cell.group == "feed_forward" else "o"
        point = row.flops / row.cell.bytes_moved, row.flops / row.us[row.ours][0] / 1e3
        size = 3 + 1.6 * math.log10(row.cell.tokens)
        axes.plot(*point, marker, ms=size, color=color, alpha=0.75)
        dense_bytes = row.cell.bytes_moved + 4 * (row.cell.dense_entries - row.cell.entries)
        rate = row.cell.dense_flops / row.us["dense"][0] / 1e3
        axes.plot(row.cell.dense_flops / dense_bytes, rate, "x", ms=5, color=DENSE_COLOR)
    for color, marker, label in (
        (EIGHT, "o", "8x layer"),
        (EIGHT, "s", "8x feed-forward block"),
        (TWENTY_ONE, "o", "21x layer"),
        (TWENTY_ONE, "s", "21x feed-forward block"),
        (DENSE_COLOR, "x", "dense"),
    ):
        axes.plot([], [], marker, color=color, label=label)
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s", ylim=(1, peak * 1.6))
    axes.set_xlabel("FLOPs a byte: x, weights and y moved once; larger marks for more tokens")
    axes.legend(loc="lower right")
    return signed(figure, facts)


def layers(results: dict):
    """Ours and the best other over dense, a column for each cell."""
    lines = [["presets", "feed_forward"], ["forward"], ["bf16"], ["fastkron"]]
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(results, *(group for line in lines for group in line)):
        if not math.isnan(row.speed(row.yardstick)):
            groups[row.cell.group][row.cell.label].append(row)
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


def columns_of(axes, group: str, layers: dict[str, list[Row]]) -> None:
    other = {"marker": "o", "ls": "", "ms": 4.5, "mfc": "white", "mec": DENSE_COLOR, "mew": 1.3}
    own = {"marker": "o", "ls": "", "ms": 6, "mew": 0, "zorder": 4}

    def mean_speed(rows: Iterable[Row]) -> float:
        return geometric_mean([row.speed(row.yardstick) for row in rows])

    x, ticks = 0, {}
    for label, rows in sorted(layers.items(), key=lambda item: -mean_speed(item[1])):
        one, *more = set(label.split(" ⊗ "))
        short = label.replace(", ", ",\n") if more else f"{label.count(one)} of {one}"
        ticks[x + (len(rows) - 1) / 2] = short
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
    axes.tick_params(length=0, labelsize=8.5)
    axes.grid(axis="x", visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"speed over {'a matmul per axis' if group == 'fastkron' else 'dense'}")
    tokens = sorted({row.cell.tokens for rows in layers.values() for row in rows})
    axes.set_title(f"{group}, T = {', '.join(map(str, tokens))}")


def model(results: dict):
    """A panel for each batch and number of tokens."""
    cells = results["cells"]
    figure, panels = plt.subplots(
        -(-len(cells) // 3), 3, figsize=(13, 0.5 + 2.1 * -(-len(cells) // 3)), squeeze=False
    )
    for cell, axes in zip(cells, panels.flat, strict=False):
        bars(axes, {name: ms[0] for name, ms in cell["ms"].items()})
        axes.set_title(f"{cell['batch']} x {cell['tokens']} tokens")
    for axes in panels.flat[len(cells) :]:
        axes.axis("off")
    figure.suptitle(f"BERT_BASE, ms: {title(results['machine'])}", fontweight="bold")
    return figure


def training(steps: dict, memory: dict):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    colors = {"8x": EIGHT, "21x": TWENTY_ONE, "8x, eager": "#8db6da", "21x, eager": "#bd9cd4"}
    for axes, record, key, unit in ((left, steps, "ms", "ms"), (right, memory, "mb", "MB")):
        names = list(record["cells"][0][key])
        wide = 0.84 / len(names)
        for i, name in enumerate(names):
            color = colors.get(name, DENSE_COLOR if name == DENSE else "#b9bdc4")
            values = [
                cell[key][name][0] if key == "ms" else cell[key][name]["peak"]
                for cell in record["cells"]
            ]
            places = [j + (i - len(names) / 2 + 0.5) * wide for j in range(len(values))]
            axes.bar(places, values, wide * 0.92, color=color, label=name)
        ticks = [f"{cell['batch']} x {cell['tokens']} tokens" for cell in record["cells"]]
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(yscale="log", ylabel=unit)
        axes.grid(axis="x", visible=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    left.set_title("A step of training BERT_BASE: time")
    right.set_title("Peak memory of that step")
    return signed(figure, steps["machine"])


def quality(record: dict):
    """What each student keeps of its teacher's score, by task."""
    scores = record["scores"]
    tasks = {
        "sst2": ("SST-2", "accuracy"),
        "trec": ("TREC", "accuracy"),
        "mrpc": ("MRPC", "accuracy"),
        "stsb": ("STS-B", "spearman"),
        "cola": ("CoLA", "matthews"),
    }
    students = {
        "Kronecker 8x": EIGHT,
        "Kronecker 8x, low-rank words": "#2a9d6f",
        "SVD 8x": DENSE_COLOR,
        "Kronecker 21x": TWENTY_ONE,
        "one dense layer 8x": OTHER_COLOR,
    }
    figure, axes = plt.subplots(figsize=(9.5, 3.6))
    left, ticks = 0.0, {}
    for task, (name, metric) in tasks.items():
        kept = {}
        for student in students:
            runs = [k for k in scores if k.startswith(f"stage2/{task}/{student}/")]
            if runs:
                mean = sum(scores[run][metric] for run in runs) / len(runs)
                kept[student] = 100 * mean / scores[f"teacher/{task}"][metric]
        for i, (student, value) in enumerate(kept.items()):
            axes.bar(left + i, value, 0.92, color=students[student])
            axes.text(left + i, value - 6, f"{value:.0f}", ha="center", color="white", fontsize=8)
        if not kept:
            continue
        teacher = 100 * scores[f"teacher/{task}"][metric]
        ticks[left + (len(kept) - 1) / 2] = f"{name}\n{metric} {teacher:.1f}"
        left += len(kept) + 1
    for student, color in students.items():
        axes.bar([0], [0], color=color, label=student)
    axes.axhline(100, color=INK, lw=1)
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.set(ylim=(0, 108), ylabel="% of the teacher's score")
    axes.set_title("Students of MiniLM after minutes of distillation")
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    axes.legend(fontsize=8, ncols=len(students), loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def times_axis(axes) -> None:
    powers_axis(axes.yaxis, 2, "{:g}x")


def powers_axis(axis, base: int, form: str = "{:,.0f}") -> None:
    axis.set_major_locator(LogLocator(base=base, numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def signed(figure, machine: dict):
    figure.supxlabel(title(machine), fontsize=7.5, color=DENSE_COLOR, x=0.99, ha="right")
    return figure
