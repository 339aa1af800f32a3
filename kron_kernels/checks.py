"""Checks of a call's operands; every error names the value, the requirement and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from kron_kernels.shapes import constant_sizes

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Layer = tuple[Tensor, Tensor, Tensor | None]  # a, b, bias

_ACTIVATIONS = get_args(Activation)
_PLAIN = (Tensor, Parameter)
_STRIDED = torch.strided
# Float8 is floating point, too, but PyTorch has next to no arithmetic in it: its matmul passes, its
# addition raises NotImplementedError.
_REAL = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
Result = TypeVar("Result")


class Shaped(NamedTuple):
    """The attributes that the checks read, for a tensor never made: a block's hidden vector."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def is_plain(operands: Sequence[Any]) -> bool:
    """Whether kernels may read these tensors through their addresses.

    Not plain are subclasses, such as a DTensor or a FakeTensor; sparse and nested tensors; views
    with a pending sign, such as ``z.conj().imag``; zeros without memory, which autograd makes; and
    anything that is not a tensor.
    """
    for t in operands:
        if not (
            type(t) in _PLAIN
            and t.layout is _STRIDED
            and not (t.is_neg() or t.is_nested or t._is_zerotensor())
        ):
            return False
    return True


def check_tensors(x: Any, factors: Sequence[Any], bias: Any = None, residual: Any = None) -> None:
    """Raise unless all are dense tensors.

    Raises:
        TypeError: If one is not a tensor, such as a list or an array, or is sparse or nested.
    """
    check_tensor("x", x)
    for i, f in enumerate(factors):
        check_tensor(f"factor {i}", f)
    if bias is not None:
        check_tensor("bias", bias)
    if residual is not None:
        check_tensor("residual", residual)


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


def layer_of_three(name: str, layer: Any) -> Layer:
    """The layer, which must be ``(a, b, bias)``.

    Raises:
        TypeError: If it is not three values.
    """
    try:
        a, b, bias = layer
    except (TypeError, ValueError):
        kind = type(layer).__name__
        values = f" of {len(layer)}" if isinstance(layer, tuple | list) else ""
        raise TypeError(f"{name} must be (a, b, bias), got a {kind}{values}.") from None
    return a, b, bias


def check_layer(
    name: str,
    x: Tensor | Shaped,
    layer: Layer,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Layer:
    """``check_product`` of a layer, whose name is in the errors."""
    a, b, bias = layer
    a, b = named(name, check_product, x, (a, b), bias, activation, residual)
    return a, b, bias


def named(name: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """The function's result; its errors begin with the layer's name."""
    try:
        return function(*args, **options)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def check_product(
    x: Tensor | Shaped,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The factors as ``(r, m_i, n_i)``, after every check of a product's operands.

    Args:
        x: Shape ``(…, n)``.
        factors: ``(m_i, n_i)`` or ``(r, m_i, n_i)``.
        bias: Shape ``(m,)``.
        activation: Its name.
        residual: Shape ``(…, m)``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace records sizes
        with constant_sizes():
            check_product(x, factors, bias, activation, residual)
        return tuple([f if f.ndim == 3 else f[None] for f in factors])
    if not factors:
        raise ValueError("kron_matmul(x, *factors) needs at least one factor, got none.")
    a, b = factors[0], factors[-1]
    dtype, device, x_shape, a_shape, b_shape = x.dtype, x.device, x.shape, a.shape, b.shape
    # The usual case takes 1 µs this way, a visible part of a small call.
    if (
        len(factors) == 2
        and x_shape
        and len(a_shape) == 3 == len(b_shape)
        and a_shape[0] == b_shape[0]
        and 0 not in a_shape
        and 0 not in b_shape
        and x_shape[-1] == a_shape[2] * b_shape[2]
        and dtype in _REAL
        and dtype == a.dtype == b.dtype
        and device == a.device == b.device
    ):
        checked: tuple[Tensor, ...] = a, b
    else:
        checked = _check_factors(x, factors)
    if bias is not None or activation is not None or residual is not None:
        _check_epilogue(x, checked, bias, activation, residual)
    return checked


def _check_factors(x: Tensor | Shaped, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype, device = x.dtype, x.device
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
    if not x.shape or x.shape[-1] != columns:
        product = " * ".join(str(shape[-1]) for shape in shapes)
        name = "x" if isinstance(x, Tensor) else "the input"
        raise ValueError(
            f"{name}'s last dimension must be the product of the factors' columns, "
            f"{product} = {columns}, got {name} of shape {tuple(x.shape)}."
        )
    if not (dtype in _REAL or dtype.is_complex):
        raise ValueError(
            f"x must be floating point of at least 16 bits or complex, got {dtype}; use x.float()."
        )
    for i, f in enumerate(factors):
        if f.dtype != dtype or f.device != device:
            _refuse_unlike(x, f"factor {i}", f)
    return tuple(
        f if len(shape) == 3 else f[None] for f, shape in zip(factors, shapes, strict=True)
    )


def _check_epilogue(
    x: Tensor | Shaped,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> None:
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
        check_activation(activation)
        if x.dtype.is_complex:
            raise ValueError(f"activation={activation!r} is defined for real x, got {x.dtype}.")
    if residual is not None:
        if residual.shape != (*x.shape[:-1], rows):
            raise ValueError(
                f"residual must have y's shape {(*x.shape[:-1], rows)}, "
                f"got {tuple(residual.shape)}."
            )
        if residual.device != x.device:
            _refuse_unlike_device(x, "residual", residual)


def check_activation(activation: str | None) -> None:
    """Raise unless it is None or the name of an activation."""
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be None or one of {', '.join(_ACTIVATIONS)}, got {activation!r}."
        )


def _refuse_unlike(x: Tensor | Shaped, name: str, t: Tensor) -> None:
    if t.dtype != x.dtype:
        raise ValueError(
            f"{name} is {t.dtype} but x is {x.dtype}; cast one with .to(), or use autocast."
        )
    _refuse_unlike_device(x, name, t)


def _refuse_unlike_device(x: Tensor | Shaped, name: str, t: Tensor) -> None:
    raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move one with .to().")
