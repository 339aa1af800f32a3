"""Recipes: YAML files that describe everything ``kroneckerbert.reproduction.run.run`` does.

    recipe = load("kronecker-bert-8", ["stage1.corpus.source=texts.txt.gz"])

A recipe is a mapping with the fields of ``Recipe``. Those in ``kroneckerbert/reproduction/recipes``
follow the paper.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainingArguments

from kroneckerbert.distillation import DistillationConfig
from kroneckerbert.presets import PRESETS, SUFFIXES
from kroneckerbert.reproduction.sentences import TextFile
from kroneckerbert.reproduction.shipped import RECIPES, from_yaml, shipped
from kroneckerbert.reproduction.tasks import TASKS

# Arguments that are set elsewhere, or by the run.
_NOT_ARGUMENTS = {
    "output_dir": "run chooses it",
    "per_device_train_batch_size": "write batch_size, the rows per step over all devices",
    "teacher_cache": "write cache_teacher in stage2",
    "resume_from_checkpoint": "a restarted run resumes by itself",
    "use_cpu": "GPUs are used if there are any; hide them with CUDA_VISIBLE_DEVICES=",
    "push_to_hub": "upload the finished folder",
}
# Lower bounds of arguments that TrainingArguments does not check.
_LEAST = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "save_steps": 0,
    "seed": 0,
}
_PROGRAMS = ("onnx", "openvino")  # that run no code when they are loaded
_hints = cache(typing.get_type_hints)  # slow for classes as large as TrainingArguments


@dataclass(frozen=True)
class CorpusSource:
    """Arguments of ``kroneckerbert.reproduction.corpus.read_corpus``.

    ``source`` may also be a file of the data folder, or ``package:NAME/PATH``.
    """

    source: str
    config: str | None = None
    share: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """How the teacher is compressed: exactly one of preset, plan (a file) and factors.

    ``calibration`` is the number of texts used as calibration, of stage 1, else of the first task;
    ``sequential`` is that of ``kroneckerbert.compress``.
    """

    preset: str | None = None
    plan: str | None = None
    factors: dict | None = None
    calibration: int = 0
    sequential: bool = False


@dataclass(frozen=True)
class FineTuning:
    """The teacher on a task: trained with ``TrainingArguments``, or ``model``, already trained.

    A table too small for ``least_steps`` in ``num_train_epochs`` is passed over more often.
    """

    arguments_class: ClassVar[type] = TrainingArguments
    model: str | None = None
    least_steps: int = 0
    max_length: int = 128
    batch_size: int = 32
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage1:
    """Distillation on unlabelled text; ``heads`` is empty, ``[mlm]`` or ``[mlm, nsp]``."""

    arguments_class: ClassVar[type] = DistillationConfig
    corpus: CorpusSource
    heads: list[str] = field(default_factory=list)
    pack: bool = False
    max_length: int = 128
    batch_size: int = 32
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Sentences:
    """Distillation of a sentence encoder on unlabelled texts, instead of stage 1 and tasks.

    Args:
        texts: Files in the data folder, see ``kroneckerbert.reproduction.sentences``.
        pairs: Tables in the data folder, ``label<TAB>text<TAB>text``, by the name of their score,
            the Spearman correlation of labels and cosines. No text of them is trained on.
        watch: Another such table, scored during the training; its texts are left out as well.
        cache_teacher: Whether to store the teacher's vectors, two bytes a number.
    """

    arguments_class: ClassVar[type] = DistillationConfig
    texts: dict[str, TextFile]
    pairs: dict[str, str] = field(default_factory=dict)
    watch: str | None = None
    cache_teacher: bool = True
    max_length: int = 64
    batch_size: int = 64
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage2:
    """Distillation on a task; ``cache_teacher`` stores the teacher's outputs for all seeds.

    ``least_steps`` is that of ``FineTuning``.
    """

    arguments_class: ClassVar[type] = DistillationConfig
    least_steps: int = 0
    max_length: int = 128
    batch_size: int = 32
    cache_teacher: bool = False
    arguments: dict = field(default_factory=dict)


Stage = Stage1 | Sentences | FineTuning | Stage2


@dataclass(frozen=True)
class TaskRecipe:
    """Settings of one task that differ from the recipe's ``fine_tuning`` and ``stage2``.

    A task of one's own has ``train`` and ``test``, tables in the data folder, and perhaps a
    ``metric``, see ``kroneckerbert.reproduction.tasks.own_task``.
    """

    train: str | None = None
    test: str | None = None
    metric: str | None = None
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    stage2: Stage2 = field(default_factory=Stage2)


@dataclass(frozen=True)
class Evaluation:
    """``also`` names sets in addition to the tasks' own, such as imdb for models of sst2."""

    batch_size: int = 32
    also: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Deployment:
    """Other forms of each task's students, evaluated too: int8 weights, and an exported program."""

    int8: bool = False
    export: str | None = None


