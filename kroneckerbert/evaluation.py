"""Metrics of a model on its task, and of its likeness to its teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kron_kernels.modules import evaluating
from kroneckerbert.data import Table, TextDataset, batches_by_length, label_targets
from kroneckerbert.loading import is_sentence_transformer
from kroneckerbert.modeling_kroneckerbert import embed, max_tokens

__all__ = ["Program", "classifies_sequences", "embedding_similarity", "evaluate", "similarity"]
_PAIRS = 4000  # the standard error of a Spearman correlation is then below 0.02


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, float]:
    """Metrics of the predictions of labels.

    Args:
        model: Any transformer, dense or Kronecker. A model for sequence classification predicts
            with its head, a SentenceTransformer by the cosine similarity of two texts' vectors, any
            other by that of their mean-pooled embeddings.
        tokenizer: Its tokenizer; rows are truncated to the longest that both take.
        table: The rows, see ``kroneckerbert.data.read_table``.
        batch_size: Rows per forward pass, batched by length.
        progress: Whether to show a bar over the batches.

    Returns:
        Shares and correlations, not per cent. A classifier has ``accuracy``, ``f1`` (of label 1 if
        there are two labels, else the mean over labels) and ``matthews``, the correlation of
        predicted and true labels. Regressions and similarities have the correlations ``pearson``
        and ``spearman``, NaN if predictions or labels are constant.

    Raises:
        ValueError: If the model lacks a label, or it has no head and the table is not numbers
            for pairs of texts.
    """
    if not classifies_sequences(model):
        if table.texts_b is None or isinstance(table.labels[0], str):
            raise ValueError(
                f"a {type(model).__name__} has no head for labels, so it is evaluated on the "
                "similarity of two texts: label<TAB>text<TAB>second text, with a number as label. "
                "For other labels use a model for sequence classification."
            )
        first, second = (
            _vectors(model, tokenizer, t, batch_size, progress)
            for t in (table.texts, table.texts_b)
        )
        return _correlations((first * second).sum(-1).cpu(), torch.tensor(table.labels).float())

    targets = torch.tensor(label_targets(table.labels, model.config))
    logits = _logits(model, tokenizer, table, batch_size, progress)
    if model.num_labels == 1:
        return _correlations(logits[:, 0], targets)
    predictions = logits.argmax(-1)
    if model.num_labels == 2:
        f1 = binary_f1_score(predictions, targets)
    else:
        f1 = multiclass_f1_score(predictions, targets, model.num_labels, average="macro")
    return {
        "accuracy": (predictions == targets).float().mean().item(),
        "f1": f1.item(),
        "matthews": multiclass_matthews_corrcoef(predictions, targets, model.num_labels).item(),
    }


def _vectors(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Unit vectors ``(texts, width)``: a SentenceTransformer's own, else mean-pooled ones."""
    if not is_sentence_transformer(model):
        return embed(model, tokenizer, texts, batch_size, progress=progress)
    return model.encode(
        list(texts),
        batch_size=batch_size,
        convert_to_tensor=True,
        normalize_embeddings=True,
        show_progress_bar=progress,
    )


def classifies_sequences(model: PreTrainedModel) -> bool:
    """Whether ``evaluate`` uses the model's own head: transformers' for sequence classification.

    Args:
        model: Any transformer, dense or Kronecker, or a ``Program``.
    """
    name = model.class_name if isinstance(model, Program) else type(model).__name__
    return name.endswith("ForSequenceClassification")


class Program(nn.Module):
    """An exported model with what is asked of a model here: it is evaluated like one.

    Args:
        folder: Written by ``kroneckerbert.export``, in a format that needs no trust: ONNX or
            OpenVINO.

    Raises:
        OSError: If a file is missing or damaged.
        ImportError: If the runtime is not installed.
        ValueError: If the format runs code on loading (``torch_export``, ``aoti``).
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        from kroneckerbert.exporting import load_exported

        self.program = load_exported(folder)
        self.config = self.program.config
        self.class_name = (self.config.architectures or [""])[0]
        self.num_labels = self.config.num_labels

    @property
    def base_model(self) -> Program:
        return self

    @property
    def device(self) -> torch.device:
        return self.program.device

    def forward(self, **inputs: Tensor) -> Any:
        (runner,) = self.program.runners.values()
        segments = "token_type_ids"  # zeros of a single text are left out of batches
        if segments in runner.metadata.kwargs and segments not in inputs:
            inputs[segments] = torch.zeros_like(inputs["input_ids"])
        return self.program(**inputs)


def similarity(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, float]:
    """Similarity of a student's mean-pooled sentence embeddings to its teacher's.

    Args:
        model: The student.
        teacher: A model of the same hidden size.
        tokenizer: The tokenizer of both.
        sentences: At least three different texts.
        batch_size: Sentences per forward pass, batched by length.
        progress: Whether to show a bar over the batches.

    Returns:
        ``cosine``, the mean over sentences of the cosine of the student's and the teacher's
        embedding. ``ranking``, the Spearman correlation of the student's and the teacher's cosines
        of 4000 pairs of sentences, the same pairs in every call: whether both find the same
        sentences alike.

    Raises:
        ValueError: If there are fewer than three different sentences, or the hidden sizes differ.
    """
    if (distinct := len(set(sentences))) < 3:
        raise ValueError(
            f"{distinct} different sentences cannot be ranked by pairs; give at least 3, better "
            "a few hundred."
        )
    s, t = model.config.hidden_size, teacher.config.hidden_size
    if s != t:
        raise ValueError(
            f"student and teacher must have the same hidden_size to be compared, got {s} and {t}."
        )
    vectors = (
        embed(m, tokenizer, sentences, batch_size, progress=progress).cpu()
        for m in (model, teacher)
    )
    return embedding_similarity(*vectors)


def embedding_similarity(students: Tensor, teachers: Tensor) -> dict[str, float]:
    """``similarity`` of embeddings that are already computed.

    Args:
        students: Unit vectors ``(sentences, hidden_size)``, float32.
        teachers: The teacher's for the same sentences, likewise.

    Returns:
        ``cosine`` and ``ranking``, as of ``similarity``.
    """
    n = len(students)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(n, (_PAIRS,), generator=generator)
    # An offset that is not a multiple of n: a sentence is never paired with itself.
    second = (first + torch.randint(1, n, (_PAIRS,), generator=generator)) % n
    by_student, by_teacher = ((e[first] * e[second]).sum(-1) for e in (students, teachers))
    return {
        "cosine": (students * teachers).sum(-1).mean().item(),
        "ranking": spearman_corrcoef(by_student, by_teacher).item(),
    }


@torch.no_grad()
def _logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Shape ``(rows, num_labels)``, float32, on the CPU, in the table's order."""
    longest = max_tokens(model, tokenizer)
    dataset = TextDataset(tokenizer, table.texts, table.texts_b, max_length=longest)
    lengths = [len(ids) for ids in dataset.columns["input_ids"]]
    batches, order = batches_by_length(dataset, lengths, tokenizer, batch_size)
    with evaluating(model):
        rows = [
            model(**batch.to(model.device)).logits.float().cpu()
            for batch in tqdm(batches, desc="evaluating", disable=not progress)
        ]
    return torch.cat(rows)[torch.tensor(order).argsort()]


def _correlations(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    return {
        "pearson": pearson_corrcoef(predictions, targets).item(),
        "spearman": spearman_corrcoef(predictions, targets).item(),
    }
