"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from kron_kernels.backends import cuda, eager, native, triton_gpu
from kron_kernels.checks import check_factors
from kron_kernels.shapes import KronShape

Backend = Literal["auto", "eager", "native", "triton", "cuda"]


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


def choose(backend: str, x: Tensor, *products: Sequence[Tensor]) -> str:
    """The backend to run, for all products of a call, each given by its factors.

    One asked for by name is granted or refused, never replaced.

    Raises:
        ValueError: If the backend asked for cannot serve the call, with the reason.
    """
    if backend == "auto":
        compiled = "native" if x.device.type == "cpu" else "triton"
        served = not any(why_not(compiled, x, *factors) for factors in products)
        return compiled if served else "eager"
    for factors in products:
        if reason := why_not(backend, x, *factors):
            raise ValueError(f"backend={backend!r} cannot serve this call: {reason}.")
    return backend


def explain_backends(x: Tensor, *factors: Tensor) -> str:
    """One line a backend: what it does for these operands, or why it cannot serve them.

    Args:
        x: The input of :func:`kron_kernels.kron_matmul`, ``(…, n)``.
        *factors: Its factors.

    Raises:
        ValueError: If ``kron_matmul`` would refuse these operands whatever the backend.
    """
    factors = check_factors(x, factors)
    cuda = why_not("cuda", x, *factors)
    triton = why_not("triton", x, *factors) or f"ready: {triton_gpu.plan(x, *factors)}"
    compiled = why_not("native", x, *factors) or f"ready: {native.instruction_set()}"
    return (
        f"cuda    {cuda}\ntriton  {triton}\nnative  {compiled}\n"
        f"eager   ready: {_eager_plan(*factors)}"
    )


def _eager_plan(*factors: Tensor) -> str:
    if len(factors) > 2:
        factors = eager.merge_small(factors)
    if len(factors) != 2:
        sides = " ⊗ ".join(f"{f.shape[1]}x{f.shape[2]}" for f in factors)
        return f"one product per axis of {sides}"
    s = KronShape.of(*factors)
    form = eager.choose_form(s)
    first, then = ("B", "A") if form.order == "b_first" else ("A", "B")
    how = "one GEMM over all tokens" if form.layout == "planes" else "a batched product"
    return f"{first} first, then {then}; A by {how}; {s.flops:,} FLOPs per token"
