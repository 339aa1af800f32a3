"""Questions answered by a span of a text: SQuAD 1.1 and 2.0, from file to metric."""

from __future__ import annotations

import gzip
import json
import math
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kron_kernels.modules import evaluating
from kron_kernels.shapes import check_integer
from kroneckerbert.data import batches_by_length
from kroneckerbert.modeling_kroneckerbert import max_tokens

# In tokens, as in BERT's own run_squad.py.
_LONGEST_QUESTION = 64
_LONGEST_ANSWER = 30


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text.

    Args:
        id: Unique among the questions.
        question: The question.
        context: The text, which may contain no answer.
        answers: All correct answers, verbatim from the text; empty if there is none.
        starts: The index of the first character of each answer in the text.

    Raises:
        ValueError: If the text is empty, or an answer is not at its start.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.context.strip():
            raise ValueError(f"question {self.id!r}: its text is empty; it must contain words.")
        for answer, start in zip(self.answers, self.starts, strict=True):
            found = self.context[start : start + len(answer)] if start >= 0 else ""
            if not answer or found != answer:
                raise ValueError(
                    f"question {self.id!r}: its text has {found!r} at character {start}, not the "
                    f"answer {answer!r}; answer_start must be where the answer stands in the text."
                )


Questions = list[Question]


