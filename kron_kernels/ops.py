"""The operators: schema, checks, implementation, fake kernel and FLOP formula of each.

They take two factors of three dimensions and x of two. Gradients are outside, in ``autograd``:
``define`` and ``impl`` cost 5 µs per call (25 instead of 20 at one token), less than ``custom_op``
with ``register_autograd``. A saved graph may call an operator with anything, so every
implementation and fake kernel checks its arguments first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from kron_kernels import dispatch, int8_products
from kron_kernels.arrivals import when_imported
from kron_kernels.backends import COMPUTING, EMBEDDING
from kron_kernels.backends.triton import launch
from kron_kernels.checks import Activation, Shaped, check_product
from kron_kernels.dispatch import BackendName
from kron_kernels.int8 import Factor, Int8Factor
from kron_kernels.shapes import KronShape

_FLOPS: dict[str, Callable[..., int]] = {}  # the FLOP formulas by operator


def _operator(name: str, schema: str, implementation: Callable, fake: Callable, flops=None):
    """Define and register ``kron_kernels::name``, once in a process; the operator to call."""
    if flops is not None:
        _FLOPS[name] = flops
    namespace, qualified = torch.ops.kron_kernels, f"kron_kernels::{name}"
    # PyTorch keeps operators: a second import of this module uses those of the first.
    if not hasattr(namespace, name):
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(qualified, fake)
    return getattr(namespace, name).default


# --- kron_matmul


def _check_product(
    x: Tensor | Shaped,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> int:
    """The number of columns of the product."""
    if len(x.shape) != 2 or a.ndim != 3 or b.ndim != 3:
        raise ValueError(
            "x must be (tokens, n) and the factors (rank, m, n), got "
            f"{', '.join(str(tuple(t.shape)) for t in (x, a, b))}."
        )
    check_product(x, (a, b), bias, activation, residual)
    _check_residual(x, residual)
    return a.shape[1] * b.shape[1]


def _check_residual(x: Tensor | Shaped, residual: Tensor | None) -> None:
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} but x is {x.dtype}; cast it with .to(), or add it later."
        )


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
    dispatch.require(backend, x, (a, b))
    return COMPUTING[backend].kron_matmul(x, (a, b), bias, activation, residual)


def _fake_matmul(x, a, b, bias, activation, residual, backend) -> Tensor:
    columns = _check_product(x, a, b, bias, activation, residual)
    return x.new_empty(x.shape[0], columns)


def _shape(a_shape, b_shape) -> KronShape:
    (rank, m1, n1), (_, m2, n2) = a_shape, b_shape
    return KronShape(m1, n1, m2, n2, rank)


def _matmul_flops(x_shape, a_shape, b_shape, *rest, **kwargs) -> int:
    return x_shape[0] * _shape(a_shape, b_shape).flops


kron_matmul = _operator(
    "kron_matmul",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, str? activation, Tensor? residual, str backend)"
    " -> Tensor",
    _matmul,
    _fake_matmul,
    _matmul_flops,
)


# --- its backward


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


def _backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    """Gradients of x, a and b; empty where not needed."""
    _check_gradient(dy, x, _check_product(x, a, b), needed, 3)
    dispatch.require(backend, x, (a, b))
    return COMPUTING[backend].kron_matmul_backward(dy, x, a, b, needed)


def _fake_backward(dy, x, a, b, needed, backend) -> tuple[Tensor, ...]:
    _check_gradient(dy, x, _check_product(x, a, b), needed, 3)
    return _fake_gradients(x, (a, b), needed)


def _fake_gradients(x: Tensor, others: Sequence[Tensor | None], needed: Sequence[bool]):
    return tuple(
        x.new_empty(t.shape if wanted and t is not None else 0)
        for t, wanted in zip((x, *others), needed, strict=True)
    )


def _backward_flops(dy_shape, x_shape, a_shape, b_shape, needed, *rest, **kwargs) -> int:
    # dX, dA and dB are each a pair of products of the forward's size; dX and one other share the
    # first product of the pair.
    s = _shape(a_shape, b_shape)
    by_a = s.rank * s.m1 * s.n1 * (s.m2 if s.order == "b_first" else s.n2)
    by_b = s.multiply_adds(s.order) - by_a
    x, a, b = needed
    if s.order == "a_first":  # the roles of the factors swap
        by_a, by_b, a, b = by_b, by_a, b, a
    products = by_a * (x or b) + by_b * x + (by_b + by_a) * a + by_b * b
    return 2 * x_shape[0] * products


kron_matmul_backward = _operator(
    "kron_matmul_backward",
    "(Tensor dy, Tensor x, Tensor a, Tensor b, bool[] needed, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _backward_flops,
)


# --- kron_qkv


def _check_layers(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[int]:
    """The number of columns of each product."""
    if not 1 <= len(a) == len(b) == len(biases) <= 4:
        raise ValueError(
            "a, b and biases must have an entry for each of 1 to 4 products, got "
            f"{len(a)}, {len(b)} and {len(biases)}."
        )
    return [_check_product(x, *layer) for layer in zip(a, b, biases, strict=True)]


def _qkv(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    backend: str,
) -> list[Tensor]:
    _check_layers(x, a, b, biases)
    dispatch.require(backend, x, *zip(a, b, strict=True))
    biases = [c if c is None else _resolved(c) for c in biases]
    return COMPUTING[backend].kron_qkv(x, list(zip(a, b, biases, strict=True)))


def _resolved(t: Tensor) -> Tensor:
    """With a lazy sign or lazy zeros written out, which PyTorch skips in lists of optionals."""
    return t.new_zeros(t.shape) if t._is_zerotensor() else t.resolve_neg()


def _fake_qkv(x, a, b, biases, backend) -> list[Tensor]:
    return [x.new_empty(x.shape[0], columns) for columns in _check_layers(x, a, b, biases)]


def _qkv_flops(x_shape, a_shapes, b_shapes, *rest, **kwargs) -> int:
    return sum(_matmul_flops(x_shape, a, b) for a, b in zip(a_shapes, b_shapes, strict=True))


kron_qkv = _operator(
    "kron_qkv",
    "(Tensor x, Tensor[] a, Tensor[] b, Tensor?[] biases, str backend) -> Tensor[]",
    _qkv,
    _fake_qkv,
    _qkv_flops,
)


# --- kron_feed_forward


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
    """The number of columns of a feed-forward block."""
    between = _check_product(x, a1, b1, bias1, activation)
    hidden = Shaped((x.shape[0], between), x.dtype, x.device)
    return _check_product(hidden, a2, b2, bias2, None, residual)


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
    dispatch.require(backend, x, (a1, b1), (a2, b2))
    up, down = (a1, b1, bias1), (a2, b2, bias2)
    return COMPUTING[backend].kron_feed_forward(x, up, activation, down, residual)


def _fake_feed_forward(x, a1, b1, bias1, activation, a2, b2, bias2, residual, backend) -> Tensor:
    columns = _check_block(x, a1, b1, bias1, activation, a2, b2, bias2, residual)
    return x.new_empty(x.shape[0], columns)


def _feed_forward_flops(x_shape, a1, b1, bias1, activation, a2, b2, *rest, **kwargs) -> int:
    return _matmul_flops(x_shape, a1, b1) + _matmul_flops(x_shape, a2, b2)


kron_feed_forward = _operator(
    "kron_feed_forward",
    "(Tensor x, Tensor a1, Tensor b1, Tensor? bias1, str activation,"
    " Tensor a2, Tensor b2, Tensor? bias2, Tensor? residual, str backend) -> Tensor",
    _feed_forward,
    _fake_feed_forward,
    _feed_forward_flops,
)


# --- its backward


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
    """Gradients of x, a1, b1, bias1, a2 and b2; empty where not needed."""
    _check_gradient(dy, x, _check_block(x, a1, b1, bias1, activation, a2, b2), needed, 6)
    dispatch.require(backend, x, (a1, b1), (a2, b2))
    up, down = (a1, b1, bias1), (a2, b2, None)
    if not COMPUTING[backend].fuses(up, down):
        raise ValueError(
            f"backend={backend!r} cannot serve this call: it has no backward of a block of these "
            "factors; differentiate the two products instead."
        )
    return COMPUTING[backend].kron_feed_forward_backward(dy, x, up, activation, down, needed)


def _fake_feed_forward_backward(dy, x, a1, b1, bias1, activation, a2, b2, needed, backend):
    _check_gradient(dy, x, _check_block(x, a1, b1, bias1, activation, a2, b2), needed, 6)
    return _fake_gradients(x, (a1, b1, bias1, a2, b2), needed)


def _feed_forward_backward_flops(
    dy_shape, x_shape, a1, b1, bias1, activation, a2, b2, *rest, **kwargs
) -> int:
    # The forward again, without its last product, and the two products of each backward.
    return 3 * _feed_forward_flops(x_shape, a1, b1, None, None, a2, b2)


kron_feed_forward_backward = _operator(
    "kron_feed_forward_backward",
    "(Tensor dy, Tensor x, Tensor a1, Tensor b1, Tensor? bias1, str activation,"
    " Tensor a2, Tensor b2, bool[] needed, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _feed_forward_backward,
    _fake_feed_forward_backward,
    _feed_forward_backward_flops,
)


# --- kron_embedding


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


def _embedding(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    _check_embedding(ids, a, b)
    if reason := launch.why_not_embedding(a, b):
        raise ValueError(f"Triton's lookup cannot serve this call: {reason}.")
    return EMBEDDING.kron_embedding(ids, a, b)


def _fake_embedding(ids, a, b) -> Tensor:
    _check_embedding(ids, a, b)
    return a.new_empty(ids.shape[0], a.shape[2] * b.shape[2])


kron_embedding = _operator(
    "kron_embedding", "(Tensor ids, Tensor a, Tensor b) -> Tensor", _embedding, _fake_embedding
)


# --- products with factors in int8


def _int8_factors(values: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Factor]:
    if len(values) != len(scales):
        raise ValueError(
            f"there must be a scale, or None, for each of {len(values)} factors, got {len(scales)}."
        )
    return [v if s is None else Int8Factor(v, s) for v, s in zip(values, scales, strict=True)]


def _int8_matmul(
    x: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
    backend: BackendName,
) -> Tensor:
    factors = _int8_factors(values, scales)
    _check_residual(x, residual)
    return int8_products.kron_matmul(x, factors, bias, activation, residual, backend)


def _fake_int8_matmul(x, values, scales, bias, activation, residual, backend) -> Tensor:
    factors = int8_products.checked_factors(
        x, _int8_factors(values, scales), bias, activation, residual
    )
    _check_residual(x, residual)
    return x.new_empty(*x.shape[:-1], prod([f.shape[1] for f in factors]))


int8_matmul = _operator(
    "int8_matmul",
    "(Tensor x, Tensor[] values, Tensor?[] scales, Tensor? bias, str? activation,"
    " Tensor? residual, str backend) -> Tensor",
    _int8_matmul,
    _fake_int8_matmul,
)


# --- FLOPs


def _register_formulas(flop_counter: ModuleType) -> None:
    for name, formula in _FLOPS.items():
        packet = getattr(torch.ops.kron_kernels, name)
        if packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)


# The counter imports Triton where it is installed: three times as long as all of this package.
when_imported("torch.utils.flop_counter", _register_formulas)
