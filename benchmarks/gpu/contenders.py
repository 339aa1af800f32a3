"""Contenders of a workload: both engines, eager, dense layers and libraries, each with a check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from kron_kernels import kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.backends import BACKENDS, eager
from kron_kernels.shapes import KronShape
from kron_kernels.testing import assert_close
from kron_kernels.testing.checks import slack

ENGINES = ("triton", "cuda")
# Our contenders; "fused" is Triton's of a block or qkv, "student" a model on our kernels. Tables
# give the others' times as multiples of the first of these that was timed.
OURS = ("triton", "fused", "student", "cuda")
Step = Callable[[], Any]
Layer = tuple[Tensor, Tensor, Tensor]  # a, b, bias


def why_not(engine: str, device: str) -> str | None:
    """Why the engine has no kernels for this device, or None."""
    sizes = (1, 4), (1, 2, 2), (1, 2, 2)
    return BACKENDS[engine].why_not(
        *(torch.empty(size, device=device, dtype=torch.float16) for size in sizes)
    )


class Workload(NamedTuple):
    """One product, a feed-forward block of two, three products of one x, or a model."""

    kind: str  # "forward", "training"; with "block", "qkv" or "model" before
    label: str
    shapes: tuple[KronShape, ...]
    tokens: int
    dtype: str
    length: int = 0  # tokens of a sequence, for a model

    def __str__(self) -> str:
        size = f"{self.tokens // self.length} x {self.length}" if self.length else str(self.tokens)
        return f"{self.kind} {self.label}, {self.dtype}, {size} tokens"


class Contender(NamedTuple):
    """A call to time, and a check of its result."""

    step: Step
    check: Callable[[Any], None]

    def __call__(self) -> Any:
        return self.step()


def contenders(
    workload: Workload, device: str, dtype: torch.dtype, left_out: dict[str, str]
) -> dict[str, Contender]:
    """Draw operands and return all contenders; add the reasons of those missing to left_out."""
    training = workload.kind.endswith("training")
    layers = [fresh_layer(s, device, dtype) for s in workload.shapes]
    x = torch.randn(workload.tokens, workload.shapes[0].in_features, device=device, dtype=dtype)
    dense = [(reference.materialize(a, b), bias) for a, b, bias in layers]
    leaves = [x, *(t for layer in layers for t in layer)]
    dense_leaves = [x, *(t for layer in dense for t in layer)]
    for t in (*leaves, *dense_leaves) if training else ():
        t.requires_grad_()
    calls = {key: (call, leaves) for key, call in kron_calls(workload, x, layers, left_out).items()}
    if len(layers) == 1:
        ((a, b, bias),) = layers
        # Leaves with two axes: a view would have a separate gradient.
        flat = [t.detach()[0].requires_grad_(training) for t in (a, b)]
        libraries = library_calls(workload, x, *flat, bias, left_out)
        calls |= {key: (call, [x, *flat, bias]) for key, call in libraries.items()}
    calls["compiled"] = compiled_call(workload, x, layers), leaves
    calls["dense"] = partial(dense_call, workload, x, dense), dense_leaves
    dy = torch.randn(workload.tokens, workload.shapes[-1].out_features, device=device, dtype=dtype)
    made = {}
    for key, (call, inputs) in calls.items():
        check = partial(check_contender, workload, layers, x, dy, dtype, key == "dense")
        if training:
            call = partial(with_gradients, call, inputs, dy)
        made[key] = Contender(call, check)
    return made


def fresh_layer(s: KronShape, device: str, dtype: torch.dtype) -> Layer:
    """Random factors whose product has entries of order 1, and a bias."""
    new = {"device": device, "dtype": dtype}
    a = torch.randn(s.rank, s.m1, s.n1, **new) / s.n1**0.5
    b = torch.randn(s.rank, s.m2, s.n2, **new) / (s.n2 * s.rank) ** 0.5
    return a, b, torch.randn(s.out_features, **new)


def kron_calls(
    workload: Workload, x: Tensor, layers: list[Layer], left_out: dict[str, str]
) -> dict[str, Step]:
    """Our calls by each engine that has kernels for all layers."""
    calls: dict[str, Step] = {}
    for engine in ENGINES:
        reasons = [BACKENDS[engine].why_not(x, a, b) for a, b, _ in layers]
        if reason := next(filter(None, reasons), None):
            left_out[engine] = reason
        else:
            calls |= engine_calls(workload, x, layers, engine)
    if len(layers) == 1:
        ((a, b, bias),) = layers
        calls["eager"] = lambda: kron_matmul(x, a, b, bias=bias, backend="eager")
    return calls


def engine_calls(
    workload: Workload, x: Tensor, layers: list[Layer], engine: str
) -> dict[str, Step]:
    fused, apart = ("fused", "calls") if engine == "triton" else (engine, f"{engine} calls")
    if workload.kind.startswith("block"):
        (a1, b1, bias1), (a2, b2, bias2) = layers

        def two_calls() -> Tensor:
            hidden = kron_matmul(x, a1, b1, bias=bias1, activation="gelu", backend=engine)
            return kron_matmul(hidden, a2, b2, bias=bias2, backend=engine)

        return {fused: lambda: kron_feed_forward(x, *layers, backend=engine), apart: two_calls}
    if workload.kind.startswith("qkv"):
        return {
            fused: lambda: kron_qkv(x, *layers, backend=engine),
            apart: lambda: [kron_matmul(x, a, b, bias=c, backend=engine) for a, b, c in layers],
        }
    ((a, b, bias),) = layers
    return {engine: lambda: kron_matmul(x, a, b, bias=bias, backend=engine)}


def library_calls(
    workload: Workload, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, left_out: dict[str, str]
) -> dict[str, Step]:
    calls = {}
    for library in peers.LIBRARIES:
        if library.package not in ("lycoris-lora", "pyfastkron"):
            continue
        for key, prepare in library.prepare.items():
            try:
                call = prepare(x, a, b)
            except Exception as error:
                left_out[key] = f"{peers.first_line(error)}; {library.pip} {library.package}"
                continue
            if call is None:
                left_out[key] = f"does not support {workload.kind} in {workload.dtype}"
            else:
                calls[key] = lambda call=call: call() + bias
    return calls


def compiled(function: Any) -> Any:
    """By Inductor, without its CUDA graphs: those are timed of every contender."""
    return torch.compile(function, dynamic=False)


def compiled_call(workload: Workload, x: Tensor, layers: list[Layer]) -> Step:
    """PyTorch's operators of the same products, which a compiler can fuse.

    On a CPU, in the simulator, the compiler's front end alone: its C++ takes minutes.
    """
    call = torch.compile(plain_form, dynamic=False, backend="eager" if x.is_cpu else "inductor")
    return lambda: call(workload.kind.split()[0], x, layers)


def plain_form(kind: str, x: Tensor, layers: list[Layer]) -> Tensor | list[Tensor]:
    if kind == "block":
        return kron_feed_forward(x, *layers, backend="eager")
    ys = [kron_matmul(x, a, b, bias=bias, backend="eager") for a, b, bias in layers]
    return ys if kind == "qkv" else ys[0]


def dense_call(
    workload: Workload, x: Tensor, layers: list[tuple[Tensor, Tensor]]
) -> Tensor | list[Tensor]:
    if workload.kind.startswith("block"):
        (w1, c1), (w2, c2) = layers
        return F.linear(F.gelu(F.linear(x, w1, c1)), w2, c2)
    ys = [F.linear(x, w, c) for w, c in layers]
    return ys if workload.kind.startswith("qkv") else ys[0]


def with_gradients(call: Step, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = call()
    return y, *torch.autograd.grad(y, leaves, dy)


def check_contender(
    workload: Workload,
    layers: list[Layer],
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
    dense: bool,
    results: Any,
) -> None:
    """Compare rows of y, dx, and the gradients of the factors with float64, in chunks of tokens."""
    width = sum(max(s.in_features, s.out_features) for s in workload.shapes)
    exact = [[t.detach().double() for t in layer] for layer in layers]
    rows = torch.linspace(0, workload.tokens - 1, min(workload.tokens, 256), device=x.device).long()
    expected = exact_results(workload, x[rows].detach().double(), exact)
    training = workload.kind.endswith("training")
    ys = results[:1] if training else [results] if isinstance(results, Tensor) else results
    for y, other in zip(ys, expected, strict=True):
        assert_close("y", y[rows].detach(), other, width, slack=slack(dtype, width))
    if not training or dense:
        return
    sums = [torch.zeros_like(t) for layer in exact for t in layer]
    exact = [[t.requires_grad_() for t in layer] for layer in exact]
    for i in range(0, workload.tokens, 4096):
        part = x[i : i + 4096].detach().double().requires_grad_()
        (y,) = exact_results(workload, part, exact)
        flat = [t for layer in exact for t in layer]
        dx, *grads = torch.autograd.grad(y, [part, *flat], dy[i : i + 4096].double())
        got = results[1][i : i + 4096]
        assert_close("dx", got, dx, width, slack=slack(dtype, width))
        sums = [total + g for total, g in zip(sums, grads, strict=True)]
    for i, (got, other) in enumerate(zip(results[2:], sums, strict=True)):
        n = width * workload.tokens
        # Few entries may happen to be small: the scale is at least that of their terms.
        scale = max(other.square().mean().sqrt().item(), workload.tokens**0.5)
        got = got.view(other.shape)  # a library's has no axis of ranks
        assert_close(f"gradient {i}", got, other, n, scale=scale, slack=slack(dtype, n))


def exact_results(workload: Workload, x: Tensor, layers: list[list[Tensor]]) -> list[Tensor]:
    if workload.kind.startswith("block"):
        (a1, b1, c1), (a2, b2, c2) = layers
        hidden = F.gelu(eager.plain_matmul(x, (a1, b1), c1))
        return [eager.plain_matmul(hidden, (a2, b2), c2)]
    return [eager.plain_matmul(x, (a, b), c) for a, b, c in layers]
