"""The paper's whole procedure from one YAML file: start, stage 1, and every task for every seed.

    recipe = load("kronecker-bert-8", ["stage1.corpus.source=texts.txt.gz"])
    run(recipe, "output", data="glue", tasks=["sst2"])

A recipe is a mapping with the fields of :class:`Recipe`; those in ``kroneckerbert/recipes`` say
what the paper does. What a run writes:

    corpus/                    the tokens of stage 1
    start/                     the student before training
    stage1/                    ... and after stage 1
    teacher/TASK/              the teacher, fine-tuned
    stage2/TASK/seed-N/        the students, with their cards
    scores/TASK/…/scores.json
    latency/latency.json
    recipe.yaml, results.json  what was done last, and all its numbers
    curves/                    the losses, term by term
    training/                  checkpoints of what is not finished

A step's folder is there when all of it is, with ``made_of.json``: what it depends on. A run that is
started again takes what fits, goes on from the last checkpoint, and refuses what no longer fits.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import timedelta
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.table import Table as RichTable
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import kroneckerbert
from kron_kernels.plan import Plan
from kroneckerbert import curves, measure
from kroneckerbert.card import Score, machine, model_card
from kroneckerbert.configuration_kroneckerbert import PRESETS
from kroneckerbert.conversion import compress
from kroneckerbert.corpus import (
    Corpus,
    MaskedCollator,
    describe_corpus,
    read_corpus,
    tokenise_corpus,
)
from kroneckerbert.data import Table, TextDataset, label_targets
from kroneckerbert.distillation import DistillationConfig, DistillationTrainer
from kroneckerbert.files import replace_folder
from kroneckerbert.heads import with_head_of
from kroneckerbert.modeling_kroneckerbert import max_tokens
from kroneckerbert.squad import Questions, SpanDataset
from kroneckerbert.tasks import TASKS, Task, compare, evaluate_task, match_labels, read_task

_PACKAGE = "package:"  # package:NAME/PATH is a file or folder in an installed package
# By the heads of pre-training that are distilled.
_STAGE1_MODELS = {
    (): "AutoModel",
    ("mlm",): "AutoModelForMaskedLM",
    ("mlm", "nsp"): "AutoModelForPreTraining",
}
# Arguments that a recipe has elsewhere, or a run decides.
_NOT_ARGUMENTS = {
    "output_dir": "run chooses it",
    "per_device_train_batch_size": "write batch_size, the rows of a step over all devices",
    "teacher_cache": "write cache_teacher in stage2",
    "resume_from_checkpoint": "a run that is started again goes on",
    "use_cpu": "GPUs are used if there are any; hide them with CUDA_VISIBLE_DEVICES=",
    "push_to_hub": "upload the finished folder",
}
_RECIPES = Path(str(resources.files("kroneckerbert"))) / "recipes"
_MADE_OF = "made_of.json"
_HISTORY = "trainer_state.json"
# Arguments that no weight depends on.
_INDIFFERENT = {
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "disable_tqdm",
    "logging_first_step",
    "logging_steps",
    "report_to",
    "run_name",
    "save_steps",
    "save_total_limit",
}
_FAR = timedelta(days=7)  # one process prepares, evaluates and measures while the others wait


@dataclass(frozen=True)
class CorpusSource:
    """Arguments of :func:`kroneckerbert.corpus.read_corpus`."""

    source: str
    config: str | None = None
    share: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """What the teacher is compressed to: exactly one of preset, plan (its file) and factors.

    ``calibration`` is a number of the corpus's sequences, on which the layers' outputs start
    nearest; the rest is as of :func:`kroneckerbert.compress`.
    """

    preset: str | None = None
    plan: str | None = None
    factors: dict | None = None
    calibration: int = 0
    sequential: bool = False
    rescale: bool = False


@dataclass(frozen=True)
class FineTuning:
    """The teacher on a task: trained with ``TrainingArguments``, or ``model``, that was."""

    model: str | None = None
    max_length: int = 128
    batch_size: int = 32
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage1:
    """Distillation on unlabelled text; ``heads`` are none, ``[mlm]`` or ``[mlm, nsp]``."""

    corpus: CorpusSource
    heads: list[str] = field(default_factory=list)
    pack: bool = False
    max_length: int = 128
    batch_size: int = 32
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage2:
    """Distillation on a task; ``cache_teacher`` keeps what the teacher says, for all seeds."""

    max_length: int = 128
    batch_size: int = 32
    cache_teacher: bool = False
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRecipe:
    """Of one task: what differs from the recipe's own ``fine_tuning`` and ``stage2``."""

    fine_tuning: FineTuning = field(default_factory=FineTuning)
    stage2: Stage2 = field(default_factory=Stage2)


