"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

from torch import Tensor

from kron_kernels.backends import cuda, eager, native
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.checks import check_factors, check_tensors
from kron_kernels.shapes import KronShape

Backend = Literal["auto", "eager", "native", "triton", "cuda"]

# Whom "auto" asks on a GPU, in this order. The reasons are lower bounds and counts by an
# uncalibrated model (benchmarks/gpu/side_by_side), and no device's times; `python -m
# benchmarks.gpu` takes those, and they are what should stand here.
GPU_ORDER: dict[str, tuple[Backend, ...]] = {
    # For one token the busiest warp executes 366 to 436 instructions of CUDA's kernel on 24 to 48
    # multiprocessors, 587 to 1962 of Triton's on 3. For 16 they are 2336 to 3917 and 587 to 1962.
    "up to 4 tokens": ("cuda", "triton"),
    # A mix without tensor cores: CUDA's bounds are 3 to 10 times Triton's.
    "both factors over 8 on a side": ("triton",),
    # The 21x attention, forward and backward: 367 µs against Triton's 487 for 65,536 tokens on an
    # A100, 235 against 324 on an H100. Triton's kernels read 16 interleaved vectors with conflicts.
    # (Three products of one x, kron_qkv, are behind: 268 against 198, 158 against 124.)
    "16 interleaved vectors": ("cuda", "triton"),
    # Forward equal to Triton's or up to 14 % behind (8x attention on an H100: 53 %, where Triton
    # has wgmma), backward from 6 % ahead to 26 % behind (8x attention on an H100: 82 to 90 %).
    "anything else": ("triton", "cuda"),
}


def why_not(backend: str, x: Tensor, *factors: Tensor) -> str | None:
    """Why this backend cannot serve the call, as the end of a sentence, or None if it can."""
    if backend == "eager":
        return None
    if backend == "native":
        return native.why_not(x, *factors)
    if backend == "triton":
        return triton_gpu.why_not(x, *factors)
    if backend == "cuda":
        return cuda.why_not(x, *factors)
    return f"there is no such backend; there are {', '.join(get_args(Backend))}"


def choose(backend: Backend, x: Tensor, *products: Sequence[Tensor]) -> Backend:
    """The backend to run, for all products of a call, each given by its factors.

    One asked for by name is granted or refused, never replaced. ``"auto"`` is eager if one of the
    products has low rank: two GEMMs, for which each device has a library.

    Raises:
        ValueError: If the backend asked for cannot serve the call, with the reason.
    """
    if backend == "auto":
        if any(is_low_rank(*factors) for factors in products):
            return "eager"
        return fastest(x, *products)
    for factors in products:
        if reason := why_not(backend, x, *factors):
            raise ValueError(f"backend={backend!r} cannot serve this call: {reason}.")
    return backend


def fastest(x: Tensor, *products: Sequence[Tensor]) -> Backend:
    """The first backend in order that serves all of these products, none of which has low rank."""
    for compiled in _order(x, *products[0]):
        if not any(why_not(compiled, x, *factors) for factors in products):
            return compiled
    return "eager"


def explain_backends(x: Tensor, *factors: Tensor) -> str:
    """One line a backend: what it does for these operands, or why it cannot serve them.

    Args:
        x: The input of ``kron_matmul``, ``(…, n)``.
        *factors: Its factors.

    Raises:
        TypeError: If an operand is no dense tensor.
        ValueError: If ``kron_matmul`` would refuse these operands whatever the backend.
    """
    check_tensors(x, factors)
    factors = check_factors(x, factors)
    compiled_cuda = why_not("cuda", x, *factors) or f"ready: {cuda.plan(x)}"
    triton = why_not("triton", x, *factors) or f"ready: {triton_gpu.plan(x, *factors)}"
    compiled = why_not("native", x, *factors) or f"ready: {native.instruction_set()}"
    return (
        f"cuda    {compiled_cuda}\ntriton  {triton}\nnative  {compiled}\n"
        f"eager   ready: {_eager_plan(factors)}"
    )


def _order(x: Tensor, *factors: Tensor) -> tuple[Backend, ...]:
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
    """Whether this product is of two thin matrices: two GEMMs, which ``"auto"`` leaves to eager."""
    # Told from most others by one look: a shape takes 1 µs to make, a visible part of a small call.
    if len(factors) != 2 or 1 not in factors[0].shape[-2:]:
        return False
    return KronShape.of(*factors).is_low_rank


def _eager_plan(factors: Sequence[Tensor]) -> str:
    if len(factors) > 2:
        factors = eager.merge_small(factors)
    if len(factors) != 2:
        sides = " ⊗ ".join(f"{f.shape[1]}x{f.shape[2]}" for f in factors)
        return f"one product per axis of {sides}"
    s = KronShape.of(*factors)
    if s.is_low_rank:
        return (
            f'low rank, {s.rank}: two GEMMs over all tokens, which "auto" takes; '
            f"{s.flops:,} FLOPs per token"
        )
    form = eager.choose_form(s)
    first, then = ("B", "A") if form.order == "b_first" else ("A", "B")
    how = "one GEMM over all tokens" if form.layout == "planes" else "a batched product"
    return f"{first} first, then {then}; A by {how}; {s.flops:,} FLOPs per token"
