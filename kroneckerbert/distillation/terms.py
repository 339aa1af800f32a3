"""The terms of the loss: what a student computes, held against what its teacher computes.

    embedding   MSE(E_S, E_T)             output of the embedding layer
    attention   Σ_l MSE(O_l_S, O_l_T)     scores O = QKᵀ/√d, before the mask and the softmax (Eq. 9)
    hidden      Σ_l MSE(H_l_S, H_l_T)     output of layer l
    logits      KL(T ‖ S) · T²            the paper gives no formula; MSE for a regression
    labels      the student's supervised loss; of token heads, their cross-entropy

after Tahaei et al., NAACL 2022, Eq. 14. Each is a mean over the positions that are real, so that
padding takes no part in it.
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
    """The terms of the loss, each a float32 scalar before its weight, by name.

    Padding takes no part: ``embedding`` and ``hidden`` are means over real tokens x width,
    ``attention`` over real query x real key pairs x heads; tokens' logits over real tokens, a
    span's start and end over real positions. ``attention`` and ``hidden`` are sums over layers.

    Args:
        student: Output with the fields its terms need: ``hidden_states`` for embedding and hidden,
            ``attentions`` under ``attention_scores`` for attention, ``*logits``, ``loss``.
        teacher: The teacher's output for the same batch.
        attention_mask: ``(batch, sequence)``, non-zero where the token is real; a multiple-choice
            ``(batch, choices, sequence)`` is flattened as the model flattens it.
        weights: Weight of every name in ``TERMS``. A term of weight 0 is not computed; ``None``
            asks for it only where the outputs have what it needs.
        layer_map: Which of the teacher's layers teach the student's, see ``layer_pairs``.
        temperature: T, by which logits are divided; their KL divergence is scaled by T².
        problem_type: As in the config: ``"regression"`` compares logits by MSE (so does a single
            logit), ``"multi_label_classification"`` label by label.
        shares: What to multiply means over ``"tokens"``, ``"pairs"``, ``"rows"`` and ``"labels"``
            by: this batch's share of all that one step is made of, so that the batches' terms add
            up to the mean over the step. 1 unless given.

    Raises:
        ValueError: If the temperature is not positive, a term asked for is missing from an output,
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
                f"{tuple(attention_mask.shape)}: the loss needs to know which tokens are real."
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
            # A span's two ends are averaged, two heads are added, as in the models' own losses.
            total = torch.stack(divergences).sum()
            terms["logits"] = total / 2 if "start_logits" in names else total
        elif weights["logits"] is not None:
            raise ValueError(
                f"logits_weight = {weights['logits']}, but student and teacher have no logits in "
                f"common: their outputs are {list(student)} and {list(teacher)}. Give both the "
                "task's head, or set logits_weight=0."
            )
    if weights["labels"] != 0:
        if student.get("loss") is not None:  # DataParallel: one per replica
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
    """Both models' tensors, one a layer: none missing, or the loss were a sum over nothing."""
    s, t = student.get(field) or (), teacher.get(field) or ()
    if not s or not t:
        raise ValueError(
            f"student and teacher must return {field}; got {len(s)} and {len(t)}. Attention layers "
            "must call the function that config._attn_implementation names; a model that cannot "
            "trains with attention_weight=0."
        )
    return s, t


def _mapped(
    s: tuple[Tensor, ...], t: tuple[Tensor, ...], layer_map: str | Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    teachers = layer_pairs(layer_map, len(s), len(t))
    return [(ours, t[layer - 1]) for ours, layer in zip(s, teachers, strict=True)]


def _hidden_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens and width of (batch, sequence, width)."""
    error = (s.float() - t.float()).masked_fill(~real[..., None], 0)
    return error.square().sum() / (real.sum() * s.shape[-1])


def _scores_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real pairs and heads of (batch, heads, queries, keys)."""
    pairs = real[:, None, :, None] & real[:, None, None, :]
    error = (s.float() - t.float()).masked_fill(~pairs, 0)
    return error.square().sum() / (pairs.sum() * s.shape[1])


def _divergence(
    name: str, s: Tensor, t: Tensor, real: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    """Mean KL(t ‖ s) T²: soft cross-entropy less the teacher's entropy, so 0 when they agree."""
    if s.shape != t.shape:
        raise ValueError(f"{name} of student and teacher differ: {s.shape} and {t.shape}.")
    if s.ndim == 3:  # one distribution for each token, so rows of the real ones
        s, t = s[real], t[real]
    s, t = s.float(), t.float()
    if problem_type == "regression" or s.shape[-1] == 1:
        return F.mse_loss(s, t)
    s, t = s / temperature, t / temperature
    if name in ("start_logits", "end_logits"):  # a distribution over positions
        lowest = torch.finfo(s.dtype).min / 2  # -inf would give 0 * nan
        s, t = s.masked_fill(~real, lowest), t.masked_fill(~real, lowest)
    elif problem_type == "multi_label_classification":  # sigmoid(z) = softmax([z, 0])
        s, t = F.pad(s[..., None], (0, 1)), F.pad(t[..., None], (0, 1))
    log_s, log_t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
    return divergence * temperature**2
