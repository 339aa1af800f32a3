"""The layers of a transformer encoder on a GPU, for inference, in few launches.

Five a layer if Triton's kernels compute its products: query, key and value; the attention; its
output with the residual; a norm; the feed-forward block with its residual and norm. Nothing waits
for the GPU, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels import dispatch
from kron_kernels.backends import COMPUTING
from kron_kernels.encoder import Embedding, Layer, Linear, Norm
from kron_kernels.functional import kron_embedding, kron_feed_forward, kron_matmul, kron_qkv


def embed(embedding: Embedding, ids: Sequence[Tensor | None]) -> Tensor:
    """``projection(norm(the sum of a row of each table))`` of ids ``(…)``: ``(…, d)``."""
    rows = [_rows(table, i) for table, i in zip(embedding.tables, ids, strict=True)]
    x = norm(sum(rows[1:], rows[0]), embedding.norm)
    return x if embedding.projection is None else linear(x, embedding.projection)


def encode(
    x: Tensor, layers: Sequence[Layer], heads: int, scale: float, bias: Tensor | None
) -> Tensor:
    """Apply the layers to ``x (B, T, d)``; ``bias`` is added to scores ``(B, heads, T, T)``."""
    for layer in layers:
        x = _layer(x, layer, heads, scale, bias)
    return x


def _layer(x: Tensor, layer: Layer, heads: int, scale: float, bias: Tensor | None) -> Tensor:
    parts = [product_of(part) for part in (layer.query, layer.key, layer.value)]
    qkv: Sequence[Tensor]
    if (q3 := parts[0]) and (k3 := parts[1]) and (v3 := parts[2]):
        qkv = kron_qkv(x, q3, k3, v3)
    else:
        qkv = [linear(x, part) for part in (layer.query, layer.key, layer.value)]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)  # (B, heads, T, size)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    x = norm(linear(y.transpose(1, 2).flatten(2), layer.output, x), layer.attention_norm)
    up, down = product_of(layer.up), product_of(layer.down)
    if up is None or down is None:
        hidden = linear(x, layer.up, activation=layer.activation)
        return norm(linear(hidden, layer.down, x), layer.output_norm)
    return _block(x, up, layer.activation, down, layer.output_norm)


def _block(x: Tensor, up: Any, activation: Any, down: Any, after: Norm) -> Tensor:
    """``norm(down(act(up(x))) + x)``, in one launch if Triton fuses these layers."""
    checked = [(*(f if f.ndim == 3 else f[None] for f in p[:2]), p[2]) for p in (up, down)]
    backend = dispatch.choose("auto", x, *(p[:2] for p in checked))
    if backend == "triton" and after.weight is not None:
        triton: Any = COMPUTING["triton or eager"]
        if triton.fuses(*checked):
            return triton.kron_feed_forward_norm(x, checked[0], activation, checked[1], x, after)
    return norm(kron_feed_forward(x, up, down, activation=activation, residual=x), after)


def norm(x: Tensor, given: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], given.weight, given.bias, given.epsilon)


def product_of(given: Linear) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``(a, b, bias)`` of a linear layer that is one product of two floating factors, or None."""
    if len(given.parts) != 1 or len(given.parts[0]) != 2:
        return None
    a, b = given.parts[0]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    return a, b, given.bias


def linear(
    x: Tensor, given: Linear, residual: Tensor | None = None, activation: Any = None
) -> Tensor:
    """``act(Σ_p x W_pᵀ + bias) + residual``; each product adds what comes before it."""
    *first, last = given.parts
    if not first:
        return _part(x, last, given.bias, activation, residual)
    total = residual if activation is None else None
    for part in first:
        total = _part(x, part, None, None, total)
    y = _part(x, last, given.bias, None, total)
    if activation is None:
        return y
    y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def _part(x: Tensor, part: Any, bias: Any, activation: Any, residual: Tensor | None) -> Tensor:
    if len(part) == 2:
        return kron_matmul(x, *part, bias=bias, activation=activation, residual=residual)
    y = F.linear(x, part[0], bias)
    y = y if activation is None else _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


_ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
}


def _rows(table: Any, ids: Any) -> Tensor:
    return F.embedding(ids, table[0]) if len(table) == 1 else kron_embedding(ids, *table)
