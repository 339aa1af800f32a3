"""``kron_matmul``, ``kron_qkv`` and ``kron_feed_forward`` with factors in int8.

They have no gradients, and no kernels for GPUs: the compiled CPU kernels compute them, or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kron_kernels import dispatch
from kron_kernels.backends import eager, native
from kron_kernels.checks import (
    Activation,
    Shaped,
    check_product,
    check_tensor,
    layer_of_three,
    named,
)
from kron_kernels.dispatch import BackendName
from kron_kernels.int8 import Factor, Int8Factor, Layer, check_int8, product
from kron_kernels.repeats import Repeats, call_key
from kron_kernels.shapes import constant_sizes

_matmuls = Repeats()
_BACKENDS = ("auto", "eager", "native")


def kron_matmul(
    x: Tensor,
    factors: Sequence[Factor],
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
    backend: BackendName,
) -> Tensor:
    """See ``kron_kernels.kron_matmul``."""
    tensors = _tensors(factors)
    call = call_key((x, *tensors, bias, residual), activation, backend)
    if call and (again := _matmuls.get(call)):
        return again(x, *tensors, bias, residual)
    check_tensor("x", x)
    if dispatch.under_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = dispatch.lowered(x, dtype)
        factors = [dispatch.lowered(f, dtype) if isinstance(f, Tensor) else f for f in factors]
        bias = dispatch.lowered(bias, dtype) if isinstance(bias, Tensor) else bias
        with torch.autocast(x.device.type, enabled=False):
            return kron_matmul(x, factors, bias, activation, residual, backend)
    factors = checked_factors(x, factors, bias, activation, residual)
    if residual is not None and residual.dtype != x.dtype:
        return kron_matmul(x, factors, bias, activation, None, backend) + residual
    is_native = _is_native(backend, (x, bias, residual), factors)
    if torch.compiler.is_compiling() and not (torch.compiler.is_exporting() or backend == "eager"):
        # A compiler sees one operator, which decides when it runs.
        operator = torch.ops.kron_kernels.int8_matmul.default  # from ops
        return operator(x, *_parts(factors), bias, activation, residual, backend)
    if is_native:
        if call and all(f.scale.is_contiguous() for f in factors if isinstance(f, Int8Factor)):
            _matmuls.add(call, native.again_matmul(x, factors, bias, activation, residual))
        with dispatch.recorded("kron_matmul"):
            return native.kron_matmul(x, _packed(factors), bias, activation, residual)
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    y = product(rows, factors)
    y = y.view(*x.shape[:-1], y.shape[-1])
    if bias is not None:
        y = y + bias
    return eager.epilogue(y.to(x.dtype), activation, residual)


def kron_qkv(x: Tensor, layers: Mapping[str, Layer], backend: BackendName) -> list[Tensor]:
    """See ``kron_kernels.kron_qkv``."""
    layers = {name: layer_of_three(name, layer) for name, layer in layers.items()}
    check_tensor("x", x)
    if not dispatch.in_products(x):
        checked: list[Layer] = []
        for name, (a, b, bias) in layers.items():
            a, b = named(name, checked_factors, x, (a, b), bias, None, None)
            checked.append((a, b, bias))
        factors = [f for a, b, _ in checked for f in (a, b)]
        if _is_native(backend, [x, *(bias for *_, bias in checked)], factors):
            packed: Any = [(*_packed((a, b)), bias) for a, b, bias in checked]
            with dispatch.recorded("kron_qkv"):
                return native.kron_qkv(x, packed)
    return [
        named(name, kron_matmul, x, (a, b), bias, None, None, backend)
        for name, (a, b, bias) in layers.items()
    ]


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    down: Layer,
    activation: Activation | None,
    residual: Tensor | None,
    backend: BackendName,
) -> Tensor:
    """See ``kron_kernels.kron_feed_forward``."""
    *first, up_bias = layer_of_three("up", up)
    *second, down_bias = layer_of_three("down", down)
    check_tensor("x", x)
    if not dispatch.in_products(x):
        a1, b1 = named("up", checked_factors, x, first, up_bias, activation, None)
        hidden = Shaped((*x.shape[:-1], a1.shape[1] * b1.shape[1]), x.dtype, x.device)
        a2, b2 = named("down", checked_factors, hidden, second, down_bias, None, residual)
        if residual is not None and residual.dtype != x.dtype:
            return kron_feed_forward(x, up, down, activation, None, backend) + residual
        operands, factors = (x, up_bias, down_bias, residual), (a1, b1, a2, b2)
        if _is_native(backend, operands, factors) and activation is not None:
            a1, b1, a2, b2 = _packed(factors)
            up, down = (a1, b1, up_bias), (a2, b2, down_bias)
            with dispatch.recorded("kron_feed_forward"):
                return native.kron_feed_forward(x, up, activation, down, residual)
    h = named("up", kron_matmul, x, first, up_bias, activation, None, backend)
    return named("down", kron_matmul, h, second, down_bias, None, residual, backend)


# --- checks


def checked_factors(
    x: Tensor | Shaped,
    factors: Sequence[Factor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> tuple[Factor, ...]:
    """The factors as ``(r, m, n)``."""
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace records sizes
        with constant_sizes():
            return checked_factors(x, factors, bias, activation, residual)
    if len(factors) > 2:
        raise ValueError(
            f"int8 factors are for products of up to two, got {len(factors)}; dequantise them."
        )
    for i, f in enumerate(factors):
        if not isinstance(f, Int8Factor):
            check_tensor(f"factor {i}", f)
    check_int8(factors)
    for name, t in (("bias", bias), ("residual", residual)):
        if t is not None:
            check_tensor(name, t)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be real with int8 factors, got {x.dtype}; use x.float().")
    shapes: list[Any] = [
        Shaped(f.shape, x.dtype, f.device) if isinstance(f, Int8Factor) else f for f in factors
    ]
    checked = check_product(x, shapes, bias, activation, residual)
    if any(map(_has_gradient, (x, *_tensors(factors), bias, residual))):
        raise ValueError(
            "int8 factors have no gradient, and an operand requires one; call it under "
            "torch.no_grad(), or train in floating point (dequantize_ goes back)."
        )
    return tuple(
        f if isinstance(f, Int8Factor) else c for f, c in zip(factors, checked, strict=True)
    )


def _has_gradient(t: Any) -> bool:
    if not isinstance(t, Tensor):
        return False
    if torch.is_grad_enabled() and t.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _is_native(
    backend: BackendName, operands: Sequence[Tensor | None], factors: Sequence[Factor]
) -> bool:
    """Whether the compiled kernels compute it here.

    Raises:
        ValueError: If the backend asked for cannot, or does not exist.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend={backend!r} has no int8 factors; those that do are {', '.join(_BACKENDS)}."
        )
    if backend == "eager" or torch.compiler.is_compiling():
        return False
    reason = _why_not(operands, factors)
    if backend == "native" and reason:
        raise ValueError(f"backend='native' cannot serve this call: {reason}.")
    return not reason


