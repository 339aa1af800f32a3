"""The paper's whole procedure from one recipe: initial student, stage 1, and each task and seed.

    run("kronecker-bert-8", "output", data="glue", tasks=["sst2"])

Output:

    corpus/                    the tokens of stage 1
    start/                     the student before training
    stage1/                    the student after stage 1
    teacher/TASK/              the fine-tuned teacher
    stage2/TASK/seed-N/        the final students, with their cards
    scores/TASK/…/scores.json
    latency/latency.json
    recipe.yaml, results.json  the last recipe, and all its numbers
    curves/                    the losses, term by term
    cache/TASK/                the teacher's outputs, if the recipe sets cache_teacher
    training/                  checkpoints of unfinished steps
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from kron_kernels.files import write_file
from kroneckerbert import measure
from kroneckerbert.data import Table, TextDataset, label_targets
from kroneckerbert.distillation import DistillationTrainer
from kroneckerbert.distillation.heads import with_head_of
from kroneckerbert.distillation.provenance import digest, identity, read_json, write_json
from kroneckerbert.evaluation import Program
from kroneckerbert.loading import load as load_model
from kroneckerbert.loading import without_weights
from kroneckerbert.quantization import quantize
from kroneckerbert.reproduction import corpus
from kroneckerbert.reproduction.card import Score
from kroneckerbert.reproduction.recipe import FineTuning, Recipe, Stage1, Stage2, load, select
from kroneckerbert.reproduction.sentence_run import SentenceRun
from kroneckerbert.reproduction.squad import Questions, SpanDataset
from kroneckerbert.reproduction.steps import Steps, core_hours, located, settings_of
from kroneckerbert.reproduction.tasks import (
    TASKS,
    Task,
    compare,
    evaluate_task,
    match_labels,
    own_task,
    read_task,
)

_Metrics = dict[str, dict[str, float]]  # by set, then by metric


def run(
    recipe: Recipe | str | Path,
    output: str | Path,
    data: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Run a recipe, or the steps of it that are not done yet; the module lists the output.

    Under ``torchrun`` or ``accelerate launch`` every process calls this function.

    Args:
        recipe: A recipe, or an argument for ``kroneckerbert.reproduction.recipe.load``.
        output: Folder for everything.
        data: Folder with the tasks' files, see ``kroneckerbert.reproduction.tasks.read_task``; None
            downloads them from the Hugging Face Hub.
        tasks: The recipe's tasks to run; None runs all.
        seeds: Replaces the recipe's seeds.

    Returns:
        The content of ``results.json``: ``parameters`` of ``teacher`` and ``student``; ``scores``,
        each with the fields of a ``kroneckerbert.reproduction.card.Score``; scores of students as
        ``deployed``; ``latency``, None if not measured; ``core_hours`` of each training.

    Raises:
        ValueError: If the recipe is invalid, does not fit the models, the data or the number of
            processes, or a folder was made by another recipe.
        TypeError: If a value of the recipe has the wrong type.
        OSError: If something cannot be read or written.
        ImportError: If a package is missing.
        Interrupted: On SIGINT or SIGTERM during a training in one process, after a checkpoint of
            its last step has been saved.
    """
    recipe = select(recipe if isinstance(recipe, Recipe) else load(recipe), tasks, seeds)
    kind = _TaskRun if recipe.sentences is None else SentenceRun
    with _quiet():
        return kind(recipe, Path(output), data).run()


