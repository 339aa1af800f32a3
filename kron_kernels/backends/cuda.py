"""Compiled CUDA kernels: ``csrc/kron.h`` through the module ``kron_kernels._native``.

A call launches kernels on the current stream and returns: it can be captured in a CUDA graph. What
it needs beside its operands it takes from PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from kron_kernels.backends import abi
from kron_kernels.backends.abi import product
from kron_kernels.backends.gpu import DTYPES, constant, precision
from kron_kernels.checks import Activation, Layer

_native = abi.module
simulating = False  # tests set it: CPU tensors stand for those of GPU 0

# Up to so many tokens a product takes a launch of its own: spread over the whole GPU it is there
# sooner than what one block of a fused feed-forward makes.
FEW_TOKENS = 16

_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """Why these kernels cannot serve this call, as the end of a sentence, or None."""
    if not (x.is_cuda or (simulating and x.device.type == "cpu")):
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    if reason := _device_why_not(x.device.index or 0):
        return reason
    if x.dtype not in DTYPES:
        return f"it has kernels for {', '.join(str(d)[6:] for d in DTYPES)}, and x is {x.dtype}"
    if len(factors) != 2:
        return f"it multiplies by two factors, and there are {len(factors)}"
    return _shape_why_not(*factors[0].shape, *factors[1].shape[1:])


def archs() -> str:
    """For which GPUs there are kernels, such as ``"80 86 90a"``; empty without any."""
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
    if prod(x.shape[:-1]) <= FEW_TOKENS:
        return "a warp for each column, without tensor cores"
    exact = x.dtype == torch.float32 and not _tf32(x.dtype)
    return (
        "exact float32" if exact else f"{'tf32' if _tf32(x.dtype) else '16 bits'} on tensor cores"
    )


def kron_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (T, n)`` and two factors."""
    x = x.contiguous()
    a, b = factors
    y = x.new_empty(x.shape[0], a.shape[1] * b.shape[1])
    bias, residual = _contiguous(bias, residual)
    _native.cuda_forward(
        *_call(x), abi.address(x), 1, *product(factors, bias, residual, activation, y)
    )
    return y


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of each ``(a, b, bias)``, up to four: one launch if they are alike."""
    x = x.contiguous()
    ys, arguments, kept = [], [], []
    for a, b, bias in layers:
        ys.append(x.new_empty(x.shape[0], a.shape[1] * b.shape[1]))
        kept += _contiguous(bias)
        arguments += product((a, b), kept[-1], None, None, ys[-1])
    _native.cuda_forward(*_call(x), abi.address(x), len(layers), *arguments)
    return ys


def kron_matmul_backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, an empty tensor for one that is not needed; deterministic."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, da, db = (_gradient(t, wanted, t is x) for t, wanted in zip((x, a, b), needed, strict=True))
    call, arguments = _call(x), product((a, b), None, None, None, None)
    workspace = _workspace(x, _native.cuda_backward_workspace(*call, *arguments))
    pointers = [_address(g, wanted) for g, wanted in zip((dx, da, db), needed, strict=True)]
    _native.cuda_backward(
        *call, abi.address(dy), abi.address(x), *arguments, *pointers, abi.address(workspace)
    )
    return dx, da.to(a.dtype), db.to(b.dtype)


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
    """``down(act(up(x))) + residual`` of ``(a, b, bias)`` each, x ``(T, n)``."""
    if x.shape[0] <= FEW_TOKENS or not fuses(up, down):
        hidden = kron_matmul(x, up[:2], up[2], activation)
        return kron_matmul(hidden, down[:2], down[2], None, residual)
    x = x.contiguous()
    y = x.new_empty(x.shape[0], down[0].shape[1] * down[1].shape[1])
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
    operands = x, up[0], up[1], bias, down[0], down[1]
    needed = [n and t is not None for n, t in zip(needed, operands, strict=True)]
    grads = [
        x.new_empty(0) if t is None else _gradient(t, n, t is x)
        for t, n in zip(operands, needed, strict=True)
    ]
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
        *(_address(g, wanted) for g, wanted in zip(grads, needed, strict=True)),
        abi.address(workspace),
    )
    return tuple(g.to(x.dtype) for g in grads)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _gradient(t: Tensor, wanted: bool, of_input: bool) -> Tensor:
    """Where a gradient goes: parameters' are sums, in float32."""
    dtype = t.dtype if of_input else torch.float32
    return t.new_empty(t.shape if wanted else 0, dtype=dtype)


def _workspace(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.uint8)


def _address(t: Tensor, wanted: bool) -> int:
    return abi.address(t) if wanted else 0


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and precision(dtype) == "tf32"


def _call(x: Tensor) -> tuple[int, ...]:
    """What every call begins with, in the order of ``csrc/binding.cpp``."""
    index = x.device.index or 0
    stream = _stream(index) if x.is_cuda else 0
    return index, stream, _tf32(x.dtype), abi.DTYPES[x.dtype], x.shape[0]
