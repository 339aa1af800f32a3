"""Operands whose product has entries of order 1, drawn alike by every test."""

import torch
from torch import Tensor

from kron_kernels import KronShape

# Sides of one, primes, both orders, both layouts of the eager backend, the paper's small factors.
SHAPES = [
    KronShape(1, 1, 1, 1),
    KronShape(3, 4, 5, 2),
    KronShape(16, 2, 12, 24),
    KronShape(2, 16, 24, 12),
    KronShape(24, 24, 2, 2),
    KronShape(24, 3, 2, 16),
    KronShape(30, 40, 17, 1),
    KronShape(53, 6, 1, 8),
    KronShape(7, 5, 13, 11, 3),
    KronShape(13, 11, 2, 3, 4),
]


def name(s: KronShape) -> str:
    return f"{s.m1}x{s.n1}-{s.m2}x{s.n2}" + (f"-r{s.rank}" if s.rank > 1 else "")


def draw(
    s: KronShape, tokens: int | tuple[int, ...] = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """``x (*tokens, n)``, ``a (r, m1, n1)``, ``b (r, m2, n2)``."""
    lead = (tokens,) if isinstance(tokens, int) else tokens
    seed = torch.Generator().manual_seed(sum(s) + len(lead))
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=seed, dtype=wide)

    x = randn(*lead, s.in_features)
    a = randn(s.rank, s.m1, s.n1) / s.n1**0.5
    b = randn(s.rank, s.m2, s.n2) / (s.n2 * s.rank) ** 0.5
    return x.to(dtype), a.to(dtype), b.to(dtype)
