"""BERT with Kronecker-factorised layers: stock classes, their modules swapped at construction."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.bert.modeling_bert import BertLayer

from kron_kernels import KroneckerEmbedding, KroneckerLinear, KronShape, kron_feed_forward
from kroneckerbert.configuration_kroneckerbert import WORD_EMBEDDINGS, KroneckerBertConfig

# What transformers calls by name in hidden_act, as kron_feed_forward knows it.
_ACTIVATIONS = {
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}


class KroneckerBertPreTrainedModel(BertPreTrainedModel):
    """Initialisation, loading and resizing for all KroneckerBERT classes.

    The stock constructors end in ``post_init``, which draws the weights and ties them. Modules are
    swapped just before, so that one code path serves construction, ``from_config`` and
    ``from_pretrained`` (on the meta device, at no cost).
    """

    config: KroneckerBertConfig
    config_class = KroneckerBertConfig  # transformers would take the annotation's text

    def post_init(self) -> None:
        # transformers asks the nearest PreTrainedModel to initialise a module: a plain BertModel in
        # here would leave the factors as they were allocated.
        if isinstance(getattr(self, "bert", None), BertModel):
            has_pooler = self.bert.pooler is not None
            self.bert = KroneckerBertModel(self.config, add_pooling_layer=has_pooler)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KroneckerLinear | KroneckerEmbedding):
            # By torch.nn.init, which transformers guards: what was loaded is left alone.
            module.reset_parameters(self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, see ``transformers.PreTrainedModel.from_pretrained``.

        A tensor of the embeddings or the encoder that the checkpoint lacks, or has in surplus, is
        an error here, where transformers draws random weights and logs a table. A pooler or a head
        may be new: that is how fine-tuning starts.

        Raises:
            ValueError: If a tensor of the embeddings or the encoder is missing, of another shape or
                in surplus, a factor is NaN or infinite, or the checkpoint is a dense BERT.
            OSError: If the file of weights is damaged.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are damaged or cut short "
                f"({error}); copy or save the checkpoint again."
            ) from error
        _check_loaded(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Add or remove words at the end of the vocabulary: rows of A; b stays.

        Args:
            new_num_tokens: The new vocabulary's size; None keeps the present one.
            pad_to_multiple_of: Round the size up to a multiple of this.
            mean_resizing: Start new words at the mean of the old ones, instead of at random with
                the standard deviation ``config.initializer_range``.

        Returns:
            The word embeddings.
        """
        table = self.get_input_embeddings()
        if not isinstance(table, KroneckerEmbedding):
            return super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = math.ceil(rows / pad_to_multiple_of) * pad_to_multiple_of
        if rows == table.num_embeddings:
            return table

        _resize_rows(table, rows, None if mean_resizing else self.config.initializer_range)
        decoder = self.get_output_embeddings()
        if isinstance(decoder, KroneckerLinear):  # tie_weights below gives it the new rows
            decoder.out_features = rows
            bias = F.pad(decoder.bias.detach(), (0, rows - decoder.bias.numel()))
            decoder.bias = nn.Parameter(bias, decoder.bias.requires_grad)
            self.set_output_embeddings(decoder)
        elif decoder is not None:
            self.set_output_embeddings(
                self._get_resized_lm_head(decoder, rows, mean_resizing=mean_resizing)
            )
        entry = {"a_shape": list(table.a.shape[1:]), "rank": table.rank}
        name = self.config.entry_of(WORD_EMBEDDINGS)
        self.config.kronecker_factors = {**self.config.kronecker_factors, name: entry}
        self.config.vocab_size = self.vocab_size = rows
        self.tie_weights()
        return table


