"""From hidden states to sentence vectors, by a SentenceTransformer's own modules."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kroneckerbert.data import Table
from kroneckerbert.loading import is_sentence_transformer
from kroneckerbert.modeling_kroneckerbert import mean_pooling


def transformer_of(model: Any) -> PreTrainedModel:
    """The transformers model in a SentenceTransformer; any other model is returned as it is."""
    return model[0].auto_model if is_sentence_transformer(model) else model


def pair_evaluator(table: Table, name: str) -> Any:
    """sentence-transformers' evaluator of a table of scores and two texts each.

    Raises:
        ValueError: If the table has no scores, or one text a row.
        ImportError: If sentence-transformers is missing.
    """
    if table.texts_b is None or isinstance(table.labels[0], str):
        raise ValueError(f"{name} needs rows score<TAB>text<TAB>text, with numbers as scores.")
    try:
        evaluation = import_module("sentence_transformers.sentence_transformer.evaluation")
    except ModuleNotFoundError:  # sentence-transformers 5.2
        evaluation = import_module("sentence_transformers.evaluation")
    scores = [float(label) for label in table.labels]
    return evaluation.EmbeddingSimilarityEvaluator(
        table.texts, table.texts_b, scores, name=Path(name).stem
    )


class Pooling:
    """The modules that follow a SentenceTransformer's transformer: pooling, normalisation, …

    A copy of them, without gradients for their own parameters. Of another model, the mean over
    tokens, scaled to unit length, as in ``kroneckerbert.embed``.

    Args:
        model: A SentenceTransformer, or a model without one.
        device: Where vectors are computed.
    """

    def __init__(self, model: Any, device: torch.device):
        self.modules: nn.Sequential | None = None
        if is_sentence_transformer(model):
            following = nn.Sequential(*list(model.children())[1:])
            self.modules = copy.deepcopy(following).to(device).float().eval().requires_grad_(False)

    def __call__(self, output: Mapping[str, Any], attention_mask: Tensor) -> Tensor:
        """Sentence vectors ``(batch, width)`` of a model's output.

        Raises:
            ValueError: If the output has no last hidden state.
        """
        hidden = output.get("last_hidden_state")
        if hidden is None:
            raise ValueError(
                "sentence_weight and relation_weight compare the pooled outputs of models without "
                f"heads; this output has {', '.join(output)}. Pass the bare models, or set both "
                "weights to 0."
            )
        if self.modules is None:
            return F.normalize(mean_pooling(hidden.float(), attention_mask), dim=-1)
        features: dict[str, Tensor] = {
            "token_embeddings": hidden.float(),
            "attention_mask": attention_mask,
        }
        for module in self.modules:
            features = module(features)
        return features["sentence_embedding"]

    @property
    def identity(self) -> str:
        """A hash of the modules and their weights, "mean" where there are none."""
        if self.modules is None:
            return "mean"
        digest = hashlib.sha256(repr(self.modules).encode())
        for name, tensor in self.modules.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
