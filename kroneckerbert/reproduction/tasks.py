"""The tasks of the KroneckerBERT paper: data, metrics and published results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kroneckerbert.data import Table, read_lines, read_table
from kroneckerbert.evaluation import classifies_sequences, evaluate
from kroneckerbert.reproduction.squad import (
    Question,
    Questions,
    predict_spans,
    read_squad,
    squad_metrics,
)

_SPELLINGS = {"train": ("train",), "validation": ("dev", "val", "validation"), "test": ("test",)}
_OF_CLASSES, _CORRELATIONS = ("accuracy", "f1", "matthews"), ("spearman", "pearson")
_PUBLISHED = ("BERT_BASE", "KroneckerBERT_8", "KroneckerBERT_21")

# The paper's results for BERT_BASE, KroneckerBERT_8 and KroneckerBERT_21 by task, split and metric,
# in per cent; None where it reports none. From its tables 2 and 3 (test), 4 and 7 (validation), 5
# (SQuAD) and 9 (out of distribution). It names no metrics. Test results use GLUE's; on validation,
# QQP's can only be accuracy, and MRPC's is assumed to be F1.
_PAPER: dict[tuple[str, str, str], tuple[float | None, ...]] = {
    ("cola", "validation", "matthews"): (None, 43.6, 34.0),
    ("cola", "test", "matthews"): (52.8, 39.8, 28.3),
    ("sst2", "validation", "accuracy"): (None, 91.1, 88.9),
    ("sst2", "test", "accuracy"): (93.4, 91.9, 88.4),
    ("mrpc", "validation", "f1"): (None, 87.5, 86.2),
    ("mrpc", "test", "f1"): (87.9, 88.5, 87.1),
    ("stsb", "validation", "spearman"): (None, 88.0, 86.4),
    ("stsb", "test", "spearman"): (85.2, 84.5, 81.3),
    ("qqp", "validation", "accuracy"): (None, 90.9, 90.0),
    ("qqp", "test", "f1"): (71.1, 71.5, 70.5),
    ("mnli", "validation", "accuracy"): (None, 82.8, 80.6),
    ("mnli", "test", "accuracy"): (83.9, 83.0, 81.3),
    ("mnli_mismatched", "validation", "accuracy"): (None, 83.5, 80.6),
    ("mnli_mismatched", "test", "accuracy"): (83.4, 82.7, 80.1),
    ("qnli", "validation", "accuracy"): (None, 90.7, 87.2),
    ("qnli", "test", "accuracy"): (90.9, 90.2, 86.1),
    ("rte", "validation", "accuracy"): (None, 69.66, 66.4),
    ("rte", "test", "accuracy"): (67.0, 67.2, 64.7),
    ("squad", "validation", "exact_match"): (80.5, 78.1, 70.7),
    ("squad", "validation", "f1"): (88.0, 86.3, 80.5),
    ("squad_v2", "validation", "exact_match"): (74.5, 70.4, 66.9),
    ("squad_v2", "validation", "f1"): (77.7, 73.8, 69.3),
    ("paws", "test", "accuracy"): (61.3, 61.4, None),
    ("imdb", "test", "accuracy"): (88.0, 86.5, None),
    ("hans", "validation", "accuracy"): (50.7, 50.4, None),
}


@dataclass(frozen=True)
class Task:
    """A task, or an extra set on which models of another task are evaluated.

    Args:
        name: Name on the command line.
        kind: Predicts a class, a number, or a span of a text.
        labels: The classes in GLUE's order; a ``Table`` contains their indices.
        metrics: Reported metrics, the main one first.
        hub: Arguments of ``datasets.load_dataset``.
        columns: Columns of that dataset: one or two texts, then the label.
        splits: The dataset's name for each available split.
        files: File names in a data folder, besides ``<name>_<split>.tsv``.
        file_columns: Columns in these files, if they differ from ``columns``.
        file_labels: Labels in these files, if they differ from ``labels``.
        header: Columns of files without a header.
        evaluated_on: Names of extra sets for the task's models.
        null_threshold: See ``kroneckerbert.reproduction.squad.predict_spans``.
        own: The file of each split in the data folder, of a task that is not the paper's.
    """

    name: str
    kind: Literal["classification", "regression", "span"]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: Mapping[str, str]
    columns: tuple[str, ...]
    splits: Mapping[str, str]
    files: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ()
    file_labels: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    evaluated_on: tuple[str, ...] = ()
    null_threshold: float | None = None
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> bool:
        """Whether rows have two texts."""
        return len(self.columns) == 3

    @property
    def paper(self) -> dict[tuple[str, str], tuple[float | None, ...]]:
        """The paper's results for BERT_BASE, KroneckerBERT_8 and _21 by split and metric."""
        return {key[1:]: results for key, results in _PAPER.items() if key[0] == self.name}

    @property
    def evaluation(self) -> str:
        """The validation split, or the test split if there is none."""
        return "validation" if "validation" in self.splits else "test"


