"""A whole transformer encoder in one call of the compiled CPU kernels, for inference.

The encoder normalises after each block, as BERT does. Its tensors are read in place at each call:
nothing is copied, so a change of a weight's numbers counts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kron_kernels.backends import abi, native
from kron_kernels.checks import Activation
from kron_kernels.int8 import Factor, Int8Factor, check_int8

# (weight (m, n),), in int8 (1, m, n), or (a (r, m1, n1), b (r, m2, n2)).
Part = tuple[Factor, ...]


class Linear(NamedTuple):
    """``y = x (Σ_p W_p)ᵀ + bias``."""

    parts: Sequence[Part]
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

    tables: Sequence[Part]  # one to three: (weight,), or (a (r, rows, c), b (r, 1, d))
    norm: Norm
    projection: Linear | None


class Division(NamedTuple):
    """How a call divides its work, see ``kron_division`` in ``csrc/kron.h``."""

    scratch: int  # bytes
    teams: int
    workers: int
    stages: int
    parts: int
    share: float


class Encoder:
    """See ``__call__``. Tensors are on the CPU, of one dtype but for int8 factors, and kept alive.

    Args:
        embedding: Tables of which one row each is added for a token.
        layers: One or more.
        heads: Of each attention; must divide the rows of query, key and value.
        scale: Of the scores, usually ``1 / sqrt(head size)``.

    Raises:
        ValueError: If the compiled kernels are missing or cannot serve these tensors.
    """

    def __init__(self, embedding: Embedding, layers: Sequence[Layer], heads: int, scale: float):
        self.tensors: list[Tensor] = []
        self.int8: list[Tensor] = []  # values, and scales in float32
        projection = embedding.projection
        numbers: list[float] = [heads, float(scale), len(embedding.tables), len(layers)]
        for table in embedding.tables:
            numbers += self._part(table)
        numbers += [*self._norm(embedding.norm), *self._linear(projection or Linear((), None))]
        for layer in layers:
            for linear in layer[:4]:  # query, key, value, output
                numbers += self._linear(linear)
            numbers += [*self._norm(layer.attention_norm), *self._linear(layer.up)]
            numbers += [abi.ACTIVATIONS[layer.activation], *self._linear(layer.down)]
            numbers += self._norm(layer.output_norm)
        first = (self.tensors or self.int8)[0]
        self.dtype, self.n_layers, self.heads = first.dtype, len(layers), heads
        self.tables = [_rows_and_width(table) for table in embedding.tables]
        self.width = _rows(layers[0].output)
        self._check(first)
        self._encoder = abi.module.encoder(*numbers)

    def _check(self, first: Tensor) -> None:
        if reason := native.why_not(first):
            raise ValueError(f"the encoder cannot serve these tensors: {reason}.")
        if self.int8 and self.dtype == torch.float64:
            raise ValueError("the encoder has no int8 factors in float64; use .float().")
        everything = [*self.tensors, *self.int8]
        for i, t in enumerate(everything):
            if t.device != first.device or (i < len(self.tensors) and t.dtype != self.dtype):
                raise ValueError(
                    f"the encoder's tensors must have one dtype and device, got {self.dtype} on "
                    f"{first.device} and {t.dtype} on {t.device}."
                )

    def _part(self, factors: Part) -> list[int]:
        check_int8(factors)
        for f in factors:
            if isinstance(f, Int8Factor):
                if f.scale.stride(1) != 1 < f.scale.shape[1]:
                    raise ValueError(
                        f"the scales of rows must be contiguous, got strides {f.scale.stride()}."
                    )
                self.int8 += f.values, f.scale
            else:
                self.tensors.append(f)
        if factors[0].ndim == 2:
            factors = (factors[0].unsqueeze(0),)  # type: ignore[union-attr]
        return abi.product(factors, None, None, None, None)

    def _vector(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        if not t.is_contiguous():
            raise ValueError(f"biases and norms must be contiguous, got strides {t.stride()}.")
        self.tensors.append(t)
        return abi.address(t)

    def _linear(self, linear: Linear) -> list[int]:
        numbers = [len(linear.parts), self._vector(linear.bias)]
        for part in linear.parts:
            numbers += self._part(part)
        return numbers

    def _norm(self, norm: Norm) -> list[float]:
        return [self._vector(norm.weight), self._vector(norm.bias), float(norm.epsilon)]

    def __call__(
        self,
        ids: Sequence[Tensor | None],
        mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        distance_bias: Tensor | None = None,
        all_states: bool = False,
    ) -> list[Tensor]:
        """Hidden states ``(sequences, length, width)``: the last, or the first and each layer's.

        Only tokens are computed. At padding, states are zero. The first position of a sequence that
        has tokens is computed even if it is padding, because models read it.

        Args:
            ids: Rows of each table, int64 ``(sequences, length)``; None for the first table if
                ``embeddings`` are given.
            mask: int64 ``(sequences, length)``, 0 for padding; None if there is none.
            embeddings: ``(sequences, length, width of the tables)`` instead of the first table's
                rows.
            distance_bias: ``(heads, 2 * length - 1)``: entry ``length - 1 + i - j`` is added to the
                scaled score of query i and key j.
            all_states: Whether to return the states before and after each layer.

        Raises:
            IndexError: If an id is not a row of its table, with both.
            ValueError: If shapes or dtypes do not fit.
        """
        first = next(t for t in (embeddings, *ids) if t is not None)
        self._check_batch(first, ids, mask, embeddings, distance_bias)
        # Contiguous copies live until the call is over.
        given = [
            t if t is None else t.contiguous() for t in (mask, *ids, embeddings, distance_bias)
        ]
        states = [
            first.new_empty(*first.shape[:2], self.width, dtype=self.dtype)
            for _ in range(self.n_layers + 1 if all_states else 1)
        ]
        addresses = [0] * (self.n_layers + 1 - len(states)) + [abi.address(t) for t in states]
        try:
            abi.module.encode(*self._call(first.shape, given), *addresses)
        except RuntimeError as error:
            self._explain(ids, mask, embeddings)
            raise ValueError(f"the encoder cannot compute this batch: {error}.") from None
        return states

    def division(self, sequences: int, length: int, mask: Tensor | None = None) -> Division:
        """How a call with this batch would divide its work among torch's threads."""
        ids = torch.empty(max(1, sequences), max(1, length), dtype=torch.int64)  # not read
        given = [mask, *[ids] * len(self.tables), None, None]
        states = [abi.address(ids)] * (self.n_layers + 1)
        call = self._call(torch.Size((sequences, length)), given)
        return Division(*abi.module.encode_division(*call, *states))

    def _call(self, shape: torch.Size, given: Sequence[Tensor | None]) -> list[Any]:
        """The arguments of ``csrc/binding.cpp``'s encode, without the states."""
        mask, *ids, embeddings, distance_bias = map(abi.address, given)
        return [
            self._encoder,
            *native._execution(),
            abi.DTYPES[self.dtype],
            *(shape[0], shape[1], mask, *ids, *[0] * (3 - len(ids))),
            *(embeddings, distance_bias),
        ]

    def _check_batch(
        self,
        first: Tensor,
        ids: Sequence[Tensor | None],
        mask: Tensor | None,
        embeddings: Tensor | None,
        distance_bias: Tensor | None,
    ) -> None:
        if len(ids) != len(self.tables):
            raise ValueError(f"there must be ids for {len(self.tables)} tables, got {len(ids)}.")
        sequences, length = first.shape[:2]
        rows = (sequences, length)
        wide = (sequences, length, self.tables[0][1])
        operands: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
            *((f"ids of table {i}", t, rows, torch.int64) for i, t in enumerate(ids)),
            ("mask", mask, rows, torch.int64),
            ("embeddings", embeddings, wide, self.dtype),
            ("distance_bias", distance_bias, (self.heads, max(0, 2 * length - 1)), self.dtype),
        ]
        for name, t, shape, dtype in operands:
            if t is not None and (t.shape != shape or t.dtype != dtype or not t.is_cpu):
                raise ValueError(
                    f"{name} must be {dtype} {shape} on the CPU, got {t.dtype} {tuple(t.shape)} on "
                    f"{t.device}."
                )

    def _explain(
        self, ids: Sequence[Tensor | None], mask: Tensor | None, embeddings: Tensor | None
    ) -> None:
        """Raise with the first id that is not a row of its table, if there is one."""
        used: Any = True
        if mask is not None:
            used = mask.bool()
            used[:, 0] = True
        for i, (table, (rows, _)) in enumerate(zip(ids, self.tables, strict=True)):
            if table is None or (i == 0 and embeddings is not None):
                continue
            wrong = table[((table < 0) | (table >= rows)) & used]
            if len(wrong):
                raise IndexError(
                    f"ids of table {i} must be 0 to {rows - 1}, its rows, got {int(wrong[0])}."
                )


def _rows_and_width(factors: Part) -> tuple[int, int]:
    return prod(f.shape[-2] for f in factors), prod(f.shape[-1] for f in factors)


def _rows(linear: Linear) -> int:
    return _rows_and_width(linear.parts[0])[0]
