"""Text to batches: plain lines for stage 1, labelled tables for a task."""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from kron_kernels.shapes import check_integer

__all__ = [
    "Table",
    "TextDataset",
    "batches_by_length",
    "is_table",
    "label_targets",
    "read_lines",
    "read_table",
]
_TOKENISED = 1000  # texts at a time: a tokenizer's own rows take ten times the memory of the ids


@dataclass(frozen=True)
class Table:
    """Labelled texts; all columns have one entry per row, and ``len`` is the number of rows.

    Args:
        labels: All integers, all floats or all strings.
        texts: The first, or only, text of each row.
        texts_b: The second text of each row, or None if the rows have one.
    """

    labels: list[int] | list[float] | list[str]
    texts: list[str]
    texts_b: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


class TextDataset(Dataset):
    """Tokenised texts for ``Trainer``, unpadded.

    ``Trainer(..., processing_class=tokenizer)`` pads each batch to its longest text;
    ``train_sampling_strategy="group_by_length"`` in its arguments keeps the padding short.
    A row is a dictionary of ``input_ids``, for pairs also ``token_type_ids`` if the tokenizer has a
    separator, and ``labels`` if there are any. All rows are tokenised at once, in memory.

    Args:
        tokenizer: A fast tokenizer.
        texts: The first, or only, text of each row.
        texts_b: The second text of each row, or None.
        labels: One number per row, see ``label_targets``: integers for a classifier, floats for a
            regression. None for text without labels.
        max_length: Tokens, special ones included, to which rows are truncated; of a pair both texts
            together.

    Attributes:
        columns: Lists by name, with one entry per row.

    Raises:
        ValueError: If ``max_length`` is not a positive integer, a column has another length than
            ``texts``, or labels are not numbers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        texts_b: Sequence[str] | None = None,
        labels: Sequence[int] | Sequence[float] | None = None,
        max_length: int = 128,
    ):
        check_integer("max_length", max_length)
        for name, column in {"texts_b": texts_b, "labels": labels}.items():
            if column is not None and len(column) != len(texts):
                raise ValueError(
                    f"{name} must have one entry for each text, got {len(column)} for {len(texts)}."
                )
        if labels is not None and any(isinstance(label, str) for label in labels):
            raise ValueError(
                "labels must be numbers, got words; pass label_targets(labels, model.config)."
            )
        self.columns: dict[str, list] = {"input_ids": []}
        for start in range(0, len(texts), _TOKENISED):
            part = slice(start, start + _TOKENISED)
            # Padding adds the mask, and BERT's segments default to zeros: a third of the memory.
            found = tokenizer(
                list(texts[part]),
                None if texts_b is None else list(texts_b[part]),
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
                # Without a separator there are no segments: GPT-2 would look the ids up as words.
                return_token_type_ids=texts_b is not None and tokenizer.sep_token is not None,
            )
            for name, rows in found.items():
                self.columns.setdefault(name, []).extend(rows)
        if labels is not None:
            self.columns["labels"] = list(labels)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, list[int] | int | float]:
        return {name: column[index] for name, column in self.columns.items()}


def by_length(lengths: Sequence[int]) -> list[int]:
    """Indices of rows from longest to shortest: batches of neighbours have the least padding."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def batches_by_length(
    dataset: Dataset, lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[DataLoader, list[int]]:
    """Padded batches of rows of similar length, and the indices of the rows in this order.

    Args:
        dataset: Rows as in ``TextDataset``.
        lengths: The number of tokens of each row.
        tokenizer: It pads each batch to its longest row.
        batch_size: Rows of a batch.

    Returns:
        The batches, from long rows to short ones; and, for every row in the order of the batches,
        its index in ``dataset``.

    Raises:
        ValueError: If ``batch_size`` is not a positive integer.
    """
    batch_size = check_integer("batch_size", batch_size)
    order = by_length(lengths)
    collate = DataCollatorWithPadding(tokenizer)
    return DataLoader(Subset(dataset, order), batch_size, collate_fn=collate), order


