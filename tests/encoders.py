"""``kron_kernels.encoder.Encoder`` in plain PyTorch, with products formed: the oracle of its tests.

In float64 it is exact to rounding; in lower precision it stands in for the compiled one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels.encoder import Embedding, Layer, Linear, Norm
from kron_kernels.reference import materialize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Encoder:
    """See ``kron_kernels.encoder.Encoder``; it reads its tensors at each call, too."""

    def __init__(self, embedding: Embedding, layers: Sequence[Layer], heads: int, scale: float):
        self.embedding, self.layers, self.heads, self.scale = embedding, layers, heads, scale

    def double(self) -> Encoder:
        """A copy in float64."""
        return Encoder(_wide(self.embedding), _wide(list(self.layers)), self.heads, self.scale)

    def __call__(
        self,
        ids: Sequence[Tensor | None],
        mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        distance_bias: Tensor | None = None,
        all_states: bool = False,
    ) -> list[Tensor]:
        """See ``kron_kernels.encoder.Encoder.__call__``.

        States are zero at padding, except for the first position of a sequence with tokens.
        """
        rows = [_rows(table, i) for table, i in zip(self.embedding.tables, ids, strict=True)]
        if embeddings is not None:
            rows[0] = embeddings
        x = _norm(self.embedding.norm, sum(rows[1:], rows[0]))  # (sequences, length, width)
        if self.embedding.projection is not None:
            x = _linear(self.embedding.projection, x)
        length = x.shape[1]
        is_key = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        is_computed = is_key.clone()
        is_computed[:, :1] = is_key.any(1, keepdim=True)
        bias = None
        if distance_bias is not None:
            i = torch.arange(length)
            bias = distance_bias[:, length - 1 + i[:, None] - i]  # (heads, queries, keys)
        states = [x]
        for layer in self.layers:
            x = self._layer(layer, x, is_key, bias)
            states.append(x)
        states = [state.masked_fill(~is_computed[..., None], 0) for state in states]
        return states if all_states else states[-1:]

    def _layer(self, layer: Layer, x: Tensor, is_key: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            _linear(linear, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (layer.query, layer.key, layer.value)
        )  # (sequences, heads, length, head size)
        scores = q @ k.mT * self.scale  # (sequences, heads, queries, keys)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~is_key[:, None, None], -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num()  # NaN if there is no key at all
        attended = (weights @ v).transpose(1, 2).flatten(-2)
        x = _norm(layer.attention_norm, _linear(layer.output, attended) + x)
        hidden = _ACTIVATIONS[layer.activation](_linear(layer.up, x))
        return _norm(layer.output_norm, _linear(layer.down, hidden) + x)


def _weight(parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The sum of dense weights and products ``(a, b)``."""
    formed = [part[0] if len(part) == 1 else materialize(*part) for part in parts]
    return sum(formed[1:], formed[0])


def _rows(table: tuple[Tensor, ...], ids: Tensor | None) -> Any:
    if ids is None:
        return None
    weight = _weight([table])
    # An index of PyTorch may be negative; a row of a table may not.
    if ids.numel() and not 0 <= ids.min() <= ids.max() < len(weight):
        raise IndexError(f"ids must be rows of a table of {len(weight)}, got {ids.tolist()}.")
    return weight[ids]


def _linear(linear: Linear, x: Tensor) -> Tensor:
    return F.linear(x, _weight(linear.parts), linear.bias)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)


def _wide(value: Any) -> Any:
    """The same in float64, whatever it is."""
    if isinstance(value, Tensor):
        return value.detach().double()
    if isinstance(value, tuple | list):
        parts = [_wide(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
