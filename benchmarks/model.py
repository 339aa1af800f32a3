"""Latency of a whole BERT_BASE: dense in three runtimes, and KroneckerBERT on our kernels.

Random weights, float32 unless named int8. Contenders take turns in one process, each on the same
ids; a student is checked against itself on PyTorch's backend before, an exported model against
PyTorch. onnxruntime and PyTorch fix their threads early: another number takes another process.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from benchmarks import machine
from benchmarks.layer_tables import exponent
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertModel, export

BATCHES, TOKENS = (1, 8), (16, 128, 512)
DENSE = "dense eager"
STUDENTS = {"8x": "kronecker-bert-8", "21x": "kronecker-bert-21"}


def run(
    threads: int, batches: Sequence[int], tokens: Sequence[int], seconds: float, path: Path
) -> dict:
    machine.use_threads(threads)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    dense = BertModel(BertConfig(), add_pooling_layer=False).eval()
    students = {name: student(preset) for name, preset in STUDENTS.items()}
    torch._dynamo.config.cache_size_limit = 64
    compiled = torch.compile(dense, dynamic=False)
    results: dict = {"machine": machine.facts(threads), "cells": []}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sessions = {
            f"dense onnxruntime {name}": session(dense, Path(folder) / name, quantize, threads)
            for name, quantize in (("fp32", None), ("int8", "int8-dynamic"))
        }
        with machine.watched(results):
            for batch in batches:
                for length in tokens:
                    print(f"model: {batch} x {length}", file=sys.stderr, flush=True)
                    ids = torch.randint(1, 30000, (batch, length))
                    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
                    calls = {DENSE: lambda ids=ids: dense(ids)}
                    calls["dense torch.compile"] = lambda ids=ids: compiled(ids)
                    for name, call in sessions.items():
                        calls[name] = lambda call=call, feeds=feeds: call(feeds)
                    for name, model in students.items():
                        calls[name] = lambda model=model, ids=ids: model(ids)
                    with torch.inference_mode():
                        times = interleaved(calls, seconds, at_least=3)
                    cell = {"batch": batch, "tokens": length}
                    cell["ms"] = {name: [round(ms, 3) for ms in t] for name, t in times.items()}
                    results["cells"].append(cell)
                    machine.write(path, results)
    machine.write(path, results)
    return results


def student(preset: str) -> nn.Module:
    config = KroneckerBertConfig.preset(preset)
    model = KroneckerBertModel(config, add_pooling_layer=False).eval()
    check(model)
    return model


def session(model: nn.Module, folder: Path, quantize: str | None, threads: int):
    """The model in onnxruntime as ``export`` writes it, which checks it, at its fastest.

    With or without a fusion that is slow on some CPUs, whichever is faster at 1 x 128.
    """
    import onnxruntime

    print(export(model, folder, quantize=quantize), flush=True)
    file = next(folder.rglob("*.onnx"))
    ids = np.ones((1, 128), dtype=np.int64)
    versions = {}
    for off in ("", "SkipLayerNormFusion"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin after a run would slow the contender that follows.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if off:
            options.add_session_config_entry("optimization.disable_specified_optimizers", off)
        opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in opened.get_inputs()}

        def run(feeds, opened=opened, wanted=wanted):
            extra = {"token_type_ids": np.zeros_like(feeds["input_ids"])}
            return opened.run(None, {k: v for k, v in (feeds | extra).items() if k in wanted})

        versions[off] = run
    feeds = {"input_ids": ids, "attention_mask": ids}
    calls = {off: lambda run=run: run(feeds) for off, run in versions.items()}
    times = interleaved(calls, 3.0)
    return versions[min(times, key=lambda off: times[off].median)]


def check(student: nn.Module) -> None:
    """Our kernels against PyTorch's on the same model, before anything is timed."""
    ids = torch.randint(1, 30000, (2, 24))
    with torch.inference_mode():
        ours = student(ids).last_hidden_state
        for module in student.modules():
            if hasattr(module, "backend"):
                module.backend = "eager"
        plain = student(ids).last_hidden_state
    for module in student.modules():
        if hasattr(module, "backend"):
            module.backend = "auto"
    assert_close("student", ours, plain.double(), 12 * 3072)


def tables(results: dict) -> list[Table]:
    shown = Table(
        title=f"BERT_BASE, median ms (times dense eager)\n{machine.title(results['machine'])}"
    )
    names = list(results["cells"][0]["ms"])
    for heading in ("batch", "tokens", *names):
        shown.add_column(heading, justify="right")
    for cell in results["cells"]:
        ms = {name: cell["ms"][name][0] for name in names}
        entries = (f"{ms[name]:.1f} ({ms[DENSE] / ms[name]:.1f})" for name in names)
        shown.add_row(str(cell["batch"]), str(cell["tokens"]), *entries)
    single = [cell for cell in results["cells"] if cell["batch"] == 1 and cell["tokens"] >= 128]
    if len(single) > 1:
        sizes = [cell["tokens"] for cell in single]
        grown = (
            f"~ tokens^{exponent(sizes, [cell['ms'][name][0] for cell in single]):.2f}"
            for name in names
        )
        shown.add_section()
        shown.add_row("1", f"{sizes[0]} to {sizes[-1]}", *grown)
    return [shown]
