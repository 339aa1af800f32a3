"""``kron_matmul``: checks, autocast, flattening, gradients and the epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kron_kernels import dispatch, ops
from kron_kernels.backends import COMPILED, eager
from kron_kernels.checks import (
    Activation,
    check_epilogue,
    check_factors,
    check_tensors,
    is_plain,
)
from kron_kernels.dispatch import Backend
from kron_kernels.shapes import KronShape, constant_sizes


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
            (Kronecker rank r). Of x's dtype and device. The leading dimension is summed over; for
            a batch of factors, ``(batch, m_i, n_i)`` with a result for each, use
            ``torch.vmap(kron_matmul)``.
        bias: Shape ``(m,)``, ``m`` the product of the factors' rows.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: Shape ``(…, m)``, on x's device, added last.
        backend: ``"eager"`` is PyTorch on any device, ``"native"`` compiled code on CPUs,
            ``"triton"`` and ``"cuda"`` Triton's and CUDA C++ kernels on GPUs; ``"auto"`` takes one
            of the last three where they can serve the call. ``"native"`` takes up to 8 factors,
            the kernels for GPUs two. A backend asked for by name is never replaced;
            ``explain_backends`` says which can serve and why others cannot.

    Returns:
        Output of shape ``(…, m)``, of x's dtype (promoted with residual's). On a CPU, 16-bit
        inputs are multiplied and summed in float32.

    Raises:
        TypeError: If an operand is no dense tensor.
        ValueError: If shapes, dtypes or devices do not fit, or the backend cannot serve the call.
    """
    operands = (x, *factors)
    if bias is not None:
        operands += (bias,)
    if residual is not None:
        operands += (residual,)
    watched = observed(operands)
    if watched and not torch.compiler.is_compiling():
        check_tensors(x, factors, bias, residual)
    if (watched or _any_autocast() or not x.is_cpu) and under_autocast(x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        # Within, the products would be cast once more, those of float32 sums included.
        with torch.autocast(device, enabled=False):
            return kron_matmul(
                *[_lowered(t, dtype) for t in (x, *factors)],
                bias=None if bias is None else _lowered(bias, dtype),
                activation=activation,
                residual=residual,
                backend=backend,
            )
    if watched and torch.jit.is_tracing():
        return _recorded(x, factors, bias, activation, residual, backend)
    factors = check_factors(x, factors)
    check_epilogue(x, factors, bias, activation, residual)
    backend = dispatch.choose(backend, x, factors)
    with_grads = differentiable(operands)
    if _plain_is_best(x, factors, backend, with_grads, watched):
        y = eager.kron_matmul(x, *factors, bias=bias)
        return eager.epilogue(y, activation, residual)
    rows = as_rows(x)
    if with_grads:
        a, b = factors
        y = apply(rows, a, b, bias, backend)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return eager.epilogue(y, activation, residual)
    last = None if residual is None or residual.dtype != x.dtype else as_rows(residual)
    epilogue = bias, activation, last
    if len(factors) == 2 and (backend == "eager" or watched or profiled()):
        y = ops.kron_matmul(rows, *factors, *epilogue, backend)
    elif profiled():  # there is no operator of other numbers of factors
        with torch.profiler.record_function("kron_kernels::kron_matmul"):
            y = COMPILED[backend].kron_matmul(rows, factors, *epilogue)
    else:
        y = COMPILED[backend].kron_matmul(rows, factors, *epilogue)
    if x.ndim != 2:
        y = y.view(*x.shape[:-1], y.shape[-1])
    return y if last is not None or residual is None else y + residual


def as_rows(t: Tensor) -> Tensor:
    """``(…, n)`` as ``(tokens, n)``."""
    return t if t.ndim == 2 else t.flatten(0, -2) if t.ndim > 2 else t[None]


# Quicker than to ask for one device; it knows CPUs and CUDA, not MPS.
_any_autocast = torch._C._is_any_autocast_enabled


def observed(operands: Sequence[Tensor]) -> bool:
    """Whether compiled kernels must be called through the dispatcher.

    Compilers, tracers and modes see such a call, and what is no plain tensor becomes one. It takes
    4 µs more, as long as a product of a few tokens.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not is_plain(operands)
    )


def traced() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is recording, which takes plain products."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def profiled() -> bool:
    """Whether a profiler is on, which sees what goes through the dispatcher."""
    return torch.autograd._profiler_enabled()


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def differentiable(operands: Sequence[Tensor]) -> bool:
    """Whether autograd or a ``torch.func`` transform may act on this call."""
    if transformed():
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in operands)


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _plain_is_best(
    x: Tensor, factors: tuple[Tensor, ...], backend: str, with_grads: bool, watched: bool
) -> bool:
    """Whether plain products serve better than the operator and its gradient."""
    # A compiler can fuse them, and an exporter must translate them.
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling() and (
        backend == "eager" or (with_grads and backend not in ("triton", "cuda"))
    ):
        return True
    if len(factors) != 2:  # the operator is for two
        return backend == "eager" or with_grads or watched
    if backend != "eager":
        return False
    # Without gradients a few tokens take less time than the call of an operator.
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))
    return not needed and eager.fits_one_chunk(x, KronShape.of(*factors))


def _recorded(
    x: Tensor,
    factors: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
    backend: Backend,
) -> Tensor:
    """Plain products for ``torch.jit.trace``, which records operations of PyTorch's own only."""
    with constant_sizes():
        checked = check_factors(x, factors)
        check_epilogue(x, checked, bias, activation, residual)
        dispatch.choose(backend, x, checked)
    factors = tuple([f if f.ndim == 3 else f[None] for f in factors])
    y = eager.kron_matmul(x, *factors, bias=bias)
    return eager.epilogue(y, activation, residual)


def apply(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """``x Wᵀ + bias`` of ``x (T, n)``, differentiable in every way."""
    function = TransformedKronMatmul if transformed() else KronMatmul
    return function.apply(x, a, b, bias, backend)


def backward(ctx, dy: Tensor):
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

    backward = staticmethod(backward)


class TransformedKronMatmul(torch.autograd.Function):
    """The same for ``torch.func`` and forward mode, whose form of a Function takes 40 µs more."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return ops.kron_matmul(x, a, b, bias, None, None, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, a, b, _, ctx.backend = inputs
        ctx.save_for_backward(x, a, b)
        ctx.save_for_forward(x, a, b)

    backward = staticmethod(backward)

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
            return eager.kron_matmul(x, a, b, bias=bias)

        return torch.vmap(plain, in_dims[:4])(x, a, b, bias), 0


def _differentiable_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, backend: str):
    """The gradients by operations that have gradients themselves, for double backward."""
    dx = apply(dy, a.mH, b.mH, None, backend)
    dy = dy.unflatten(-1, (a.shape[1], b.shape[1]))  # (T, m1, m2)
    x = x.unflatten(-1, (a.shape[2], b.shape[2])).conj()  # (T, n1, n2)
    z = torch.einsum("tjq,kpq->ktjp", x, b.conj())
    v = torch.einsum("kij,tip->ktjp", a.conj(), dy)
    da = torch.einsum("tip,ktjp->kij", dy, z)
    db = torch.einsum("ktjp,tjq->kpq", v, x)
    return dx, da, db


def _lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as ``F.linear`` does: under autocast every real dtype but float64 becomes the lower."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
