"""The terms of the distillation loss, each comparing the student with its teacher.

    embedding   MSE(E_S, E_T) / Var E_T              output of the embedding layer
    attention   Σ_l MSE(O_l_S, O_l_T) / Var O_l_T    scores O = QKᵀ/√d, before mask and softmax
    hidden      Σ_l MSE(H_l_S, H_l_T) / Var H_l_T    output of layer l
    logits      KL(T ‖ S) · T²                       MSE for a regression
    labels      the student's supervised loss        cross-entropy for token heads
    sentence    ‖v_S − v_T‖² / 2‖v_T‖²               pooled vectors; of unit ones 1 − cos
    relation    MSE(cos v_S, cos v_T)                over a batch's pairs of pooled vectors

From Tahaei et al., NAACL 2022, Eq. 9 and 14, but for the last two. The paper does not divide by the
teacher's variances, and gives no formula for the logits' term. In all-MiniLM-L6-v2 the variance of
the scores falls from 13 to 2 over the layers, and that of the states is 0.15 to 0.4: undivided, the
scores are nearly all of the loss. Each term is a mean over real positions, without padding.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from kroneckerbert.distillation.pairing import layer_pairs

TERMS = ("embedding", "attention", "hidden", "logits", "labels", "sentence", "relation")
MEASURED = ("hidden_states", "attentions")  # the fields whose variances divide terms
SENTENCE = "sentence_embedding"  # the field of an output, sentence-transformers' name


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
    variances: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss by name, float32 scalars before weighting.

    Padding is excluded: ``embedding`` and ``hidden`` are means over real tokens and width,
    ``attention`` over pairs of real tokens and heads, token logits over real tokens, and a span's
    start and end over real positions. ``attention`` and ``hidden`` are summed over layers.

    Args:
        student: Output with the fields the terms need: ``hidden_states`` for embedding and hidden,
            ``attentions`` (under ``attention_scores``) for attention, ``*logits``, ``loss``,
            ``sentence_embedding`` for sentence and relation.
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
        variances: The teacher's, by field and layer, from ``variances_of``; they divide the first
            three terms. 1 if unset.

    Raises:
        ValueError: If the temperature is not positive, an output lacks a requested term's fields,
            no term is left, or shapes do not match.
    """
    check_temperature(temperature)
    real = attention_mask.reshape(-1, attention_mask.shape[-1]).bool()
    shares = shares or dict.fromkeys(("tokens", "pairs", "rows", "labels"), 1.0)
    by: Mapping[str, Tensor | list[float]] = variances or {
        field: [1.0] * len(teacher.get(field) or ()) for field in MEASURED
    }
    terms = {}
    if weights["embedding"] != 0 or weights["hidden"] != 0:
        ours, theirs = _layers("hidden_states", student, teacher)
        if ours[0].shape[:2] != real.shape:
            raise ValueError(
                f"attention_mask must be (batch, sequence) = {tuple(ours[0].shape[:2])}, got "
                f"{tuple(attention_mask.shape)}: it marks the real tokens."
            )
        if weights["embedding"] != 0:
            error = _hidden_mse(ours[0], theirs[0], real) / by["hidden_states"][0]
            terms["embedding"] = error * shares["tokens"]
        if weights["hidden"] != 0:
            layers = layer_pairs(layer_map, len(ours) - 1, len(theirs) - 1)
            errors = [
                _hidden_mse(s, theirs[j], real) / by["hidden_states"][j]
                for s, j in zip(ours[1:], layers, strict=True)
            ]
            terms["hidden"] = torch.stack(errors).sum() * shares["tokens"]
    if weights["attention"] != 0:
        ours, theirs = _layers("attentions", student, teacher)
        layers = layer_pairs(layer_map, len(ours), len(theirs))
        errors = [
            _scores_mse(s, theirs[j - 1], real) / by["attentions"][j - 1]
            for s, j in zip(ours, layers, strict=True)
        ]
        terms["attention"] = torch.stack(errors).sum() * shares["pairs"]
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
    if SENTENCE in student and SENTENCE in teacher:
        s, t = (output[SENTENCE].float() for output in (student, teacher))
        if weights["sentence"] != 0:
            terms["sentence"] = _vector_error(s, t) * shares["rows"]
        if weights["relation"] != 0:
            terms["relation"] = _relation_mse(s, t) * shares["rows"]
    elif weights["sentence"] or weights["relation"]:
        raise ValueError(
            f"student and teacher must return {SENTENCE} for the sentence and relation terms; pool "
            "their outputs, or set sentence_weight=0 and relation_weight=0."
        )
    if not terms:
        raise ValueError(
            "No term applies: all weights but those of logits and labels are 0, and there are no "
            "logits in common and no labels. Set one of the weights, or give both models heads."
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


def _hidden_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens and width; tensors are (batch, sequence, width)."""
    error = (s.float() - t.float()).masked_fill(~real[..., None], 0)
    return error.square().sum() / (real.sum() * s.shape[-1])


def _scores_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real pairs and heads; tensors are (batch, heads, queries, keys)."""
    pairs = real[:, None, :, None] & real[:, None, None, :]
    error = (s.float() - t.float()).masked_fill(~pairs, 0)
    return error.square().sum() / (pairs.sum() * s.shape[1])


def _vector_error(s: Tensor, t: Tensor) -> Tensor:
    """Mean over rows of half the relative squared distance; vectors are (batch, width)."""
    error = (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=torch.finfo(t.dtype).tiny)
    return error.mean() / 2


def _relation_mse(s: Tensor, t: Tensor) -> Tensor:
    """Mean over the batch's pairs of different rows; 0 for a single row."""
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    error = (s @ s.mT - t @ t.mT).square().fill_diagonal_(0)
    return error.sum() / max(len(s) * (len(s) - 1), 1)


def moments_of(tensors: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Sums over a batch's real positions of 1, of the entries and of their squares.

    Args:
        tensors: By layer: hidden states ``(batch, sequence, width)`` or scores ``(batch, heads,
            sequence, sequence)``.
        attention_mask: ``(batch, sequence)``.

    Returns:
        Shape ``(3, layers)``, float64.
    """
    real = attention_mask.reshape(-1, attention_mask.shape[-1]).bool()
    sums = []
    for x in tensors:
        is_scores = x.ndim == 4
        kept = real[:, None, :, None] & real[:, None, None, :] if is_scores else real[..., None]
        x = x.double().masked_fill(~kept, 0)
        count = kept.sum() * x.shape[1 if is_scores else -1]
        sums.append(torch.stack([count, x.sum(), x.square().sum()]))
    return torch.stack(sums, 1)


def variances_of(moments: Tensor) -> Tensor:
    """Variances ``(layers,)`` from the sum of ``moments_of`` over batches; 1 where all is alike."""
    count, first, second = moments.double()
    variance = second / count - (first / count).square()
    return variance.where(variance > 1e-6 * second / count, 1.0).float()  # above rounding


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
