"""The terms of the loss: what a student computes, held against what its teacher computes.

    embedding   MSE(E_S, E_T)             output of the embedding layer
    attention   Σ_l MSE(O_l_S, O_l_T)     scores O = QKᵀ/√d, before the mask and the softmax (Eq. 9)
    hidden      Σ_l MSE(H_l_S, H_l_T)     output of layer l
    logits      KL(T ‖ S) · T²            the paper gives no formula; MSE for a regression
    labels      the student's own supervised loss

after Tahaei et al., NAACL 2022, Eq. 14. Each is a mean over the positions that are real, so that
padding takes no part in it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.utils import ModelOutput

TERMS = ("embedding", "attention", "hidden", "logits", "labels")

_SCORES = "sdpa_with_scores"


def _sdpa_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    output_attentions: bool = False,  # not passed on: sdpa would warn that it cannot
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """SDPA's output, and ``query @ keyᵀ * scaling`` in the place of the attention weights."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    if not output_attentions and not _keeps_the_flag(module):
        return output, None
    key = repeat_kv(key, query.shape[1] // key.shape[1])  # several heads of queries may share one
    scores = (query * scaling) @ key.mT
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal and kwargs.get("sliding_window") is None:
        return output, scores  # the mask is of padding, if any
    # A key that the query never sees teaches nothing.
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, 0)
    elif is_causal:
        scores = scores.tril(key.shape[-2] - query.shape[-2])
    return output, scores


def _keeps_the_flag(module: nn.Module) -> bool:
    # GPT-2's layers take ``output_attentions`` and do not hand it on: there it counts as given.
    return "output_attentions" in inspect.signature(module.forward).parameters


AttentionInterface.register(_SCORES, _sdpa_with_scores)
AttentionMaskInterface.register(_SCORES, sdpa_mask)


class _Projections(NamedTuple):
    """How an attention that does not call the interface has its scores."""

    names: tuple[str, ...]  # of the layers that project the text to queries and keys
    scores: Callable[..., Tensor]  # of the module and what those layers return


