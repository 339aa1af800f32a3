"""Compiled CPU kernels: ``csrc/kron.h`` through the module ``kron_kernels._native``.

Rows are made contiguous. Factors may have any strides, so a gradient's transposed factors are not
copied. Nothing is packed or kept between calls.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kron_kernels.backends import abi
from kron_kernels.backends.abi import product
from kron_kernels.backends.gradients import new_gradients, returned
from kron_kernels.checks import Activation
from kron_kernels.checks import Layer as FloatingLayer
from kron_kernels.int8 import Factor, Layer
from kron_kernels.shapes import KronShape

_native = abi.module
_ISAS = ("portable", "avx2", "avx512")
_MAX_FACTORS = 8

# Tests lower them to run the code of other machines.
_isa = _native.isa() if _native else 0
# Whether to use instructions for bytes, and for bfloat16 in encoders, where there are some.
_bytes, _bfloat16 = 1, 1


def _thread_pool() -> int:
    """Address of torch's ``parallel_for`` for extensions, 0 before torch 2.10."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        library = Path(torch.__file__).parent / "lib" / name
        if library.exists():
            function: Any = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


_POOL = _thread_pool() if _native else 0
_threads = torch.get_num_threads


def _stay_alone() -> None:
    global _threads
    _threads = lambda: 1  # noqa: E731


# A forked child inherits torch's pool without its threads: a call of it would never return.
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_stay_alone)


def instruction_set() -> str:
    """The one in use: ``avx512``, ``avx2`` or ``portable`` (NEON, on ARM)."""
    return _ISAS[_isa]


def int8_products() -> str:
    """How int8 factors are multiplied here."""
    has_bytes = _native is not None and _bytes and _native.bytes(_isa)
    return "an instruction for bytes" if has_bytes else "pairs of 16 bits"


def describe(x: Tensor, *factors: Tensor) -> str:
    """The instruction set."""
    return instruction_set()


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """Why the compiled kernels cannot serve this call, as the end of a sentence, or None."""
    if _native is None:
        return abi.missing
    if not x.is_cpu:
        return f"it runs on CPUs, and x is on {x.device}"
    if x.dtype not in abi.DTYPES:
        return f"it has kernels for {', '.join(str(d)[6:] for d in abi.DTYPES)}, and x is {x.dtype}"
    if len(factors) > _MAX_FACTORS:
        return f"it takes up to {_MAX_FACTORS} factors, and there are {len(factors)}"
    if (
        len(factors) == 1
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (x, *factors))
    ):
        return "it has gradients for two factors and more, and there is one"
    if not _POOL and _threads() > 1:
        return "this torch does not share its thread pool (2.10 and later do)"
    return None


