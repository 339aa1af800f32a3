"""``kron_matmul``: checks, autocast, flattening, gradients and the epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels import dispatch, ops
from kron_kernels.backends import eager
from kron_kernels.checks import Activation, check_epilogue, check_factors
from kron_kernels.dispatch import Backend
from kron_kernels.shapes import KronShape

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def kron_matmul(
    x: Tensor,
    *factors: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``y = act(x Wᵀ + bias) + residual`` with ``W = Σ_k A_k ⊗ B_k ⊗ …``, without forming W.

    For two factors, read a row of ``x`` as a row-major ``(n1, n2)`` matrix X: the row of y is
    ``Σ_k A_k X B_kᵀ``, read as row-major ``(m1, m2)``. (Papers that write ``vec(B X Aᵀ)`` stack
    columns; it is the same product.)

    Differentiable any number of times, in forward mode as well; works under ``torch.vmap``,
    ``torch.compile(fullgraph=True)`` and ``torch.export``, on meta tensors, and under autocast,
    where it casts as ``F.linear`` does and leaves ``residual`` to PyTorch's type promotion.

    Args:
        x: Input of shape ``(…, n)``, ``n`` the product of the factors' columns. Real or complex
            floating point, any strides, any number of tokens including none.
        *factors: One or more, each ``(m_i, n_i)``, or ``(r, m_i, n_i)`` for a sum of r products
            (Kronecker rank r). Of x's dtype and device.
        bias: Shape ``(m,)``, ``m`` the product of the factors' rows.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: Shape ``(…, m)``, added last.
        backend: ``"eager"`` is PyTorch on any device; ``"auto"`` takes the fastest backend that
            can serve the call. One asked for by name is never replaced by another;
            :func:`kron_kernels.explain_backends` says which can serve and why others cannot.

    Returns:
        Output of shape ``(…, m)``, of x's dtype (promoted with residual's). On a CPU, 16-bit
        inputs are multiplied and summed in float32.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or the backend cannot serve the call.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x, bias, *factors = _lowered(device, x, bias, *factors)
        # Within, the products would be cast once more, those of float32 sums included.
        with torch.autocast(device, enabled=False):
            return kron_matmul(
                x, *factors, bias=bias, activation=activation, residual=residual, backend=backend
            )
    factors = check_factors(x, factors)
    check_epilogue(x, factors, bias, activation, residual)
    backend = dispatch.choose(backend, x, *factors)
    if len(factors) != 2 or _plain_is_best(x, *factors):
        y = eager.kron_matmul(x, *factors, bias=bias)
    else:
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
        y = KronMatmul.apply(rows, *factors, bias, backend)
        y = y.view(*x.shape[:-1], y.shape[-1])
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def _plain_is_best(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether plain products serve better than the operator and its gradient.

    A compiler can fuse and export them; without gradients, a few tokens take less time than the
    call of an operator inside an autograd.Function.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return False
    return eager.fits_one_chunk(x, KronShape.of(a, b))


class KronMatmul(torch.autograd.Function):
    """``x (T, n)``, ``a (r, m1, n1)``, ``b (r, m2, n2)``, ``bias (m,)`` or None to ``y (T, m)``."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return ops.kron_matmul(x, a, b, bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, a, b, _, ctx.backend = inputs
        ctx.save_for_backward(x, a, b)
        ctx.save_for_forward(x, a, b)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, a, b = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = _differentiable_backward(dy, x, a, b, ctx.backend)
        else:
            grads = ops.kron_matmul_backward(dy, x.conj(), a.conj(), b.conj(), needed, ctx.backend)
        grads = [g if n else None for g, n in zip(grads, needed, strict=True)]
        return *grads, dy.sum(0) if ctx.needs_input_grad[3] else None, None

    @staticmethod
    def jvp(ctx, x_t: Tensor | None, a_t: Tensor | None, b_t: Tensor | None, bias_t, _) -> Tensor:
        x, a, b = ctx.saved_tensors
        terms = [
            KronMatmul.apply(*operands, None, ctx.backend)
            for operands in ((x_t, a, b), (x, a_t, b), (x, a, b_t))
            if all(t is not None for t in operands)
        ]
        if bias_t is not None:
            terms.append(bias_t.expand(x.shape[0], -1))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info, in_dims, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str):
        def plain(x, a, b, bias):
            return eager.kron_matmul(x, a, b, bias=bias)

        return torch.vmap(plain, in_dims[:4])(x, a, b, bias), 0


def _differentiable_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, backend: str):
    """The gradients by operations that have gradients themselves, for double backward."""
    dx = KronMatmul.apply(dy, a.mH, b.mH, None, backend)
    dy = dy.unflatten(-1, (a.shape[1], b.shape[1]))  # (T, m1, m2)
    x = x.unflatten(-1, (a.shape[2], b.shape[2])).conj()  # (T, n1, n2)
    z = torch.einsum("tjq,kpq->ktjp", x, b.conj())
    v = torch.einsum("kij,tip->ktjp", a.conj(), dy)
    da = torch.einsum("tip,ktjp->kij", dy, z)
    db = torch.einsum("ktjp,tjq->kpq", v, x)
    return dx, da, db


def _lowered(device: str, *operands: Tensor | None) -> list[Tensor | None]:
    """Cast as ``F.linear`` does: under autocast every real dtype but float64 becomes the lower."""
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        keep = t is None or not t.is_floating_point() or t.dtype == torch.float64
        return t if keep else t.to(dtype)

    return [cast(t) for t in operands]
