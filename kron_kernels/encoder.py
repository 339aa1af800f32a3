"""A whole transformer encoder in one call of the compiled CPU kernels, for inference.

The encoder normalises after each block, as BERT does. Its tensors are read in place at each call:
nothing is copied, so a change of a weight's numbers counts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kron_kernels.backends import abi, native
from kron_kernels.checks import Activation


class Linear(NamedTuple):
    """``y = x (Σ_p W_p)ᵀ + bias``."""

    parts: Sequence[tuple[Tensor, ...]]  # (weight (m, n),) or (a (r, m1, n1), b (r, m2, n2)) each
    bias: Tensor | None  # (m,)


class Norm(NamedTuple):
    """``LayerNorm`` over the last dimension."""

    weight: Tensor | None  # (width,)
    bias: Tensor | None
    epsilon: float


class Layer(NamedTuple):
    """Attention and feed-forward block, each followed by its residual and norm."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    activation: Activation
    down: Linear
    output_norm: Norm


class Embedding(NamedTuple):
    """``projection(norm(the sum of a row of each table))``."""

    tables: Sequence[tuple[Tensor, ...]]  # one to three: (weight,) or (a (r, rows, c), b (r, 1, d))
    norm: Norm
    projection: Linear | None


class Encoder:
    """See ``__call__``. All tensors have one dtype, on the CPU, and are kept alive.

    Args:
        embedding: Tables of which one row each is added for a token.
        layers: One or more.
        heads: Of each attention; must divide the rows of query, key and value.
        scale: Of the scores, usually ``1 / sqrt(head size)``.

    Raises:
        ValueError: If the compiled kernels are missing or cannot serve these tensors.
    """

    def __init__(self, embedding: Embedding, layers: Sequence[Layer], heads: int, scale: float):
        raise NotImplementedError

    def __call__(
        self,
        ids: Sequence[Tensor | None],
        mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        distance_bias: Tensor | None = None,
        all_states: bool = False,
    ) -> list[Tensor]:
        """Hidden states ``(sequences, length, width)``: the last one, or the first and each layer's.

        Only tokens are computed. At padding, states are zero; a sequence's first position is
        computed even if it is padding, as models read it.

        Args:
            ids: Rows of each table, int64 ``(sequences, length)``; None for the first table if
                ``embeddings`` are given.
            mask: int64 ``(sequences, length)``, 0 for padding; None if there is none.
            embeddings: ``(sequences, length, width of the tables)`` instead of the first table's rows.
            distance_bias: ``(heads, 2 * length - 1)``: entry ``length - 1 + i - j`` is added to the
                scaled score of query i and key j.
            all_states: Whether to return the states before and after each layer.

        Raises:
            IndexError: If an id is not a row of its table, with both.
            ValueError: If shapes or dtypes do not fit.
        """
        raise NotImplementedError
