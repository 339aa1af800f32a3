"""Operator contracts: schema, fake kernel, implementation and FLOP formula. Torch only.

Two factors of three dimensions, x of two: what gradients and transforms are made for. Autograd and
autocast live outside, in ``functional``: ``define`` and ``impl`` cost 5 µs a call (25 against 20 at
one token), less than ``custom_op`` with ``register_autograd``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kron_kernels.backends import COMPILED, eager
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.checks import Activation, Shaped, check_epilogue, check_factors
from kron_kernels.shapes import KronShape

_SCHEMAS = {
    "kron_matmul": (
        "(Tensor x, Tensor a, Tensor b, Tensor? bias, str? activation, Tensor? residual,"
        " str backend) -> Tensor"
    ),
    "kron_matmul_backward": (
        "(Tensor dy, Tensor x, Tensor a, Tensor b, bool[] needed, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "kron_qkv": "(Tensor x, Tensor[] a, Tensor[] b, Tensor?[] biases, str backend) -> Tensor[]",
    "kron_feed_forward": (
        "(Tensor x, Tensor a1, Tensor b1, Tensor? bias1, str activation,"
        " Tensor a2, Tensor b2, Tensor? bias2, Tensor? residual, str backend) -> Tensor"
    ),
    "kron_feed_forward_backward": (
        "(Tensor dy, Tensor x, Tensor a1, Tensor b1, Tensor? bias1, str activation,"
        " Tensor a2, Tensor b2, bool[] needed, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "kron_embedding": "(Tensor ids, Tensor a, Tensor b) -> Tensor",
}

Grads = tuple[Tensor, Tensor, Tensor]  # of x, a and b; empty where not needed


# A saved graph may call an operator with anything: every implementation and fake kernel begins with
# these checks.


def _check_product(
    x: Tensor | Shaped,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> int:
    """The number of columns that the product gives."""
    if len(x.shape) != 2 or a.ndim != 3 or b.ndim != 3:
        raise ValueError(
            "x must be (tokens, n) and the factors (rank, m, n), got "
            f"{', '.join(str(tuple(t.shape)) for t in (x, a, b))}."
        )
    check_factors(x, (a, b))
    check_epilogue(x, (a, b), bias, activation, residual)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} but x is {x.dtype}; cast it with .to(), or add it later."
        )
    return a.shape[1] * b.shape[1]


def _check_block(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    activation: str | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None = None,
    residual: Tensor | None = None,
) -> int:
    """The number of columns that a feed-forward block gives."""
    between = _check_product(x, a1, b1, bias1, activation)
    hidden = Shaped((x.shape[0], between), x.dtype, x.device)
    return _check_product(hidden, a2, b2, bias2, None, residual)


def _check_gradient(
    dy: Tensor, x: Tensor, columns: int, needed: Sequence[bool], gradients: int
) -> None:
    if dy.shape != (x.shape[0], columns) or (dy.dtype, dy.device) != (x.dtype, x.device):
        raise ValueError(
            f"dy must be {x.dtype} of shape {(x.shape[0], columns)} on {x.device}, got {dy.dtype} "
            f"of {tuple(dy.shape)} on {dy.device}."
        )
    if len(needed) != gradients:
        raise ValueError(f"needed must have {gradients} entries, got {len(needed)}.")


def _check_layers(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[int]:
    """The number of columns that each product gives."""
    if not 1 <= len(a) == len(b) == len(biases) <= 4:
        raise ValueError(
            "a, b and biases must have an entry for each of 1 to 4 products, got "
            f"{len(a)}, {len(b)} and {len(biases)}."
        )
    return [_check_product(x, *layer) for layer in zip(a, b, biases, strict=True)]


def _check_embedding(ids: Tensor, a: Tensor, b: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids must be int64 or int32 of shape (tokens,), got {ids.dtype} of {tuple(ids.shape)}."
        )
    if a.ndim != 3 or b.ndim != 3 or b.shape[:2] != (a.shape[0], 1) or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"a must be (rank, rows, columns) and b (rank, 1, size), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    if a.dtype != b.dtype or not ids.device == a.device == b.device:
        raise ValueError(
            f"a is {a.dtype} on {a.device}, b {b.dtype} on {b.device} and ids are on {ids.device}, "
            "but the factors must be of one dtype, and all on one device."
        )


def _grant(backend: str, x: Tensor, *products: Sequence[Tensor]) -> None:
    """Raise unless the backend serves these products of ``x``."""
    for factors in products:
        if reason := _why_not(backend, x, *factors):
            raise ValueError(f"backend={backend!r} cannot serve this operator: {reason}.")


def _why_not(backend: str, x: Tensor, *factors: Tensor) -> str | None:
    if backend == "eager":
        return None
    if backend not in COMPILED:
        return f"there is no such backend; there are eager, {', '.join(COMPILED)}"
    return COMPILED[backend].why_not(x, *factors)


def _matmul(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    _check_product(x, a, b, bias, activation, residual)
    _grant(backend, x, (a, b))
    if backend in COMPILED:
        return COMPILED[backend].kron_matmul(x, (a, b), bias, activation, residual)
    return eager.epilogue(eager.forward(x, a, b, bias), activation, residual)


def _backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool], backend: str
) -> Grads:
    _check_gradient(dy, x, _check_product(x, a, b), needed, 3)
    _grant(backend, x, (a, b))
    if backend in COMPILED:
        return COMPILED[backend].kron_matmul_backward(dy, x, a, b, needed)
    return eager.backward(dy, x, a, b, needed)


def _qkv(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    backend: str,
) -> list[Tensor]:
    _check_layers(x, a, b, biases)
    _grant(backend, x, *zip(a, b, strict=True))
    if backend in COMPILED:
        biases = [c if c is None else _resolved(c) for c in biases]
        return COMPILED[backend].kron_qkv(x, list(zip(a, b, biases, strict=True)))
    return [eager.forward(x, p, q, c) for p, q, c in zip(a, b, biases, strict=True)]


def _resolved(t: Tensor) -> Tensor:
    """With its sign, or its zeros, in memory: the dispatcher does not look into optional lists."""
    return t.new_zeros(t.shape) if t._is_zerotensor() else t.resolve_neg()


def _feed_forward(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    activation: Activation,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    _check_block(x, a1, b1, bias1, activation, a2, b2, bias2, residual)
    _grant(backend, x, (a1, b1), (a2, b2))
    if backend in COMPILED:
        up, down = (a1, b1, bias1), (a2, b2, bias2)
        return COMPILED[backend].kron_feed_forward(x, up, activation, down, residual)
    hidden = eager.epilogue(eager.forward(x, a1, b1, bias1), activation, None)
    return eager.epilogue(eager.forward(hidden, a2, b2, bias2), None, residual)


def _feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    activation: Activation,
    a2: Tensor,
    b2: Tensor,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    _check_gradient(dy, x, _check_block(x, a1, b1, bias1, activation, a2, b2), needed, 6)
    _grant(backend, x, (a1, b1), (a2, b2))
    if backend not in COMPILED or not COMPILED[backend].meet(a1, b1, a2, b2):
        raise ValueError(
            f"backend={backend!r} cannot serve this operator: it has no backward of a block of "
            "these factors, and the two products have gradients of their own."
        )
    up, down = (a1, b1, bias1), (a2, b2, None)
    return COMPILED[backend].kron_feed_forward_backward(dy, x, up, activation, down, needed)


def _embedding(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    _check_embedding(ids, a, b)
    if reason := triton_gpu.why_not_embedding(a, b):
        raise ValueError(f"Triton's lookup cannot serve this call: {reason}.")
    return triton_gpu.kron_embedding(ids, a, b)


def _fake_embedding(ids, a, b) -> Tensor:
    _check_embedding(ids, a, b)
    return a.new_empty(ids.shape[0], a.shape[2] * b.shape[2])


def _fake_matmul(x, a, b, bias, activation, residual, backend) -> Tensor:
    columns = _check_product(x, a, b, bias, activation, residual)
    return x.new_empty(x.shape[0], columns)


def _fake_backward(dy, x, a, b, needed, backend) -> Grads:
    _check_gradient(dy, x, _check_product(x, a, b), needed, 3)
    dx, da, db = (
        t.new_empty(t.shape if wanted else 0) for t, wanted in zip((x, a, b), needed, strict=True)
    )
    return dx, da, db


def _fake_qkv(x, a, b, biases, backend) -> list[Tensor]:
    return [x.new_empty(x.shape[0], columns) for columns in _check_layers(x, a, b, biases)]


def _fake_feed_forward(x, a1, b1, bias1, activation, a2, b2, bias2, residual, backend) -> Tensor:
    columns = _check_block(x, a1, b1, bias1, activation, a2, b2, bias2, residual)
    return x.new_empty(x.shape[0], columns)


def _fake_feed_forward_backward(dy, x, a1, b1, bias1, activation, a2, b2, needed, backend):
    _check_gradient(dy, x, _check_block(x, a1, b1, bias1, activation, a2, b2), needed, 6)
    return tuple(
        x.new_empty(t.shape if wanted and t is not None else 0)
        for t, wanted in zip((x, a1, b1, bias1, a2, b2), needed, strict=True)
    )


def _matmul_flops(x_shape, a_shape, b_shape, *more, out_shape=None, **kwargs) -> int:
    return x_shape[0] * _shape(a_shape, b_shape).flops


def _backward_flops(
    dy_shape, x_shape, a_shape, b_shape, needed, backend, *, out_shape=None, **kwargs
) -> int:
    # Each of dX, dA and dB is a pair of products of the forward's size, dX and one other sharing
    # the first product of theirs.
    s = _shape(a_shape, b_shape)
    by_a = s.rank * s.m1 * s.n1 * (s.m2 if s.order == "b_first" else s.n2)
    by_b = s.multiply_adds(s.order) - by_a
    x, a, b = needed
    if s.order == "a_first":  # the roles of the factors swap
        by_a, by_b, a, b = by_b, by_a, b, a
    products = by_a * (x or b) + by_b * x + (by_b + by_a) * a + by_b * b
    return 2 * x_shape[0] * products


def _qkv_flops(x_shape, a_shapes, b_shapes, *more, out_shape=None, **kwargs) -> int:
    return sum(_matmul_flops(x_shape, a, b) for a, b in zip(a_shapes, b_shapes, strict=True))


def _feed_forward_flops(
    x_shape, a1, b1, bias1, activation, a2, b2, *more, out_shape=None, **kwargs
) -> int:
    return _matmul_flops(x_shape, a1, b1) + _matmul_flops(x_shape, a2, b2)


def _feed_forward_backward_flops(
    dy_shape, x_shape, a1, b1, bias1, activation, a2, b2, *more, out_shape=None, **kwargs
) -> int:
    # The forward again, but for the last product, and the two products of each backward.
    return 3 * _feed_forward_flops(x_shape, a1, b1, None, None, a2, b2)


def _shape(a_shape, b_shape) -> KronShape:
    (rank, m1, n1), (_, m2, n2) = a_shape, b_shape
    return KronShape(m1, n1, m2, n2, rank)


def _register() -> None:
    for name, implementation, fake, flops in (
        ("kron_matmul", _matmul, _fake_matmul, _matmul_flops),
        ("kron_matmul_backward", _backward, _fake_backward, _backward_flops),
        ("kron_qkv", _qkv, _fake_qkv, _qkv_flops),
        ("kron_feed_forward", _feed_forward, _fake_feed_forward, _feed_forward_flops),
        (
            "kron_feed_forward_backward",
            _feed_forward_backward,
            _fake_feed_forward_backward,
            _feed_forward_backward_flops,
        ),
        ("kron_embedding", _embedding, _fake_embedding, None),
    ):
        operator = f"kron_kernels::{name}"
        torch.library.define(operator, _SCHEMAS[name])
        torch.library.impl(operator, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(operator, fake)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.kron_kernels, name))(flops)


# torch keeps operators for the life of the process: when this module is imported a second time,
# those of the first serve.
if not hasattr(torch.ops.kron_kernels, "kron_embedding"):
    _register()

kron_matmul = torch.ops.kron_kernels.kron_matmul.default
kron_matmul_backward = torch.ops.kron_kernels.kron_matmul_backward.default
kron_qkv = torch.ops.kron_kernels.kron_qkv.default
kron_feed_forward = torch.ops.kron_kernels.kron_feed_forward.default
kron_embedding = torch.ops.kron_kernels.kron_embedding.default
kron_feed_forward_backward = torch.ops.kron_kernels.kron_feed_forward_backward.default
