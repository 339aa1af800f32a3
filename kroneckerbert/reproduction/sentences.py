"""Sentences to distil an encoder on, made of files of documents, questions or tables.

A document is cut into sentences where a full stop, question or exclamation mark is followed by a
capital letter or a digit: abbreviations cut some sentences in two, which costs a teacher's student
nothing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kroneckerbert.data import numbered_lines

_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_SHUFFLED = 0  # seed of the order


@dataclass(frozen=True)
class TextFile:
    """Which texts of a file to take.

    A SQuAD ``.json`` gives its questions, a ``.tsv`` its second column, any other file its lines.
    All may be ``.gz``.

    Args:
        cut: Whether texts are documents to be cut into sentences.
        without: Rows of a ``.tsv`` that are left out, by their first column.
    """

    cut: bool = False
    without: list[str] = field(default_factory=list)

    def read(self, path: Path) -> Iterator[str]:
        """The texts, in their order.

        Raises:
            ValueError: If the file is not of its kind.
            OSError: If it cannot be read.
        """
        kind = Path(path.name.removesuffix(".gz")).suffix
        texts = {".json": _questions, ".tsv": self._column}.get(kind, _lines)(path)
        for text in texts:
            yield from _END.split(text) if self.cut else (text,)

    def _column(self, path: Path) -> Iterator[str]:
        for number, line in numbered_lines(path):
            label, tab, text = line.partition("\t")
            if not tab:
                raise ValueError(f"{path}, line {number} has no tab: a row is label<TAB>text.")
            if label not in self.without:
                yield text.partition("\t")[0]


def read_sentences(
    files: Mapping[str, TextFile], folder: Path, held_out: Iterable[str] = (), words: int = 50
) -> list[str]:
    """All texts of two to ``words`` words, each once, shuffled.

    Args:
        files: What to take of each file, by its name.
        folder: Where they are.
        held_out: Texts to evaluate on: a text that differs from one of them in case, spaces and
            punctuation at most is left out.
        words: The longest text's words.

    Raises:
        ValueError: If there is no text, or a file is not of its kind.
        OSError: If a file cannot be read.
    """
    seen = {_letters(text) for text in held_out} | {""}
    texts = []
    for name, file in files.items():
        for text in file.read(folder / name):
            text = " ".join(text.split())
            key = _letters(text)
            if key not in seen and 2 <= text.count(" ") + 1 <= words:
                seen.add(key)
                texts.append(text)
    if not texts:
        raise ValueError(f"{', '.join(files)} in {folder} have no text of 2 to {words} words.")
    random.Random(_SHUFFLED).shuffle(texts)
    return texts


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())


def _lines(path: Path) -> Iterator[str]:
    return (line for _, line in numbered_lines(path))


def _questions(path: Path) -> Iterator[str]:
    text = "\n".join(_lines(path))
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield question["question"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not SQuAD's JSON ({type(error).__name__}: {error})."
        ) from error
