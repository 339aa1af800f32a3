"""``kron_matmul``, ``kron_qkv`` and ``kron_feed_forward`` with factors in int8.

They have no gradients, and no kernels for GPUs: the compiled CPU kernels compute them, or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kron_kernels import dispatch
from kron_kernels.backends import eager, native
from kron_kernels.checks import (
    Activation,
    Shaped,
    check_product,
    check_tensor,
    is_plain,
    named,
)
from kron_kernels.dispatch import BackendName
from kron_kernels.int8 import Factor, Int8Factor, Layer, check_int8, columns_of, product
from kron_kernels.repeats import Repeats, call_key

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
    tensors = [t for f in factors for t in (f if isinstance(f, Int8Factor) else (f,))]
    call = call_key((x, *tensors, bias, residual), activation, backend)
    if call and (again := _matmuls.get(call)):
        return again(x, *tensors, bias, residual)
    factors = _checked(x, factors, bias, activation, residual)
    if torch.compiler.is_compiling():
        # A compiler sees one operator, which decides when it runs.
        operator = torch.ops.kron_kernels.int8_matmul.default  # from ops
        return operator(x, *_parts(factors), bias, activation, residual, backend)
    if _is_native(backend, (x, bias, residual), factors):
        if call:
            _matmuls.add(call, native.again_matmul(x, factors, bias, activation, residual))
        return native.kron_matmul(x, factors, bias, activation, residual)
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    if dispatch.under_autocast(x):  # its dtypes do not hold the sums
        with torch.autocast(x.device.type, enabled=False):
            y = product(rows, factors)
    else:
        y = product(rows, factors)
    y = y.view(*x.shape[:-1], y.shape[-1])
    if bias is not None:
        y = y + bias
    return eager.epilogue(y.to(x.dtype), activation, residual)


def kron_qkv(x: Tensor, layers: Mapping[str, Layer], backend: BackendName) -> list[Tensor]:
    """See ``kron_kernels.kron_qkv``."""
    checked: list[Layer] = []
    for name, (a, b, bias) in layers.items():
        a, b = named(name, _checked, x, (a, b), bias, None, None)
        checked.append((a, b, bias))
    operands = [x, *(bias for *_, bias in checked)]
    factors = [f for a, b, _ in checked for f in (a, b)]
    if not torch.compiler.is_compiling() and _is_native(backend, operands, factors):
        return native.kron_qkv(x, checked)
    return [kron_matmul(x, (a, b), bias, None, None, backend) for a, b, bias in checked]


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    down: Layer,
    activation: Activation | None,
    residual: Tensor | None,
    backend: BackendName,
) -> Tensor:
    """See ``kron_kernels.kron_feed_forward``."""
    a1, b1 = named("up", _checked, x, up[:2], up[2], activation, None)
    hidden = Shaped((*x.shape[:-1], a1.shape[1] * b1.shape[1]), x.dtype, x.device)
    a2, b2 = named("down", _checked, hidden, down[:2], down[2], None, residual)
    operands, factors = (x, up[2], down[2], residual), (a1, b1, a2, b2)
    if (
        activation is not None
        and not torch.compiler.is_compiling()
        and _is_native(backend, operands, factors)
    ):
        return native.kron_feed_forward(x, (a1, b1, up[2]), activation, (a2, b2, down[2]), residual)
    h = kron_matmul(x, (a1, b1), up[2], activation, None, backend)
    return kron_matmul(h, (a2, b2), down[2], None, residual, backend)


# --- checks


def _checked(
    x: Tensor | Shaped,
    factors: Sequence[Factor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> tuple[Factor, ...]:
    """The factors as ``(r, m, n)``."""
    if isinstance(x, Tensor):
        check_tensor("x", x)
    if len(factors) > 2:
        raise ValueError(
            f"int8 factors are for products of up to two, got {len(factors)}; dequantise them."
        )
    columns = columns_of(factors)
    for i, f in enumerate(factors):
        if isinstance(f, Int8Factor):
            check_int8(f"factor {i}", f, i == columns)
        else:
            check_tensor(f"factor {i}", f)
    for name, t in (("bias", bias), ("residual", residual)):
        if t is not None:
            check_tensor(name, t)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be real with int8 factors, got {x.dtype}; use x.float().")
    shapes: list[Any] = [
        Shaped(f.shape, x.dtype, f.device) if isinstance(f, Int8Factor) else f for f in factors
    ]
    checked = check_product(x, shapes, bias, activation, residual)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} but x is {x.dtype}; cast it with .to(), or add it later."
        )
    operands = (x, *factors, bias, residual)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in operands):
        raise ValueError(
            "int8 factors have no gradient, and an operand requires one; call it under "
            "torch.no_grad(), or train in floating point (dequantize_ goes back)."
        )
    return tuple(
        f if isinstance(f, Int8Factor) else c for f, c in zip(factors, checked, strict=True)
    )


def _is_native(
    backend: BackendName, operands: Sequence[Tensor | None], factors: Sequence[Factor]
) -> bool:
    """Whether the compiled kernels compute it.

    Raises:
        ValueError: If the backend asked for cannot, or does not exist.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend={backend!r} has no int8 factors; those that do are {', '.join(_BACKENDS)}."
        )
    reason = None if backend == "eager" else _why_not(operands, factors)
    if backend == "native" and reason:
        raise ValueError(f"backend='native' cannot serve this call: {reason}.")
    return backend != "eager" and not reason


def _why_not(operands: Sequence[Tensor | None], factors: Sequence[Factor]) -> str | None:
    x: Any = operands[0]
    if reason := native.why_not(x):
        return reason
    if x.dtype == torch.float64:
        return "it has no int8 factors in float64"
    tensors = [t for t in operands if t is not None]
    tensors += [t for f in factors for t in (f if isinstance(f, Int8Factor) else (f,))]
    if dispatch.is_observed(tensors) or not is_plain(tensors) or dispatch.transformed():
        return "a transform, a tracer or a mode is active, or an operand is not an ordinary tensor"
    return None


# --- the operator that compilers see


def _parts(factors: Sequence[Factor]) -> tuple[list[Tensor], list[Tensor | None]]:
    values = [f.values if isinstance(f, Int8Factor) else f for f in factors]
    return values, [f.scale if isinstance(f, Int8Factor) else None for f in factors]
