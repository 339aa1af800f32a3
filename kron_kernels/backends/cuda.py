"""CUDA C++ kernels: ``csrc/kron.h`` through the compiled module ``kron_kernels._native``.

A call launches kernels on the current stream and returns, so a CUDA graph can capture it. Memory
beyond the operands comes from PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from kron_kernels.backends import abi, gpu
from kron_kernels.backends.abi import product
from kron_kernels.backends.gpu import constant, dtype_why_not, precision
from kron_kernels.backends.gradients import new_gradients, returned
from kron_kernels.checks import Activation, Layer

_native = abi.module

# Up to this many tokens each product of a feed-forward is a separate launch, which spreads over
# the whole GPU. The fused kernel would run in a single block.
FEW_TOKENS = 16

_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # None in CPU builds of PyTorch


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """Why these kernels cannot run this call, as the end of a sentence, or None."""
    if not gpu.on_gpu(x):
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    if reason := _device_why_not(x.device.index or 0) or dtype_why_not(x.dtype):
        return reason
    if len(factors) != 2:
        return f"it multiplies by two factors, and there are {len(factors)}"
    return _shape_why_not(*factors[0].shape, *factors[1].shape[1:])


def archs() -> str:
    """The GPU architectures with kernels, such as ``"80 86 90a"``; empty if there are none."""
    return getattr(_native, "cuda_archs", "")


@constant
def _device_why_not(index: int) -> str | None:
    if not archs():
        if _native is None:
            return f"{abi.missing}; kernels for GPUs need CUDA's nvcc as well"
        return (
            "the compiled module has no CUDA kernels; with CUDA's nvcc on the PATH, reinstall "
            "kron_kernels"
        )
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, and this is PyTorch for AMD's"
    return None if _usable(index) else _native.cuda_why_not(index)


@lru_cache(maxsize=64)
def _usable(index: int) -> bool:
    return _native.cuda_why_not(index) is None


@constant
def _shape_why_not(*sizes: int) -> str | None:
    return _unserved(*sizes)


@lru_cache(maxsize=4096)
def _unserved(rank: int, m1: int, n1: int, m2: int, n2: int) -> str | None:
    return _native.cuda_unserved(*abi.product_of_shapes([(rank, m1, n1), (rank, m2, n2)]))


def describe(x: Tensor, *factors: Tensor) -> str:
    """How the kernels compute this product, in words."""
    if _tokens(x) <= FEW_TOKENS:
        return "a warp for each column, without tensor cores"
    if x.dtype != torch.float32:
        return "16 bits on tensor cores"
    return "tf32 on tensor cores" if _tf32(x.dtype) else "exact float32"


def kron_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (…, n)`` and two factors."""
    x = x.contiguous()
    a, b = factors
    y = x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1])  # (…, m)
    bias, residual = _contiguous(bias, residual)
    _native.cuda_forward(
        *_call(x), abi.address(x), 1, *product(factors, bias, residual, activation, y)
    )
    return y


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of up to four ``(a, b, bias)``; one launch if their shapes are equal."""
    x = x.contiguous()
    ys, arguments, kept = [], [], []
    for a, b, bias in layers:
        ys.append(x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1]))
        kept += _contiguous(bias)
        arguments += product((a, b), kept[-1], None, None, ys[-1])
    _native.cuda_forward(*_call(x), abi.address(x), len(layers), *arguments)
    return ys


def kron_matmul_backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, a and b, an empty tensor for each that is not needed; deterministic."""
    dy, x = dy.contiguous(), x.contiguous()
    grads = new_gradients((x, a, b), needed, torch.float32)
    call, arguments = _call(x), product((a, b), None, None, None, None)
    workspace = _workspace(x, _native.cuda_backward_workspace(*call, *arguments))
    _native.cuda_backward(
        *call,
        abi.address(dy),
        abi.address(x),
        *arguments,
        *map(abi.address, grads),
        abi.address(workspace),
    )
    return returned(grads, x)


def fuses(up: Layer, down: Layer) -> bool:
    """Whether these layers fit the fused feed-forward block and its backward."""
    (a1, b1, _), (a2, b2, _) = up, down
    shapes = (*a1.shape, *b1.shape[1:], *a2.shape, *b2.shape[1:])
    return _fuses(a1.device.index or 0, abi.DTYPES[a1.dtype], _tf32(a1.dtype), *shapes)


@lru_cache(maxsize=4096)
def _fuses(device: int, dtype: int, tf32: bool, *shapes: int) -> bool:
    r1, m1, n1, m2, n2, r2, p1, q1, p2, q2 = shapes
    up = abi.product_of_shapes([(r1, m1, n1), (r1, m2, n2)])
    down = abi.product_of_shapes([(r2, p1, q1), (r2, p2, q2)])
    return _native.cuda_feed_forward_unserved(device, 0, tf32, dtype, *up, *down) is None


def kron_feed_forward(
    x: Tensor, up: Layer, activation: Activation, down: Layer, residual: Tensor | None
) -> Tensor:
    """``down(act(up(x))) + residual`` of ``x (…, n)`` and two ``(a, b, bias)``."""
    if _tokens(x) <= FEW_TOKENS or not fuses(up, down):
        hidden = kron_matmul(x, up[:2], up[2], activation)
        return kron_matmul(hidden, down[:2], down[2], None, residual)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], down[0].shape[1] * down[1].shape[1])  # (…, m)
    up_bias, down_bias, residual = _contiguous(up[2], down[2], residual)
    _native.cuda_feed_forward(
        *_call(x),
        abi.address(x),
        *product(up[:2], up_bias, None, activation, None),
        *product(down[:2], down_bias, residual, None, y),
    )
    return y


def kron_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, up's a, b and bias, down's a and b; empty where not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    (bias,) = _contiguous(up[2])
    grads = new_gradients((x, *up[:2], bias, *down[:2]), needed, torch.float32)
    call = _call(x)
    layers = [
        *product(up[:2], bias, None, activation, None),
        *product(down[:2], None, None, None, None),
    ]
    workspace = _workspace(x, _native.cuda_feed_forward_backward_workspace(*call, *layers))
    _native.cuda_feed_forward_backward(
        *call,
        abi.address(dy),
        abi.address(x),
        *layers,
        *map(abi.address, grads),
        abi.address(workspace),
    )
    return returned(grads, x)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _workspace(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.uint8)


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and precision(dtype) == "tf32"


def _call(x: Tensor) -> tuple[int, ...]:
    """The first arguments of every call, in the order of ``csrc/binding.cpp``."""
    index = x.device.index or 0
    return index, _stream(index), _tf32(x.dtype), abi.DTYPES[x.dtype], _tokens(x)


def _tokens(x: Tensor) -> int:
    return prod(x.shape[:-1])
