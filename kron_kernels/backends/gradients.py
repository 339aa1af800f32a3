"""Buffers for gradients, and the form in which a backend returns them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def new_gradients(
    operands: Sequence[Tensor | None], needed: Sequence[bool], sums: torch.dtype
) -> list[Tensor | None]:
    """Uninitialised gradients of ``x, *parameters``, None where not needed or without an operand.

    The gradient of x has its dtype. Parameters' gradients are sums over tokens, in ``sums``.
    """
    x, *parameters = [t if wanted else None for t, wanted in zip(operands, needed, strict=True)]
    dx = None if x is None else x.new_empty(x.shape)
    return [dx, *(p if p is None else p.new_empty(p.shape, dtype=sums) for p in parameters)]


def returned(gradients: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    """The gradients in the dtype of x, with an empty tensor for each None.

    Operators of PyTorch return tensors only.
    """
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g in gradients)
