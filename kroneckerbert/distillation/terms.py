"""The terms of the distillation loss, each comparing the student with its teacher.

    embedding   MSE(E_S, E_T)             output of the embedding layer
    attention   Σ_l MSE(O_l_S, O_l_T)     scores O = QKᵀ/√d, before the mask and the softmax (Eq. 9)
    hidden      Σ_l MSE(H_l_S, H_l_T)     output of layer l
    logits      KL(T ‖ S) · T²            the paper gives no formula; MSE for a regression
    labels      the student's supervised loss; cross-entropy for token heads

From Tahaei et al., NAACL 2022, Eq. 14. Each term is a mean over real positions, without padding.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from kroneckerbert.distillation.pairing import layer_pairs

TERMS = ("embedding", "attention", "hidden", "logits", "labels")


def distillation_terms(
    student: ModelOutput,
    teacher: ModelOutput,
    attention_mask: Tensor,
    weights: Mapping[str, float | None],
    *,
    layer_map: str | Sequence[int] = "uniform",
    temperature: float = 1.0,
    problem_type: str | None = None,
    shares: Mapping[str, float | Tensor] | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss by name, float32 scalars before weighting.

    Padding is excluded: ``embedding`` and ``hidden`` are means over real tokens and width,
    ``attention`` over pairs of real tokens and heads, token logits over real tokens, and a span's
    start and end over real positions. ``attention`` and ``hidden`` are summed over layers.

    Args:
        student: Output with the fields the terms need: ``hidden_states`` for embedding and hidden,
            ``attentions`` (under ``attention_scores``) for attention, ``*logits``, ``loss``.
        teacher: The teacher's output for the same batch.
        attention_mask: ``(batch, sequence)``, non-zero for real tokens; the multiple-choice shape
            ``(batch, choices, sequence)`` is flattened as in the model.
        weights: Weight of every name in ``TERMS``. A term of weight 0 is not computed; one of
            weight None is computed if the outputs have its fields.
        layer_map: The teacher layer for each student layer, see ``layer_pairs``.
        temperature: T, which divides the logits; their KL divergence is multiplied by T².
        problem_type: As in the config: ``"regression"`` (or a single logit) compares logits by MSE,
            ``"multi_label_classification"`` label by label.
        shares: Factors for means over ``"tokens"``, ``"pairs"``, ``"rows"`` and ``"labels"``: this
            batch's share of the whole step, with which the terms of all batches add up to the mean
            over the step. 1 if unset.

    Raises:
        ValueError: If the temperature is not positive, an output lacks a requested term's fields,
            no term is left, or shapes do not match.
    """
    check_temperature(temperature)
    real = attention_mask.reshape(-1, attention_mask.shape[-1]).bool()
    shares = shares or dict.fromkeys(("tokens", "pairs", "rows", "labels"), 1.0)
    terms = {}
    if weights["embedding"] != 0 or weights["hidden"] != 0:
        states = _layers("hidden_states", student, teacher)
        if states[0][0].shape[:2] != real.shape:
            raise ValueError(
                f"attention_mask must be (batch, sequence) = {tuple(states[0][0].shape[:2])}, got "
                f"{tuple(attention_mask.shape)}: it marks the real tokens."
            )
        if weights["embedding"] != 0:
            terms["embedding"] = _hidden_mse(states[0][0], states[1][0], real) * shares["tokens"]
        if weights["hidden"] != 0:
            pairs = _mapped(states[0][1:], states[1][1:], layer_map)
            total = torch.stack([_hidden_mse(s, t, real) for s, t in pairs]).sum()
            terms["hidden"] = total * shares["tokens"]
    if weights["attention"] != 0:
        pairs = _mapped(*_layers("attentions", student, teacher), layer_map)
        total = torch.stack([_scores_mse(s, t, real) for s, t in pairs]).sum()
        terms["attention"] = total * shares["pairs"]
    if weights["logits"] != 0:
        names = [name for name in student if name.endswith("logits") and name in teacher]
        if names:
            divergences = [
                _divergence(name, student[name], teacher[name], real, temperature, problem_type)
                * shares["tokens" if student[name].ndim == 3 else "rows"]
                for name in names
            ]
            # As in the models' losses, a span's two ends are averaged and several heads are added.
            total = torch.stack(divergences).sum()
            terms["logits"] = total / 2 if "start_logits" in names else total
        elif weights["logits"] is not None:
            raise ValueError(
                f"logits_weight = {weights['logits']}, but student and teacher have no logits in "
                f"common: their outputs are {list(student)} and {list(teacher)}. Give both the "
                "task's head, or set logits_weight=0."
            )
    if weights["labels"] != 0:
        if student.get("loss") is not None:  # one per replica under DataParallel
            terms["labels"] = student["loss"].float().mean() * shares["labels"]
        elif weights["labels"] is not None:
            raise ValueError(
                f"labels_weight = {weights['labels']}, but the student returned no loss: give it a "
                "head and the batch labels, or set labels_weight=0."
            )
    if not terms:
        raise ValueError(
            "No term applies: the weights of embedding, attention and hidden are 0, and there are "
            "no logits in common and no labels. Set one of the weights, or give both models heads."
        )
    return terms


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}.")


def _layers(
    field: str, student: ModelOutput, teacher: ModelOutput
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both models' tensors, one per layer. Missing ones would make the loss an empty sum of 0."""
    s, t = student.get(field) or (), teacher.get(field) or ()
    if not s or not t:
        raise ValueError(
            f"student and teacher must return {field}; got {len(s)} and {len(t)}. Attention layers "
            "must call the function that config._attn_implementation names; otherwise train with "
            "attention_weight=0."
        )
    return s, t


def _mapped(
    s: tuple[Tensor, ...], t: tuple[Tensor, ...], layer_map: str | Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    teachers = layer_pairs(layer_map, len(s), len(t))
    return [(ours, t[layer - 1]) for ours, layer in zip(s, teachers, strict=True)]


def _hidden_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens and width; tensors are (batch, sequence, width)."""
    error = (s.float() - t.float()).masked_fill(~real[..., None], 0)
    return error.square().sum() / (real.sum() * s.shape[-1])


def _scores_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real pairs and heads; tensors are (batch, heads, queries, keys)."""
    pairs = real[:, None, :, None] & real[:, None, None, :]
    error = (s.float() - t.float()).masked_fill(~pairs, 0)
    return error.square().sum() / (pairs.sum() * s.shape[1])


def _divergence(
    name: str, s: Tensor, t: Tensor, real: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    """Mean KL(t ‖ s) T², which is 0 if both agree; MSE for a regression."""
    if s.shape != t.shape:
        raise ValueError(f"{name} of student and teacher differ: {s.shape} and {t.shape}.")
    if s.ndim == 3:  # one distribution per token
        s, t = s[real], t[real]
    s, t = s.float(), t.float()
    if problem_type == "regression" or s.shape[-1] == 1:
        return F.mse_loss(s, t)
    s, t = s / temperature, t / temperature
    if name in ("start_logits", "end_logits"):  # distributions over positions
        lowest = torch.finfo(s.dtype).min / 2  # -inf would give 0 * nan
        s, t = s.masked_fill(~real, lowest), t.masked_fill(~real, lowest)
    elif problem_type == "multi_label_classification":  # sigmoid(z) = softmax([z, 0])
        s, t = F.pad(s[..., None], (0, 1)), F.pad(t[..., None], (0, 1))
    log_s, log_t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
    return divergence * temperature**2
