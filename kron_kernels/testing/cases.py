"""Shapes that tests and benchmarks share, and operands whose product has entries of order 1."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from kron_kernels.checks import Activation
from kron_kernels.shapes import KronShape

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
PRESETS = {  # KroneckerBERT's layers
    "8x attention": KronShape(384, 384, 2, 2),
    "8x up": KronShape(8, 2, 384, 384),
    "8x down": KronShape(2, 8, 384, 384),
    "21x attention": KronShape(384, 48, 2, 16),
    "21x up": KronShape(16, 2, 192, 384),
    "21x down": KronShape(2, 16, 384, 192),
}
PAIRS = {size: (PRESETS[f"{size} up"], PRESETS[f"{size} down"]) for size in ("8x", "21x")}
DECODER = KronShape(30522, 96, 1, 8)
SQUARES = [KronShape(32, 32, 24, 24), KronShape(64, 64, 12, 12)]
SUMS = [
    KronShape(384, 48, 2, 16, 4),
    KronShape(384, 384, 8, 2, 4),
    KronShape(384, 384, 2, 8, 4),
]
# SHAPES, and odd sizes in both orders, with either factor as the mix.
MIXED = [*SHAPES, KronShape(3, 20, 34, 40), KronShape(70, 66, 8, 2, 2)]
# Pairs of layers whose factors meet in one kernel: plain, odd, and sums.
FEED_FORWARDS = [
    (KronShape(4, 2, 12, 24), KronShape(2, 4, 24, 12)),
    (KronShape(5, 3, 7, 9), KronShape(3, 5, 11, 7)),
    (KronShape(4, 2, 12, 24, 2), KronShape(1, 4, 24, 12, 3)),
]
DTYPES = ("float16", "bfloat16", "tf32", "float32")  # tf32: float32 multiplied in tf32
ACTIVATIONS = (None, *get_args(Activation))


def name(s: KronShape) -> str:
    """A shape as a test's id: ``16x2-12x24``, or ``7x5-13x11-r3``."""
    return f"{s.m1}x{s.n1}-{s.m2}x{s.n2}" + (f"-r{s.rank}" if s.rank > 1 else "")


def draw(
    s: KronShape, tokens: int | tuple[int, ...] = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """``x (*tokens, n)``, ``a (r, m1, n1)``, ``b (r, m2, n2)`` on the CPU; the same every time."""
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(sum(s) + len(lead))
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=wide)

    x = randn(*lead, s.in_features)
    a = randn(s.rank, s.m1, s.n1) / s.n1**0.5
    b = randn(s.rank, s.m2, s.n2) / (s.n2 * s.rank) ** 0.5
    return x.to(dtype), a.to(dtype), b.to(dtype)
