"""Attention scores, QKᵀ/√d before mask and softmax, which models do not return."""

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
    output_attentions: bool = False,  # not passed on: sdpa warns that it ignores it
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """SDPA's output, with ``query @ keyᵀ * scaling`` in place of the attention weights."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    if not output_attentions and not _keeps_the_flag(module):
        return output, None
    key = repeat_kv(key, query.shape[1] // key.shape[1])  # grouped-query attention
    scores = (query * scaling) @ key.mT
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal and kwargs.get("sliding_window") is None:
        return output, scores  # any mask is of padding
    # 0 for keys that the query cannot see.
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, 0)
    elif is_causal:
        scores = scores.tril(key.shape[-2] - query.shape[-2])
    return output, scores


def _keeps_the_flag(module: nn.Module) -> bool:
    # GPT-2's layers take ``output_attentions`` without passing it on: assume it is set.
    return "output_attentions" in inspect.signature(module.forward).parameters


AttentionInterface.register(_SCORES, _sdpa_with_scores)
AttentionMaskInterface.register(_SCORES, sdpa_mask)


class _Projections(NamedTuple):
    """Scores of an attention module that does not call the interface."""

    names: tuple[str, ...]  # layers that project to queries and keys
    scores: Callable[..., Tensor]  # of the module and those layers' outputs


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
    # Fused attentions record the stock class they replace. Exact classes only: a user's subclass
    # may compute its scores differently.
    return getattr(type(module), "stock", type(module))


def _projections(attention: nn.Module) -> _Projections:
    return _PROJECTIONS[_stock(attention)]


# Outputs of projections until they are used, by module: DataParallel's replicas have their own.
_projected: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def _forget(attention: nn.Module, *_: object) -> None:
    # Called first: an error or activation checkpointing may have ended the last call early.
    for name in _projections(attention).names:
        _projected.pop(getattr(attention, name), None)


def _remember(projection: nn.Module, _: object, output: Tensor) -> None:
    # Keep the first call's; DeBERTa calls it again for relative positions.
    _projected.setdefault(projection, output)


def _put_scores(attention: nn.Module, _: object, output: tuple) -> tuple:
    """Replace the attention weights in the output, if it has them, by the scores."""
    names, scores = _projections(attention)
    projected = [_projected.pop(getattr(attention, name)) for name in names]
    asked = len(output) > 1 and output[1] is not None
    return (output[0], scores(attention, *projected), *output[2:]) if asked else output


@contextmanager
def attention_scores(*models: PreTrainedModel) -> Iterator[None]:
    """Make ``model(..., output_attentions=True)`` return the scores before mask and softmax.

    ``attentions[l]`` is ``Q Kᵀ / √d`` of layer l, ``(batch, heads, queries, keys)``, after any
    rotation and undefined at padding. In causal or windowed layers the scores of keys that a query
    cannot see are 0: these pairs count in a mean but add nothing to it. Inside the context, outputs
    are computed by SDPA. (Otherwise ``sdpa`` returns an empty tuple and ``eager`` the
    probabilities, with dropout in training.)

    MPNet and DeBERTa compute their outputs unchanged, and their scores cover content only: MPNet's
    ``Q Kᵀ / √d`` without the relative position bias; DeBERTa's content-to-content part, divided as
    in the model by ``√(d * parts)``, where ``parts`` is 1 plus the number of position parts.

    With activation checkpointing the backward must be inside too, since it runs the layers again.

    Raises:
        ValueError: If a model's attention layers are of neither kind.
    """
    with ExitStack() as stack:
        for model in models:
            own = [m for m in model.modules() if _stock(m) in _PROJECTIONS]
            if not own and not _calls_the_interface(model):
                raise ValueError(
                    f"the attention scores of {type(model).__name__} cannot be read: its layers do "
                    "not call transformers' AttentionInterface and are not MPNet's or DeBERTa's. "
                    "Train with attention_weight=0."
                )
            for attention in own:
                if _put_scores not in attention._forward_hooks.values():  # once, even if nested
                    _hook(attention, stack)
            if not own:
                # Not set_attn_implementation, which reads the source file of the class.
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
    # By what its module imports: many models that call it do not set _supports_attention_backend.
    return any(
        hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS")
        for module in model.modules()
    )