@dataclass(frozen=True)
class Evaluation:
    """``also`` names sets beside the tasks' own, such as imdb for the models of sst2."""

    batch_size: int = 32
    also: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Latency:
    """What is measured of teacher and student, for about ``seconds`` per batch size."""

    batch: list[int] = field(default_factory=lambda: [1])
    tokens: int = 128
    threads: int | None = None
    seconds: float = 10.0


@dataclass(frozen=True)
class Card:
    """For the model card: its Hub metadata, and a line for each set of data and its licence."""

    license: str | None = None
    language: str | None = None
    data: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """The whole procedure. ``batch_size`` is always the rows of a step, over all processes.

    Args:
        description: In one line.
        teacher: Name or folder of a dense model; also ``package:NAME/PATH``, in a Python package.
        student: See :class:`Student`.
        stage1: See :class:`Stage1`; without it, tasks begin at the compressed model.
        fine_tuning: Of every task, see :class:`FineTuning`.
        stage2: Of every task, see :class:`Stage2`; its arguments, as stage 1's, are the fields of
            ``DistillationConfig``.
        tasks: By name, see :class:`TaskRecipe`.
        seeds: Each has a student of its own in stage 2.
        evaluation: See :class:`Evaluation`.
        latency: See :class:`Latency`; without it nothing is timed.
        card: See :class:`Card`.
        given: The mapping that this was made of.
    """

    teacher: str
    student: Student
    description: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    stage1: Stage1 | None = None
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    stage2: Stage2 = field(default_factory=Stage2)
    tasks: dict[str, TaskRecipe] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    latency: Latency | None = None
    card: Card = field(default_factory=Card)
    given: dict = field(default_factory=dict, repr=False)


# Reading


def shipped() -> dict[str, str]:
    """The recipes that come with the package: the description of each by its name."""
    files = sorted(_RECIPES.iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): yaml.load(file.read_text(), _Loader)["description"]
        for file in files
        if file.name.endswith(".yaml")
    }


def load(source: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A YAML file, or the name of one that is shipped.
        changes: ``"stage1.arguments.learning_rate=1e-4"``, with a YAML value.

    Raises:
        ValueError: If a key is unknown or missing, a value is out of range, or it is no YAML.
        TypeError: If a value is of another type than its key.
        FileNotFoundError: If there is no such file.
    """
    path = Path(source)
    if not path.is_file():
        name = str(source).removesuffix(".yaml")
        path = _RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe {str(source)!r}: give a YAML file or one of "
                f"{', '.join(shipped())}."
            )
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no YAML: {error}") from error
    if not isinstance(given, dict):
        raise TypeError(f"{source} must be a mapping, with teacher, student, …; got {given!r}.")
    for change in changes:
        _set(given, change)
    return parse(given)


def parse(given: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping describes, checked.

    Raises:
        ValueError, TypeError: As :func:`load`.
    """
    given = {key: value for key, value in given.items() if value is not None}
    names = [f.name for f in fields(Recipe) if f.name != "given"]
    for key in given:
        _known(key, names, "")
    # Checked before they are merged into every task, so that an error names the right place.
    _build(Recipe, {**given, "tasks": {}}, "")
    own = given.get("tasks", {})
    if not isinstance(own, dict):
        raise TypeError(f"tasks must be a mapping from names to what differs, got {own!r}.")
    shared = {key: given.get(key, {}) for key in ("fine_tuning", "stage2")}
    merged = {}
    for name, task in own.items():
        _known(name, _trainable(), "tasks.")
        _build(TaskRecipe, task or {}, f"tasks.{name}.")
        merged[name] = _merged(shared, task or {})
    recipe = _build(Recipe, {**given, "tasks": merged, "given": dict(given)}, "")
    _check(recipe)
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a word; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _set(given: dict, change: str) -> None:
    """``a.b.c=value``, in place."""
    path, equals, value = change.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)):
        raise ValueError(
            f"--set {change!r} must be a key and its value: stage1.arguments.learning_rate=1e-4."
        )
    for parent in parents:
        if given.get(parent) is None:
            given[parent] = {}
        given = given[parent]
        if not isinstance(given, dict):
            raise TypeError(f"--set {change!r}: {parent} is {given!r}, which has no keys.")
    given[key] = yaml.load(value, _Loader)


def _merged(shared: Any, own: Any) -> Any:
    if not isinstance(shared, Mapping) or not isinstance(own, Mapping):
        return shared if own is None else own
    return {**shared, **{key: _merged(shared.get(key), value) for key, value in own.items()}}