class KroneckerBertModel(KroneckerBertPreTrainedModel, BertModel):
    """The encoder: ``BertModel`` with the modules named by ``config.kronecker_factors`` swapped.

    Args:
        config: Its sizes and factors.
        add_pooling_layer: Whether to add the (dense) pooler.
    """

    def post_init(self) -> None:
        for path, shape in self.config.kronecker_shapes().items():
            parent, _, child = path.rpartition(".")
            dense = self.get_submodule(path)
            setattr(self.get_submodule(parent), child, _factorised(dense, shape))
        for layer in self.encoder.layer:
            layer.__class__ = KroneckerBertLayer
        super().post_init()


class KroneckerBertLayer(BertLayer):
    """A stock layer, its feed-forward block in one pass where both its layers are factorised."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        up, down = self.intermediate.dense, self.output.dense
        activation = _ACTIVATIONS.get(type(self.intermediate.intermediate_act_fn))
        # Adapters replace the layers, and hooks expect to be called.
        parts = self.intermediate, up, self.output, down
        stock = type(up) is type(down) is KroneckerLinear and not any(
            part._forward_hooks or part._forward_pre_hooks for part in parts
        )
        if not stock or activation is None:
            return super().feed_forward_chunk(attention_output)
        layers = (up.a, up.b, up.bias), (down.a, down.b, down.bias)
        if self.training and self.output.dropout.p:
            y = kron_feed_forward(attention_output, *layers, activation=activation)
            return self.output.LayerNorm(self.output.dropout(y) + attention_output)
        return self.output.LayerNorm(
            kron_feed_forward(
                attention_output, *layers, activation=activation, residual=attention_output
            )
        )


class KroneckerBertForMaskedLM(KroneckerBertPreTrainedModel, BertForMaskedLM):
    """KroneckerBERT with the masked-language-model head.

    If the word embeddings are factorised and tied, the decoder is the ``KroneckerLinear`` that has
    their factors: exact, as many times cheaper as they are smaller, and saved once.
    """

    def post_init(self) -> None:
        shape = self.config.kronecker_shapes().get(WORD_EMBEDDINGS)
        if shape is not None and self.config.tie_word_embeddings:
            head = self.cls.predictions
            head.decoder = _factorised(head.decoder, shape)
            # Patterns, hence the `$`: "decoder.b" fits "decoder.bias", too.
            self._tied_weights_keys = {
                "cls.predictions.decoder.a$": f"bert.{WORD_EMBEDDINGS}.a$",
                "cls.predictions.decoder.b$": f"bert.{WORD_EMBEDDINGS}.b$",
                "cls.predictions.decoder.bias$": "cls.predictions.bias$",
            }
        super().post_init()


class KroneckerBertForSequenceClassification(
    KroneckerBertPreTrainedModel, BertForSequenceClassification
):
    """KroneckerBERT with a (dense) classifier of sequences on the pooler."""


class KroneckerBertForQuestionAnswering(KroneckerBertPreTrainedModel, BertForQuestionAnswering):
    """KroneckerBERT with a (dense) head for the start and the end of an answer."""


class KroneckerBertForTokenClassification(KroneckerBertPreTrainedModel, BertForTokenClassification):
    """KroneckerBERT with a (dense) classifier of tokens."""


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: the usual sentence embedding.

    Args:
        last_hidden_state: Shape ``(batch, tokens, hidden)``.
        attention_mask: Shape ``(batch, tokens)``, zero at padding.

    Returns:
        Shape ``(batch, hidden)``; zero where a row is all padding.
    """
    mask = attention_mask[..., None].to(last_hidden_state.dtype)
    # Counted in integers: a sum of ones in bfloat16 stops at 256.
    count = attention_mask.sum(-1, keepdim=True).clamp_min(1)
    return (last_hidden_state * mask).sum(-2) / count


