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

A step's folder appears only when it is complete, with a record of its inputs in ``made_of.json``.
A restarted run reuses steps whose inputs are unchanged, resumes from the last checkpoint, and
refuses a folder whose inputs have changed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from kron_kernels.files import write_file
from kron_kernels.plan import Plan
from kroneckerbert import measure
from kroneckerbert.conversion import compress
from kroneckerbert.data import Table, TextDataset, label_targets
from kroneckerbert.distillation import DistillationTrainer, resuming
from kroneckerbert.distillation.heads import with_head_of
from kroneckerbert.distillation.provenance import (
    MADE_OF,
    digest,
    identity,
    is_made_of,
    read_json,
    write_json,
)
from kroneckerbert.distillation.signals import Interrupted, stoppable
from kroneckerbert.files import replace_folder, resolved, writable_folder
from kroneckerbert.loading import copy_modules, load_tokenizer, without_weights
from kroneckerbert.loading import load as load_model
from kroneckerbert.modeling_kroneckerbert import max_tokens
from kroneckerbert.reproduction import corpus, curves
from kroneckerbert.reproduction.card import Score, machine, model_card, without_paths
from kroneckerbert.reproduction.recipe import Latency, Recipe, Stage, Stage1, load, select
from kroneckerbert.reproduction.squad import Questions, SpanDataset
from kroneckerbert.reproduction.tasks import (
    TASKS,
    Task,
    compare,
    evaluate_task,
    match_labels,
    read_task,
)

_PACKAGE = "package:"  # package:NAME/PATH is a path inside an installed package
# By the number of heads in stage 1.
_MODELS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining")
_HISTORY = "trainer_state.json"
# Prefixes of the arguments that do not affect the weights.
_IRRELEVANT = (
    *("dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm"),
    *("logging_", "report_to", "run_name", "save_"),
)
_Metrics = dict[str, dict[str, float]]  # by set, then by metric
_Work = Callable[[Path, Path], None]
_TIMEOUT = timedelta(days=7)  # one process prepares, evaluates and measures; the others wait


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
        each with the fields of a ``kroneckerbert.reproduction.card.Score``; ``latency``, None if
        not measured.

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
    from kroneckerbert.reproduction.sentence_run import SentenceRun

    kind = Run if recipe.sentences is None else SentenceRun
    with _quiet():
        return kind(recipe, Path(output), data).run()


