"""Attention scores, QKᵀ/√d before mask and softmax, of models that return none."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

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


def _mpnet_scores(module: Any, query: Tensor, key: Tensor) -> Tensor:
    query, key = (_heads(x, module.num_attention_heads) for x in (query, key))
    return (query * query.shape[-1] ** -0.5) @ key.mT


def _deberta_v2_scores(module: Any, query: Tensor, key: Tensor) -> Tensor:
    query, key = (_heads(x, module.num_attention_heads) for x in (query, key))
    parts = 1 + sum(part in module.pos_att_type for part in ("c2p", "p2c"))
    return (query / math.sqrt(query.shape[-1] * parts)) @ key.mT


def _deberta_scores(module: Any, projected: Tensor) -> Tensor:
    query, key, _ = _heads(projected, module.num_attention_heads).chunk(3, dim=-1)
    query = query + _heads(module.q_bias[None, None], module.num_attention_heads)
    return (query / math.sqrt(query.shape[-1] * (1 + len(module.pos_att_type)))) @ key.mT


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, sequence, width) as (batch, heads, sequence, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


_PROJECTIONS: dict[type[nn.Module], _Projections] = {
    MPNetSelfAttention: _Projections(("q", "k"), _mpnet_scores),
    modeling_deberta.DisentangledSelfAttention: _Projections(("in_proj",), _deberta_scores),
    modeling_deberta_v2.DisentangledSelfAttention: _Projections(
        ("query_proj", "key_proj"), _deberta_v2_scores
    ),
}


def _stock(module: nn.Module) -> type[nn.Module]:
    # Fused attentions have a class of their own, which knows the stock one. How a class computes
    # that someone else has derived is not known.
    return getattr(type(module), "stock", type(module))


def _projections(attention: nn.Module) -> _Projections:
    return _PROJECTIONS[_stock(attention)]


# What projections return, until used. By module, of which DataParallel's replicas have their own.
_projected: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def _forget(attention: nn.Module, *_: object) -> None:
    # At the beginning: a call may have ended midway, by an error, or when activation checkpointing
    # had all that it needed.
    for name in _projections(attention).names:
        _projected.pop(getattr(attention, name), None)


def _remember(projection: nn.Module, _: object, output: Tensor) -> None:
    # The first call is the text's, a second may be that of DeBERTa's relative positions.
    _projected.setdefault(projection, output)


def _put_scores(attention: nn.Module, _: object, output: tuple) -> tuple:
    """The attention's output with the scores in the place of its weights, where it has them."""
    names, scores = _projections(attention)
    projected = [_projected.pop(getattr(attention, name)) for name in names]
    asked = len(output) > 1 and output[1] is not None
    return (output[0], scores(attention, *projected), *output[2:]) if asked else output


@contextmanager
def attention_scores(*models: PreTrainedModel) -> Iterator[None]:
    """Within, ``model(..., output_attentions=True)`` returns the scores before mask and softmax.

    ``attentions[l]`` is ``Q Kᵀ / √d`` of layer l, ``(batch, heads, queries, keys)``, of no meaning
    at padding; after the rotation, where a model rotates. Where a layer is causal or has a window,
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
            own = [m for m in model.modules() if _stock(m) in _PROJECTIONS]
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
    for name in _projections(attention).names:
        stack.enter_context(getattr(attention, name).register_forward_hook(_remember))
    stack.enter_context(attention.register_forward_hook(_put_scores))


def _calls_the_interface(model: nn.Module) -> bool:
    # By what its source imports: many that do call it do not say so in _supports_attention_backend.
    return any(
        hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS")
        for module in model.modules()
    )
