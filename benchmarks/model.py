"""Latency of whole encoders: BERT_BASE and MiniLM, dense in several runtimes, and their students.

float32 unless named int8. Contenders (see ``benchmarks.contenders``) take turns in one process, on
the same ids: random ones of one length, and a batch of real sentences of mixed length, padded to
the longest. onnxruntime and PyTorch fix their threads early: another number of threads takes
another process, see ``benchmarks.threads``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import BertConfig
from transformers.utils import logging

from benchmarks import machine, sentences
from benchmarks.contenders import (
    BY_LAYERS,
    IN_INT8,
    INT8,
    LOW_RANK,
    LOW_RANK_IN_INT8,
    Call,
    contenders,
)
from benchmarks.layers import exponent
from benchmarks.machine import DENSE
from benchmarks.training import PRESETS, medians, rounded
from kron_kernels.timing import interleaved

SECONDS = 8.0  # for each batch and length, at least
BERT, MINILM = "BERT_BASE", "MiniLM"
OUR_INT8 = f"dense {IN_INT8}"
RUNTIMES = ("dense torch.compile", "dense onnxruntime fp32", INT8, "dense openvino int8")
CONTENDERS = {
    BERT: (
        *(DENSE, *RUNTIMES, OUR_INT8, *(f"{name} {IN_INT8}" for name in PRESETS), *PRESETS),
        *(f"{name} {way}" for name in PRESETS for way in (BY_LAYERS, LOW_RANK, LOW_RANK_IN_INT8)),
    ),
    # The 8x student in the other runtimes, too.
    MINILM: (
        *(DENSE, *RUNTIMES, OUR_INT8, f"8x {IN_INT8}", "8x", f"8x {BY_LAYERS}"),
        *("8x torch.compile", "8x onnxruntime fp32", "8x onnxruntime int8"),
    ),
}
# all-MiniLM-L6-v2.
MINILM_SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
BASES = {BERT: BertConfig(), MINILM: BertConfig(**MINILM_SIZES)}
MINILM_TOKENS = (16, 128)
PARTS = ("sizes", "sentences", "minilm")


def run(
    path: Path,
    threads: int,
    effort: float,
    batch: Sequence[int],
    tokens: Sequence[int],
    parts: Sequence[str] = PARTS,
    data: Path | None = None,
) -> None:
    logging.set_verbosity_error()
    text = sentences.source(data)
    padded = sentences.batch(text)
    with (
        machine.recording(path, threads) as record,
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")

        def add(of: str, models: dict[str, Call], ids: Any, mask: Any = None, **facts: Any) -> None:
            length = f"{ids.shape[0]} x {ids.shape[1]}"
            machine.progress(f"model: {of}, {length}")
            calls = {name: partial(model, ids, mask) for name, model in models.items()}
            with torch.inference_mode():
                times = interleaved(calls, effort * SECONDS, at_least=3)
            size = {"model": of, "batch": ids.shape[0], "tokens": ids.shape[1]}
            record.add(size | facts | {"ms": rounded(times)})

        if {"sizes", "sentences"} & {*parts}:
            models = contenders(CONTENDERS[BERT], BASES[BERT], Path(folder, BERT), threads)
            if "sizes" in parts:
                for sequences in batch:
                    for length in tokens:
                        add(BERT, models, random_ids(sequences, length))
            if "sentences" in parts:
                facts = {"real_tokens": int(padded[1].sum()), "text": text.name}
                add(BERT, models, *padded, **facts)
            del models
        if "minilm" in parts:
            models = contenders(CONTENDERS[MINILM], BASES[MINILM], Path(folder, MINILM), threads)
            for length in MINILM_TOKENS:
                add(MINILM, models, random_ids(1, length))


def random_ids(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(1, 30000, (sequences, length))


def rows_of(results: dict[str, Any], of: str = BERT) -> list[dict[str, Any]]:
    """The rows of one model."""
    return [row for row in results["rows"] if row["model"] == of]


def row_of(results: dict[str, Any], of: str, batch: int, tokens: int) -> dict[str, Any] | None:
    """The row of random ids of this size."""
    for row in rows_of(results, of):
        if (row["batch"], row["tokens"]) == (batch, tokens) and not is_real(row):
            return row
    return None


def sentences_row(results: dict[str, Any]) -> dict[str, Any] | None:
    return next(filter(is_real, results["rows"]), None)


def is_real(row: dict[str, Any]) -> bool:
    """Whether a row is of real sentences."""
    return "real_tokens" in row


def tables(results: dict[str, Any]) -> list[Table]:
    found = []
    for of in CONTENDERS:
        rows = rows_of(results, of)
        if not rows:
            continue
        more = {}
        single = [row for row in rows if row["batch"] == 1 and row["tokens"] >= 128]
        if len(single) > 1:
            sizes = [row["tokens"] for row in single]
            costs = zip(*(medians(row).values() for row in single), strict=True)
            powers = [f"~ tokens^{exponent(sizes, of_one):.2f}" for of_one in costs]
            more = {f"1 x {sizes[0]} to {sizes[-1]}": powers}
        only = results | {"rows": rows}
        shown = machine.versus_dense(f"{of}, median ms", only, medians, digits=1, more=more)
        if row := next(filter(is_real, rows), None):
            shown.caption = (
                f"{row['batch']} x {row['tokens']}: sentences from {row['text']}, "
                f"{row['real_tokens']} tokens and the rest padding"
            )
        found.append(shown)
    return found
