"""Sizes, costs and contraction order of one Kronecker layer, and checks of plain arguments.

A leaf: it imports nothing of this package.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Order = Literal["b_first", "a_first"]


class KronShape(NamedTuple):
    """``W = Σ_{k<rank} A_k (m1, n1) ⊗ B_k (m2, n2)``, a weight of shape ``(m1 * m2, n1 * n2)``."""

    m1: int
    n1: int
    m2: int
    n2: int
    rank: int = 1

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> KronShape:
        """The shape of factors ``a (r, m1, n1)`` and ``b (r, m2, n2)``; 2-D factors mean r = 1."""
        a_shape, b_shape = a.shape, b.shape
        if torch._C._get_tracing_state() is not None:
            a_shape, b_shape = sizes(a), sizes(b)
        (m1, n1), (m2, n2) = a_shape[-2:], b_shape[-2:]
        return cls(m1, n1, m2, n2, a_shape[0] if a.ndim == 3 else 1)

    @classmethod
    def split(
        cls, out_features: int, in_features: int, a_shape: tuple[int, int], rank: int = 1
    ) -> KronShape:
        """The shape whose left factor is ``a_shape``, for a weight of the given size.

        Raises:
            ValueError: If a size or the rank is not a positive integer, or ``a_shape`` is not two
                integers or does not divide the weight.
        """
        m = check_integer("out_features", out_features)
        n = check_integer("in_features", in_features)
        m1, n1 = sides_of(a_shape)
        check_divides("rows", m, m1, 0)
        check_divides("columns", n, n1, 1)
        rank = check_integer("rank", rank, None)
        if rank < 1:
            raise ValueError(f"rank = {rank!r}, but a sum needs at least one term; use rank=1.")
        return cls(m1, n1, m // m1, n // n1, rank)

    @property
    def a_shape(self) -> tuple[int, int]:
        return self.m1, self.n1

    @property
    def part(self) -> tuple[tuple[int, int], int]:
        """``(a_shape, rank)``, as ``KroneckerSum`` takes it."""
        return self.a_shape, self.rank

    @property
    def in_features(self) -> int:
        return self.n1 * self.n2

    @property
    def out_features(self) -> int:
        return self.m1 * self.m2

    @property
    def parameters(self) -> int:
        return self.rank * (self.m1 * self.n1 + self.m2 * self.n2)

    @property
    def transposed(self) -> KronShape:
        return KronShape(self.n1, self.m1, self.n2, self.m2, self.rank)

    @property
    def swapped(self) -> KronShape:
        """The shape of ``B ⊗ A``."""
        return KronShape(self.m2, self.n2, self.m1, self.n1, self.rank)

    @property
    def is_low_rank(self) -> bool:
        """Whether the terms are ``column ⊗ row`` or ``row ⊗ column``: a product of thin matrices.

        ``order`` then starts with the rows, and the intermediate product has ``rank`` columns.
        """
        return self.n1 == 1 == self.m2 or self.m1 == 1 == self.n2

    def multiply_adds(self, order: Order) -> int:
        """Multiply-adds per token. ``b_first``: Z = X Bᵀ, then A Z. ``a_first``: A X, then Bᵀ."""
        m1, n1, m2, n2, rank = self
        middle = n1 * m2 * (n2 + m1) if order == "b_first" else m1 * n2 * (n1 + m2)
        return rank * middle

    @property
    def order(self) -> Order:
        """The cheaper contraction order; the wrong one costs up to 8x for the paper's shapes."""
        b_first, a_first = self.multiply_adds("b_first"), self.multiply_adds("a_first")
        return "b_first" if b_first <= a_first else "a_first"

    @property
    def flops(self) -> int:
        """Floating-point operations per token in the cheaper order, two per multiply-add."""
        return 2 * self.multiply_adds(self.order)


@contextmanager
def constant_sizes() -> Iterator[None]:
    """Suspend ``torch.jit.trace``: nothing is recorded, and sizes are numbers, not tensors."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def sizes(t: Tensor) -> torch.Size:
    """A factor's shape as numbers, even inside ``torch.jit.trace``."""
    if not torch.jit.is_tracing():
        return t.shape
    with constant_sizes():
        return t.shape


def contraction_order(sides: Sequence[Sequence[int]]) -> list[int]:
    """The cheapest order in which to contract the factors ``(m_i, n_i)`` of one product.

    An exchange argument puts axis i before j if its ``1/m_i - 1/n_i`` is larger: it shrinks the
    data more for its cost. On a tie the last axis goes first, as in ``KronShape.order``.
    """
    if len(sides) == 2:  # by integers, which torch.compile can compare
        return [1, 0] if KronShape(*sides[0], *sides[1]).order == "b_first" else [0, 1]
    return sorted(range(len(sides)), key=lambda i: (1 / sides[i][1] - 1 / sides[i][0], -i))


