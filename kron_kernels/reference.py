"""The definition by ``torch.kron`` in float64: the oracle of the tests and benchmarks."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def materialize(*factors: Tensor) -> Tensor:
    """``Σ_k F_k ⊗ G_k ⊗ …`` of shape ``(m, n)``, formed term by term with ``torch.kron``."""
    # torch.kron refuses some strides, even those of contiguous tensors: odd ones at sides of 1.
    copies = (f.clone(memory_format=torch.contiguous_format) for f in factors)
    terms = zip(*(f if f.ndim == 3 else f[None] for f in copies), strict=True)
    return sum(reduce(torch.kron, term) for term in terms)


def kron_matmul(
    x: Tensor,
    *factors: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` in float64 (complex128), with W formed."""

    def wide(t: Tensor) -> Tensor:
        return t.to(torch.complex128 if t.is_complex() else torch.float64)

    w = materialize(*map(wide, factors))
    y = F.linear(wide(x), w, None if bias is None else wide(bias))
    match activation:
        case "gelu":
            y = F.gelu(y)
        case "gelu_tanh":
            y = F.gelu(y, approximate="tanh")
        case "relu":
            y = F.relu(y)
        case "silu":
            y = F.silu(y)
    return y if residual is None else y + wide(residual)
