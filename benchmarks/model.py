"""Latency of a whole BERT_BASE: dense in three runtimes, and KroneckerBERT on our kernels.

Random weights, float32 unless named int8. Contenders take turns in one process, on the same ids; a
student is first compared with itself on PyTorch's operators, an exported model with PyTorch.
onnxruntime and PyTorch fix their threads early: another number of threads takes another process.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from benchmarks import machine
from benchmarks.layers import exponent
from benchmarks.machine import DENSE
from benchmarks.training import PRESETS, medians, on_backend, rounded
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertModel, export

SECONDS = 8.0  # for each batch and length, at least


def run(
    path: Path, threads: int, effort: float, batch: Sequence[int], tokens: Sequence[int]
) -> None:
    logging.set_verbosity_error()
    with (
        machine.recording(path, threads) as record,
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        models = contenders(Path(folder), threads)
        for sequences in batch:
            for length in tokens:
                machine.progress(f"model: {sequences} x {length}")
                ids = torch.randint(1, 30000, (sequences, length))
                calls = {name: partial(model, ids) for name, model in models.items()}
                with torch.inference_mode():
                    times = interleaved(calls, effort * SECONDS, at_least=3)
                record.add({"batch": sequences, "tokens": length, "ms": rounded(times)})


def contenders(folder: Path, threads: int) -> dict[str, Callable[[Tensor], Any]]:
    torch.manual_seed(0)
    dense = BertModel(BertConfig(), add_pooling_layer=False).eval()
    students = {name: student(preset) for name, preset in PRESETS.items()}
    torch._dynamo.config.cache_size_limit = 64
    return {
        DENSE: dense,
        "dense torch.compile": torch.compile(dense, dynamic=False),
        "dense onnxruntime fp32": session(dense, folder / "fp32", None, threads),
        "dense onnxruntime int8": session(dense, folder / "int8", "int8-dynamic", threads),
        **students,
    }


def student(preset: str) -> nn.Module:
    """The student, once it agrees with itself on PyTorch's operators."""
    config = KroneckerBertConfig.preset(preset)
    model = KroneckerBertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(1, 30000, (2, 24))
    with torch.inference_mode():
        ours, eager = (
            on_backend(model, backend)(ids).last_hidden_state for backend in ("auto", "eager")
        )
    assert_close("student", ours, eager.double(), 12 * 3072)
    return on_backend(model, "auto")


def session(
    model: nn.Module, folder: Path, quantize: str | None, threads: int
) -> Callable[[Tensor], Any]:
    """The model in onnxruntime, checked by ``export``, in the faster of two versions.

    One fuses skip connections with layer norms, which is slow on some CPUs; timed at 1 x 128.
    """
    import onnxruntime

    print(export(model, folder, quantize=quantize), flush=True)
    file = next(folder.rglob("*.onnx"))
    versions = {}
    for disabled in ("", "SkipLayerNormFusion"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin after a run would slow the contender that follows.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if disabled:
            options.add_session_config_entry("optimization.disable_specified_optimizers", disabled)
        opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = {put.name for put in opened.get_inputs()}
        versions[disabled] = partial(run_session, opened, names)
    ids = torch.ones(1, 128, dtype=torch.long)
    times = interleaved({name: partial(call, ids) for name, call in versions.items()}, 3.0)
    return versions[min(times, key=lambda name: times[name].median)]


def run_session(session: Any, names: set[str], ids: Tensor) -> Any:
    words = ids.numpy()
    feeds = {"input_ids": words, "attention_mask": np.ones_like(words)}
    feeds["token_type_ids"] = np.zeros_like(words)
    return session.run(None, {name: feeds[name] for name in names})


def tables(results: dict[str, Any]) -> list[Table]:
    shown = machine.versus_dense("BERT_BASE, median ms", results, medians, digits=1)
    single = [row for row in results["rows"] if row["batch"] == 1 and row["tokens"] >= 128]
    if len(single) > 1:
        sizes = [row["tokens"] for row in single]
        costs = zip(*(medians(row).values() for row in single), strict=True)
        shown.add_section()
        powers = (f"~ tokens^{exponent(sizes, of_one):.2f}" for of_one in costs)
        shown.add_row("1", f"{sizes[0]} to {sizes[-1]}", *powers)
    return [shown]
