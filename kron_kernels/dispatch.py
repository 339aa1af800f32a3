"""How each call is computed: by which backend, and through which layers of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kron_kernels.backends import BACKENDS, COMPUTING, eager, or_eager
from kron_kernels.backends.triton import launch
from kron_kernels.checks import Activation, Layer, check_product, check_tensors, is_plain
from kron_kernels.shapes import KronShape, constant_sizes

BackendName = Literal["auto", "eager", "native", "triton", "cuda"]

# Order in which "auto" tries the GPU backends. From an uncalibrated cost model
# (benchmarks/gpu/side_by_side); replace it by timings of `python -m benchmarks.gpu`.
GPU_ORDER: dict[str, tuple[BackendName, ...]] = {
    # One token: the busiest warp executes 366 to 436 instructions with CUDA, on 24 to 48
    # multiprocessors, and 587 to 1962 with Triton, on 3. 16 tokens: 2336 to 3917, and 587 to 1962.
    "up to 4 tokens": ("cuda", "triton"),
    # CUDA mixes without tensor cores: its lower bounds are 3 to 10 times Triton's.
    "both factors over 8 on a side": ("triton",),
    # 21x attention, forward and backward, 65,536 tokens: CUDA 367 µs and Triton 487 µs on an A100,
    # 235 and 324 on an H100. Triton reads 16 interleaved vectors with bank conflicts. (kron_qkv is
    # the other way round: 268 and 198, 158 and 124.)
    "16 interleaved vectors": ("cuda", "triton"),
    # CUDA's forward is 0 to 14 % slower (8x attention on an H100: 53 %, Triton has wgmma); its
    # backward is between 6 % faster and 26 % slower (8x attention on an H100: 82 to 90 %).
    "anything else": ("triton", "cuda"),
}


# How a call is computed:
# - plain: a differentiable PyTorch expression, which compilers and exporters take apart;
# - products: one kron_matmul after another, each with its own route;
# - autograd: an autograd.Function around an operator;
# - operator: an operator of PyTorch's dispatcher, which profilers, modes and compilers see;
# - recorded: direct, in a range that profilers see, for factors that no operator supports;
# - direct: a call of the backend, 4 µs faster than an operator: the time of a small product.
Way = Literal["plain", "products", "autograd", "operator", "recorded", "direct"]

Route = tuple[Way, BackendName]  # "auto" with "products" only; or a name of backends.COMPUTING

PLAIN: Route = ("plain", "eager")


# --- routes


def route_matmul(
    backend: BackendName,
    x: Tensor,
    factors: Sequence[Tensor],
    operands: Sequence[Tensor],
    observed: bool,
) -> Route:
    """The route of one product of checked operands; ``observed`` is ``is_observed(operands)``."""
    if observed and torch.jit.is_tracing():  # a trace records only PyTorch's own operators
        with constant_sizes():
            choose(backend, x, factors)
        return PLAIN
    chosen = choose(backend, x, factors)
    with_grads = differentiable(operands)
    if observed and torch.compiler.is_compiling():
        # An exporter must translate plain products, and a compiler can fuse them.
        if torch.compiler.is_exporting() or chosen == "eager":
            return PLAIN
        if with_grads and chosen == "native":
            return PLAIN
    if len(factors) != 2:  # operators are for two, gradients for two and more
        one = len(factors) == 1
        if chosen == "eager" or observed or (with_grads and (one or transformed())):
            return PLAIN
        if with_grads:
            return "autograd", chosen
        return "recorded" if _profiled() else "direct", chosen
    # For a few tokens, without gradients, the expression takes less time than an operator's call.
    small = chosen == "eager" and eager.fits_one_chunk(x, KronShape.of(*factors))
    if small and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))):
        return PLAIN
    name = _computing(backend, chosen)
    return ("autograd", name) if with_grads else _without_gradients(name, observed)


def route_qkv(
    backend: BackendName,
    x: Tensor,
    layers: Sequence[Layer],
    operands: Sequence[Tensor],
    observed: bool,
) -> Route:
    """The route of several products of one x; see ``route_matmul``."""
    products = [layer[:2] for layer in layers]
    # No backend fuses the gradients. "auto" leaves low rank to eager, and only that.
    if differentiable(operands) or (backend == "auto" and _low_rank_among(products)):
        return "products", backend
    chosen = choose(backend, x, *products)
    return _without_gradients(_computing(backend, chosen), observed)


def route_feed_forward(
    backend: BackendName,
    x: Tensor,
    up: Layer,
    activation: Activation | None,
    down: Layer,
    operands: Sequence[Tensor],
    observed: bool,
) -> Route:
    """The route of a feed-forward block; see ``route_matmul``."""
    products = up[:2], down[:2]
    # Without an activation the hidden vector is just the input of the second product. "auto" leaves
    # a low-rank product to eager, and chooses a backend for the other one alone.
    if activation is None or (backend == "auto" and _low_rank_among(products)):
        return "products", backend
    chosen = choose(backend, x, *products)
    name = _computing(backend, chosen)
    if not differentiable(operands):
        return _without_gradients(name, observed)
    if transformed() or torch.compiler.is_compiling() or not COMPUTING[chosen].fuses(up, down):
        return "products", name
    return "autograd", name


def route_embedding(a: Tensor, b: Tensor) -> Route:
    """The route of a lookup in the table ``Σ_k a_k ⊗ b_k``."""
    if launch.why_not_embedding(a, b) is not None:
        return PLAIN
    if transformed() or torch.compiler.is_compiling() or _traced() or not is_plain((a, b)):
        return PLAIN
    return "autograd", "triton"


def in_products(x: Tensor) -> bool:
    """Whether fused calls always run as single products here; asked before the checks.

    Single products cast under autocast, know shapes on the meta device, and can be exported.
    """
    return x.is_meta or under_autocast(x) or _traced()


def _computing(asked: str, chosen: BackendName) -> BackendName:
    """The name that computes a call: only "auto" may replace a backend whose kernels fail."""
    return or_eager(chosen) if asked == "auto" else chosen


def _without_gradients(backend: BackendName, observed: bool) -> Route:
    if backend == "eager" or observed or _profiled():
        return "operator", backend
    return "direct", backend


def _low_rank_among(products: Sequence[Sequence[Tensor]]) -> bool:
    low_rank = [is_low_rank(*factors) for factors in products]
    return any(low_rank)


# --- what is active


def is_observed(operands: Sequence[Tensor]) -> bool:
    """Whether something may look at the call, or at an operand's data, on its way to a backend.

    That is a compiler, a tracer, a dispatch mode, or a tensor that is not plain memory.
    """
    return is_watched() or not is_plain(operands)


def is_watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode is active."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_active() -> bool:
    """Whether autocast, a profiler, a transform or forward-mode differentiation is active."""
    return torch._C._is_any_autocast_enabled() or transformed() or _profiled()


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    # One question for all devices is faster than for one; it counts CPUs and CUDA, but not MPS.
    if x.is_cpu and not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as ``F.linear`` does under autocast: every real dtype but float64 to the lower one."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def differentiable(operands: Sequence[Tensor]) -> bool:
    """Whether autograd or a ``torch.func`` transform is active."""
    return transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in operands))


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recorded(name: str) -> AbstractContextManager:
    """A range that profilers see around a direct call of the compiled kernels."""
    if not _profiled():
        return nullcontext()
    return torch.profiler.record_function(f"kron_kernels::{name}")


def _profiled() -> bool:
    return torch.autograd._profiler_enabled()


def _traced() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


# --- backends


def why_not(backend: str, x: Tensor, *factors: Tensor) -> str | None:
    """Why this backend cannot serve the call, as the end of a sentence, or None if it can."""
    if backend not in BACKENDS and backend not in COMPUTING:
        names = [name for name in ("auto", *BACKENDS) if name != backend]  # operators take no auto
        return f"it does not exist; the backends are {', '.join(names)}"
    return COMPUTING[backend].why_not(x, *factors)


def require(backend: str, x: Tensor, *products: Sequence[Tensor]) -> None:
    """Raise unless the backend can serve all products, each given by its factors.

    Raises:
        ValueError: With the reason.
    """
    for factors in products:
        if reason := why_not(backend, x, *factors):
            raise ValueError(f"backend={backend!r} cannot serve this call: {reason}.")


def choose(backend: BackendName, x: Tensor, *products: Sequence[Tensor]) -> BackendName:
    """The backend for all products of a call, each given by its factors.

    A backend asked for by name is used or refused, never replaced. ``"auto"`` is eager if one of
    the products has low rank: two GEMMs, for which each device has a library.

    Raises:
        ValueError: If the backend asked for cannot serve the call, with the reason.
    """
    if backend != "auto":
        require(backend, x, *products)
        return backend
    if _low_rank_among(products):
        return "eager"
    for name in _order(x, *products[0]):
        reasons = [BACKENDS[name].why_not(x, *factors) for factors in products]
        if not any(reasons):
            return name
    return "eager"


def explain_backends(x: Tensor, *factors: Tensor) -> str:
    """One line per backend: how it would compute this product, or why it cannot.

    Args:
        x: The input of ``kron_matmul``, ``(…, n)``.
        *factors: Its factors.

    Raises:
        TypeError: If an operand is not a dense tensor.
        ValueError: If ``kron_matmul`` would refuse these operands with every backend.
    """
    check_tensors(x, factors)
    factors = check_product(x, factors)
    return "\n".join(
        f"{name:8}{backend.why_not(x, *factors) or f'ready: {backend.describe(x, *factors)}'}"
        for name, backend in reversed(BACKENDS.items())
    )


def _order(x: Tensor, *factors: Tensor) -> tuple[BackendName, ...]:
    if x.is_cpu:
        return ("native",)
    sides = [f.shape[1:] for f in factors]
    if prod(x.shape[:-1]) <= 4:
        return GPU_ORDER["up to 4 tokens"]
    if all(min(side) > 8 for side in sides):
        return GPU_ORDER["both factors over 8 on a side"]
    if max(sides[-1]) >= 16 and prod(sides[-1]) < prod(sides[0]):
        return GPU_ORDER["16 interleaved vectors"]
    return GPU_ORDER["anything else"]


def is_low_rank(*factors: Tensor) -> bool:
    """Whether this is a product of two thin matrices: ``"auto"`` leaves two GEMMs to eager."""
    # Making a shape takes 1 µs, a visible part of a small call; sides of 1 are rare.
    if len(factors) != 2 or 1 not in factors[0].shape[-2:]:
        return False
    return KronShape.of(*factors).is_low_rank