@torch.no_grad()
def embed(
    model: BertPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    normalize: bool = True,
) -> Tensor:
    """Mean-pooled embeddings of sentences, with dropout off and little padding.

    Args:
        model: Any BERT, dense or Kronecker, with or without a head (which is not used).
        tokenizer: Its tokenizer; longer sentences are truncated to what both can take.
        sentences: The texts.
        batch_size: Sentences per forward pass; they are batched by length.
        normalize: Scale to unit length, so that a dot product is the cosine similarity.

    Returns:
        Shape ``(len(sentences), hidden)``, float32, on the model's device, in the given order.
    """
    if isinstance(sentences, str):
        raise TypeError(f"sentences must be a list of texts, got the text {sentences!r}.")
    encoder = model.base_model
    rows = torch.empty(len(sentences), encoder.config.hidden_size, device=encoder.device)
    if not sentences:
        return rows
    longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]), reverse=True)

    was_training = encoder.training
    encoder.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [sentences[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(encoder.device)
            hidden = encoder(**batch).last_hidden_state
            rows[chosen] = mean_pooling(hidden.float(), batch["attention_mask"])
    finally:
        encoder.train(was_training)
    return F.normalize(rows, dim=-1) if normalize else rows


def _factorised(dense: nn.Linear | nn.Embedding, s: KronShape) -> nn.Module:
    """A Kronecker module in place of ``dense``: of its sizes, device and dtype, newly drawn."""
    new = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if isinstance(dense, nn.Embedding):
        return KroneckerEmbedding(
            dense.num_embeddings, dense.embedding_dim, s.n2, s.rank, dense.padding_idx, **new
        )
    has_bias = dense.bias is not None
    return KroneckerLinear(
        dense.in_features, dense.out_features, (s.m1, s.n1), s.rank, has_bias, **new
    )


@torch.no_grad()
def _resize_rows(table: KroneckerEmbedding, rows: int, std: float | None) -> None:
    """Cut or extend A: with its mean row, or with rows that give E's entries this deviation."""
    rank, old_rows, columns = table.a.shape
    a = table.a[:, :rows]
    if rows > old_rows:
        # E is linear in A, so the mean of A's rows gives the mean of E's.
        new = table.a.mean(1, keepdim=True).expand(rank, rows - old_rows, columns)
        if std is not None:
            # Var E_ij = Var A · Σ_k b_kj², on average over j.
            new = torch.randn_like(new) * std / table.b.square().mean(-1).sum().sqrt()
        a = torch.cat([a, new], 1)
    table.a = nn.Parameter(a.clone(), table.a.requires_grad)
    table.num_embeddings = rows


def _check_loaded(
    model: KroneckerBertPreTrainedModel, info: dict[str, Any], source: str | os.PathLike | None
) -> None:
    """Raise if the embeddings or the encoder are not what was saved, see ``from_pretrained``."""

    def backbone(names: Any) -> list[str]:
        return sorted(n for n in names if re.match(r"(bert\.)?(embeddings|encoder)\.", n))

    missing, surplus = backbone(info["missing_keys"]), backbone(info["unexpected_keys"])
    mismatched = backbone(key[0] for key in info["mismatched_keys"])
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
        for what, names in (
            ("missing", missing),
            ("in surplus", surplus),
            ("of another shape", mismatched),
        )
        if names
    ]
    if problems:
        dense = {name.removesuffix(".weight") for name in surplus}
        if any(name.removesuffix(".a") in dense for name in missing):
            remedy = (
                "these are dense weights where config.kronecker_factors asks for factors: load "
                "them with their own class and call kroneckerbert.compress(model, config)"
            )
        else:
            remedy = "load it with the config it was saved with, or save it again"
        raise ValueError(
            f"{source} is no checkpoint of this {type(model).__name__}. "
            f"Tensors {'; '.join(problems)}. To resolve: {remedy}."
        )

    for path, module in model.named_modules():
        if not isinstance(module, KroneckerLinear | KroneckerEmbedding):
            continue
        for name in ("a", "b"):
            factor = getattr(module, name)
            if not factor.is_meta and not factor.isfinite().all():
                raise ValueError(
                    f"{path}.{name} in {source} has NaN or infinite entries; the training that "
                    "wrote it diverged or the file is damaged: use an earlier checkpoint, or "
                    "dtype=torch.float32 if it was loaded in half precision."
                )
