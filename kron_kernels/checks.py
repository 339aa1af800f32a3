"""What a call must look like; every refusal names the value, the requirement and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Layer = tuple[Tensor, Tensor, Tensor | None]  # a, b, bias


def check_factors(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors as ``(r, m_i, n_i)``, held to one another and to ``x (…, n)``."""
    if not factors:
        raise ValueError("kron_matmul(x, *factors) needs at least one factor, got none.")
    dtype, device = x.dtype, x.device
    if len(factors) == 2:  # what is usual and right is told in 1 µs, a visible part of a small call
        a, b = factors
        (*_, n), a_shape, b_shape = x.shape or (0,), a.shape, b.shape
        if (
            len(a_shape) == 3 == len(b_shape)
            and a_shape[0] == b_shape[0]
            and 0 not in a_shape
            and 0 not in b_shape
            and n == a_shape[2] * b_shape[2]
            and dtype.is_floating_point
            and dtype == a.dtype == b.dtype
            and device == a.device == b.device
        ):
            return a, b
    shapes = [f.shape for f in factors]
    columns = 1
    for i, shape in enumerate(shapes):
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(
                f"factor {i} must be (m, n) or (rank, m, n) with every side at least 1, "
                f"got shape {tuple(shape)}."
            )
        columns *= shape[-1]
    ranks = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
    if ranks.count(ranks[0]) != len(ranks):
        raise ValueError(
            f"factors must share one Kronecker rank, got {ranks} (a 2-D factor has rank 1); "
            f"repeat a shared factor with .expand({max(ranks)}, -1, -1)."
        )
    if x.ndim == 0 or x.shape[-1] != columns:
        product = " * ".join(str(shape[-1]) for shape in shapes)
        raise ValueError(
            f"x's last dimension must be the product of the factors' columns, "
            f"{product} = {columns}, got x of shape {tuple(x.shape)}."
        )
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"x must be floating point or complex, got {dtype}; use x.float().")
    for i, f in enumerate(factors):
        if f.dtype != dtype or f.device != device:
            _refuse_unlike(x, f"factor {i}", f)
    return tuple(
        f if len(shape) == 3 else f[None] for f, shape in zip(factors, shapes, strict=True)
    )


def check_epilogue(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    """Bias ``(m,)``, activation and residual ``(…, m)`` against checked factors."""
    if bias is None and activation is None and residual is None:
        return
    rows = prod([f.shape[1] for f in factors])
    if bias is not None:
        if bias.shape != (rows,):
            raise ValueError(
                f"bias must have shape ({rows},), the product of the factors' rows, "
                f"got {tuple(bias.shape)}."
            )
        if bias.dtype != x.dtype or bias.device != x.device:
            _refuse_unlike(x, "bias", bias)
    if activation is not None:
        known = get_args(Activation)
        if activation not in known:
            raise ValueError(
                f"activation must be None or one of {', '.join(known)}, got {activation!r}."
            )
        if x.is_complex():
            raise ValueError(f"activation={activation!r} is defined for real x, got {x.dtype}.")
    if residual is not None and residual.shape != (*x.shape[:-1], rows):
        raise ValueError(
            f"residual must have y's shape {(*x.shape[:-1], rows)}, got {tuple(residual.shape)}."
        )


def _refuse_unlike(x: Tensor, name: str, t: Tensor) -> None:
    if t.dtype != x.dtype:
        raise ValueError(
            f"{name} is {t.dtype} but x is {x.dtype}; cast one with .to(), or use autocast."
        )
    raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move one with .to().")
