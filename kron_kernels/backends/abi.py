"""The compiled module and its arguments: ``csrc/kron.h`` in the order of ``csrc/binding.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kron_kernels.checks import Activation
from kron_kernels.shapes import contraction_order

try:
    import kron_kernels._native as module
except ImportError as error:
    module = None
    missing = str(error)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


def address(t: Tensor | None) -> int:
    """Where a tensor's first entry is; 0 for none."""
    return 0 if t is None else t.data_ptr()


def product(
    factors: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
    y: Tensor | None,
) -> list[int]:
    """A ``kron_product``."""
    shapes = tuple([f.shape for f in factors])
    arguments = [
        shapes[0][0],
        len(factors),
        address(bias),
        address(residual),
        ACTIVATIONS[activation],
        address(y),
    ]
    turns = _turns(shapes)
    for i, f in enumerate(factors):
        _, rows, cols = shapes[i]
        arguments += (address(f), rows, cols, *f.stride(), turns[i])
    return arguments


def product_of_shapes(shapes: Sequence[tuple[int, int, int]]) -> list[int]:
    """The same of contiguous factors without data, for questions about what is served."""
    arguments = [shapes[0][0], len(shapes), 0, 0, 0, 0]
    turns = _turns(tuple(shapes))
    for i, (_, rows, cols) in enumerate(shapes):
        arguments += (0, rows, cols, rows * cols, cols, 1, turns[i])
    return arguments


@lru_cache(maxsize=4096)
def _turns(shapes: tuple[tuple[int, int, int], ...]) -> list[int]:
    return contraction_order([(m, n) for _, m, n in shapes])