class _TaskRun(Steps):
    """A recipe of stages and tasks."""

    def run(self) -> dict[str, Any]:
        recipe, stage1 = self.recipe, self.recipe.stage1
        self._check()
        if (program := recipe.deployment.export) is not None:  # now, not after the training
            from kroneckerbert.exporting import check_packages

            check_packages(program)
        self.tasks = TASKS | {
            name: own_task(name, task.train, task.test, task.metric, self.data or ".")
            for name, task in recipe.tasks.items()
            if task.train and task.test
        }
        # Report missing data now, not after hours of stage 1.
        with self.state.main_process_first():  # one process downloads for all
            self.rows = {name: self._digests(name) for name in recipe.tasks}
        text = self._corpus(stage1) if stage1 else ""
        about: dict[str, Any] = {}
        texts: Callable[[], Dataset] | None = None
        if stage1:
            about = {"corpus": text, "max_length": stage1.max_length}
            texts = partial(self._texts, stage1)
        elif name := next(iter(recipe.tasks), None):
            length = recipe.tasks[name].stage2.max_length
            about = {"data": self.rows[name][f"{name} train"], "max_length": length}
            texts = partial(self._task_texts, name, length)
        start = self._start(about, texts)
        student = self._stage1(stage1, start, text) if stage1 else start
        scores: list[Score] = []
        students: list[tuple[str, int, Path]] = []
        deployed: dict[str, dict[str, _Metrics]] = {}
        for name in recipe.tasks:
            teacher = self._teacher(name)
            taught = self._evaluated(name, "teacher", teacher)
            self._print_scores(self._compared(taught, {}), "teacher")
            ours = {}
            for seed in recipe.seeds:
                folder = self._stage2(name, teacher, student, seed)
                ours[seed] = self._evaluated(name, f"seed-{seed}", folder)
                students.append((name, seed, folder))
                deployed[f"{name}/seed-{seed}"] = self._deployed(name, seed, folder)
            compared = self._compared(taught, ours)
            self._print_scores(compared, "student")
            scores += compared
        latency = self._latency(recipe.latency, student) if recipe.latency else None
        if self.is_main:
            self._summarise(student, students, scores, deployed, latency)
        self.wait()
        return json.loads((self.output / "results.json").read_text())

    # Data

    def _sets(self, name: str) -> list[str]:
        """The sets on which a task's models are evaluated."""
        also = self.recipe.evaluation.also
        return [name, *(other for other in self.tasks[name].evaluated_on if other in also)]

    def _read(self, name: str, split: str) -> Table | Questions:
        try:
            return read_task(self.tasks[name], split, self.data)
        except OSError as error:
            message = str(error).rstrip(".")
            raise type(error)(
                f"{message}; or leave out the task with --task, or remove the set from "
                "evaluation.also."
            ) from error

    def _digests(self, name: str) -> dict[str, str]:
        """A digest of the rows of each set and split."""
        wanted = [(name, "train"), *((of, self.tasks[of].evaluation) for of in self._sets(name))]
        return {
            f"{of} {split}": digest(repr(self._read(of, split)).encode(errors="surrogatepass"))
            for of, split in wanted
        }

    # Steps

    def _corpus(self, stage: Stage1) -> str:
        """Tokenise the corpus; returns its description."""
        options, folder = asdict(stage.corpus), self.output / "corpus"
        given = options.pop("source")
        own = Path(self.data or ".") / given
        source = str(own) if own.is_file() else located(given)
        description = corpus.describe_corpus(source, **options)
        if self.is_main:
            if not folder.exists():
                self.print(f"- corpus: {description}")
            texts = corpus.read_corpus(source, **options)
            corpus.tokenise_corpus(texts, self.tokenizer, folder, description)
        self.wait()
        return description

    def _texts(self, stage: Stage1, **options: Any) -> corpus.Corpus:
        return corpus.Corpus(self.output / "corpus", self.tokenizer, stage.max_length, **options)

    def _task_texts(self, name: str, max_length: int) -> Dataset:
        """The texts of a task's training set, without labels."""
        rows = self._read(name, "train")
        if not isinstance(rows, Table):
            questions = [question.question for question in rows]
            return TextDataset(self.tokenizer, questions, max_length=max_length)
        return TextDataset(self.tokenizer, rows.texts, rows.texts_b, None, max_length)

    def _stage1(self, stage: Stage1, start: Path, text: str) -> Path:
        settings = settings_of(stage)
        del settings["corpus"]
        made_of = {"start": identity(start), "corpus": text, "stage1": settings}

        def work(folder: Path, training: Path) -> None:
            args, teacher = self._arguments(stage, training), self._dense_model()
            if args.logits_weight == 0:  # do not compute logits, a vocabulary wide, for nothing
                teacher = teacher.base_model
            mask = corpus.MaskedCollator(self.tokenizer, seed=args.seed) if stage.heads else None
            student = load_model(start, self.kind)
            texts = self._texts(stage, pairs="nsp" in stage.heads, pack=stage.pack)
            trainer = DistillationTrainer(
                student,
                teacher,
                args,
                train_dataset=texts,
                processing_class=self.tokenizer,
                data_collator=mask,
            )
            self._train(trainer, folder)

        return self._step("stage1", made_of, work)

    def _teacher(self, name: str) -> str | Path:
        task, tuning = self.tasks[name], self.recipe.tasks[name].fine_tuning
        if tuning.model is not None:
            return located(tuning.model)
        made_of = {
            "teacher": identity(self.dense),
            "fine_tuning": settings_of(tuning),
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            args = self._arguments(tuning, training, **self._epochs(name, tuning))
            set_seed(args.seed)  # initialises the head
            labels: dict[str, Any] = {"num_labels": 1} if task.kind == "regression" else {}
            if task.kind == "classification":
                names = dict(enumerate(task.labels))
                labels = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            model = _load(task, self.dense, **labels)
            rows = self._dataset(name, model, tuning.max_length)
            trainer = Trainer(model, args, train_dataset=rows, processing_class=self.tokenizer)
            self._train(trainer, folder)

        return self._step(f"teacher/{name}", made_of, work)

    def _stage2(self, name: str, teacher: str | Path, student: Path, seed: int) -> Path:
        stage = self.recipe.tasks[name].stage2
        made_of = {
            "student": identity(student),
            "teacher": identity(teacher),
            "stage2": settings_of(stage),
            "seed": seed,
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            cache = str(self.output / "cache" / name) if stage.cache_teacher else None
            epochs = self._epochs(name, stage)
            args = self._arguments(stage, training, seed=seed, teacher_cache=cache, **epochs)
            tuned = _load(self.tasks[name], teacher)
            rows = self._dataset(name, tuned, stage.max_length)
            model = with_head_of(tuned, student)
            trainer = DistillationTrainer(
                model, tuned, args, train_dataset=rows, processing_class=self.tokenizer
            )
            self._train(trainer, folder)

        return self._step(f"stage2/{name}/seed-{seed}", made_of, work)

    def _epochs(self, name: str, stage: FineTuning | Stage2) -> dict[str, float]:
        """More passes than the recipe's, where a small table needs them for ``least_steps``."""
        if stage.arguments.get("max_steps", -1) > 0:  # decides alone
            return {}
        rows = len(self._read(name, "train"))
        steps = math.ceil(rows / stage.batch_size)
        epochs = math.ceil(stage.least_steps / steps)
        usual = TrainingArguments.num_train_epochs
        if epochs <= stage.arguments.get("num_train_epochs", usual):
            return {}
        self.print(f"  {epochs} passes over {rows:,} rows, for {epochs * steps} steps")
        return {"num_train_epochs": epochs}

    def _dataset(self, name: str, model: PreTrainedModel, max_length: int) -> Dataset:
        task, rows = self.tasks[name], self._read(name, "train")
        if not isinstance(rows, Table):
            return SpanDataset(self.tokenizer, rows, max_length, min(128, max_length // 3))
        rows = match_labels(task, rows, model.config)
        labels = label_targets(rows.labels, model.config)
        return TextDataset(self.tokenizer, rows.texts, rows.texts_b, labels, max_length)

    def _evaluated(self, name: str, role: str, model: str | Path) -> _Metrics:
        rows = {key: value for key, value in self.rows[name].items() if not key.endswith(" train")}

        def work(folder: Path, _: Path) -> None:
            loaded: Any
            if (Path(model) / "export.json").is_file():
                loaded = Program(model)
            else:
                loaded = _load(self.tasks[name], model).to(self.state.device).eval()
            size, scores = self.recipe.evaluation.batch_size, {}
            for other in self._sets(name):
                task = self.tasks[other]
                data = self._read(other, task.evaluation)
                scores[other] = evaluate_task(loaded, self.tokenizer, task, data, size)
            write_json(folder / "scores.json", scores)

        made_of = {"model": identity(model), "data": rows}
        folder = self._step(f"scores/{name}/{role}", made_of, work, alone=True, renew=True)
        return read_json(folder / "scores.json")

    def _deployed(self, name: str, seed: int, student: Path) -> dict[str, _Metrics]:
        """Scores of the other forms of a student that the recipe asks for."""
        form, scores = self.recipe.deployment, {}
        if form.int8:

            def quantised(folder: Path, _: Path) -> None:
                self._save(quantize(_load(self.tasks[name], student)), folder)

            int8 = self._step(
                f"int8/{name}/seed-{seed}", {"student": identity(student)}, quantised, alone=True
            )
            scores["int8"] = self._evaluated(name, f"seed-{seed}-int8", int8)
        if form.export is not None:
            from kroneckerbert.exporting import export

            def exported(folder: Path, _: Path) -> None:
                export(
                    _load(self.tasks[name], student),
                    folder / "program",
                    format=form.export,  # type: ignore[arg-type]  # the recipe's check
                    tokenizer=self.tokenizer,
                )

            made_of = {"student": identity(student), "format": form.export}
            program = self._step(f"export/{name}/seed-{seed}", made_of, exported, alone=True)
            scores[form.export] = self._evaluated(
                name, f"seed-{seed}-{form.export}", program / "program"
            )
        for role, metrics in scores.items():
            self._print_scores(self._compared(metrics, {}), role)
        return scores

    # Reports

    def _print_scores(self, scores: Sequence[Score], role: str) -> None:
        for score in scores:
            value = score if role == "student" else f"{score.teacher:.2f}"
            paper = ", ".join(f"{name} {number:g}" for name, number in score.paper.items())
            beside = f"   [paper: {paper}]" if paper else ""
            self.print(f"  {score.task} {score.split} {score.metric}, {role}: {value}{beside}")

    def _compared(self, teacher: _Metrics, ours: Mapping[int, _Metrics]) -> list[Score]:
        """Scores of all sets and metrics: the teacher's, the students' by seed, and the paper's."""
        scores = []
        for name, metrics in teacher.items():
            task = self.tasks[name]
            by_seed = {seed: compare(task, scored[name]) for seed, scored in ours.items()}
            for metric, paper in compare(task, metrics).items():
                seeds = {seed: row[metric]["ours"] for seed, row in by_seed.items()}
                scores.append(Score(name, task.evaluation, metric, paper.pop("ours"), seeds, paper))
        return scores

    def _summarise(
        self,
        stage1: Path,
        students: list[tuple],
        scores: list[Score],
        deployed: dict[str, dict[str, _Metrics]],
        latency: dict | None,
    ) -> None:
        """Write numbers, cards and curves from the files of the steps."""
        dense, ours = (
            measure.parameters(without_weights(source).base_model)
            for source in (self.dense, stage1)
        )
        hours = {f"{name}/seed-{seed}": core_hours(folder) for name, seed, folder in students}
        if self.recipe.stage1:
            hours = {"stage1": core_hours(stage1)} | hours
        results = {
            "parameters": {"teacher": dense, "student": ours},
            "scores": [asdict(score) | {"student": str(score)} for score in scores],
            "deployed": deployed,
            "latency": latency,
            "core_hours": hours,
        }
        text = yaml.safe_dump(self.recipe.given, sort_keys=False, allow_unicode=True)
        write_file(self.output / "recipe.yaml", text)
        write_json(self.output / "results.json", results)
        ratio = f"{dense / ours:.1f} times fewer (without heads)"
        self.print(f"{ours:,} parameters instead of {dense:,}, {ratio}")
        for batch, times in latency["milliseconds"].items() if latency else ():
            student, teacher = (times[name]["median"] for name in ("student", "teacher"))
            self.print(f"{student:.1f} ms instead of {teacher:.1f} at batch {batch}")
        pictures: dict[str, dict[str, Path]] = {}
        cost: dict[str, float | None] = {}
        if self.recipe.stage1:
            cost = {"stage 1": hours["stage1"]}
            self._save_card(stage1, "stage 1", latency=latency, core_hours=cost)
            pictures["stage1"] = {"stage 1": stage1}
        for name, seed, folder in students:
            of_task = [score for score in scores if score.task in self._sets(name)]
            own = {"stage 2": hours[f"{name}/seed-{seed}"]}
            figures = {"scores": of_task, "latency": latency, "core_hours": cost | own}
            self._save_card(folder, name, seed=seed, **figures)
            pictures.setdefault(name, {})[f"seed {seed}"] = folder
        self._save_curves(pictures)
        self.print(f"Students, with their cards, are in {students[-1][2] if students else stage1}.")


def _load(task: Task, source: str | Path, **config: Any) -> PreTrainedModel:
    head = "QuestionAnswering" if task.kind == "span" else "SequenceClassification"
    auto_class = f"AutoModelFor{head}"
    return load_model(source, auto_class, new_head=True, dtype=torch.float32, **config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide loading bars and reports of new heads' missing weights, which are expected here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