def _mpnet_scores(module: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    query, key = (_heads(x, module.num_attention_heads) for x in (query, key))
    return (query * query.shape[-1] ** -0.5) @ key.mT


def _deberta_v2_scores(module: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    query, key = (_heads(x, module.num_attention_heads) for x in (query, key))
    parts = 1 + sum(part in module.pos_att_type for part in ("c2p", "p2c"))
    return (query / math.sqrt(query.shape[-1] * parts)) @ key.mT


def _deberta_scores(module: nn.Module, projected: Tensor) -> Tensor:
    query, key, _ = _heads(projected, module.num_attention_heads).chunk(3, dim=-1)
    query = query + _heads(module.q_bias[None, None], module.num_attention_heads)
    return (query / math.sqrt(query.shape[-1] * (1 + len(module.pos_att_type)))) @ key.mT


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, sequence, width) as (batch, heads, sequence, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


_PROJECTIONS = {
    MPNetSelfAttention: _Projections(("q", "k"), _mpnet_scores),
    modeling_deberta.DisentangledSelfAttention: _Projections(("in_proj",), _deberta_scores),
    modeling_deberta_v2.DisentangledSelfAttention: _Projections(
        ("query_proj", "key_proj"), _deberta_v2_scores
    ),
}
# What projections return, until used. By module, of which DataParallel's replicas have their own.
_projected: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def _forget(attention: nn.Module, *_: object) -> None:
    # At the beginning: a call may have ended midway, by an error, or when activation checkpointing
    # had all that it needed.
    for name in _PROJECTIONS[type(attention)].names:
        _projected.pop(getattr(attention, name), None)


def _remember(projection: nn.Module, _: object, output: Tensor) -> None:
    # The first call is the text's, a second may be that of DeBERTa's relative positions.
    _projected.setdefault(projection, output)


def _put_scores(attention: nn.Module, _: object, output: tuple) -> tuple:
    """The attention's output with the scores in the place of its weights, where it has them."""
    names, scores = _PROJECTIONS[type(attention)]
    projected = [_projected.pop(getattr(attention, name)) for name in names]
    asked = len(output) > 1 and output[1] is not None
    return (output[0], scores(attention, *projected), *output[2:]) if asked else output


@contextmanager
def attention_scores(*models: PreTrainedModel) -> Iterator[None]:
    """Within, ``model(..., output_attentions=True)`` returns the scores before mask and softmax.

    ``attentions[l]`` is ``Q Kᵀ / √d`` of layer l, ``(batch, heads, queries, keys)``, of no
    meaning at padding; after the rotation, where a model rotates. Where a layer is causal or has a window,
    the scores of keys out of the query's sight are 0, so that such pairs count in the mean but add
    nothing to it. Outputs are computed by SDPA whatever the model was set to before. (Stock
    ``sdpa`` returns an empty tuple, ``eager`` the probabilities, dropped out in training.)

    MPNet and DeBERTa compute their outputs as ever, and their scores are those of content alone:
    MPNet's ``Q Kᵀ / √d`` without the relative position bias; DeBERTa's content-to-content part,
    divided as the model divides it, by ``√(d * parts)``, where ``parts`` is 1 and one more for each
    part with positions.

    Under activation checkpointing the backward belongs inside too: it runs the layers again.

    Raises:
        ValueError: If a model's attention layers are of neither kind.
    """
    with ExitStack() as stack:
        for model in models:
            own = [module for module in model.modules() if type(module) in _PROJECTIONS]
            if not own and not _calls_the_interface(model):
                raise ValueError(
                    f"the attention scores of {type(model).__name__} cannot be read: its layers do "
                    "not call transformers' AttentionInterface, nor are they MPNet's or "
                    "DeBERTa's. Train with attention_weight=0."
                )
            for attention in own:
                if _put_scores not in attention._forward_hooks.values():  # but once when nested
                    _hook(attention, stack)
            if not own:
                # Not set_attn_implementation: it decides by reading the source file of the class.
                config = model.config
                before = config._attn_implementation
                stack.callback(setattr, config, "_attn_implementation", before)
                config._attn_implementation = _SCORES
        yield


def _hook(attention: nn.Module, stack: ExitStack) -> None:
    stack.callback(_forget, attention)
    stack.enter_context(attention.register_forward_pre_hook(_forget))
    for name in _PROJECTIONS[type(attention)].names:
        stack.enter_context(getattr(attention, name).register_forward_hook(_remember))
    stack.enter_context(attention.register_forward_hook(_put_scores))


def _calls_the_interface(model: nn.Module) -> bool:
    # By what its source imports: many that do call it do not say so in _supports_attention_backend.
    return any(
        hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS")
        for module in model.modules()
    )


def layer_pairs(layers: str | Sequence[int], student: int, teacher: int) -> list[int]:
    """The teacher's layer for each of the student's, both counted from 1.

    Args:
        layers: ``"uniform"`` spreads them and ends with the teacher's last (TinyBERT's g(l) = l
            times the ratio of depths); ``"first"`` and ``"last"`` take as many from that end; or a
            number for each layer of the student.
        student: Number of its layers.
        teacher: Number of its layers.

    Raises:
        ValueError: If the name is unknown, a list does not fit, or a name is given for a student
            deeper than its teacher.
    """
    if not isinstance(layers, str):
        if len(layers) != student or not all(1 <= layer <= teacher for layer in layers):
            raise ValueError(
                f"layer_map = {list(layers)} must name a layer of the teacher, 1 to {teacher}, for "
                f"each of the student's {student}."
            )
        return list(layers)
    if student > teacher:
        raise ValueError(
            f"the student has {student} layers and the teacher {teacher}: layer_map = {layers!r} "
            "is for one at most as deep; give a list with a layer of the teacher for each."
        )
    named = {
        # Integers: a float's rounding must not decide which layer teaches.
        "uniform": [(2 * layer * teacher + student) // (2 * student) for layer in _up_to(student)],
        "first": list(_up_to(student)),
        "last": [teacher - student + layer for layer in _up_to(student)],
    }
    if layers not in named:
        raise ValueError(f"layer_map must be a list or one of {list(named)}, got {layers!r}.")
    return named[layers]


def _up_to(n: int) -> range:
    return range(1, n + 1)


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
        layer_map: Which of the teacher's layers teach the student's, see :func:`layer_pairs`.
        temperature: T, by which logits are divided; their KL divergence is scaled by T².
        problem_type: As in the config: ``"regression"`` compares logits by MSE (so does a single
            logit), ``"multi_label_classification"`` label by label.
        shares: What to multiply means over ``"tokens"``, ``"pairs"``, ``"rows"`` and ``"labels"``
            by: this batch's share of all that one step is made of, so that the batches' terms add
            up to the mean over the step. 1 unless given.

    Raises:
        ValueError: If a term asked for is missing from an output, no term is left, or shapes do
            not match.
    """
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