def _glue(
    name: str,
    folder: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    texts: tuple[str, ...],
    **others,
) -> Task:
    return Task(
        name,
        "classification" if labels else "regression",
        labels,
        metrics,
        {"path": "nyu-mll/glue", "name": name},
        (*texts, "label"),
        **{
            "splits": {split: split for split in _SPELLINGS},
            "files": (f"{folder}/{{split}}.tsv",),
            **others,
        },
    )


def _squad(name: str, version: str, **others) -> Task:
    return Task(
        name,
        "span",
        (),
        ("exact_match", "f1"),
        {"path": f"rajpurkar/{name}"},
        ("question", "context", "answers"),
        {"train": "train", "validation": "validation"},
        (f"squad_{{split}}_v{version}.json", f"{{split}}-v{version}.json"),
        **others,
    )


# fmt: off
_TASKS = (
    _glue(
        "cola", "CoLA", ("unacceptable", "acceptable"), ("matthews",), ("sentence",),
        header=("source", "label", "mark", "sentence"),
    ),
    _glue(
        "sst2", "SST-2", ("negative", "positive"), ("accuracy",), ("sentence",),
        evaluated_on=("imdb",),
    ),
    _glue(
        "mrpc", "MRPC", ("not_equivalent", "equivalent"), ("f1", "accuracy"),
        ("sentence1", "sentence2"),
        file_columns=("#1 String", "#2 String", "Quality"),
        evaluated_on=("paws",),
    ),
    _glue(
        "stsb", "STS-B", (), ("pearson", "spearman"), ("sentence1", "sentence2"),
        file_columns=("sentence1", "sentence2", "score"),
    ),
    _glue(
        "qqp", "QQP", ("not_duplicate", "duplicate"), ("f1", "accuracy"),
        ("question1", "question2"),
        file_columns=("question1", "question2", "is_duplicate"),
    ),
    mnli := _glue(
        "mnli", "MNLI", ("entailment", "neutral", "contradiction"), ("accuracy",),
        ("premise", "hypothesis"),
        splits={"train": "train", "validation": "validation_matched", "test": "test_matched"},
        files=("MNLI/{split}.tsv", "MNLI/{split}_matched.tsv"),
        file_columns=("sentence1", "sentence2", "gold_label"),
        evaluated_on=("mnli_mismatched",),
    ),
    replace(
        mnli,
        name="mnli_mismatched",
        splits={"validation": "validation_mismatched", "test": "test_mismatched"},
        files=("MNLI/{split}_mismatched.tsv",),
        evaluated_on=(),
    ),
    _glue(
        "qnli", "QNLI", ("entailment", "not_entailment"), ("accuracy",),
        ("question", "sentence"),
    ),
    _glue(
        "rte", "RTE", ("entailment", "not_entailment"), ("accuracy",),
        ("sentence1", "sentence2"),
        evaluated_on=("hans",),
    ),
    _glue(
        "wnli", "WNLI", ("not_entailment", "entailment"), ("accuracy",),
        ("sentence1", "sentence2"),
    ),
    _squad("squad", "1.1"),
    _squad("squad_v2", "2.0", null_threshold=0.0),
    Task(
        "trec", "classification", ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), ("accuracy",),
        # The Hub's converted branch: `datasets` no longer runs scripts.
        {"path": "CogComp/trec", "revision": "refs/convert/parquet"},
        ("text", "coarse_label"),
        {"train": "train", "test": "test"},
    ),
    Task(
        "paws", "classification", ("not_equivalent", "equivalent"), ("accuracy",),
        {"path": "google-research-datasets/paws", "name": "labeled_final"},
        ("sentence1", "sentence2", "label"),
        {"test": "test"},
        ("PAWS/{split}.tsv",),
    ),
    Task(
        "imdb", "classification", ("negative", "positive"), ("accuracy",),
        {"path": "stanfordnlp/imdb"},
        ("text", "label"),
        {"test": "test"},
        file_labels=("neg", "pos"),
    ),
    Task(
        "hans", "classification", ("entailment", "not_entailment"), ("accuracy",),
        {"path": "jhu-cogsci/hans", "revision": "refs/convert/parquet"},
        ("premise", "hypothesis", "label"),
        {"validation": "validation"},
        ("heuristics_evaluation_set.txt", "HANS/heuristics_evaluation_set.txt"),
        file_columns=("sentence1", "sentence2", "gold_label"),
        file_labels=("entailment", "non-entailment"),
    ),
)
# fmt: on
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: If the task is unknown.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def own_task(name: str, train: str, test: str, metric: str | None, data: str | Path) -> Task:
    """A task of one's own: two tables ``label<TAB>text[<TAB>second text]`` in a folder.

    Words are classes, in their order; so are integers, from 0 without gaps, unless the metric is a
    correlation; other numbers are a regression's.

    Args:
        name: Its name.
        train: The table to train on.
        test: The table to evaluate on.
        metric: ``"accuracy"``, ``"f1"`` or ``"matthews"`` of classes, ``"pearson"`` or
            ``"spearman"`` of numbers; None takes accuracy or Spearman's.
        data: The folder.

    Raises:
        ValueError: If a table has the wrong format, or the labels do not fit the metric.
        OSError: If a file cannot be read.
    """
    tables = [read_table(Path(data) / file) for file in (train, test)]
    found = {label for table in tables for label in table.labels}
    if len({table.texts_b is None for table in tables}) > 1:
        raise ValueError(f"{train} and {test} must both have one text a row, or both two.")
    if len({isinstance(label, str) for label in found}) > 1:
        raise ValueError(f"the labels of {train} and {test} must all be words, or all be numbers.")
    labels = sorted(found)  # type: ignore[type-var]
    fractions = any(isinstance(label, float) for label in labels)
    numbers = metric in _CORRELATIONS if metric else fractions
    fitting = _CORRELATIONS if numbers else _OF_CLASSES
    if metric is not None and metric not in (*_CORRELATIONS, *_OF_CLASSES):
        raise ValueError(f"metric must be one of {', '.join((*_OF_CLASSES, *_CORRELATIONS))}.")
    if numbers and isinstance(labels[0], str):
        raise ValueError(f"{metric} is of numbers, but the labels of {train} are words.")
    if not numbers and fractions:
        raise ValueError(f"{metric} is of classes, but the labels of {train} are fractions.")
    if not numbers and isinstance(labels[0], int) and labels != list(range(len(labels))):
        raise ValueError(
            f"classes must be words, or integers from 0 without gaps; {train} and {test} have "
            f"{', '.join(map(str, labels[:10]))}. For numbers that are scores, set the metric "
            "spearman."
        )
    return Task(
        name,
        "regression" if numbers else "classification",
        () if numbers else tuple(map(str, labels)),
        (metric or fitting[0],),
        {},
        ("text", "label") if tables[0].texts_b is None else ("text", "second", "label"),
        {"train": "train", "test": "test"},
        own={"train": train, "test": test},
    )