def _build(cls: type, given: Any, where: str) -> Any:
    """The dataclass that a mapping describes."""
    if not isinstance(given, Mapping):
        names = ", ".join(f.name for f in fields(cls))
        raise TypeError(f"{where.rstrip('.')} must be a mapping with {names}; got {given!r}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in given.items():
        _known(key, hints, where)
        values[key] = _value(hints[key], value, f"{where}{key}")
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{f.name} is missing; a recipe needs it.")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    parts = typing.get_args(hint) or (hint,)
    inner = next((part for part in parts if is_dataclass(part)), None)
    if inner and typing.get_origin(hint) is dict:
        return {key: _build(inner, v, f"{where}.{key}.") for key, v in value.items()}
    if inner:
        return _build(inner, {} if value is None else value, f"{where}.")
    if not _fits(value, hint):
        told = str(hint) if typing.get_args(hint) else hint.__name__
        raise TypeError(f"{where} must be {told}, got {value!r}.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if origin is typing.Literal:
        return value in parts
    if hint in (int, float):  # True is no number, 1 may stand for 1.0
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _known(key: Any, names: Iterable[str], where: str) -> None:
    names = list(names)
    if key in names:
        return
    near = difflib.get_close_matches(str(key), names, 1, 0.5)
    raise ValueError(
        f"{where}{key} is unknown; "
        + (f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(names)}.")
    )


def _check(recipe: Recipe) -> None:
    """What types do not say."""
    student, stage1 = recipe.student, recipe.stage1
    ways = [way for way in ("preset", "plan", "factors") if getattr(student, way) is not None]
    if len(ways) != 1:
        raise ValueError(
            f"student has {' and '.join(ways) or 'no shapes'}; give one of preset, plan (a file) "
            "and factors."
        )
    if student.preset is not None:
        _known(student.preset, PRESETS, "student.preset = ")
    if stage1 is None and student.calibration:
        raise ValueError("student.calibration needs stage1.corpus, whose text it is.")
    if student.sequential and not student.calibration:
        raise ValueError("student.sequential refits on text: set student.calibration, such as 512.")
    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {recipe.seeds}.")
    for name in recipe.evaluation.also:
        also = {name for task in TASKS.values() for name in task.evaluated_on}
        _known(name, sorted(also), "evaluation.also: ")
    if stage1 is not None:
        if tuple(stage1.heads) not in _STAGE1_MODELS:
            raise ValueError(f"stage1.heads must be [], [mlm] or [mlm, nsp]; got {stage1.heads}.")
        _check_stage(stage1, DistillationConfig, "stage1")
    # What tasks share comes first: an error in it is not one of each.
    for where, task in ("", recipe), *((f"tasks.{n}.", t) for n, t in recipe.tasks.items()):
        _check_stage(task.fine_tuning, TrainingArguments, f"{where}fine_tuning")
        _check_stage(task.stage2, DistillationConfig, f"{where}stage2")
        if "seed" in task.stage2.arguments:
            raise ValueError(f"{where}stage2.arguments.seed is no argument here: write seeds.")
    if recipe.latency is not None and not (
        recipe.latency.seconds > 0 and min(recipe.latency.batch, default=0) > 0
    ):
        raise ValueError("latency needs batch sizes and seconds above 0.")


def _check_stage(stage: Stage1 | FineTuning | Stage2, cls: type, where: str) -> None:
    if stage.batch_size < 1 or stage.max_length < 8:
        raise ValueError(
            f"{where} needs a batch_size of at least 1 and a max_length of at least 8; got "
            f"{stage.batch_size} and {stage.max_length}."
        )
    hints = _hints(cls)
    for key, value in stage.arguments.items():
        if key in _NOT_ARGUMENTS:
            raise ValueError(f"{where}.arguments.{key} is no argument here: {_NOT_ARGUMENTS[key]}.")
        _known(key, hints, f"{where}.arguments.")
        _value(hints[key], value, f"{where}.arguments.{key}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    """They take a while of a class so large."""
    return typing.get_type_hints(cls)


def _trainable() -> list[str]:
    return [name for name, task in TASKS.items() if "train" in task.splits]


# Running


def run(
    recipe: Recipe | str | Path,
    output: str | Path,
    data: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Do what a recipe says, or what is left of it; see the module's text for what is written.

    Under ``torchrun`` or ``accelerate launch`` every process calls it.

    Args:
        recipe: Or what :func:`load` takes.
        output: Folder for everything.
        data: Folder with the tasks' files, see :func:`kroneckerbert.tasks.read_task`; None
            downloads them from the Hugging Face Hub.
        tasks: Those of the recipe to do; None is all.
        seeds: In place of the recipe's.

    Returns:
        What ``results.json`` says: ``parameters`` of ``teacher`` and ``student``; ``scores``, the
        fields of a :class:`kroneckerbert.card.Score` each; ``latency``, None if it is not measured.

    Raises:
        ValueError: If the recipe is wrong, does not fit the models, the data or the number of
            processes, or a folder was made by another recipe.
        TypeError: If a value of the recipe is of the wrong type.
        OSError: If something cannot be read or written.
        ImportError: If a package is missing.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe)
    given = dict(recipe.given)
    if tasks is not None:
        for name in tasks:
            _known(name, recipe.tasks, "tasks.")
        given["tasks"] = {name: given["tasks"][name] for name in dict.fromkeys(tasks)}
    if seeds is not None:
        given["seeds"] = list(seeds)
    return _Run(parse(given), Path(output), None if data is None else Path(data)).run()


class _Run:
    """One recipe, one folder; steps in the order in which they need one another."""

    def __init__(self, recipe: Recipe, output: Path, data: Path | None):
        self.recipe, self.output, self.data = recipe, output.resolve(), data
        # The first of its kind decides how long processes wait for one another. Without being told
        # of the CPU, it would take each process for the only one.
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=_FAR)
        self.console = Console(
            markup=False, highlight=False, soft_wrap=True, quiet=not self.state.is_main_process
        )
        self.say = self.console.print
        self.dense = _located(recipe.teacher)
        self.pretrained = _STAGE1_MODELS[tuple(recipe.stage1.heads) if recipe.stage1 else ()]

    def run(self) -> dict[str, Any]:
        recipe = self.recipe
        self.tokenizer = AutoTokenizer.from_pretrained(self.dense)
        self._check()
        if self.state.is_main_process:
            _make(self.output)
        # What is missing is said now, not after the hours of stage 1.
        with self.state.main_process_first():  # it downloads for the others, too
            self.rows = {name: self._digests(name) for name in recipe.tasks}
        start = self._start()
        student = self._stage1(start) if recipe.stage1 else start
        scores: list[Score] = []
        students: list[tuple[str, int, Path]] = []
        for name in recipe.tasks:
            teacher = self._teacher(name)
            told = self._evaluated(name, "teacher", teacher)
            self._say_scores(_compared(told, {}), "teacher")
            ours = {}
            for seed in recipe.seeds:
                folder = self._stage2(name, teacher, student, seed)
                ours[seed] = self._evaluated(name, f"seed-{seed}", folder)
                students.append((name, seed, folder))
            compared = _compared(told, ours)
            self._say_scores(compared, "student")
            scores += compared
        latency = self._latency(student) if recipe.latency else None
        if self.state.is_main_process:
            self._summarise(student, students, scores, latency)
        self._wait()
        return json.loads((self.output / "results.json").read_text())

    # What is known before any work

    def _check(self) -> None:
        """Resolve every argument, tell of them, and raise what would else come late."""
        recipe, state = self.recipe, self.state
        self.say(f"{recipe.description or 'A recipe'}\nTeacher {recipe.teacher}; to {self.output}")
        self.say(
            f"{state.num_processes} process(es) on {state.device.type}, "
            f"{self._devices} device(s) in all"
        )
        stages: dict[str, tuple[type, Stage1 | FineTuning | Stage2]] = {}
        if recipe.stage1:
            stages["stage 1"] = DistillationConfig, recipe.stage1
        for name, task in recipe.tasks.items():
            if task.fine_tuning.model is None:
                stages[f"{name}, teacher"] = TrainingArguments, task.fine_tuning
            stages[f"{name}, stage 2"] = DistillationConfig, task.stage2
        longest = max_tokens(_without_weights(self.dense), self.tokenizer)
        for name, (cls, stage) in stages.items():
            if stage.max_length > longest:
                raise ValueError(
                    f"{name}: max_length {stage.max_length} exceeds the teacher's {longest}."
                )
            args = self._arguments(cls, stage, self.output)
            accumulated = args.gradient_accumulation_steps
            length = (
                f"{args.max_steps} steps"
                if args.max_steps > 0
                else f"{args.num_train_epochs:g} epochs"
            )
            self.say(
                f"{name}: {stage.batch_size} rows a step = {self._devices} device(s) x "
                f"{args.per_device_train_batch_size} rows x {accumulated} accumulated; {length}, "
                f"learning rate {args.learning_rate:g}, at most {stage.max_length} tokens"
            )
        latency = recipe.latency
        if latency is not None and latency.tokens > longest:
            raise ValueError(f"latency.tokens {latency.tokens} exceeds the teacher's {longest}.")

    @property
    def _devices(self) -> int:
        """A single process uses all GPUs that it sees."""
        alone = self.state.num_processes == 1
        return max(1, torch.cuda.device_count()) if alone else self.state.num_processes

    def _arguments(
        self, cls: type, stage: Stage1 | FineTuning | Stage2, training: Path, **decided: Any
    ) -> TrainingArguments:
        parts = self._devices * stage.arguments.get("gradient_accumulation_steps", 1)
        if stage.batch_size % parts:
            raise ValueError(
                f"batch_size {stage.batch_size} cannot be divided by {parts} = {self._devices} "
                "device(s) x gradient_accumulation_steps; change one of them."
            )
        usual = {
            "save_strategy": "steps",
            "save_total_limit": 1,
            "logging_first_step": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not sys.stderr.isatty(),
            "report_to": "none",
        }
        return cls(
            output_dir=str(training),
            per_device_train_batch_size=stage.batch_size // parts,
            **usual | stage.arguments | decided,
        )

    def _sets(self, name: str) -> list[str]:
        """What a task's models are evaluated on."""
        also = self.recipe.evaluation.also
        return [name, *(other for other in TASKS[name].evaluated_on if other in also)]

    def _read(self, name: str, split: str) -> Table | Questions:
        try:
            return read_task(name, split, self.data)
        except OSError as error:
            remedy = (
                "leave the task out with --task"
                if "train" in TASKS[name].splits
                else "leave it out of evaluation.also"
            )
            raise type(error)(f"{str(error).rstrip('.')}; or {remedy}.") from error

    def _digests(self, name: str) -> dict[str, str]:
        """What the data are, by set and split."""
        wanted = [
            (name, "train"),
            *((other, TASKS[other].evaluation) for other in self._sets(name)),
        ]
        return {
            f"{other} {split}": _digest(repr(self._read(other, split))) for other, split in wanted
        }

    # Steps

    def _step(
        self,
        name: str,
        made_of: Mapping[str, Any],
        work: Callable[[Path, Path], None],
        *,
        alone: bool = False,
        renew: bool = False,
    ) -> Path:
        """The folder of a step, which ``work`` fills unless it is there already.

        Args:
            name: Of the folder.
            made_of: What it depends on, plain JSON.
            work: Gets the folder, and one for checkpoints, which goes when the step is done.
            alone: Only the main process works.
            renew: Do again what no longer fits, where it costs little.
        """
        folder, training = self.output / name, self.output / "training" / name
        made_of = json.loads(json.dumps(made_of))
        done = _fits_folder(folder, made_of, renew)
        if not done:
            _fits_folder(training, made_of, renew or not _last_whole_checkpoint(training))
        self._wait()  # until all know whether it is done
        if done:
            return folder
        begins = self.state.is_main_process
        self.say(f"- {name}")
        if begins and not alone:
            _make(training)
            (training / _MADE_OF).write_text(json.dumps(made_of, indent=2) + "\n")
        self._wait()
        if begins or not alone:
            # The others have a name for it, and write nothing.
            with replace_folder(folder) if begins else nullcontext(folder) as new, _quiet():
                work(new, training)
                if begins:
                    (new / _MADE_OF).write_text(json.dumps(made_of, indent=2) + "\n")
        if begins:
            shutil.rmtree(training, ignore_errors=True)
        self._wait()
        return folder

    def _wait(self) -> None:
        self.state.wait_for_everyone()

    def _corpus(self) -> tuple[Path, str]:
        """The folder of tokens, and what they are of."""
        told = self.recipe.stage1.corpus
        how = {"config": told.config, "share": told.share, "seed": told.seed}
        source, folder = _located(told.source), self.output / "corpus"
        what = describe_corpus(source, **how)
        if self.state.is_main_process:
            if not (folder / "corpus.json").exists():
                self.say(f"- corpus: {what}")
            tokenise_corpus(read_corpus(source, **how), self.tokenizer, folder, what)
        self._wait()
        return folder, what

    def _start(self) -> Path:
        told, stage1 = self.recipe.student, self.recipe.stage1
        shapes = Plan.load(told.plan) if told.plan else told.preset or told.factors
        made_of = {
            "teacher": _identity(self.dense),
            "model": self.pretrained,
            "student": asdict(told) | {"plan": told.plan and shapes.factors},
        }
        if stage1:
            self.corpus, self.text = self._corpus()
        if told.calibration:
            made_of |= {"corpus": self.text, "max_length": stage1.max_length}

        def work(folder: Path, _: Path) -> None:
            batches = None
            if told.calibration:
                texts = Corpus(self.corpus, self.tokenizer, stage1.max_length)
                # From all of it: neighbours are often about the same thing.
                chosen = range(0, len(texts), max(1, len(texts) // told.calibration))
                batches = DataLoader(
                    Subset(texts, chosen[: told.calibration]),
                    batch_size=32,
                    collate_fn=DataCollatorWithPadding(self.tokenizer),
                )
            student = compress(
                self._dense_model(),
                shapes,
                calibration=batches,
                sequential=told.sequential,
                rescale=told.rescale,
            )
            student.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        return self._step("start", made_of, work, alone=True)

    def _dense_model(self) -> PreTrainedModel:
        """The teacher with the heads of stage 1, all of it from its file."""
        auto = getattr(transformers, self.pretrained)
        model, info = auto.from_pretrained(
            self.dense, dtype=torch.float32, output_loading_info=True
        )
        # An encoder without its pooler is whole, unless pairs are predicted from it.
        pairs = self.pretrained == "AutoModelForPreTraining"
        if missing := sorted(n for n in info["missing_keys"] if pairs or "pooler." not in n):
            raise ValueError(
                f"{self.recipe.teacher} has not the {len(missing)} tensors of stage1.heads, such "
                f"as {missing[0]}; use a checkpoint that has, or stage1.heads=[]."
            )
        return model.eval()

    def _stage1(self, start: Path) -> Path:
        stage = self.recipe.stage1
        made_of = {
            "start": _made_of(start),
            "corpus": self.text,
            "stage1": {k: v for k, v in _settings(stage).items() if k != "corpus"},
        }

        def work(folder: Path, training: Path) -> None:
            args = self._arguments(DistillationConfig, stage, training)
            student = getattr(transformers, self.pretrained).from_pretrained(start)
            teacher = self._dense_model()
            if args.logits_weight == 0:  # then its heads, a word's size each, would work in vain
                teacher = teacher.base_model
            texts = Corpus(
                self.corpus,
                self.tokenizer,
                stage.max_length,
                pairs="nsp" in stage.heads,
                pack=stage.pack,
            )
            masked = "mlm" in stage.heads
            collator = (
                MaskedCollator(self.tokenizer, seed=args.seed)
                if masked
                else DataCollatorWithPadding(self.tokenizer)
            )
            trainer = DistillationTrainer(
                student,
                teacher,
                args,
                train_dataset=texts,
                data_collator=collator,
                processing_class=self.tokenizer,
            )
            self._train(trainer, folder, training)

        return self._step("stage1", made_of, work)

    def _teacher(self, name: str) -> str | Path:
        task, tuning = TASKS[name], self.recipe.tasks[name].fine_tuning
        if tuning.model is not None:
            return _located(tuning.model)
        made_of = {
            "teacher": _identity(self.dense),
            "fine_tuning": _settings(tuning),
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            args = self._arguments(TrainingArguments, tuning, training)
            set_seed(args.seed)  # draws the head
            kind = {"num_labels": 1, "problem_type": "regression"}
            if task.labels:
                ids = {label: i for i, label in enumerate(task.labels)}
                kind = {"label2id": ids, "id2label": {i: label for label, i in ids.items()}}
            kind = {} if task.kind == "span" else kind
            model = _auto(task).from_pretrained(self.dense, dtype=torch.float32, **kind)
            rows = self._dataset(name, model, tuning.max_length)
            trainer = Trainer(model, args, train_dataset=rows, processing_class=self.tokenizer)
            self._train(trainer, folder, training)

        return self._step(f"teacher/{name}", made_of, work)

    def _stage2(self, name: str, teacher: str | Path, student: Path, seed: int) -> Path:
        stage = self.recipe.tasks[name].stage2
        made_of = {
            "student": _made_of(student),
            "teacher": _made_of(teacher),
            "stage2": _settings(stage),
            "seed": seed,
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            said = str(self.output / "cache" / name) if stage.cache_teacher else None
            args = self._arguments(
                DistillationConfig, stage, training, seed=seed, teacher_cache=said
            )
            tuned = _auto(TASKS[name]).from_pretrained(teacher, dtype=torch.float32)
            trainer = DistillationTrainer(
                with_head_of(tuned, student),
                tuned,
                args,
                train_dataset=self._dataset(name, tuned, stage.max_length),
                processing_class=self.tokenizer,
            )
            self._train(trainer, folder, training)

        return self._step(f"stage2/{name}/seed-{seed}", made_of, work)

    def _dataset(self, name: str, model: PreTrainedModel, max_length: int) -> Dataset:
        task, rows = TASKS[name], self._read(name, "train")
        if task.kind == "span":
            return SpanDataset(self.tokenizer, rows, max_length, min(128, max_length // 3))
        rows = match_labels(task, rows, model.config)
        labels = label_targets(rows.labels, model.config)
        return TextDataset(self.tokenizer, rows.texts, rows.texts_b, labels, max_length)

    def _train(self, trainer: Trainer, folder: Path, training: Path) -> None:
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(training))
        trainer.save_model(str(folder))  # by all processes: the parameters may be sharded
        if self.state.is_main_process:
            (folder / "training_args.bin").unlink(missing_ok=True)  # names this machine's folders
            trainer.state.save_to_json(str(folder / _HISTORY))

    def _evaluated(self, name: str, who: str, model: str | Path) -> dict[str, dict[str, float]]:
        """Metrics by the name of the set."""
        rows = {key: value for key, value in self.rows[name].items() if not key.endswith(" train")}
        made_of = {"model": _made_of(model), "data": rows}

        def work(folder: Path, _: Path) -> None:
            loaded = _auto(TASKS[name]).from_pretrained(model, dtype=torch.float32)
            loaded.to(self.state.device).eval()
            size = self.recipe.evaluation.batch_size
            scores = {
                other: evaluate_task(
                    loaded,
                    self.tokenizer,
                    TASKS[other],
                    self._read(other, TASKS[other].evaluation),
                    size,
                )
                for other in self._sets(name)
            }
            (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")

        folder = self._step(f"scores/{name}/{who}", made_of, work, alone=True, renew=True)
        return json.loads((folder / "scores.json").read_text())

    def _latency(self, student: Path) -> dict[str, Any]:
        told = self.recipe.latency
        made_of = {"student": _made_of(student), "latency": asdict(told), "machine": machine()}

        def work(folder: Path, _: Path) -> None:
            models = {
                name: AutoModel.from_pretrained(source, dtype=torch.float32).to(self.state.device)
                for name, source in (("teacher", self.dense), ("student", student))
            }
            with _threads(told.threads):
                threads = torch.get_num_threads()
                times = {
                    batch: measure.latency(models, batch, told.tokens, told.seconds)
                    for batch in told.batch
                }
            latency = {
                "machine": machine(),
                "threads": threads,
                "dtype": "float32",
                "tokens": told.tokens,
                "milliseconds": {
                    batch: {name: timing._asdict() for name, timing in timings.items()}
                    for batch, timings in times.items()
                },
            }
            (folder / "latency.json").write_text(json.dumps(latency, indent=2) + "\n")

        folder = self._step("latency", made_of, work, alone=True, renew=True)
        return json.loads((folder / "latency.json").read_text())

    # Telling

    def _say_scores(self, scores: Sequence[Score], who: str) -> None:
        for score in scores:
            of_teacher = who == "teacher"
            value = f"{score.teacher:.2f}" if of_teacher else str(score)
            # The teacher stands beside BERT_BASE, a student beside the paper's students.
            paper = ", ".join(
                f"{name} {value:g}"
                for name, value in score.paper.items()
                if (name == "BERT_BASE") == of_teacher
            )
            told = f"  {score.task} {score.split} {score.metric}, {who}: {value}"
            self.say(f"{told}   [paper: {paper}]" if paper else told)

    def _summarise(
        self,
        stage1: Path,
        students: Sequence[tuple[str, int, Path]],
        scores: Sequence[Score],
        latency: dict[str, Any] | None,
    ) -> None:
        """Numbers, cards and curves, from what is on the disk."""
        dense, ours = _without_weights(self.dense), _without_weights(stage1)
        sizes = {
            name: measure.parameters(model.base_model)
            for name, model in (("teacher", dense), ("student", ours))
        }
        results = {
            "parameters": sizes,
            "scores": [asdict(score) | {"student": str(score)} for score in scores],
            "latency": latency,
        }
        text = yaml.safe_dump(self.recipe.given, sort_keys=False, allow_unicode=True)
        _write(self.output / "recipe.yaml", text)
        _write(self.output / "results.json", json.dumps(results, indent=2) + "\n")
        if scores:
            table = RichTable("set", "metric", "teacher", "student", "paper")
            for score in scores:
                paper = ", ".join(f"{name} {value:g}" for name, value in score.paper.items())
                cells = score.task, score.metric, f"{score.teacher:.2f}", str(score), paper
                table.add_row(*cells)
            self.say(table, soft_wrap=False)
        self.say(
            f"{sizes['student']:,} parameters instead of {sizes['teacher']:,}, "
            f"{sizes['teacher'] / sizes['student']:.1f} times fewer (without heads)"
        )
        for batch, times in (latency or {"milliseconds": {}})["milliseconds"].items():
            medians = [times[name]["median"] for name in ("teacher", "student")]
            self.say(
                f"{medians[1]:.1f} ms instead of {medians[0]:.1f} at batch {batch}, "
                f"{latency['tokens']} tokens, {latency['threads']} thread(s), {latency['machine']}"
            )
        told = {"recipe": self.recipe.given, "latency": latency}
        if self.recipe.stage1:
            self._card(stage1, ours, "stage 1", **told)
        for name, seed, folder in students:
            sets = self._sets(name)
            of_task = [score for score in scores if score.task in sets]
            self._card(folder, _without_weights(folder), name, seed=seed, scores=of_task, **told)
        self._draw(students)
        self.say(f"Students, with their cards, are in {(students or [('', 0, stage1)])[-1][2]}.")

    def _card(self, folder: Path, model: PreTrainedModel, name: str, **told: Any) -> None:
        with torch.device("meta"):
            dense = model.dense_class(model.config.to_dense())
        form = self.recipe.student.preset or "Kronecker student"
        package = self.recipe.teacher.startswith(_PACKAGE)
        teacher = self.recipe.teacher.removeprefix(_PACKAGE).split("/")[0 if package else -1]
        name = f"{form} of {teacher}, {name}"
        card = model_card(model, name=name, dense_parameters=measure.parameters(dense), **told)
        _write(folder / "README.md", str(card))

    def _draw(self, students: Sequence[tuple[str, int, Path]]) -> None:
        if find_spec("matplotlib") is None:
            self.say("Curves are not drawn: pip install 'kron-kernels[demo]' for matplotlib.")
            return
        pictures: dict[str, dict[str, list[dict]]] = {}
        if self.recipe.stage1:
            pictures["stage1"] = {"stage 1": curves.read(self.output / "stage1" / _HISTORY)}
        for name, seed, folder in students:
            pictures.setdefault(name, {})[f"seed {seed}"] = curves.read(folder / _HISTORY)
        _make(self.output / "curves")
        for name, histories in pictures.items():
            curves.save(histories, self.output / "curves" / f"{name}.png")


def _compared(
    teacher: Mapping[str, Mapping[str, float]],
    ours: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> list[Score]:
    """Metrics by set, of the teacher and by seed, beside the paper's."""
    scores = []
    for name, metrics in teacher.items():
        task = TASKS[name]
        by_seed = {seed: compare(task, told[name]) for seed, told in ours.items()}
        for metric, told in compare(task, metrics).items():
            seeds = {seed: compared[metric]["ours"] for seed, compared in by_seed.items()}
            paper = {name: value for name, value in told.items() if name != "ours"}
            scores.append(Score(name, task.evaluation, metric, told["ours"], seeds, paper))
    return scores


def _auto(task: Task) -> type:
    if task.kind == "span":
        return AutoModelForQuestionAnswering
    return AutoModelForSequenceClassification


def _located(source: str) -> str:
    """Where a name, a path or ``package:NAME/PATH`` is."""
    if not source.startswith(_PACKAGE):
        source = os.path.expanduser(source)
        if not Path(source).exists() and (source[0] in "./" or source.count("/") > 1):
            raise FileNotFoundError(
                f"{source} is no file or folder; give one that is there, or a name on the hub."
            )
        return source
    name, _, path = source.removeprefix(_PACKAGE).partition("/")
    if find_spec(name) is None:
        raise ImportError(
            f"{source} is in the package {name}, which is not installed; install it, or give a "
            "name or folder.",
            name=name,
        )
    return str(Path(str(resources.files(name))) / path)


def _settings(stage: Stage1 | FineTuning | Stage2) -> dict[str, Any]:
    """What of it the weights depend on."""
    kept = {k: v for k, v in stage.arguments.items() if k not in _INDIFFERENT}
    return {**asdict(stage), "arguments": kept}


def _identity(source: str | Path) -> str:
    """A model's name; of a folder with a digest of what is in it."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name}, {digest.hexdigest()[:16]}"


def _made_of(source: str | Path) -> str:
    """What a step's folder depends on, in short; of any other model, what it is."""
    path = Path(source) / _MADE_OF
    return _digest(path.read_text()) if path.exists() else _identity(source)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _fits_folder(folder: Path, made_of: Mapping[str, Any], renew: bool) -> bool:
    """Whether a folder holds just this.

    Raises:
        ValueError: If it holds another's work, unless that may be done again.
    """
    path = folder / _MADE_OF
    if not path.exists():
        return False
    before = json.loads(path.read_text())
    changes = list(_changes(before, made_of))
    if changes and not renew:
        raise ValueError(
            f"{folder} is of another recipe: {'; '.join(changes)}. Delete {folder} to make it "
            "anew, change the recipe back, or choose another output folder."
        )
    return not changes


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterable[str]:
    for key in {**before, **now}:
        old, new = before.get(key, "not set"), now.get(key, "not set")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{where}{key}.")
        elif old != new:
            yield f"{where}{key} was {old} and is {new}"


def _last_whole_checkpoint(training: Path) -> str | None:
    """The last whose state is there: Trainer writes that after everything else."""
    whole = [path.parent for path in training.glob(f"checkpoint-*/{_HISTORY}")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)


def _without_weights(source: str | Path) -> PreTrainedModel:
    """The model that a name or folder holds, on the meta device: its sizes, at no cost."""
    config = AutoConfig.from_pretrained(source)
    name = (config.architectures or [""])[0]
    with torch.device("meta"):
        if hasattr(kroneckerbert, name):
            return getattr(kroneckerbert, name)(config)
        return AutoModel.from_config(config)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".writable", "w"):
            pass
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"cannot write {folder}: {error.strerror} ({error.filename}); choose a folder in a "
            "place that you can write to."
        ) from error


def _write(path: Path, text: str) -> None:
    """All of it, or what was there."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars of loading and tables of what a new head lacks: that is as it should be."""
    logging = transformers.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
