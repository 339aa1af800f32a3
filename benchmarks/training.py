"""One step of training a BERT_BASE: forward, backward, AdamW; dense against KroneckerBERT.

A classifier of two labels on random ids, float32, dropout on as in fine-tuning. The students run by
our kernels and by PyTorch's operators ("eager"); without dropout both must give the same loss and
gradients before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from benchmarks import machine
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertForSequenceClassification

DENSE = "dense eager"
PRESETS = {"8x": "kronecker-bert-8", "21x": "kronecker-bert-21"}
CONTENDERS = (DENSE, *(f"{name}{how}" for name in PRESETS for how in ("", ", eager")))
SIZES = ((1, 128), (8, 128))  # batch, tokens


def model(name: str, **sizes: int) -> nn.Module:
    """A contender: "dense eager", or the name of a preset, with ", eager" for PyTorch's operators.

    Those of one preset have the same weights.
    """
    torch.manual_seed(0)
    if name == DENSE:
        return BertForSequenceClassification(BertConfig(**sizes))
    preset, _, eager = name.partition(", ")
    config = KroneckerBertConfig.preset(PRESETS[preset], **sizes)
    student = KroneckerBertForSequenceClassification(config)
    return by_pytorch(student) if eager else student


def by_pytorch(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "eager"
    return model


def batch_of(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30000, (batch, tokens))
    return {"input_ids": ids, "labels": torch.randint(2, (batch,))}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> None:
    optimizer.zero_grad()
    model(**inputs).loss.backward()
    optimizer.step()


def check(contenders: dict[str, nn.Module]) -> None:
    """Our kernels' gradients against PyTorch's, on the same model."""
    inputs = batch_of(2, 24)
    for name in PRESETS:
        pair = [contenders[key].eval() for key in (name, f"{name}, eager")]
        for model in pair:
            model.zero_grad()
            model(**inputs).loss.backward()
        ours, eager = (dict(model.named_parameters()) for model in pair)
        for key, parameter in ours.items():
            wanted = eager[key].grad
            # What is added to all keys alike, a softmax does not see: that gradient is rounding.
            if wanted is not None and not key.endswith("key.bias"):
                # Through 12 layers, each a sum of up to 3072 terms, and over the tokens.
                assert_close(f"{name} {key}", parameter.grad, wanted.double(), 24 * 12 * 3072)


def run(threads: int, sizes: Sequence[tuple[int, int]], seconds: float, path: Path) -> dict:
    machine.use_threads(threads)
    logging.set_verbosity_error()
    contenders = {name: model(name) for name in CONTENDERS}
    check(contenders)
    optimizers = {n: torch.optim.AdamW(m.train().parameters()) for n, m in contenders.items()}
    results: dict = {"machine": machine.facts(threads), "cells": []}
    with machine.watched(results):
        for batch, tokens in sizes:
            print(f"training: {batch} x {tokens}", file=sys.stderr, flush=True)
            inputs = batch_of(batch, tokens)
            calls: dict[str, Callable[[], None]] = {
                name: partial(step, contender, optimizers[name], inputs)
                for name, contender in contenders.items()
            }
            times = interleaved(calls, seconds, at_least=3)
            cell = {"batch": batch, "tokens": tokens}
            cell["ms"] = {name: [round(ms, 2) for ms in t] for name, t in times.items()}
            results["cells"].append(cell)
            machine.write(path, results)
    machine.write(path, results)
    return results


def tables(results: dict) -> list[Table]:
    facts = machine.title(results["machine"])
    shown = Table(title=f"a step of training BERT_BASE, median ms (times dense eager)\n{facts}")
    names = list(results["cells"][0]["ms"])
    for heading in ("batch", "tokens", *names):
        shown.add_column(heading, justify="right")
    for cell in results["cells"]:
        ms = {name: cell["ms"][name][0] for name in names}
        entries = (f"{ms[name]:.0f} ({ms[DENSE] / ms[name]:.1f})" for name in names)
        shown.add_row(str(cell["batch"]), str(cell["tokens"]), *entries)
    return [shown]