def check_integer(name: str, value: Any, least: int | None = 1) -> int:
    """Convert a Python, NumPy or torch integer to ``int``; bools and floats are refused.

    Raises:
        ValueError: If it is not an integer, or less than ``least``.
    """
    # NumPy's bools refuse to be an index, torch's do not.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool"
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} = {value!r} must be an integer{bound}.")
    return number


def check_number(name: str, value: Any, least: float = 0.0) -> float:
    """Convert to a finite ``float`` of at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # torch's are RuntimeErrors
        number = math.nan
    if not least <= number < math.inf:
        raise ValueError(f"{name} = {value!r} must be a finite number of at least {least:g}.")
    return number


def sides_of(a_shape: Any) -> tuple[int, int]:
    """``(m1, n1)`` of the left factor, from any sequence of two integers.

    Raises:
        ValueError: If it is not two integers.
    """
    try:
        sides = () if isinstance(a_shape, str | bytes | Mapping | Set) else tuple(a_shape)
    except TypeError:
        sides = ()
    if len(sides) != 2:
        raise ValueError(
            f"a_shape = {a_shape!r} must be two integers (m1, n1), the left factor's rows and "
            "columns, such as (16, 2)."
        )
    m1, n1 = (check_integer(f"a_shape[{i}]", side, None) for i, side in enumerate(sides))
    return m1, n1


def parts_of(parts: Any) -> list[tuple[tuple[int, int], int]]:
    """The ``(a_shape, rank)`` pairs of a sum, from any iterable of pairs.

    Raises:
        ValueError: If it is not an iterable of pairs, or is empty.
    """
    try:
        found = None if isinstance(parts, str | bytes | Mapping | Set) else list(parts)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"parts = {parts!r} must be a list of (a_shape, rank): [((16, 2), 1)].")
    if not found:
        raise ValueError("parts is empty, but a sum needs at least one (a_shape, rank).")
    for i, part in enumerate(found):
        if not isinstance(part, list | tuple) or len(part) != 2:
            raise ValueError(f"parts[{i}] = {part!r} must be (a_shape, rank): ((16, 2), 1).")
    return [(a_shape, rank) for a_shape, rank in found]


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Prefix type and value errors raised inside with ``label``, such as a layer's path."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{label}: {error}") from error


def check_mapping(name: str, value: Any, example: str) -> None:
    """Raise unless it is a mapping from strings.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(getattr(value, "factors", None), Mapping):
        kind = type(value).__name__
        raise TypeError(
            f"{name} is a {kind}, not a mapping from paths to terms; pass its .factors."
        )
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} = {value!r:.80} must be a mapping, such as {example}.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} has the key {key!r:.80}, but keys must be strings: {example}.")


# Bound of the trial division: exact up to 10**12, 0.1 s for the largest prime below.
_TRIALS = 10**6


def divisors(n: int) -> list[int]:
    """All divisors in ascending order."""
    small = [d for d in range(1, min(math.isqrt(n), _TRIALS) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_divisors(size: int, factor: int) -> str:
    """``"nearest divisors are 4 and 6"``: the divisors of ``size`` around ``factor``."""
    found = divisors(size)
    below = max((d for d in found if d < factor), default=None)
    above = min((d for d in found if d > factor), default=None)
    nearest = [str(d) for d in (below, above) if d is not None]
    are = "divisors are" if len(nearest) == 2 else "divisor is"
    return f"nearest {are} {' and '.join(nearest)}"


def check_divides(side: str, size: int, factor: int, axis: int) -> None:
    """Raise, naming the nearest divisors, unless ``factor`` divides the weight's ``size``."""
    if factor < 1:
        raise ValueError(f"a_shape[{axis}] = {factor} is the factor's {side}, at least 1.")
    if size % factor:
        raise ValueError(
            f"weight's {size} {side} are not divisible by a_shape[{axis}] = {factor}; "
            f"{nearest_divisors(size, factor)}."
        )


def check_rank(s: KronShape) -> None:
    """Raise if fewer terms of these factors already represent every weight."""
    most = min(s.m1 * s.n1, s.m2 * s.n2)
    if s.rank > most:
        raise ValueError(
            f"rank = {s.rank}, but A {s.m1}x{s.n1} and B {s.m2}x{s.n2} already represent every "
            f"weight with {most} terms; use rank <= {most}."
        )