class Run:
    """One recipe in one folder; steps in order of dependence."""

    def __init__(self, recipe: Recipe, output: Path, data: str | Path | None):
        self.recipe, self.output, self.data = recipe, resolved(output), data
        # The first PartialState sets the timeout between processes. Without cpu=True on a machine
        # without GPUs, each process would take itself for the only one.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
        self.state, self.is_main, self.wait = state, state.is_main_process, state.wait_for_everyone
        alone = state.num_processes == 1  # a single process uses all visible GPUs
        self.devices = max(1, torch.cuda.device_count()) if alone else state.num_processes
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not self.is_main)
        self.print = console.print
        self.dense = _located(recipe.teacher)
        self.kind = _MODELS[len(recipe.stage1.heads) if recipe.stage1 else 0]
        self.tokenizer = load_tokenizer(self.dense)

    def run(self) -> dict[str, Any]:
        recipe, stage1 = self.recipe, self.recipe.stage1
        self._check()
        # Report missing data now, not after hours of stage 1.
        with self.state.main_process_first():  # one process downloads for all
            self.rows = {name: self._digests(name) for name in recipe.tasks}
        text = self._corpus(stage1) if stage1 else ""
        length = stage1.max_length if stage1 else None
        start = self._start(
            {"corpus": text, "max_length": length}, lambda: self._texts(stage1) if stage1 else []
        )
        student = self._stage1(stage1, start, text) if stage1 else start
        scores: list[Score] = []
        students: list[tuple[str, int, Path]] = []
        for name in recipe.tasks:
            teacher = self._teacher(name)
            taught = self._evaluated(name, "teacher", teacher)
            self._print_scores(_compared(taught, {}), "teacher")
            ours = {}
            for seed in recipe.seeds:
                folder = self._stage2(name, teacher, student, seed)
                ours[seed] = self._evaluated(name, f"seed-{seed}", folder)
                students.append((name, seed, folder))
            compared = _compared(taught, ours)
            self._print_scores(compared, "student")
            scores += compared
        latency = self._latency(recipe.latency, student) if recipe.latency else None
        if self.is_main:
            self._summarise(student, students, scores, latency)
        self.wait()
        return json.loads((self.output / "results.json").read_text())

    # Checks before any work

    def _check(self) -> None:
        """Resolve and print all arguments, and raise errors that would otherwise appear late."""
        recipe, state = self.recipe, self.state
        self.print(
            f"{recipe.description or 'A recipe'}\nTeacher {recipe.teacher}; to {self.output}\n"
            f"{state.num_processes} process(es) on {state.device.type}"
        )
        given = {"stage 1": recipe.stage1, "sentences": recipe.sentences}
        stages: dict[str, Stage] = {name: stage for name, stage in given.items() if stage}
        for name, task in recipe.tasks.items():
            if task.fine_tuning.model is None:
                stages[f"{name}, teacher"] = task.fine_tuning
            else:
                _located(task.fine_tuning.model)
            stages[f"{name}, stage 2"] = task.stage2
        lengths = {"latency.tokens": recipe.latency.tokens} if recipe.latency else {}
        for name, stage in stages.items():
            lengths[f"{name}: max_length"] = stage.max_length
            args = self._arguments(stage, self.output)
            self.print(
                f"{name}: {stage.batch_size} rows a step = {self.devices} device(s) x "
                f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} "
                f"accumulated, learning rate {args.learning_rate:g}"
            )
        if recipe.student.plan is not None:
            Plan.load(recipe.student.plan)
        longest = max_tokens(without_weights(self.dense), self.tokenizer)
        for name, length in lengths.items():
            if length > longest:
                raise ValueError(f"{name} {length} exceeds the teacher's {longest}.")
        if self.is_main:
            writable_folder(self.output / "step")  # also creates the output folder

    def _arguments(self, stage: Stage, training: Path, **decided: Any) -> TrainingArguments:
        parts = self.devices * stage.arguments.get("gradient_accumulation_steps", 1)
        if stage.batch_size % parts:
            raise ValueError(
                f"batch_size {stage.batch_size} cannot be divided by {parts} = {self.devices} "
                "device(s) x gradient_accumulation_steps; change one of them."
            )
        gpu = torch.cuda.is_available()
        usual = {"use_cpu": not gpu, "dataloader_pin_memory": gpu, "save_total_limit": 1}
        usual |= {"logging_first_step": True, "disable_tqdm": not sys.stderr.isatty()}
        return stage.arguments_class(
            output_dir=str(training),
            per_device_train_batch_size=stage.batch_size // parts,
            **usual | stage.arguments | decided,
        )

    def _sets(self, name: str) -> list[str]:
        """The sets on which a task's models are evaluated."""
        also = self.recipe.evaluation.also
        return [name, *(other for other in TASKS[name].evaluated_on if other in also)]

    def _read(self, name: str, split: str) -> Table | Questions:
        try:
            return read_task(name, split, self.data)
        except OSError as error:
            message = str(error).rstrip(".")
            raise type(error)(
                f"{message}; or leave out the task with --task, or remove the set from "
                "evaluation.also."
            ) from error

    def _digests(self, name: str) -> dict[str, str]:
        """A digest of the rows of each set and split."""
        wanted = [(name, "train"), *((of, TASKS[of].evaluation) for of in self._sets(name))]
        return {
            f"{of} {split}": digest(repr(self._read(of, split)).encode(errors="surrogatepass"))
            for of, split in wanted
        }

    # Steps

    def _step(
        self, name: str, made_of: dict, work: _Work, alone: bool = False, renew: bool = False
    ) -> Path:
        """The folder of a step, filled by ``work`` unless it is already complete.

        ``work`` receives the folder, and one for checkpoints that is deleted when the step is done.
        ``alone`` runs it on the main process only; ``renew`` repeats a step whose inputs changed.
        """
        folder, training = self.output / name, self.output / "training" / name
        made_of = json.loads(json.dumps(made_of))
        done = is_made_of(folder, made_of, renew)
        if not done:
            is_made_of(training, made_of, renew or _last_checkpoint(training) is None)
        self.wait()  # all processes must have looked before one writes
        if done:
            return folder
        self.print(f"- {name}")
        if self.is_main and not alone:
            training.mkdir(parents=True, exist_ok=True)
            write_json(training / MADE_OF, made_of)
        self.wait()
        if self.is_main:
            with replace_folder(folder) as new:
                work(new, training)
                write_json(new / MADE_OF, made_of)
            shutil.rmtree(training, ignore_errors=True)
        elif not alone:
            work(folder, training)  # writes nothing in this process
        self.wait()
        return folder

    def _corpus(self, stage: Stage1) -> str:
        """Tokenise the corpus; returns its description."""
        options = asdict(stage.corpus)
        source, folder = _located(options.pop("source")), self.output / "corpus"
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

    def _start(self, about_text: dict[str, Any], texts: Callable[[], Dataset]) -> Path:
        """The compressed teacher, started on ``texts`` if the recipe calibrates."""
        given = self.recipe.student
        shapes: Any = given.preset or given.factors
        if given.plan is not None:
            shapes = Plan.load(given.plan)
        made_of: dict[str, Any] = {
            "teacher": identity(self.dense),
            "model": self.kind,
            "student": asdict(given) | {"plan": given.plan and shapes.factors},
        }
        if given.calibration:
            made_of |= about_text

        def work(folder: Path, _: Path) -> None:
            batches = None
            if given.calibration:
                found: Any = texts()
                # Spread over the corpus: neighbouring texts are often about the same subject.
                chosen = range(0, len(found), max(1, len(found) // given.calibration))
                rows = Subset(found, chosen[: given.calibration])
                collate = DataCollatorWithPadding(self.tokenizer)
                batches = DataLoader(rows, batch_size=32, collate_fn=collate)
            student = compress(
                self._dense_model(), shapes, calibration=batches, sequential=given.sequential
            )
            self._save(student, folder)

        return self._step("start", made_of, work, alone=True)

    def _save(self, student: PreTrainedModel, folder: Path) -> None:
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        copy_modules(self.dense, folder)

    def _dense_model(self) -> PreTrainedModel:
        """The teacher with the heads of stage 1, all of which its file must contain."""
        try:
            return load_model(self.dense, self.kind, dtype=torch.float32)
        except ValueError as error:
            raise ValueError(
                f"{error} If stage1.heads are missing, use stage1.heads=[] or another teacher."
            ) from error

    def _stage1(self, stage: Stage1, start: Path, text: str) -> Path:
        settings = _settings(stage)
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
        task, tuning = TASKS[name], self.recipe.tasks[name].fine_tuning
        if tuning.model is not None:
            return _located(tuning.model)
        made_of = {
            "teacher": identity(self.dense),
            "fine_tuning": _settings(tuning),
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            args = self._arguments(tuning, training)
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
            "stage2": _settings(stage),
            "seed": seed,
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            cache = str(self.output / "cache" / name) if stage.cache_teacher else None
            args = self._arguments(stage, training, seed=seed, teacher_cache=cache)
            tuned = _load(TASKS[name], teacher)
            rows = self._dataset(name, tuned, stage.max_length)
            model = with_head_of(tuned, student)
            trainer = DistillationTrainer(
                model, tuned, args, train_dataset=rows, processing_class=self.tokenizer
            )
            self._train(trainer, folder)

        return self._step(f"stage2/{name}/seed-{seed}", made_of, work)

    def _dataset(self, name: str, model: PreTrainedModel, max_length: int) -> Dataset:
        task, rows = TASKS[name], self._read(name, "train")
        if not isinstance(rows, Table):
            return SpanDataset(self.tokenizer, rows, max_length, min(128, max_length // 3))
        rows = match_labels(task, rows, model.config)
        labels = label_targets(rows.labels, model.config)
        return TextDataset(self.tokenizer, rows.texts, rows.texts_b, labels, max_length)

    def _train(self, trainer: Trainer, folder: Path) -> None:
        training = trainer.args.output_dir
        last = _last_checkpoint(Path(training))
        # DistillationTrainer checks the checkpoint itself.
        if last and self.is_main and not isinstance(trainer, DistillationTrainer):
            processes = trainer.args.world_size
            resuming.check(Path(last), range(processes), processes)
        with stoppable(trainer) as stop:
            trainer.train(resume_from_checkpoint=last)
            step = trainer.state.global_step
            if stop.number is not None and step < trainer.state.max_steps:
                raise Interrupted(stop.number, f"Stopped after step {step}, kept in {training}.")
            trainer.save_model(str(folder))  # in all processes: parameters may be sharded
        if self.is_main:
            (folder / "training_args.bin").unlink(missing_ok=True)  # contains local paths
            trainer.state.save_to_json(str(folder / _HISTORY))

    def _evaluated(self, name: str, role: str, model: str | Path) -> _Metrics:
        rows = {key: value for key, value in self.rows[name].items() if not key.endswith(" train")}

        def work(folder: Path, _: Path) -> None:
            loaded = _load(TASKS[name], model).to(self.state.device).eval()
            size, scores = self.recipe.evaluation.batch_size, {}
            for other in self._sets(name):
                task = TASKS[other]
                data = self._read(other, task.evaluation)
                scores[other] = evaluate_task(loaded, self.tokenizer, task, data, size)
            write_json(folder / "scores.json", scores)

        made_of = {"model": identity(model), "data": rows}
        folder = self._step(f"scores/{name}/{role}", made_of, work, alone=True, renew=True)
        return read_json(folder / "scores.json")

    def _latency(self, given: Latency, student: Path) -> dict[str, Any]:
        def work(folder: Path, _: Path) -> None:
            models = {
                name: load_model(source, "AutoModel", dtype=torch.float32).to(self.state.device)
                for name, source in (("teacher", self.dense), ("student", student))
            }
            before, times = torch.get_num_threads(), {}
            threads = given.threads or before
            torch.set_num_threads(threads)
            try:
                for batch in given.batch:
                    timings = measure.latency(models, batch, given.tokens, given.seconds)
                    times[batch] = {name: timing._asdict() for name, timing in timings.items()}
            finally:
                torch.set_num_threads(before)
            latency = {
                "machine": machine(),
                "threads": threads,
                "dtype": "float32",
                "tokens": given.tokens,
                "milliseconds": times,
            }
            write_json(folder / "latency.json", latency)

        made_of = {"student": identity(student), "latency": asdict(given), "machine": machine()}
        folder = self._step("latency", made_of, work, alone=True, renew=True)
        return read_json(folder / "latency.json")

    # Reports

    def _print_scores(self, scores: Sequence[Score], role: str) -> None:
        for score in scores:
            value = f"{score.teacher:.2f}" if role == "teacher" else score
            paper = ", ".join(f"{name} {number:g}" for name, number in score.paper.items())
            beside = f"   [paper: {paper}]" if paper else ""
            self.print(f"  {score.task} {score.split} {score.metric}, {role}: {value}{beside}")

    def _summarise(
        self, stage1: Path, students: list[tuple], scores: list[Score], latency: dict | None
    ) -> None:
        """Write numbers, cards and curves from the files of the steps."""
        dense, ours = (
            measure.parameters(without_weights(source).base_model)
            for source in (self.dense, stage1)
        )
        results = {
            "parameters": {"teacher": dense, "student": ours},
            "scores": [asdict(score) | {"student": str(score)} for score in scores],
            "latency": latency,
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
        if self.recipe.stage1:
            self._save_card(stage1, "stage 1", latency=latency)
            pictures["stage1"] = {"stage 1": stage1}
        for name, seed, folder in students:
            of_task = [score for score in scores if score.task in self._sets(name)]
            self._save_card(folder, name, seed=seed, scores=of_task, latency=latency)
            pictures.setdefault(name, {})[f"seed {seed}"] = folder
        (self.output / "curves").mkdir(exist_ok=True)
        try:
            for name, folders in pictures.items():
                histories = {of: curves.read(folder / _HISTORY) for of, folder in folders.items()}
                curves.save(histories, self.output / "curves" / f"{name}.png")
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing to draw
            self.print(f"No curves: {error}")
        self.print(f"Students, with their cards, are in {students[-1][2] if students else stage1}.")

    def _save_card(self, folder: Path, stage: str, **results: Any) -> None:
        model, recipe = without_weights(folder), self.recipe
        with torch.device("meta"):
            dense = model.dense_class(model.config.to_dense())
        form = recipe.student.preset or "Kronecker student"
        name = f"{form} of {without_paths(recipe.teacher)}, {stage}"
        size = measure.parameters(dense)
        card = model_card(model, name=name, dense_parameters=size, recipe=recipe.given, **results)
        write_file(folder / "README.md", str(card))


def _compared(teacher: _Metrics, ours: Mapping[int, _Metrics]) -> list[Score]:
    """Scores of all sets and metrics: the teacher's, the students' by seed, and the paper's."""
    scores = []
    for name, metrics in teacher.items():
        task = TASKS[name]
        by_seed = {seed: compare(task, scored[name]) for seed, scored in ours.items()}
        for metric, paper in compare(task, metrics).items():
            seeds = {seed: row[metric]["ours"] for seed, row in by_seed.items()}
            scores.append(Score(name, task.evaluation, metric, paper.pop("ours"), seeds, paper))
    return scores


def _load(task: Task, source: str | Path, **config: Any) -> PreTrainedModel:
    head = "QuestionAnswering" if task.kind == "span" else "SequenceClassification"
    auto_class = f"AutoModelFor{head}"
    return load_model(source, auto_class, new_head=True, dtype=torch.float32, **config)


def _located(source: str) -> str:
    """A hub name or local path, with ``package:NAME/PATH`` and ``~`` resolved."""
    if not source.startswith(_PACKAGE):
        source = os.path.expanduser(source)
        is_local = source.startswith((".", "/")) or source.count("/") > 1 or not source
        if is_local and not Path(source).exists():
            raise FileNotFoundError(
                f"{source!r} is not a file or folder; give an existing one, or a name on the hub."
            )
        return source
    name, _, path = source.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or find_spec(name) is None:
        raise ImportError(f"{source} needs the package {name}, which is not installed.", name=name)
    found = Path(str(resources.files(name))) / path
    if not found.exists():
        raise FileNotFoundError(f"{source} is not in the package {name}: there is no {found}.")
    return str(found)


def _settings(stage: Stage) -> dict[str, Any]:
    """The settings of a stage that the weights depend on."""
    kept = {k: v for k, v in stage.arguments.items() if not k.startswith(_IRRELEVANT)}
    return asdict(stage) | {"arguments": kept}


def _last_checkpoint(training: Path) -> str | None:
    """The last complete checkpoint: Trainer writes its state after everything else."""
    whole = {
        int(step): path.parent
        for path in training.glob(f"checkpoint-*/{_HISTORY}")
        if (step := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    return str(whole[max(whole)]) if whole else None


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
