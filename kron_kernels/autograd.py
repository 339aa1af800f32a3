"""The ``autograd.Function``s around the operators; ``dispatch`` decides which calls use them."""

from __future__ import annotations

import torch
from torch import Tensor

from kron_kernels import dispatch, ops
from kron_kernels.backends import eager, native


def kron_matmul(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """``x Wᵀ + bias`` of ``x (T, n)``, differentiable in every way."""
    function = TransformedKronMatmul if dispatch.transformed() else KronMatmul
    return function.apply(x, a, b, bias, backend)


def _backward(ctx, dy: Tensor):
    """Gradients of ``x``, ``a``, ``b``, ``bias``, and None for the backend."""
    x, a, b = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        grads = _differentiable_backward(dy, x, a, b, ctx.backend)
    else:
        grads = ops.kron_matmul_backward(dy, x.conj(), a.conj(), b.conj(), needed, ctx.backend)
    grads = [g if n else None for g, n in zip(grads, needed, strict=True)]
    return *grads, dy.sum(0) if ctx.needs_input_grad[3] else None, None


class KronMatmul(torch.autograd.Function):
    """``x (T, n)``, ``a (r, m1, n1)``, ``b (r, m2, n2)``, ``bias (m,)`` or None to ``y (T, m)``."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.backend = backend
        return ops.kron_matmul(x, a, b, bias, None, None, backend)

    backward = staticmethod(_backward)


class TransformedKronMatmul(torch.autograd.Function):
    """``KronMatmul`` for ``torch.func`` and forward mode, in a form that takes 40 µs more."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return ops.kron_matmul(x, a, b, bias, None, None, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, a, b, _, ctx.backend = inputs
        ctx.save_for_backward(x, a, b)
        ctx.save_for_forward(x, a, b)

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx, x_t: Tensor | None, a_t: Tensor | None, b_t: Tensor | None, bias_t, _) -> Tensor:
        x, a, b = ctx.saved_tensors
        terms = [
            TransformedKronMatmul.apply(*operands, None, ctx.backend)
            for operands in ((x_t, a, b), (x, a_t, b), (x, a, b_t))
            if all(t is not None for t in operands)
        ]
        if bias_t is not None:
            terms.append(bias_t.expand(x.shape[0], -1))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info, in_dims, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str):
        def plain(x, a, b, bias):
            return eager.plain_matmul(x, (a, b), bias)

        return torch.vmap(plain, in_dims[:4])(x, a, b, bias), 0


def _differentiable_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, backend: str):
    """The gradients by operations that have gradients themselves, for double backward."""
    dx = kron_matmul(dy, a.mH, b.mH, None, backend)
    dy = dy.unflatten(-1, (a.shape[1], b.shape[1]))  # (T, m1, m2)
    x = x.unflatten(-1, (a.shape[2], b.shape[2])).conj()  # (T, n1, n2)
    z = torch.einsum("tjq,kpq->ktjp", x, b.conj())
    v = torch.einsum("kij,tip->ktjp", a.conj(), dy)
    da = torch.einsum("tip,ktjp->kij", dy, z)
    db = torch.einsum("ktjp,tjq->kpq", v, x)
    return dx, da, db


class KronMatmulOfMany(torch.autograd.Function):
    """``x (…, n)``, ``bias (m,)`` or None, three factors or more, by the compiled CPU kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        with dispatch.recorded("kron_matmul"):
            return native.kron_matmul(x, factors, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        operands = ctx.saved_tensors
        x, *factors = operands
        of_x, of_bias, *of_factors = ctx.needs_input_grad
        needed = [of_x, *of_factors]
        # torch.autograd.grad(…, is_grads_batched=True) gives a dy that has no memory.
        batched = not torch._C._dispatch_keys(dy).has(torch._C.DispatchKey.CPU)
        observed = batched or dispatch.transformed() or dispatch.is_observed([dy, *operands])
        if torch.is_grad_enabled() or observed:  # there is no operator that could be observed
            with torch.enable_grad():
                y = eager.plain_matmul(x, factors)
            wanted = [t for t, n in zip(operands, needed, strict=True) if n]
            again = torch.is_grad_enabled()
            some = iter(torch.autograd.grad(y, wanted, dy, create_graph=again) if wanted else ())
            dx, *grads = (next(some) if n else None for n in needed)
        else:
            with dispatch.recorded("kron_matmul_backward"):
                found = native.kron_matmul_of_many_backward(dy, x, factors, needed)
            dx, *grads = (g if n else None for g, n in zip(found, needed, strict=True))
        return dx, dy.flatten(0, -2).sum(0) if of_bias else None, *grads


class FeedForward(torch.autograd.Function):
    """``down(act(up(x)))`` of layers that a backend fuses; the hidden vector is recomputed."""

    @staticmethod
    def forward(ctx, x, a1, b1, bias1, activation, a2, b2, bias2, backend) -> Tensor:
        ctx.save_for_backward(x, a1, b1, bias1, a2, b2, bias2)
        ctx.activation, ctx.backend = activation, backend
        return ops.kron_feed_forward(x, a1, b1, bias1, activation, a2, b2, bias2, None, backend)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, a1, b1, bias1, a2, b2, bias2 = ctx.saved_tensors
        operands = {0: x, 1: a1, 2: b1, 3: bias1, 5: a2, 6: b2}  # by position in forward
        grads: list[Tensor | None] = [None] * 9
        if ctx.needs_input_grad[7]:
            grads[7] = dy.sum(0)
        needed = {i: ctx.needs_input_grad[i] for i in operands}
        if torch.is_grad_enabled():  # double backward goes through the two products
            hidden = kron_matmul(x, a1, b1, bias1, ctx.backend)
            hidden = eager.epilogue(hidden, ctx.activation, None)
            y = kron_matmul(hidden, a2, b2, bias2, ctx.backend)
            wanted = [i for i in operands if needed[i]]
            found = torch.autograd.grad(y, [operands[i] for i in wanted], dy, create_graph=True)
        else:
            wanted = list(operands)
            found = ops.kron_feed_forward_backward(
                dy, x, a1, b1, bias1, ctx.activation, a2, b2, list(needed.values()), ctx.backend
            )
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad if needed[i] else None
        return tuple(grads)


class Embedding(torch.autograd.Function):
    """Rows ``ids (…)`` of the table ``Σ_k a_k ⊗ b_k``, by Triton."""

    @staticmethod
    def forward(ctx, ids: Tensor, a: Tensor, b: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, a, b)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx % a.shape[1]
        return ops.kron_embedding(ids.reshape(-1), a, b).view(*ids.shape, a.shape[2] * b.shape[2])

    @staticmethod
    def backward(ctx, dy: Tensor):
        ids, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, a.shape[2], b.shape[2])  # (T, d / n, n)
        rows = a[:, ids.reshape(-1)]  # (r, T, d / n)
        da = db = None
        if ctx.needs_input_grad[1]:
            tables = [
                torch.ops.aten.embedding_dense_backward(
                    (dy @ row[0]), ids.reshape(-1), a.shape[1], ctx.padding_idx, False
                )
                for row in b
            ]
            da = torch.stack(tables)
        if ctx.needs_input_grad[2]:
            db = torch.einsum("tjp,ktj->kp", dy, rows)[:, None]
        return None, da, db, None