def read_task(name: str | Task, split: str, data: str | Path | None = None) -> Table | Questions:
    """The rows of one split of a task.

    Args:
        name: A key of ``TASKS``, or an own task.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        data: A folder with ``<name>_<split>.tsv``, see ``kroneckerbert.data.read_table``, or with
            the task's official files: the unpacked archive of GLUE (``SST-2/train.tsv``), SQuAD's
            ``train-v1.1.json``, ``PAWS/test.tsv``, ``heuristics_evaluation_set.txt``. Files may be
            compressed (``.gz``); ``dev`` and ``val`` also mean ``validation``. None downloads from
            the Hugging Face Hub.

    Returns:
        Questions for a span task; else a table with float labels for a regression, and indices of
        the task's ``labels`` for a classification.

    Raises:
        ValueError: If the task or split is unknown, or the rows have the wrong format, no labels
            or unknown labels.
        FileNotFoundError: If the folder has none of these files.
        ImportError: If ``datasets`` is needed and missing.
        OSError: If a file cannot be read, or the Hub cannot be reached.
    """
    task = name if isinstance(name, Task) else find_task(name)
    if split not in task.splits:
        raise ValueError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}.")
    if task.own:
        return read_file(task, Path(data or ".") / task.own[split])
    if data is None:
        return _from_hub(task, split)
    return read_file(task, _find(task, split, Path(data)))