@dataclass(frozen=True)
class Latency:
    """Timing of teacher and student, for about ``seconds`` per batch size."""

    batch: list[int] = field(default_factory=lambda: [1])
    tokens: int = 128
    threads: int | None = None
    seconds: float = 10.0


@dataclass(frozen=True)
class Card:
    """Hub metadata of the model card, a line per data set with its licence, and per limit."""

    license: str | None = None
    language: str | None = None
    data: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """The whole procedure. ``batch_size`` always counts the rows of a step over all processes.

    Args:
        description: One line.
        teacher: Hub name or folder of a dense model, or ``package:NAME/PATH`` in a Python package.
        student: See ``Student``.
        stage1: See ``Stage1``; without it, stage 2 begins at the compressed model.
        sentences: See ``Sentences``; such a recipe has no stage 1 and no tasks.
        fine_tuning: For every task, see ``FineTuning``.
        stage2: For every task, see ``Stage2``; its arguments, like stage 1's, are fields of
            ``DistillationConfig``.
        tasks: By name, see ``TaskRecipe``.
        seeds: One student per seed in stage 2.
        evaluation: See ``Evaluation``.
        deployment: See ``Deployment``.
        latency: See ``Latency``; without it nothing is timed.
        card: See ``Card``.

    Attributes:
        given: The mapping that the recipe was made from.
    """

    teacher: str
    student: Student
    description: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    stage1: Stage1 | None = None
    sentences: Sentences | None = None
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    stage2: Stage2 = field(default_factory=Stage2)
    tasks: dict[str, TaskRecipe] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    deployment: Deployment = field(default_factory=Deployment)
    latency: Latency | None = None
    card: Card = field(default_factory=Card)
    given: dict = field(default_factory=dict, init=False, repr=False)


# Reading


