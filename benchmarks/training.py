"""One step of training a BERT_BASE: forward, backward, AdamW; dense against KroneckerBERT.

A classifier of two labels on random ids, float32, dropout on as in fine-tuning. Each student runs
on our kernels and on PyTorch's operators ("eager"); without dropout both must give the same loss
and gradients before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from benchmarks import machine
from benchmarks.machine import DENSE
from kron_kernels.testing import assert_close
from kron_kernels.timing import Timing, interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertForSequenceClassification

PRESETS = {"8x": "kronecker-bert-8", "21x": "kronecker-bert-21"}
CONTENDERS = (DENSE, *(f"{name}{suffix}" for name in PRESETS for suffix in ("", ", eager")))
SIZES = ((1, 128), (8, 128))  # batch, tokens
SECONDS = 10.0  # for each size, at least


def run(path: Path, threads: int, effort: float) -> None:
    logging.set_verbosity_error()
    with machine.recording(path, threads) as record:
        contenders = {name: model(name) for name in CONTENDERS}
        check(contenders)
        optimizers = {n: torch.optim.AdamW(m.train().parameters()) for n, m in contenders.items()}
        for batch, tokens in SIZES if effort == 1 else SIZES[:1]:
            machine.progress(f"training: {batch} x {tokens}")
            inputs = batch_of(batch, tokens)
            calls: dict[str, Callable[[], None]] = {
                name: partial(step, contender, optimizers[name], inputs)
                for name, contender in contenders.items()
            }
            times = interleaved(calls, effort * SECONDS, at_least=3)
            record.add({"batch": batch, "tokens": tokens, "ms": rounded(times)})


def model(name: str, **sizes: int) -> nn.Module:
    """A contender: "dense eager", or a preset's name, with ", eager" for PyTorch's operators.

    Models of one preset have the same weights.
    """
    torch.manual_seed(0)
    if name == DENSE:
        return BertForSequenceClassification(BertConfig(**sizes))
    preset, _, eager = name.partition(", ")
    config = KroneckerBertConfig.preset(PRESETS[preset], **sizes)
    student = KroneckerBertForSequenceClassification(config)
    return on_backend(student, "eager") if eager else student


def on_backend(model: nn.Module, backend: str) -> nn.Module:
    """The same model, with every Kronecker layer on this backend."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def batch_of(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30000, (batch, tokens))
    return {"input_ids": ids, "labels": torch.randint(2, (batch,))}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> None:
    optimizer.zero_grad()
    model(**inputs).loss.backward()
    optimizer.step()


def check(contenders: dict[str, nn.Module]) -> None:
    """Compare the gradients of our kernels with those of PyTorch's operators."""
    inputs = batch_of(2, 24)
    for name in PRESETS:
        pair = [contenders[key].eval() for key in (name, f"{name}, eager")]
        for model in pair:
            model.zero_grad()
            model(**inputs).loss.backward()
        ours, eager = (dict(model.named_parameters()) for model in pair)
        for key, parameter in ours.items():
            wanted = eager[key].grad
            # A constant added to all keys cancels in the softmax: its gradient is only rounding.
            if wanted is not None and not key.endswith("key.bias"):
                # Through 12 layers, each a sum of up to 3072 terms, and over the tokens.
                assert_close(f"{name} {key}", parameter.grad, wanted.double(), 24 * 12 * 3072)


def rounded(times: dict[str, Timing]) -> dict[str, list[float]]:
    """Median and quartiles, in milliseconds to the microsecond."""
    return {name: [round(ms, 3) for ms in t] for name, t in times.items()}


def medians(row: dict[str, Any]) -> dict[str, float]:
    return {name: ms[0] for name, ms in row["ms"].items()}


def tables(results: dict[str, Any]) -> list[Table]:
    return [machine.versus_dense("a step of training BERT_BASE, median ms", results, medians)]