def read_file(task: Task, path: Path) -> Table | Questions:
    """All rows of a task's file, which may have any name.

    Args:
        task: The task.
        path: A file in a format of ``read_task``, plain or compressed (``.gz``).

    Returns:
        As ``read_task``.

    Raises:
        ValueError: If the rows have the wrong format, no labels or unknown labels.
        OSError: If the file cannot be read.
    """
    return read_squad(path) if task.kind == "span" else _read_rows(task, path)


def match_labels(task: Task, table: Table, config: PreTrainedConfig) -> Table:
    """The table with labels renumbered as the model numbers them.

    A model that names its labels may have them in any order; one that does not (``LABEL_0``, ...)
    is assumed to use GLUE's order.

    Args:
        task: A classification or regression.
        table: The result of ``read_task``.
        config: Configuration of a model for sequence classification.

    Raises:
        ValueError: If task and model have different labels.
    """
    ids = {str(name).lower(): i for name, i in config.label2id.items()}
    names = [name.lower() for name in task.labels]
    if config.num_labels == 1 and task.kind == "regression":
        return table
    if config.num_labels == len(names) and set(names) == set(ids):
        return replace(table, labels=[ids[names[label]] for label in table.labels])
    unnamed = all(name in (str(i), f"label_{i}") for name, i in ids.items())
    if config.num_labels == len(names) and unnamed:
        return table
    raise ValueError(
        f"the model's labels are {', '.join(config.label2id)}, but those of {task.name} are "
        f"{', '.join(task.labels) or 'numbers (num_labels = 1)'}; use a model that was trained on "
        "this task, or name its labels in config.label2id."
    )


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Table | Questions,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, float]:
    """The task's metrics, the main one first.

    Args:
        model: Any transformer, dense or Kronecker, with a head for this kind of task; a regression
            on pairs also accepts a model without a head, see
            ``kroneckerbert.evaluation.evaluate``.
        tokenizer: Its tokenizer.
        task: The task.
        rows: The result of ``read_task``.
        batch_size: Rows per forward pass; rows of similar length are batched together.
        progress: Whether to show a bar over the batches.

    Returns:
        As ``kroneckerbert.evaluation.evaluate``; for spans, in per cent, as
        ``kroneckerbert.reproduction.squad.squad_metrics``.

    Raises:
        ValueError: If the model lacks the head, or has other labels than the task.
    """
    if not isinstance(rows, Table):
        answers = predict_spans(
            model, tokenizer, rows, batch_size, task.null_threshold, progress=progress
        )
        scores = squad_metrics(answers, rows)
    else:
        if classifies_sequences(model):
            rows = match_labels(task, rows, model.config)
        elif task.kind == "classification":
            raise ValueError(
                f"a {type(model).__name__} has no head for the labels of {task.name}; use a model "
                "for sequence classification."
            )
        scores = evaluate(model, tokenizer, rows, batch_size, progress)
    return {metric: scores[metric] for metric in task.metrics}


def compare(
    task: Task, scores: Mapping[str, float], split: str | None = None
) -> dict[str, dict[str, float]]:
    """Scores beside the paper's, all in per cent.

    Args:
        task: The task.
        scores: The result of ``evaluate_task``.
        split: Split of the scores; None means ``task.evaluation``.

    Returns:
        For every metric, ``ours`` and the paper's results for ``BERT_BASE``, ``KroneckerBERT_8``
        and ``KroneckerBERT_21`` where it reports them.
    """
    scale = 1 if task.kind == "span" else 100
    compared = {}
    for metric, score in scores.items():
        published = task.paper.get((split or task.evaluation, metric), ())
        compared[metric] = {"ours": scale * score} | {
            model: value
            for model, value in zip(_PUBLISHED, published, strict=bool(published))
            if value is not None
        }
    return compared


