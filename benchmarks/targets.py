"""What the engine is to reach, and what was measured: ratios within one run, of medians.

The goals of int8 are for a machine with AVX-512 VNNI; the results say which instructions were used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import int8, memory, model, threads
from benchmarks.contenders import BY_LAYERS, IN_INT8, INT8
from benchmarks.machine import DENSE, read
from benchmarks.markdown import lines
from benchmarks.training import medians

BIG, SMALL = "8x", "21x"
Results = dict[str, Any]


class Target(NamedTuple):
    what: str
    must: tuple[float, ...]
    aim: tuple[float, ...]
    measured: tuple[float, ...] | None  # None: not in these results
    at_most: bool = False  # whether less is better

    @property
    def reached(self) -> str:
        if self.measured is None:
            return "not measured"
        pairs = zip(self.measured, self.must, strict=True)
        return "yes" if all(m <= g if self.at_most else m >= g for m, g in pairs) else "**no**"


def targets(folder: Path) -> list[Target]:
    """From the results of ``model`` with one thread, ``threads`` and ``memory``."""
    one = _read(folder, "model")
    if one["rows"] and one["machine"]["threads"] != 1:
        one = {"rows": []}
    return [
        *_speeds(one),
        *_of_threads(_read(folder, "threads")),
        *_sentences(one),
        _minilm(one),
        *_memory(_read(folder, "memory")),
        *_int8(one, _read(folder, "int8"), _read(folder, "study")),
    ]


def table(folder: Path) -> str:
    """As Markdown."""
    heads = ("ratio of medians", "must", "aim", "measured", "reached")
    body = []
    for target in targets(folder):
        asked = (_text(values, ".3g", target.at_most) for values in (target.must, target.aim))
        body.append([target.what, *asked, _text(target.measured, ".2f"), target.reached])
    return lines(heads, body)


def _text(values: tuple[float, ...] | None, form: str, at_most: bool = False) -> str:
    if not values:
        return "–"
    return "at most " * at_most + " / ".join(f"{value:{form}}" for value in values)


def _read(folder: Path, name: str) -> Results:
    path = folder / f"{name}.json"
    return read(path) if path.exists() else {"rows": []}


def _over(row: dict[str, Any] | None, student: str, *others: str) -> tuple[float, ...] | None:
    """Times faster than others."""
    ms = medians(row) if row else {}
    if not {student, *others} <= ms.keys():
        return None
    return tuple(ms[other] / ms[student] for other in others)


def _speeds(one: Results) -> list[Target]:
    asked = (
        (SMALL, 16, (16, 3), (20, 4)),
        (SMALL, 128, (10, 2.7), (12, 3.2)),
        (BIG, 16, (6, 1.15), (7,)),
        (BIG, 128, (3.9, 1.05), (4.2,)),
    )
    found = []
    for student, tokens, must, aim in asked:
        row = model.row_of(one, model.BERT, 1, tokens)
        what = f"{student}, 1 x {tokens}, one thread: over dense eager / ONNX Runtime int8 dense"
        found.append(Target(what, must, aim, _over(row, student, DENSE, INT8)))
    return found


def _of_threads(results: Results) -> list[Target]:
    rows = {row["tokens"]: row for row in results["rows"] if "2" in row["ms"]}
    found = []
    for tokens, must, aim in ((16, 1.6, 1.8), (128, 1.75, 1.9)):
        row = rows.get(tokens)
        measured = tuple(threads.gain(row, name, "2") for name in (SMALL, BIG)) if row else None
        what = f"{SMALL} / {BIG}, 1 x {tokens}: two threads over one"
        found.append(Target(what, (must, must), (aim, aim), measured))
    return found


def _sentences(one: Results) -> list[Target]:
    row = model.sentences_row(one)
    aim = row["batch"] * row["tokens"] / row["real_tokens"] if row else None
    found = []
    for student in (SMALL, BIG):
        what = f"{student}, 32 sentences of mixed length: over the padded batch, layer by layer"
        measured = _over(row, student, f"{student} {BY_LAYERS}")
        found.append(Target(what, (1.5,), (aim,) if aim else (), measured))
    return found


def _minilm(one: Results) -> Target:
    row = model.row_of(one, model.MINILM, 1, 16)
    what = "MiniLM 8x, 1 x 16, one thread: over dense eager"
    return Target(what, (6,), (8,), _over(row, BIG, DENSE))


def _memory(results: Results) -> list[Target]:
    rows = memory.rows_of(results, memory.INFERENCE)
    row = next((row for row in rows if row["batch"] == 32), None)
    found = []
    for student in (SMALL, BIG):
        measured = None
        if row:
            engine, today = (
                row["mb"][name]["peak"] for name in (student, f"{student} {BY_LAYERS}")
            )
            measured = (engine / today,)
        what = f"{student}, peak memory of 32 x 128 in inference: over layer by layer"
        found.append(Target(what, (1,), (0.5,), measured, at_most=True))
    return found


def _int8(one: Results, layers: Results, scores: Results) -> list[Target]:
    found = []
    for student, must, aim in (
        (BIG, (3.5, 2.3, 2.3), (5, 3, 3)),
        (SMALL, (6, 4.2, 4.2), (10, 5.5, 5.5)),
    ):
        rows = [model.row_of(one, model.BERT, *size) for size in ((1, 16), (1, 128), (8, 128))]
        ratios = [_over(row, f"{student} {IN_INT8}", INT8) for row in rows]
        measured = tuple(r[0] for r in ratios if r) if all(ratios) else None
        what = f"{student} int8, 1 x 16 / 1 x 128 / 8 x 128: over ONNX Runtime int8 dense"
        found.append(Target(what, must, aim, measured))
    row = model.row_of(one, model.BERT, 1, 128)
    what = "dense in int8, 1 x 128: over ONNX Runtime int8 dense"
    found.append(Target(what, (0.9,), (1.1,), _over(row, model.OUR_INT8, INT8)))
    row = model.row_of(one, model.MINILM, 1, 16)
    what = "MiniLM 8x int8, 1 x 16: over ONNX Runtime int8 dense"
    found.append(Target(what, (2.5,), (3.5,), _over(row, f"{BIG} {IN_INT8}", INT8)))
    gains = [
        int8.gain(row)
        for row in layers["rows"]
        if (row["layer"], row["tokens"]) == ("8x2 384x384", 128)
    ]
    what = "8x2 ⊗ 384x384, 128 tokens: int8 over our float32"
    found.append(Target(what, (2.5,), (3.3,), tuple(gains) or None))
    losses = [100 * (r["scores"]["STS-B"] - r["int8"]) for r in scores["rows"] if "int8" in r]
    measured = (sum(losses) / len(losses),) if losses else None
    what = "points of STS-B lost by int8, mean over the study's students"
    found.append(Target(what, (0.5,), (0.2,), measured, at_most=True))
    return found