def load(source: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A YAML file, or the name of an included recipe.
        changes: Overrides such as ``"stage1.arguments.learning_rate=1e-4"``, with YAML values.

    Raises:
        ValueError: If a key is unknown or missing, a value is out of range, or the file is not
            YAML.
        TypeError: If a value has the wrong type.
        FileNotFoundError: If it does not exist.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{str(source).removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no recipe {str(source)!r}: give a YAML file or one of "
            f"{', '.join(shipped())}."
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OSError(f"{source} cannot be read: {error.strerror}.") from error
    given = from_yaml(text, source)
    if not isinstance(given, dict):
        raise TypeError(f"{source} must be a mapping, with teacher, student, …; got {given!r:.80}.")
    for change in changes:
        _set(given, change)
    try:
        return parse(given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{source}: {error}") from error


def parse(given: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping describes, after all checks.

    Raises:
        ValueError, TypeError: As ``load``.
    """
    given = {key: value for key, value in given.items() if value is not None}
    _build(Recipe, given)  # before tasks are merged, so that errors name the right key
    tasks = given.get("tasks", {})
    for name, own in tasks.items():
        is_own = bool(own) and ("train" in own or "test" in own)
        if is_own and (name in TASKS or not ("train" in own and "test" in own)):
            raise ValueError(
                f"tasks.{name}: a task of your own has train and test, two tables, and a name that "
                "is none of the paper's tasks."
            )
        if not is_own:
            _known(name, [task for task in TASKS if "train" in TASKS[task].splits], "tasks.")
    shared = {key: given.get(key, {}) for key in ("fine_tuning", "stage2")}
    merged = {name: _merged(shared, own) for name, own in tasks.items()}
    recipe = _build(Recipe, {**given, "tasks": merged})
    recipe.given.update(given)
    _check(recipe)
    return recipe


def select(recipe: Recipe, tasks: Sequence[str] | None, seeds: Sequence[int] | None) -> Recipe:
    """The recipe restricted to some tasks, or with other seeds; None keeps its own.

    Raises:
        ValueError, TypeError: If it lacks a task, or the seeds are invalid.
    """
    given = dict(recipe.given)
    for name in tasks or ():
        _known(name, recipe.tasks, "tasks.")
    if tasks is not None:
        given["tasks"] = {name: given["tasks"][name] for name in tasks}
    if seeds is not None:
        given["seeds"] = list(seeds)
    return parse(given)


def _set(given: dict, change: str) -> None:
    """``a.b.c=value``, in place."""
    path, equals, value = change.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)):
        raise ValueError(
            f"--set {change!r} must be a key and its value, such as "
            "stage1.arguments.learning_rate=1e-4."
        )
    for parent in parents:
        if given.get(parent) is None:
            given[parent] = {}
        given = given[parent]
        if not isinstance(given, dict):
            raise TypeError(f"--set {change!r}: {parent} is {given!r}, which has no keys.")
    given[key] = from_yaml(value, f"--set {change!r}")


def _merged(shared: Any, own: Any) -> Any:
    if not isinstance(shared, Mapping) or not isinstance(own, Mapping):
        return shared if own is None else own
    return {**shared, **{key: _merged(shared.get(key), value) for key, value in own.items()}}


def _build(cls: type, given: Any, where: str = "") -> Any:
    """The dataclass that a mapping describes; None means an empty mapping."""
    given = {} if given is None else given
    known = {f.name: f for f in fields(cls) if f.init}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{where.rstrip('.')} must be a mapping with {', '.join(known)}; got {given!r}."
        )
    for key in given:
        _known(key, known, where)
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{name} is missing; a recipe needs it.")
    hints = _hints(cls)
    return cls(**{key: _value(hints[key], value, f"{where}{key}") for key, value in given.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    inner: Any = next((part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)), None)
    if inner is not None and typing.get_origin(hint) is not dict:
        return _build(inner, value, f"{where}.")
    if not _fits(value, dict if inner else hint):
        expected = hint if typing.get_args(hint) else hint.__name__
        raise TypeError(f"{where} must be {expected}, got {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}.")
    if inner is None:
        return value
    return {key: _build(inner, entry, f"{where}.{key}.") for key, entry in value.items()}


# Not huggingface_hub.dataclasses.strict: it refuses 1 for a float, accepts True for an integer and
# does not name the path of a nested key.
def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if origin is typing.Literal:
        return value in parts
    if hint in (int, float):  # 1 is accepted for 1.0; True is not a number
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _known(key: Any, names: Iterable[str], where: str) -> None:
    if key in names:
        return
    near = difflib.get_close_matches(str(key), names, 1, 0.5)
    raise ValueError(
        f"{where}{key} is unknown; "
        + (f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(names)}.")
    )


def _check(recipe: Recipe) -> None:
    """Conditions that types do not express."""
    student, stage1, latency = recipe.student, recipe.stage1, recipe.latency
    if recipe.deployment.export not in (None, *_PROGRAMS):
        raise ValueError(
            f"deployment.export must be one of {', '.join(_PROGRAMS)}, got "
            f"{recipe.deployment.export!r}."
        )
    ways = [way for way in ("preset", "plan", "factors") if getattr(student, way) is not None]
    if len(ways) != 1:
        found = " and ".join(ways) or "no shapes"
        raise ValueError(f"student has {found}; give one of preset, plan (a file) and factors.")
    if student.preset is not None:
        base, *suffixes = student.preset.split("+")
        _known(base, PRESETS, "student.preset = ")
        for suffix in suffixes:
            _known(suffix, SUFFIXES, f"student.preset = {base}+")
    sentences = recipe.sentences
    if sentences is not None:
        if stage1 is not None or recipe.tasks:
            raise ValueError(
                "a recipe with sentences has no stage1 and no tasks: write one recipe for each."
            )
        if not sentences.texts:
            raise ValueError("sentences.texts names no file; a recipe needs text to train on.")
        _check_stage(sentences, "sentences")
    if student.sequential and not student.calibration:
        raise ValueError("student.sequential refits on text: set student.calibration, such as 512.")
    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {recipe.seeds}.")
    others = sorted({name for task in TASKS.values() for name in task.evaluated_on})
    for name in recipe.evaluation.also:
        _known(name, others, "evaluation.also: ")
    if stage1 is not None:
        if stage1.heads not in ([], ["mlm"], ["mlm", "nsp"]):
            raise ValueError(f"stage1.heads must be [], [mlm] or [mlm, nsp]; got {stage1.heads}.")
        _check_stage(stage1, "stage1")
        if not 0 < stage1.corpus.share <= 1:
            raise ValueError(f"stage1.corpus.share must be in (0, 1], got {stage1.corpus.share}.")
    # Shared settings first: an error there should not be reported for each task.
    parts: dict[str, Recipe | TaskRecipe] = {f"tasks.{n}.": t for n, t in recipe.tasks.items()}
    for where, task in {"": recipe, **parts}.items():
        _check_stage(task.fine_tuning, f"{where}fine_tuning")
        _check_stage(task.stage2, f"{where}stage2")
    if latency is not None:
        if not (latency.seconds > 0 and min(latency.batch, default=0) > 0):
            raise ValueError("latency needs batch sizes and seconds above 0.")
        _in_range("latency.batch", max(latency.batch), 1)
        _in_range("latency.tokens", latency.tokens, 1)
        if latency.threads is not None:
            _in_range("latency.threads", latency.threads, 1, os.cpu_count() or 1)
    for seed in recipe.seeds:
        _in_range("seeds", seed, 0, 2**32 - 1)
    _in_range("student.calibration", student.calibration, 0)
    _in_range("evaluation.batch_size", recipe.evaluation.batch_size, 1)


def _check_stage(stage: Stage, where: str) -> None:
    if stage.batch_size < 1 or stage.max_length < 8:
        raise ValueError(
            f"{where} needs a batch_size of at least 1 and a max_length of at least 8; got "
            f"{stage.batch_size} and {stage.max_length}."
        )
    if isinstance(stage, FineTuning | Stage2):
        _in_range(f"{where}.least_steps", stage.least_steps, 0)
    hints = _hints(stage.arguments_class)
    elsewhere = _NOT_ARGUMENTS | ({"seed": "write seeds"} if isinstance(stage, Stage2) else {})
    for key, value in stage.arguments.items():
        if key in elsewhere:
            raise ValueError(f"{where}.arguments.{key} cannot be set here: {elsewhere[key]}.")
        _known(key, hints, f"{where}.arguments.")
        _value(hints[key], value, f"{where}.arguments.{key}")
        if key in _LEAST and value is not None:
            _in_range(f"{where}.arguments.{key}", value, _LEAST[key])


def _in_range(where: str, value: float, least: float, most: float = 10**9) -> None:
    if not least <= value <= most:
        raise ValueError(
            f"{where} must be at least {least:g} and at most {most:.10g}, got {value}."
        )
