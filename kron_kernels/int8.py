"""Factors in int8, and products of them on any device.

The compiled CPU kernels do the same, see ``kron_factor`` in ``csrc/kron.h``: a product with such a
factor rounds each vector that the factor multiplies to multiples of its largest entry / 127. Sums
of the integers are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from kron_kernels.checks import check_tensor
from kron_kernels.decompose import check_finite
from kron_kernels.shapes import contraction_order, sizes

# Factors with fewer entries stay in floating point: they cost little, and their errors would be in
# every number of the result. So do those with fewer columns, beside which scales would be large.
LEAST_ENTRIES, LEAST_COLUMNS = 1024, 8
# So many products of two bytes fit into a sum of 32 bits.
MOST_COLUMNS = 65536
# Vectors whose entries are all smaller count as zeros: 127 / 2**-128 would overflow.
_SMALLEST = 2.0**-100
_EXACT = 1024  # columns whose products of bytes are summed exactly in float32


class Int8Factor(NamedTuple):
    """Entry ``(k, i, j)`` stands for ``values[k, i, j] * scale[k, i, 0]``.

    Attributes:
        values: int8 ``(r, m, n)``, -127 to 127.
        scale: float32 ``(r, m, 1)``, or ``(1, m, 1)`` for terms that share scales.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, t: Tensor, shared: bool = False) -> Int8Factor:
        """The nearest to a factor ``(r, m, n)`` with scales of each row's largest entry.

        Args:
            t: Finite in float32, of any real dtype.
            shared: One scale for row i of all terms. Columns ``(r, m, 1)`` need it: the terms are
                what the product contracts.

        Raises:
            TypeError: If it is not a dense tensor.
            ValueError: If it is complex, has another shape or entries that are not finite.
        """
        check_tensor("a factor", t)
        if t.ndim != 3 or 0 in t.shape or t.is_complex():
            raise ValueError(
                "a factor must be real (r, m, n) with every side at least 1, got "
                f"{t.dtype} {tuple(t.shape)}{'; use t[None]' * (t.ndim == 2)}."
            )
        t = t.detach().float()
        if t.is_meta:  # only the shapes: a model that is about to be loaded
            rows = (1 if shared else len(t), t.shape[1], 1)
            return cls(torch.empty_like(t, dtype=torch.int8), t.new_empty(rows))
        check_finite("the factor in float32", t)
        scale = t.abs().amax((0, 2) if shared else 2, keepdim=True) / 127
        values = t / torch.where(scale == 0, 1.0, scale)
        return cls(values.round().clamp(-127, 127).to(torch.int8), scale.contiguous())

    @property
    def shape(self) -> torch.Size:
        """Of the values, ``(r, m, n)``."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the values."""
        return self.values.ndim

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    def stride(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.stride()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(r, m, n)`` in floating point."""
        return (self.values * self.scale).to(dtype)


Factor = Tensor | Int8Factor
Layer = tuple[Factor, Factor, Tensor | None]  # a, b, bias


def rounded_factors(factors: Sequence[Tensor]) -> tuple[Factor, ...]:
    """The factors of a product, ``(r, m, n)`` each, those that are large enough in int8."""
    columns, which = columns_of(factors), are_large([f.shape for f in factors])
    return tuple(
        Int8Factor.of(f, shared=i == columns) if large else f
        for i, (f, large) in enumerate(zip(factors, which, strict=True))
    )


def are_large(shapes: Sequence[Sequence[int]]) -> list[bool]:
    """Which factors of a product, of shapes ``(r, m, n)``, are worth int8.

    Those with at least 1024 entries, and 8 columns that the product sums over.
    """
    columns = _columns_of(shapes)
    contracted = [shape[0 if i == columns else 2] for i, shape in enumerate(shapes)]
    return [
        prod(shape) >= LEAST_ENTRIES and LEAST_COLUMNS <= n <= MOST_COLUMNS
        for shape, n in zip(shapes, contracted, strict=True)
    ]


def are_floating(factors: tuple[Any, ...]) -> TypeGuard[tuple[Tensor, ...]]:
    """Whether none of these is an ``Int8Factor``."""
    return Int8Factor not in map(type, factors)


def check_int8(factors: Sequence[Factor]) -> None:
    """Raise unless the int8 ones among a product's factors are such as products take.

    Raises:
        TypeError: If values or scale are not a dense tensor.
        ValueError: With what they must be.
    """
    for i, f in enumerate(factors):
        if isinstance(f, Int8Factor):
            check_tensor(f"factor {i}'s values", f.values)
            check_tensor(f"factor {i}'s scale", f.scale)
            if f.values.dtype != torch.int8 or f.ndim != 3 or 0 in f.shape:
                raise ValueError(
                    f"factor {i}'s values must be int8 (r, m, n) with every side at least 1, got "
                    f"{f.values.dtype} {tuple(f.shape)}; make it with Int8Factor.of(t)."
                )
    columns = columns_of(factors)
    for i, f in enumerate(factors):
        if isinstance(f, Int8Factor):
            _check_scale(f"factor {i}", f, is_columns=i == columns)


def _check_scale(name: str, f: Int8Factor, is_columns: bool) -> None:
    (r, m, n), scale = f.shape, f.scale
    shapes = [(1, m, 1)] if is_columns or r == 1 else [(1, m, 1), (r, m, 1)]
    if scale.dtype != torch.float32 or scale.shape not in shapes or scale.device != f.device:
        raise ValueError(
            f"{name}'s scale must be float32 of shape {' or '.join(map(str, shapes))} on "
            f"{f.device}, got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
            f"{'; columns share their scales: Int8Factor.of(t, shared=True)' * is_columns}."
        )
    if (r if is_columns else n) > MOST_COLUMNS:
        raise ValueError(f"{name} has more than {MOST_COLUMNS} columns; keep it in float32.")


# --- products


def product(x: Tensor, factors: Sequence[Factor]) -> Tensor:
    """``x Wᵀ`` of ``x (tokens, n)`` and one or two factors ``(r, m, n)``."""
    columns = columns_of(factors)
    if columns is not None:  # two matrices
        column, row = factors[columns], factors[1 - columns]
        return _times(_times(x, _row_matrix(row)), _column_matrix(column))
    ranks, *sides = zip(*(sizes_of(f) for f in factors), strict=True)
    order = contraction_order(list(zip(*sides, strict=True)))
    y: Any = 0
    for k in range(ranks[0]):
        z = x.unflatten(-1, sides[1])  # (tokens, n1, n2)
        for axis in order:
            z = z.movedim(axis + 1, -1)
            z = _times(z, _term(factors[axis], k)).movedim(-1, axis + 1)
        y = y + z
    return y.flatten(1)


def columns_of(factors: Sequence[Factor]) -> int | None:
    """Which of two factors has the columns of a low-rank product; None for another product."""
    return _columns_of([sizes_of(f) for f in factors])


def sizes_of(f: Factor) -> torch.Size:
    """``(r, m, n)`` as numbers, even inside ``torch.jit.trace``."""
    return sizes(f.values if isinstance(f, Int8Factor) else f)


def _columns_of(shapes: Sequence[Sequence[int]]) -> int | None:
    if len(shapes) == 2 and min(map(len, shapes)) >= 2:
        a, b = shapes
        if a[-1] == b[-2] == 1:
            return 0
        if a[-2] == b[-1] == 1:
            return 1
    return None


Matrix = tuple[Tensor, Tensor | None]  # (m, n), and the scales of int8 rows (m, 1)


def _term(f: Factor, k: int) -> Matrix:
    if isinstance(f, Tensor):
        return f[k], None
    return f.values[k], f.scale[k if sizes(f.scale)[0] > 1 else 0]


def _row_matrix(f: Factor) -> Matrix:
    """The only row of each term, ``(r, n)``."""
    if isinstance(f, Tensor):
        return f[:, 0], None
    return f.values[:, 0], f.scale[:, 0].expand(f.shape[0], 1)


def _column_matrix(f: Factor) -> Matrix:
    """The only column of each term, ``(m, r)``."""
    if isinstance(f, Tensor):
        return f[:, :, 0].mT, None
    return f.values[:, :, 0].mT, f.scale[0]


def _times(x: Tensor, matrix: Matrix) -> Tensor:
    """``x (…, n)`` times a matrix's rows: ``(…, m)``."""
    weight, scale = matrix
    if scale is None:
        return x @ weight.to(x.dtype).mT
    integers, unit = round_rows(x)
    # Sums are exact up to the rounding of a part's to x's dtype.
    parts = zip(integers.split(_EXACT, -1), weight.to(x.dtype).split(_EXACT, -1), strict=True)
    total: Any = sum(a @ b.mT for a, b in parts)
    return total * (unit * scale.mT)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 for ``x (…, n)``, and what 1 stands for ``(…, 1)``.

    The unit is NaN for a row that has an entry that is not finite.
    """
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest < float("inf")
    used = finite & (largest >= _SMALLEST)
    safe = torch.where(used, largest, 1.0)
    # One division as in the kernels: 127 / safe would be a reciprocal, rounded, times 127.
    inverse = torch.full_like(safe, 127.0) / safe
    integers = (torch.where(used, x, 0.0) * inverse).round()
    return integers, torch.where(used, safe / 127, torch.where(finite, 0.0, float("nan")))