def kron_matmul(
    x: Tensor,
    factors: Sequence[Factor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (…, n)`` and up to ``_MAX_FACTORS`` factors."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], prod([f.shape[1] for f in factors]))
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    _native.forward(*_call(x), 1, *product(factors, bias, residual, activation, y))
    return y


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of up to four ``(a, b, bias)``; x ``(…, n)`` is read once."""
    x = x.contiguous()
    ys, arguments, kept = [], [], []
    for a, b, bias in layers:
        ys.append(x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1]))
        kept.append(bias if bias is None else bias.contiguous())
        arguments += product((a, b), kept[-1], None, None, ys[-1])
    _native.forward(*_call(x), len(layers), *arguments)
    return ys


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    residual: Tensor | None,
) -> Tensor:
    """``down(act(up(x))) + residual`` of ``(a, b, bias)`` each, x ``(…, n)``."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], down[0].shape[1] * down[1].shape[1])
    up_bias, down_bias, residual = (
        t if t is None else t.contiguous() for t in (up[2], down[2], residual)
    )
    _native.feed_forward(
        *_call(x),
        *product(up[:2], up_bias, None, activation, None),
        *product(down[:2], down_bias, residual, None, y),
    )
    return y


# --- repeated calls: other tensors of the same sizes, strides and dtypes


def again_matmul(
    x: Tensor,
    factors: Sequence[Factor],
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Callable[..., Tensor] | None:
    """``kron_matmul`` as a function of its operands; None if it needs copies.

    These are x, the factors, each int8 one as its values and scale, bias and residual.
    """
    if not _contiguous(x, bias, residual):
        return None
    plan = _plan(x, False, (factors, activation))
    shape = (*x.shape[:-1], prod([f.shape[1] for f in factors]))

    def again(x: Tensor, *operands: Tensor | None) -> Tensor:
        y = x.new_empty(*shape)
        _native.run_plan(plan, *_execution(), x, *operands, y)
        return y

    return again


def again_qkv(x: Tensor, layers: Sequence[FloatingLayer]) -> Callable[..., list[Tensor]] | None:
    """``kron_qkv`` as a function of x and the layers; None if it needs copies."""
    if not _contiguous(x, *(bias for *_, bias in layers)):
        return None
    plan = _plan(x, False, *(((a, b), None) for a, b, _ in layers))
    shapes = [(*x.shape[:-1], a.shape[1] * b.shape[1]) for a, b, _ in layers]

    def again(x: Tensor, *layers: FloatingLayer) -> list[Tensor]:
        ys: list[Tensor] = []
        operands: list[Tensor | None] = []
        for (a, b, bias), shape in zip(layers, shapes, strict=True):
            ys.append(x.new_empty(*shape))
            operands += a, b, bias, None, ys[-1]
        _native.run_plan(plan, *_execution(), x, *operands)
        return ys

    return again


def again_feed_forward(
    x: Tensor, up: Layer, activation: Activation, down: Layer, residual: Tensor | None
) -> Callable[..., Tensor] | None:
    """``kron_feed_forward`` as a function of ``x, up, down, residual``; None if it needs copies."""
    if not _contiguous(x, up[2], down[2], residual):
        return None
    plan = _plan(x, True, (up[:2], activation), (down[:2], None))
    shape = (*x.shape[:-1], down[0].shape[1] * down[1].shape[1])

    def again(x: Tensor, up: Layer, down: Layer, residual: Tensor | None) -> Tensor:
        y = x.new_empty(*shape)
        _native.run_plan(plan, *_execution(), x, *up, None, None, *down, residual, y)
        return y

    return again


def _contiguous(*operands: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous() for t in operands)


def _plan(
    x: Tensor, is_block: bool, *products: tuple[Sequence[Factor], Activation | None]
) -> bytes:
    """A call for ``_native.run_plan``, which reads the addresses from the tensors."""
    arguments = [is_block, abi.DTYPES[x.dtype], prod(x.shape[:-1]), len(products)]
    for factors, activation in products:
        arguments += product(factors, None, None, activation, None)
    return _native.plan(*arguments)


# --- gradients


def kron_matmul_backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, a and b, an empty tensor for one that is not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    grads = new_gradients((x, a, b), needed, _sums(x))
    *call, address = _call(x)
    _native.backward(
        *(*call, abi.address(dy), address),
        *product((a, b), None, None, None, None),
        *map(abi.address, grads),
    )
    return returned(grads, x)


def kron_matmul_of_many_backward(
    dy: Tensor, x: Tensor, factors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x and of three factors or more, an empty tensor for one that is not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    grads = new_gradients((x, *factors), needed, _sums(x))
    *call, address = _call(x)
    _native.backward_many(
        *(*call, abi.address(dy), address),
        *product(factors, None, None, None, None),
        *map(abi.address, grads),
    )
    return returned(grads, x)


def fuses(up: FloatingLayer, down: FloatingLayer) -> bool:
    """Whether the layers can exchange the hidden vector entry by entry.

    They can if both read it as the same grid, up computes it entry by entry and down reads it so.
    """
    (a1, b1, _), (a2, b2, _) = up, down
    (_, k, _), (_, width, _) = a1.shape, b1.shape
    return (
        (k, width) == (a2.shape[2], b2.shape[2])
        and KronShape.of(a1, b1).order == "b_first"
        and KronShape.of(a2, b2).order == "a_first"
    )


def kron_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    up: FloatingLayer,
    activation: Activation,
    down: FloatingLayer,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, up's a, b and bias, down's a and b; empty where not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    bias = None if up[2] is None else up[2].contiguous()
    grads = new_gradients((x, *up[:2], bias, *down[:2]), needed, _sums(x))
    *call, address = _call(x)
    _native.feed_forward_backward(
        *(*call, abi.address(dy), address),
        *product(up[:2], bias, None, activation, None),
        *product(down[:2], None, None, None, None),
        *map(abi.address, grads),
    )
    return returned(grads, x)


def _sums(x: Tensor) -> torch.dtype:
    """The dtype in which gradients are summed over tokens."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _call(x: Tensor) -> tuple[int, ...]:
    return *_execution(), abi.DTYPES[x.dtype], prod(x.shape[:-1]), abi.address(x)


def _execution() -> tuple[int, ...]:
    """A ``kron_execution`` of ``csrc/kron.h``."""
    return _isa, _threads(), _POOL, _bytes, _bfloat16