def _from_hub(task: Task, split: str) -> Table | Questions:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{task.name} is downloaded with datasets ({error}): pip install 'kron-kernels[data]', "
            "or give a folder with its files: --data DIR",
            name="datasets",
        ) from error
    path = task.hub["path"]
    try:
        rows = load_dataset(**task.hub, split=task.splits[split])
    except Exception as error:  # httpx raises no OSError
        raise OSError(
            f"{path} cannot be loaded from the Hub ({type(error).__name__}: {error}); give a "
            f"folder with the files of {task.name}: --data DIR"
        ) from error
    if task.kind == "span":
        return [
            Question(
                row["id"],
                row["question"],
                row["context"],
                tuple(row["answers"]["text"]),
                tuple(row["answers"]["answer_start"]),
            )
            for row in rows
        ]
    *texts, labels = (list(rows[column]) for column in task.columns)
    return Table(_targets(task, labels, path), *texts)


def _find(task: Task, split: str, folder: Path) -> Path:
    patterns = task.files
    if task.kind != "span":
        patterns = (f"{task.name}_{{split}}.tsv", f"{task.name}_{{split}}.raw.tsv", *patterns)
    names = [p.format(split=spelling) for p in patterns for spelling in _SPELLINGS[split]]
    names = list(dict.fromkeys(names))
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    raise FileNotFoundError(
        f"{folder} has no {split} split of {task.name}; looked for {', '.join(names)}, plain or "
        f".gz; the folder has {', '.join(present) or 'no files'}."
    )


def _read_rows(task: Task, path: Path) -> Table:
    rows = [line.split("\t") for line in read_lines(path)]
    columns = task.file_columns or task.columns
    header: Sequence[str] = rows[0]
    if header[0] in ("index", "id") and columns[-1] not in header:
        raise ValueError(_without_labels(path))
    if set(columns) <= set(header):
        rows = rows[1:]
    elif len(header) == len(task.header):
        header = task.header
    elif len(header) in (2, 3):
        table = read_table(path)
        if (table.texts_b is not None) != task.pairs:
            raise ValueError(
                f"{path}: its rows have {len(header) - 1} text(s), but those of {task.name} have "
                f"{len(columns) - 1}."
            )
        return replace(table, labels=_targets(task, table.labels, path))
    else:
        raise ValueError(
            f"{path}: its first row has {len(header)} fields, {', '.join(header)[:80]!r}; a file "
            f"of {task.name} has rows label<TAB>text, or a header with {', '.join(columns)}."
        )
    if task.name == "qqp":  # the official files split a few questions over two lines
        rows = [row for row in rows if len(row) >= len(header)]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, row {number}: {len(row)} tab-separated field(s), but the columns are "
                f"{len(header)}: {', '.join(header)}."
            )
    if not rows:
        raise ValueError(f"{path} has a header and no rows.")
    *texts, labels = ([row[header.index(column)] for row in rows] for column in columns)
    return Table(_targets(task, labels, path), *texts)


def _targets(task: Task, labels: Sequence, source: Path | str) -> list[int] | list[float]:
    """Floats for a regression, else indices of the task's labels."""
    ids = {str(i): i for i in range(len(task.labels))}
    for names in (task.labels, task.file_labels):
        ids |= {name: i for i, name in enumerate(names)}
    targets: list[Any] = [
        _finite(label) if task.kind == "regression" else ids.get(str(label)) for label in labels
    ]
    for number, (label, target) in enumerate(zip(labels, targets, strict=True), 1):
        if str(label) in ("-1", "-1.0"):  # the Hub's mark for a missing label
            raise ValueError(_without_labels(source))
        if target is None:
            raise ValueError(
                f"{source}, row {number}: label {label!r}; {task.name} has "
                f"{', '.join(task.labels) or 'finite numbers'}."
            )
    return targets


def _without_labels(source: Path | str) -> str:
    return f"{source} has no labels: GLUE does not publish its test labels; use validation."


def _finite(label: str | float) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
