"""Tables of the documentation, made of results; a test compares them with the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    budgets,
    distillation_speed,
    int8,
    memory,
    model,
    starts,
    students,
    study,
    threads,
)
from benchmarks.contenders import BY_LAYERS, IN_INT8, LOW_RANK, LOW_RANK_IN_INT8
from benchmarks.machine import DENSE, read
from benchmarks.training import PRESETS, medians

LABELS = {
    DENSE: "dense, eager",
    "dense torch.compile": "dense, `torch.compile`",
    "dense onnxruntime fp32": "dense, ONNX Runtime",
    "dense onnxruntime int8": "dense, ONNX Runtime, int8",
    "dense openvino int8": "dense, OpenVINO, int8",
    model.OUR_INT8: "dense, our engine, int8",
    **{f"{name} {IN_INT8}": f"**KroneckerBERT {name}, int8**" for name in PRESETS},
    **{name: f"**KroneckerBERT {name}**" for name in PRESETS},
    **{f"{name} {BY_LAYERS}": f"{name}, layer by layer" for name in PRESETS},
    **{f"{name} {LOW_RANK}": f"low rank of the size of {name}" for name in PRESETS},
    **{f"{name} {LOW_RANK_IN_INT8}": f"low rank of the size of {name}, int8" for name in PRESETS},
    "8x torch.compile": "8x, `torch.compile`",
    "8x onnxruntime fp32": "8x, ONNX Runtime",
    "8x onnxruntime int8": "8x, ONNX Runtime, int8",
}
SHOWN = ((1, 16), (1, 128), (1, 512), (8, 128))  # of BERT_BASE: batch and tokens


def tables(folder: Path) -> list[str]:
    """All tables for which the folder has results."""
    made = []
    names = (
        *("model", "threads", "memory", "int8", "students", "study", "study_speed"),
        *("budgets", "starts", "distillation_speed"),
    )
    files = {name: folder / f"{name}.json" for name in names}
    results = {name: read(file) for name, file in files.items() if file.exists()}
    if "model" in results:
        made += [of_model(results["model"], name) for name in model.CONTENDERS]
    if "threads" in results:
        made.append(of_threads(results["threads"]))
    if "memory" in results:
        made.append(of_memory(results["memory"]))
    if "int8" in results:
        made.append(of_int8(results["int8"]))
    if "students" in results:
        shown = (students.encoders(results["students"]), students.classifiers(results["students"]))
        made += [lines(*table) for table in shown if table[1]]
    if "study" in results:
        made += [lines(*study.summary(results["study"], size)) for size in study.SIZES]
    if "study_speed" in results:
        made += [of_study_speed(results["study_speed"], size) for size in study.SIZES]
    for module in (budgets, starts, distillation_speed):
        if (name := module.__name__.rpartition(".")[2]) in results:
            made.append(lines(*module.summary(results[name])))
    return [table for table in made if table]


def of_model(results: dict[str, Any], of: str) -> str:
    """Milliseconds, and times faster than dense eager."""
    rows = model.rows_of(results, of)
    if of == model.BERT:  # a choice, in this order
        chosen = [model.row_of(results, of, *size) for size in SHOWN]
        rows = [row for row in [*chosen, model.sentences_row(results)] if row]
    if not rows:
        return ""
    heads = [size(row) if i else f"{size(row)} tokens" for i, row in enumerate(rows)]
    body = [[label(name), *(versus(row, name) for row in rows)] for name in rows[0]["ms"]]
    return lines([f"{of}: milliseconds (times faster than dense eager)", *heads], body)


def size(row: dict[str, Any]) -> str:
    return (
        f"{row['batch']} sentences" if model.is_real(row) else f"{row['batch']} x {row['tokens']}"
    )


def versus(row: dict[str, Any], name: str) -> str:
    ms = medians(row)
    return f"{ms[name]:.{1 if ms[name] < 100 else 0}f} ({ms[DENSE] / ms[name]:.1f})"


def of_threads(results: dict[str, Any]) -> str:
    """Milliseconds, and times faster than with one thread."""
    places = threads.columns(results)
    body = [
        [label(name), *(threads.versus_one(*place, name) for place in places.values())]
        for name in results["rows"][0]["ms"]["1"]
    ]
    return lines(["BERT_BASE: milliseconds (times faster than with one thread)", *places], body)


def of_memory(results: dict[str, Any]) -> str:
    """MB, and times less than dense."""
    rows = memory.rows_of(results, memory.INFERENCE)
    if not rows:
        return ""
    body = []
    for name in rows[0]["mb"]:
        peaks = [(row["mb"][name]["peak"], row["mb"][DENSE]["peak"]) for row in rows]
        weights = str(rows[0]["mb"][name]["states"])
        body.append([label(name), weights, *(f"{mb} ({dense / mb:.1f})" for mb, dense in peaks)])
    heads = ["peak memory in inference, MB (times less than dense)", "weights"]
    return lines([*heads, *map(size, rows)], body)


def of_int8(results: dict[str, Any]) -> str:
    """Times faster than float32, and the rate."""
    rows = results["rows"]
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        cells = [f"{int8.gain(row):.2f} ({int8.rate(row):.0f})" for row in own]
        body.append([layer.replace(" ", " ⊗ "), *cells])
    heads = ["int8, times faster than float32 (G multiply-adds a second)"]
    return lines([*heads, *(f"{n} token{'s' * (n > 1)}" for n in sizes)], body)


def of_study_speed(results: dict[str, Any], size: str) -> str:
    """FLOPs and milliseconds of the study's students of one size, and of the teacher."""
    rows = study.in_order(results["rows"], size)
    kinds = [*rows[0]["ms"]]
    body = [
        [row["form"], f"{row['flops'] / 1e6:.0f}", *(f"{row['ms'][kind]:.2f}" for kind in kinds)]
        for row in rows
    ]
    heads = [
        f"{kind.replace(' ', ' text' + 's' * (kind[:2] != '1 ') + ', ')}, ms" for kind in kinds
    ]
    return lines([size, "MFLOP a text", *heads], body)


def label(name: str) -> str:
    return LABELS.get(name, name)


def lines(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; the first row is above the line."""
    whole = [heads, ["---"] * len(heads), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in whole)