def _why_not(operands: Sequence[Tensor | None], factors: Sequence[Factor]) -> str | None:
    x: Any = operands[0]
    if reason := native.why_not(x):
        return reason
    if x.dtype == torch.float64:
        return "it has no int8 factors in float64"
    tensors = [*_tensors(factors), *(t for t in operands if t is not None)]
    if dispatch.is_observed(tensors) or dispatch.transformed():
        return "a transform, a tracer or a mode is active, or an operand is not an ordinary tensor"
    return None


# --- the tensors of factors


def _tensors(factors: Sequence[Factor]) -> list[Tensor]:
    """Values and scales of int8 factors, and other factors."""
    return [t for f in factors for t in (f if isinstance(f, Int8Factor) else (f,))]


def _packed(factors: Sequence[Factor]) -> list[Factor]:
    """The factors with contiguous scales, as the compiled kernels read them."""
    return [
        Int8Factor(f.values, f.scale.contiguous()) if isinstance(f, Int8Factor) else f
        for f in factors
    ]


def _parts(factors: Sequence[Factor]) -> tuple[list[Tensor], list[Tensor | None]]:
    values = [f.values if isinstance(f, Int8Factor) else f for f in factors]
    return values, [f.scale if isinstance(f, Int8Factor) else None for f in factors]
