"""What a call must look like; every refusal names the value, the requirement and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Layer = tuple[Tensor, Tensor, Tensor | None]  # a, b, bias


_PLAIN = (Tensor, Parameter)


def is_plain(*operands: Tensor | None) -> bool:
    """Whether kernels may read these tensors through their addresses; None counts as plain.

    They may not read a subclass, such as a DTensor or a FakeTensor; a sparse tensor; a view whose
    sign is still to be flipped, such as ``z.conj().imag``; or zeros without memory, as autograd
    makes them.
    """
    for t in operands:  # 0.2 µs each
        if t is not None and not (
            type(t) in _PLAIN
            and t.layout is torch.strided
            and not t.is_neg()
            and not t._is_zerotensor()
        ):
            return False
    return True


def check_tensors(x: Any, factors: Sequence[Any], bias: Any = None, residual: Any = None) -> None:
    """Raise unless all are dense tensors.

    Raises:
        TypeError: If one is none, such as a list or an array, or is a sparse or nested tensor.
    """
    check_tensor("x", x)
    for i, f in enumerate(factors):
        check_tensor(f"factor {i}", f)
    for name, t in (("bias", bias), ("residual", residual)):
        if t is not None:
            check_tensor(name, t)


def check_tensor(name: str, t: Any) -> None:
    """Raise unless it is a dense tensor; see ``check_tensors``."""
    if not isinstance(t, Tensor):
        kind = f"{type(t).__module__}.{type(t).__qualname__}".removeprefix("builtins.")
        remedy = "" if t is None else "; use torch.as_tensor"
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}{remedy}.")
    if t.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, but must be dense; pass its .values(), or each of its "
            "tensors by itself."
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} has layout {t.layout}, but must be dense; use .to_dense().")


def check_factors(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors as ``(r, m_i, n_i)``, held to one another and to ``x (…, n)``."""
    if not factors:
        raise ValueError("kron_matmul(x, *factors) needs at least one factor, got none.")
    try:
        return _check_factors(x, factors)
    except (AttributeError, RuntimeError):  # of what has no shape
        check_tensors(x, factors)
        raise


def _check_factors(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype, device = x.dtype, x.device
    if len(factors) == 2:  # the usual case takes 1 µs, a visible part of a small call
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
            batch = "; for a batch of factors use torch.vmap(kron_matmul)" * (len(shape) > 3)
            raise ValueError(
                f"factor {i} must be (m, n) or (rank, m, n) with every side at least 1, "
                f"got shape {tuple(shape)}{batch}."
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
    try:
        _check_epilogue(x, prod([f.shape[1] for f in factors]), bias, activation, residual)
    except (AttributeError, RuntimeError):  # of what has no shape
        check_tensors(x, factors, bias, residual)
        raise


def _check_epilogue(
    x: Tensor, rows: int, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
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
    if residual is not None:
        if residual.shape != (*x.shape[:-1], rows):
            raise ValueError(
                f"residual must have y's shape {(*x.shape[:-1], rows)}, "
                f"got {tuple(residual.shape)}."
            )
        if residual.device != x.device:
            _refuse_unlike_device(x, "residual", residual)


def _refuse_unlike(x: Tensor, name: str, t: Tensor) -> None:
    if t.dtype != x.dtype:
        raise ValueError(
            f"{name} is {t.dtype} but x is {x.dtype}; cast one with .to(), or use autocast."
        )
    _refuse_unlike_device(x, name, t)


def _refuse_unlike_device(x: Tensor, name: str, t: Tensor) -> None:
    raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move one with .to().")