def read_lines(path: str | os.PathLike) -> list[str]:
    """The texts of a UTF-8 file, one per line, without blank lines and spaces around them.

    Args:
        path: Plain, or compressed if it ends in ``.gz``.

    Raises:
        ValueError: If it has no text, or a line is not UTF-8.
        OSError: If it cannot be read or decompressed.
    """
    lines = [line.strip() for _, line in numbered_lines(path)]
    if not lines:
        raise ValueError(f"{path} has no text; it must have one text per line.")
    return lines


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is a labelled table: its first non-blank line has a tab.

    Commands read ``--data`` and ``--calibration`` as a table then, as plain text otherwise.

    Args:
        path: Plain, or compressed if it ends in ``.gz``.

    Raises:
        ValueError: If that line is not UTF-8.
        OSError: If the file cannot be read or decompressed.
    """
    return any("\t" in line for _, line in [next(numbered_lines(path), (0, ""))])


def read_table(path: str | os.PathLike) -> Table:
    """A tab-separated UTF-8 table with the columns label, text and, optionally, a second text.

    A first line whose first field is ``label`` is a header and skipped, like blank lines and rows
    with an empty text, which a warning counts. There is no quoting: quotation marks are text.

    Args:
        path: Plain, or compressed if it ends in ``.gz``.

    Returns:
        Labels are integers if all are, floats if all are numbers, strings if none is a number.

    Raises:
        ValueError: If a line breaks these rules or is not UTF-8, or there are no rows.
        OSError: If the file cannot be read or decompressed.
    """
    rows: list[tuple[int, list[str]]] = []
    empty: list[int] = []
    for number, line in numbered_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if not rows and fields[0].lower() == "label":
            continue
        if len(fields) not in (2, 3):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} tab-separated field(s); "
                "a row is label<TAB>text or label<TAB>text<TAB>second text."
            )
        if rows and len(fields) != len(rows[0][1]):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, but the first row, line "
                f"{rows[0][0]}, has {len(rows[0][1])}; all rows must have one text, or all two."
            )
        if not fields[0]:
            raise ValueError(f"{path}, line {number}: the label is empty; every row needs one.")
        if all(fields):
            rows.append((number, fields))
        else:
            empty.append(number)
    if empty:
        warnings.warn(
            f"{path}: {len(empty)} row(s) with an empty text are skipped, the first in line "
            f"{empty[0]}.",
            stacklevel=2,
        )
    if not rows:
        raise ValueError(f"{path} has no rows; a row is label<TAB>text.")
    columns = list(zip(*(fields for _, fields in rows), strict=True))
    labels = _labels(path, [number for number, _ in rows], columns[0])
    return Table(labels, *(list(column) for column in columns[1:]))


def label_targets(
    labels: list[int] | list[float] | list[str], config: PreTrainedConfig
) -> list[int] | list[float]:
    """A table's labels as the numbers that a model is trained on.

    Args:
        labels: As in a ``Table``.
        config: The configuration of a model for sequence classification. ``label2id`` has its
            classes; ``num_labels = 1`` means a regression.

    Returns:
        Floats for a regression, else integers in ``[0, num_labels)``, where words are looked up in
        ``label2id``.

    Raises:
        ValueError: If the model lacks one of the labels, or is a regression and they are words.
    """
    kind = type(labels[0])
    if config.num_labels == 1:
        if kind is str:
            raise ValueError(
                f"the labels are words such as {labels[0]!r}, but the model is a regression "
                "(num_labels = 1), which needs numbers."
            )
        return [float(label) for label in labels]
    known: Collection[Any] = ()  # no class is a fraction
    if kind is int:
        known = range(config.num_labels)
    elif kind is str:
        known = config.label2id
    if unknown := sorted({label for label in labels if label not in known}):
        names = ", ".join(map(str, config.label2id))
        raise ValueError(
            f"the model has no label {unknown[0]!r}; labels must be integers from 0 to "
            f"{config.num_labels - 1} or the words of config.label2id: {names}."
        )
    return [config.label2id[label] if kind is str else int(label) for label in labels]


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers in the file, from 1."""
    with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
        number = 0
        try:
            # As bytes: a text file decodes a buffer of many lines at once, and could not name one.
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file, for example "
                "with iconv."
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(
                f"{path} is not a gzip file, or is cut short after line {number} ({error}); a file "
                "that ends in .gz must be compressed."
            ) from error


def _labels(
    path: str | os.PathLike, numbers: Sequence[int], fields: Sequence[str]
) -> list[int] | list[float] | list[str]:
    found = [_number(field) for field in fields]
    values = [value for value in found if value is not None]
    if not values:
        return list(fields)
    if len(values) < len(fields):
        is_word = [value is None for value in found]
        odd = is_word.index(not is_word[0])
        raise ValueError(
            f"{path}, line {numbers[odd]}: label {fields[odd]!r} is "
            f"{'a word' if is_word[odd] else 'a number'}, but the first, {fields[0]!r} in line "
            f"{numbers[0]}, is not; all labels must be numbers, or all words."
        )
    for number, field, value in zip(numbers, fields, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{path}, line {number}: label {field!r} must be a finite number.")
    whole = [value for value in values if isinstance(value, int)]
    return whole if len(whole) == len(values) else [float(value) for value in values]


def _number(field: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(field)
        except ValueError:
            pass
    return None