def read_squad(path: Path) -> Questions:
    """The questions of a file in SQuAD's JSON format, version 1.1 or 2.0.

    Args:
        path: Plain, or compressed if it ends in ``.gz``.

    Raises:
        ValueError: If the format is wrong, an answer is not at its start, an id occurs twice, or
            there is no question.
        OSError: If the file cannot be read or decompressed.
    """
    try:
        with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
            articles = json.load(file)["data"]
        questions = [
            Question(
                entry["id"],
                entry["question"],
                paragraph["context"],
                tuple(answer["text"] for answer in entry["answers"]),
                tuple(answer["answer_start"] for answer in entry["answers"]),
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(
            f"{path} is not a gzip file, or is truncated ({error}); a file that ends in .gz must "
            "be compressed."
        ) from error
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(
            f"{path} is not in SQuAD's format ({type(error).__name__}: {error}); it must be JSON: "
            "data > paragraphs > context and qas > id, question and answers > text, answer_start."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if not questions:
        raise ValueError(f"{path} has no questions; SQuAD's files have them in data > paragraphs.")
    [(most_common, times)] = Counter(question.id for question in questions).most_common(1)
    if times > 1:
        raise ValueError(f"{path}: {times} questions have the id {most_common!r}; ids are unique.")
    return questions


class SpanDataset(Dataset):
    """Questions with overlapping windows of their texts, tokenised once, unpadded.

    ``Trainer(..., processing_class=tokenizer)`` pads each batch to its longest window.

    Args:
        tokenizer: A fast tokenizer.
        questions: The first answer of each is the target.
        max_length: Tokens of a window, including question and special tokens. A question keeps at
            most 64 tokens, or fewer if the text would have no room.
        stride: Tokens that a window shares with the previous one.
        train: Whether items have ``start_positions`` and ``end_positions``: the answer's first and
            last token, or ``[CLS]`` for both if the window does not contain the whole answer.

    Raises:
        ValueError: If a window has no room beyond its overlap, or a size is not an integer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        max_length: int = 384,
        stride: int = 128,
        train: bool = True,
    ):
        max_length = check_integer("max_length", max_length)
        stride = check_integer("stride", stride, 0)
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride - 1
        if room < 1:
            raise ValueError(
                f"a window of max_length {max_length} has no room for a question and more than the "
                f"{stride} tokens it shares; lower stride or raise max_length."
            )
        has_segments = "token_type_ids" in tokenizer.model_input_names
        self.columns: dict[str, list[Any]] = {"input_ids": []}
        if has_segments:
            self.columns["token_type_ids"] = []
        if train:
            self.columns |= {"start_positions": [], "end_positions": []}
        self.windows: list[_Window] = []  # if not train
        for first in range(0, len(questions), 1000):  # lists of all tokens would take gigabytes
            batch = questions[first : first + 1000]
            encoded = tokenizer(
                _shortened(tokenizer, [q.question for q in batch], min(room, _LONGEST_QUESTION)),
                [q.context for q in batch],
                truncation="only_second",
                max_length=max_length,
                stride=stride,
                return_overflowing_tokens=True,
            )
            samples = encoded["overflow_to_sample_mapping"]
            for encoding, sample in zip(encoded.encodings, samples, strict=True):
                ids = np.array(encoding.ids, np.int32)
                self.columns["input_ids"].append(ids)
                if has_segments:
                    self.columns["token_type_ids"].append(np.array(encoding.type_ids, np.int8))
                cls = int((ids == tokenizer.cls_token_id).argmax())
                in_context = np.array(encoding.sequence_ids) == 1
                characters = np.array(encoding.offsets, np.int32)[in_context]
                window = _Window(first + sample, cls, int(in_context.argmax()), characters)
                if train:
                    start, end = window.answer(batch[sample])
                    self.columns["start_positions"].append(start)
                    self.columns["end_positions"].append(end)
                else:
                    self.windows.append(window)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        item = {name: column[index] for name, column in self.columns.items()}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in item.items()}


def predict_spans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_size: int = 32,
    null_threshold: float | None = None,
    max_length: int = 384,
    progress: bool = False,
) -> dict[str, str]:
    """The span with the highest sum of start and end logits, for each question.

    All spans of up to 30 tokens in all windows are compared; BERT's own script combines the 20 best
    starts and ends.

    Args:
        model: A model for question answering.
        tokenizer: Its tokenizer.
        questions: Their answers are not used.
        batch_size: Windows per forward pass; windows of similar length are batched together.
        null_threshold: The answer is empty if the sum of the logits of ``[CLS]``, in the window
            where it is smallest, exceeds that of the best span by more than this: 0 for SQuAD 2.0.
            None gives every question an answer, as SQuAD 1.1 requires.
        max_length: Tokens of a window, limited by model and tokenizer. Each window shares a third
            with the previous one.
        progress: Whether to show a bar over the batches.

    Returns:
        Answers by question id.

    Raises:
        ValueError: If the model has no head for spans, or a number is out of range.
    """
    if not type(model).__name__.endswith("ForQuestionAnswering"):
        raise ValueError(
            f"a {type(model).__name__} has no head for spans; use a model for question answering."
        )
    if null_threshold is not None and math.isnan(null_threshold):
        raise ValueError("null_threshold = nan compares with nothing; use a number, or None.")
    max_length = min(check_integer("max_length", max_length), max_tokens(model, tokenizer))
    dataset = SpanDataset(tokenizer, questions, max_length, max_length // 3, train=False)
    best = [(-math.inf, "")] * len(questions)
    null = [math.inf] * len(questions)
    for window, starts, ends in _window_logits(model, tokenizer, dataset, batch_size, progress):
        i = window.question
        null[i] = min(null[i], (starts[window.cls] + ends[window.cls]).item())
        context = slice(window.context, window.context + len(window.characters))
        score, first, last = _best_span(starts[context], ends[context])
        if score > best[i][0]:
            begin, end = window.characters[first, 0], window.characters[last, 1]
            best[i] = score, questions[i].context[begin:end]
    threshold = math.inf if null_threshold is None else null_threshold
    return {
        question.id: "" if null_score - score > threshold else text
        for question, (score, text), null_score in zip(questions, best, null, strict=True)
    }


def squad_metrics(
    predictions: Mapping[str, str], questions: Sequence[Question]
) -> dict[str, float]:
    """SQuAD's metrics, by the rules of the official script for version 2.0.

    Case, punctuation, articles and extra spaces are ignored, and the best match among several
    correct answers counts. The correct prediction for a question without answers is the empty text.

    Args:
        predictions: An answer for every question, by id.
        questions: The questions with their correct answers.

    Returns:
        ``exact_match`` and ``f1`` of shared words, in per cent.

    Raises:
        ValueError: If there are no questions, or one has no prediction.
    """
    if not questions:
        raise ValueError("there are no questions, and so no metrics; give at least one.")
    if missing := [question.id for question in questions if question.id not in predictions]:
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions have no prediction, such as "
            f"{missing[0]!r}; an unanswered question needs the prediction ''."
        )
    # Not torchmetrics' squad: it fails on questions without answers, counts an answer that is only
    # an article, and sums in float32.
    exact = f1 = 0.0
    for question in questions:
        prediction = _words(predictions[question.id])
        answers = [words for text in question.answers if (words := _words(text))] or [[]]
        exact += any(prediction == words for words in answers)
        f1 += max(_f1(prediction, words) for words in answers)
    return {"exact_match": 100 * exact / len(questions), "f1": 100 * f1 / len(questions)}


@dataclass(frozen=True, slots=True)
class _Window:
    """The origin of a window's tokens.

    Args:
        question: Index of the question.
        cls: Position of ``[CLS]``, which means no answer.
        context: Position of the text's first token.
        characters: Shape ``(tokens of the text, 2)``: first character of each and the one after it.
    """

    question: int
    cls: int
    context: int
    characters: np.ndarray

    def answer(self, question: Question) -> tuple[int, int]:
        """First and last token of the first answer, or ``cls`` for both if the window lacks it."""
        if question.answers and len(self.characters):
            text, start = question.answers[0], question.starts[0]
            begin = start + len(text) - len(text.lstrip())  # spaces belong to no token
            end = start + len(text.rstrip())
            if self.characters[0, 0] <= begin and end <= self.characters[-1, 1]:
                first = np.searchsorted(self.characters[:, 1], begin, side="right")
                last = np.searchsorted(self.characters[:, 0], end, side="left") - 1
                return self.context + int(first), self.context + int(last)
        return self.cls, self.cls


def _shortened(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int) -> list[str]:
    """The texts, each truncated to this many tokens."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    spans = tokenizer(texts, **options)["offset_mapping"]
    return [
        text[: span[tokens - 1][1]] if len(span) > tokens else text
        for text, span in zip(texts, spans, strict=True)
    ]


@torch.no_grad()
def _window_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: SpanDataset,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[_Window, Tensor, Tensor]]:
    """Each window with its start and end logits ``(tokens,)``, float32, on the CPU."""
    lengths = [len(ids) for ids in dataset.columns["input_ids"]]
    batches, order = batches_by_length(dataset, lengths, tokenizer, batch_size)
    windows = iter([dataset.windows[i] for i in order])
    with evaluating(model):
        for batch in tqdm(batches, desc="evaluating", disable=not progress):
            is_token = batch["attention_mask"].bool()
            output = model(**batch.to(model.device))
            logits = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            for mask, starts, ends in zip(is_token, *logits, strict=True):
                yield next(windows), starts[mask], ends[mask]


def _best_span(starts: Tensor, ends: Tensor) -> tuple[float, int, int]:
    """Highest sum of a start and an end at most 29 tokens after it, with both positions."""
    ends = pad(ends, (0, _LONGEST_ANSWER - 1), value=-math.inf).unfold(0, _LONGEST_ANSWER, 1)
    scores = starts[:, None] + ends  # (start, tokens after it)
    first, behind = divmod(int(scores.argmax()), _LONGEST_ANSWER)
    return scores[first, behind].item(), first, first + behind


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer))  # harmonic mean of precision and recall
