"""Fusions of several products: an attention's three, and a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kron_kernels import dispatch, ops
from kron_kernels.backends import COMPILED, eager
from kron_kernels.checks import (
    Activation,
    Layer,
    Shaped,
    check_epilogue,
    check_factors,
    check_tensor,
    check_tensors,
)
from kron_kernels.dispatch import Backend
from kron_kernels.functional import (
    apply,
    as_rows,
    differentiable,
    kron_matmul,
    observed,
    profiled,
    traced,
    transformed,
    under_autocast,
)

Result = TypeVar("Result")


def kron_qkv(
    x: Tensor, query: Layer, key: Layer, value: Layer, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Three products of the same x, such as an attention's, for which x is read once.

    Args:
        x: Shape ``(…, n)``.
        query: ``(a, b, bias)``: factors ``(m1, n1)`` and ``(m2, n2)``, or ``(r, …)`` for a sum of r
            products, and a bias ``(m1 * m2,)`` or None.
        key: The same of the second product.
        value: And of the third.
        backend: As for ``kron_matmul``.

    Returns:
        What three calls of ``kron_matmul`` return; gradients and transforms are theirs.

    Raises:
        TypeError: As ``kron_matmul``.
        ValueError: As ``kron_matmul``, naming the layer.
    """
    layers = {"query": query, "key": key, "value": value}
    operands = _operands(x, layers)
    watched = _watched(operands, layers)
    if differentiable(operands) or _stepwise(x, backend, (query, key, value)):
        q, k, v = (
            _of(name, kron_matmul, x, a, b, bias=bias, backend=backend)
            for name, (a, b, bias) in layers.items()
        )
        return q, k, v
    checked = [_of(name, _checked_layer, x, layer) for name, layer in layers.items()]
    backend = _choose(backend, x, *[layer[:2] for layer in checked])
    if backend == "eager" or watched or profiled():
        a, b, biases = zip(*checked, strict=True)
        ys = ops.kron_qkv(as_rows(x), a, b, biases, backend)
    else:
        ys = COMPILED[backend].kron_qkv(as_rows(x), checked)
    if x.ndim != 2:
        ys = [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
    q, k, v = ys
    return q, k, v


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    down: Layer,
    *,
    activation: Activation | None = "gelu",
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``down(act(up(x))) + residual``: a feed-forward block whose hidden vector is never stored.

    The compiled backends go through a block of tokens at a time. Where ``up = (k x l) ⊗ B``,
    cheaper contracted from the right, and ``down = (l' x k) ⊗ B'``, cheaper from the left, as in
    KroneckerBERT, an entry of the hidden vector lives in a register only (native: at most in the
    first-level cache), in the backward, which recomputes it, too. Otherwise it is in memory: native
    keeps a block of it, the others all, and all do while gradients wait for their backward.

    Args:
        x: Shape ``(…, n)``.
        up: ``(a, b, bias)``: factors ``(m1, n1)`` and ``(m2, n2)``, or ``(r, …)`` for a sum of r
            products, and a bias ``(m1 * m2,)`` or None.
        down: The same of the second layer, whose inputs are up's outputs.
        activation: Between the two, as for ``kron_matmul``; with None the block is two products.
        residual: Of the output's shape, added last.
        backend: As for ``kron_matmul``.

    Returns:
        Shape ``(…, m)``, of x's dtype (promoted with residual's).

    Raises:
        TypeError: As ``kron_matmul``.
        ValueError: As ``kron_matmul``, naming the layer, or if ``down`` does not take what ``up``
            gives.
    """
    layers = {"up": up, "down": down}
    operands = _operands(x, layers, residual)
    watched = _watched(operands, layers, residual)
    with_grads = differentiable(operands)
    # Without an activation the hidden vector is no more than the input of the second product.
    stepwise = activation is None or _stepwise(x, backend, (up, down))
    if not stepwise:
        up = _of("up", _checked_layer, x, up, activation)
        shape = *x.shape[:-1], up[0].shape[1] * up[1].shape[1]
        between = Shaped(shape, x.dtype, x.device)
        down = _of("down", _checked_layer, between, down, residual=residual)
        backend = _choose(backend, x, up[:2], down[:2])
        fused = backend in COMPILED and COMPILED[backend].meet(*up[:2], *down[:2])
    if stepwise or (with_grads and (not fused or transformed() or torch.compiler.is_compiling())):
        a, b, bias = up
        hidden = _of("up", kron_matmul, x, a, b, bias=bias, activation=activation, backend=backend)
        a, b, bias = down
        return _of("down", kron_matmul, hidden, a, b, bias=bias, residual=residual, backend=backend)

    rows = as_rows(x)
    last = None  # the residual, if the kernel adds it
    if residual is not None and residual.dtype == x.dtype and not with_grads:
        last = as_rows(residual)
    if with_grads:
        y = FeedForward.apply(rows, *up, activation, *down, backend)
    elif backend == "eager" or watched or profiled():
        y = ops.kron_feed_forward(rows, *up, activation, *down, last, backend)
    else:
        y = COMPILED[backend].kron_feed_forward(rows, up, activation, down, last)
    if x.ndim != 2:
        y = y.view(*x.shape[:-1], y.shape[-1])
    return y if last is not None or residual is None else y + residual


def _operands(
    x: Tensor, layers: Mapping[str, Layer], residual: Tensor | None = None
) -> list[Tensor]:
    """All tensors of a call."""
    operands = [x]
    for name, layer in layers.items():
        try:
            a, b, bias = layer
        except (TypeError, ValueError):
            kind = type(layer).__name__
            values = f" of {len(layer)}" if isinstance(layer, tuple | list) else ""
            raise TypeError(f"{name} must be (a, b, bias), got a {kind}{values}.") from None
        operands += (a, b) if bias is None else (a, b, bias)
    if residual is not None:
        operands.append(residual)
    return operands


def _watched(
    operands: Sequence[Tensor], layers: Mapping[str, Layer], residual: Tensor | None = None
) -> bool:
    """``observed`` of all operands, which must be dense tensors."""
    if not observed(operands):
        return False
    if not torch.compiler.is_compiling():
        for name, (a, b, bias) in layers.items():
            _of(name, check_tensors, operands[0], (a, b), bias)
        if residual is not None:
            check_tensor("residual", residual)
    return True


def _checked_layer(
    x: Tensor | Shaped,
    layer: Layer,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Layer:
    a, b, bias = layer
    a, b = check_factors(x, (a, b))
    check_epilogue(x, (a, b), bias, activation, residual)
    return a, b, bias


def _of(name: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """The function's result; its errors say which layer they are about."""
    try:
        return function(*args, **options)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def _choose(backend: Backend, x: Tensor, *products: Sequence[Tensor]) -> Backend:
    """``dispatch.choose``; of ``"auto"`` ``_stepwise`` has taken the products of low rank."""
    if backend == "auto":
        return dispatch.fastest(x, *products)
    return dispatch.choose(backend, x, *products)


def _stepwise(x: Tensor, backend: str, layers: Sequence[Layer]) -> bool:
    """Whether the products one by one serve better: they cast, know shapes, and are exported.

    ``"auto"`` leaves low rank to eager, and a fused call has one backend: one low-rank product
    would take the others with it.
    """
    return (
        x.is_meta
        or under_autocast(x)
        or traced()
        or (backend == "auto" and any(dispatch.is_low_rank(a, b) for a, b, _ in layers))
    )


class FeedForward(torch.autograd.Function):
    """``down(act(up(x)))`` of factors that meet in the hidden vector, which is not kept."""

    @staticmethod
    def forward(ctx, x, a1, b1, bias1, activation, a2, b2, bias2, backend) -> Tensor:
        ctx.save_for_backward(x, a1, b1, bias1, a2, b2, bias2)
        ctx.activation, ctx.backend = activation, backend
        return ops.kron_feed_forward(x, a1, b1, bias1, activation, a2, b2, bias2, None, backend)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, a1, b1, bias1, a2, b2, bias2 = ctx.saved_tensors
        operands = {0: x, 1: a1, 2: b1, 3: bias1, 5: a2, 6: b2}
        grads: list[Tensor | None] = [None] * 9
        if ctx.needs_input_grad[7]:
            grads[7] = dy.sum(0)
        if torch.is_grad_enabled():  # for double backward, through the products
            hidden = apply(x, a1, b1, bias1, ctx.backend)
            hidden = eager.epilogue(hidden, ctx.activation, None)
            y = apply(hidden, a2, b2, bias2, ctx.backend)
            wanted = [i for i in operands if ctx.needs_input_grad[i]]
            some = torch.autograd.grad(y, [operands[i] for i in wanted], dy, create_graph=True)
        else:
            wanted = list(operands)
            needed = [ctx.needs_input_grad[i] for i in wanted]
            some = ops.kron_feed_forward_backward(
                dy, x, a1, b1, bias1, ctx.activation, a2, b2, needed, ctx.backend
            )
        for i, grad in zip(wanted, some, strict=True):
            grads[i] = grad if ctx.needs_input_grad[i] else None
        return tuple(grads)
