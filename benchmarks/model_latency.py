"""Latency of a whole BERT_BASE: dense in three runtimes, and KroneckerBERT on our kernels.

    python benchmarks/model_latency.py [--threads 1 2] [--batch 1 32] [--tokens 16 128 512]
    python benchmarks/model_latency.py --table benchmarks/results/model_latency.json

Random weights, float32 unless named int8. Contenders take turns in one process, each on the same
ids; a student is checked against itself on PyTorch's backend before, an exported model against
PyTorch. Each number of threads runs in a process of its own, for onnxruntime and PyTorch fix theirs
early. Compare only what one run measured; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from kron_kernels.backends import native
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertModel, export

THREADS, BATCHES, TOKENS = (1, 2), (1, 32), (16, 128, 512)
DENSE = "dense eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each cell, at least")
    parser.add_argument("--rounds", type=int, default=3, help="for each cell, at least")
    parser.add_argument("--append", action="store_true", help="keep the cells of earlier runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/model_latency.json"))
    parser.add_argument("--table", type=Path, help="print the table of these results, and end")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print_table(json.loads(args.table.read_text()))
    elif args.here:
        measure(args)
    else:
        if not args.append:
            args.json.unlink(missing_ok=True)
        for threads in args.threads:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            options = [*sys.argv[1:], "--here", "--threads", str(threads)]
            subprocess.run([sys.executable, __file__, *options], env=environment, check=True)
        print_table(json.loads(args.json.read_text()))


def measure(args: argparse.Namespace) -> None:
    (threads,) = args.threads
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    dense = BertModel(BertConfig(), add_pooling_layer=False).eval()
    students = {
        name: KroneckerBertModel(KroneckerBertConfig.preset(preset), add_pooling_layer=False).eval()
        for name, preset in (("8x", "kronecker-bert-8"), ("21x", "kronecker-bert-21"))
    }
    for student in students.values():
        check(student)
    compiled = torch.compile(dense, dynamic=False)
    torch._dynamo.config.cache_size_limit = 64
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sessions = {
            f"dense onnxruntime {name}": session(dense, Path(folder) / name, quantize, threads)
            for name, quantize in (("fp32", None), ("int8", "int8-dynamic"))
        }
        for batch in args.batch:
            for tokens in args.tokens:
                ids = torch.randint(1, 30000, (batch, tokens))
                feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
                calls = {DENSE: lambda ids=ids: dense(ids)}
                calls["dense torch.compile"] = lambda ids=ids: compiled(ids)
                for name, run in sessions.items():
                    calls[name] = lambda run=run, feeds=feeds: run(feeds)
                for name, student in students.items():
                    calls[name] = lambda student=student, ids=ids: student(ids)
                with torch.inference_mode():
                    times = interleaved(calls, args.seconds, at_least=args.rounds)
                save(args.json, threads, batch, tokens, times)
                told = {name: round(t.median, 2) for name, t in times.items()}
                print(f"{threads} threads, {batch} x {tokens}: {told}", flush=True)


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
        # A fused block has no backend of its own: layer by layer, as hooks make it.
        hooks = [
            layer.intermediate.register_forward_hook(lambda *_: None)
            for layer in student.encoder.layer
        ]
        plain = student(ids).last_hidden_state
    for hook in hooks:
        hook.remove()
    for module in student.modules():
        if hasattr(module, "backend"):
            module.backend = "auto"
    assert_close("student", ours, plain.double(), 12 * 3072)


def save(path: Path, threads: int, batch: int, tokens: int, times: dict) -> None:
    results = json.loads(path.read_text()) if path.exists() else {"cells": []}
    results["machine"] = {
        "cpu": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.instruction_set(),
        "torch": torch.__version__,
    }
    cell = {"threads": threads, "batch": batch, "tokens": tokens}
    results["cells"].append(cell | {"ms": {name: t._asdict() for name, t in times.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def print_table(results: dict) -> None:
    machine = results["machine"]
    names = list(results["cells"][0]["ms"])
    table = Table(
        title=f"BERT_BASE, {machine['cpu']}, {machine['capability']}, torch {machine['torch']}: "
        "median ms (times faster than dense eager)"
    )
    for heading in ("threads", "batch", "tokens", *names):
        table.add_column(heading, justify="right")
    for cell in results["cells"]:
        reference = cell["ms"][DENSE]["median"]
        cells = (
            f"{cell['ms'][n]['median']:.1f} ({reference / cell['ms'][n]['median']:.1f})"
            for n in names
        )
        table.add_row(*(str(cell[k]) for k in ("threads", "batch", "tokens")), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
