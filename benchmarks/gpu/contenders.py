"""Who is timed: both engines, eager, dense layers, other libraries; each is checked first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.checks import slack
from benchmarks.gpu.jobs import ENGINES, Place
from kron_kernels import kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.backends import BACKENDS, eager
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.shapes import KronShape
from kron_kernels.testing import assert_close

Step = Callable[[], Any]
# By one kernel, or what an engine has nearest to it: a block and qkv are Triton's "fused". The
# others' times are multiples of the first that is there.
OURS = ("triton", "fused", "cuda")


class Cell(NamedTuple):
    """What is timed: one product, a block of two, or three of one x."""

    kind: str  # "forward", "training"; with "block" or "qkv" before
    label: str
    shapes: tuple[KronShape, ...]
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} {self.label}, {self.dtype}, {self.tokens} tokens"


class Contender(NamedTuple):
    """A call to time, and the check of its result."""

    step: Step
    check: Callable[[Any], None]

    def __call__(self) -> Any:
        return self.step()


def contenders(
    place: Place, cell: Cell, dtype: torch.dtype, left_out: dict[str, str]
) -> dict[str, Contender]:
    """New operands, and everyone's call on them."""
    training = cell.kind.endswith("training")
    layers = [fresh_layer(place, s, dtype) for s in cell.shapes]
    x = torch.randn(cell.tokens, cell.shapes[0].in_features, device=place.device, dtype=dtype)
    dense = [(reference.materialize(a, b), bias) for a, b, bias in layers]
    leaves = [x, *(t for layer in layers for t in layer)]
    dense_leaves = [x, *(t for layer in dense for t in layer)]
    for t in (*leaves, *dense_leaves) if training else ():
        t.requires_grad_()
    calls = {key: (call, leaves) for key, call in kron_calls(cell, x, layers, left_out).items()}
    if len(layers) == 1:
        ((a, b, bias),) = layers
        # Leaves of two axes, for a view would have a gradient of its own.
        flat = [t.detach()[0].requires_grad_(training) for t in (a, b)]
        some = library_calls(cell, x, *flat, bias, left_out)
        calls |= {key: (call, [x, *flat, bias]) for key, call in some.items()}
    calls["dense"] = partial(dense_call, cell, x, dense), dense_leaves
    dy = torch.randn(cell.tokens, cell.shapes[-1].out_features, device=place.device, dtype=dtype)
    made = {}
    for key, (call, some) in calls.items():
        check = partial(hold_cell, cell, layers, x, dy, dtype, key == "dense")
        if training:
            call = partial(with_gradients, call, some, dy)
        made[key] = Contender(call, check)
    return made


def fresh_layer(place: Place, s: KronShape, dtype: torch.dtype) -> triton_gpu.Layer:
    new = {"device": place.device, "dtype": dtype}
    a = torch.randn(1, s.m1, s.n1, **new) / s.n1**0.5
    b = torch.randn(1, s.m2, s.n2, **new) / s.n2**0.5
    return a, b, torch.randn(s.out_features, **new)


def kron_calls(
    cell: Cell, x: Tensor, layers: list[triton_gpu.Layer], left_out: dict[str, str]
) -> dict[str, Step]:
    """Ours, by each engine that serves all layers."""
    calls: dict[str, Step] = {}
    for engine in ENGINES:
        reasons = [BACKENDS[engine].why_not(x, a, b) for a, b, _ in layers]
        if reason := next(filter(None, reasons), None):
            left_out[engine] = reason
        else:
            calls |= engine_calls(cell, x, layers, engine)
    if len(layers) == 1:
        ((a, b, bias),) = layers
        calls["eager"] = lambda: kron_matmul(x, a, b, bias=bias, backend="eager")
    return calls


def engine_calls(
    cell: Cell, x: Tensor, layers: list[triton_gpu.Layer], engine: str
) -> dict[str, Step]:
    fused, apart = ("fused", "calls") if engine == "triton" else (engine, f"{engine} calls")
    if cell.kind.startswith("block"):
        (a1, b1, bias1), (a2, b2, bias2) = layers

        def two_calls() -> Tensor:
            hidden = kron_matmul(x, a1, b1, bias=bias1, activation="gelu", backend=engine)
            return kron_matmul(hidden, a2, b2, bias=bias2, backend=engine)

        return {fused: lambda: kron_feed_forward(x, *layers, backend=engine), apart: two_calls}
    if cell.kind.startswith("qkv"):
        return {
            fused: lambda: kron_qkv(x, *layers, backend=engine),
            apart: lambda: [kron_matmul(x, a, b, bias=c, backend=engine) for a, b, c in layers],
        }
    ((a, b, bias),) = layers
    return {engine: lambda: kron_matmul(x, a, b, bias=bias, backend=engine)}


def library_calls(
    cell: Cell, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, left_out: dict[str, str]
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
                left_out[key] = f"it does not serve {cell.kind} in {cell.dtype}"
            else:
                calls[key] = lambda call=call: call() + bias
    return calls


def dense_call(cell: Cell, x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor | list[Tensor]:
    if cell.kind.startswith("block"):
        (w1, c1), (w2, c2) = layers
        return F.linear(F.gelu(F.linear(x, w1, c1)), w2, c2)
    ys = [F.linear(x, w, c) for w, c in layers]
    return ys if cell.kind.startswith("qkv") else ys[0]


def with_gradients(call: Step, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = call()
    return y, *torch.autograd.grad(y, leaves, dy)


def hold_cell(
    cell: Cell,
    layers: list[triton_gpu.Layer],
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
    dense: bool,
    results: Any,
) -> None:
    """Rows of y and dx to float64, and all tokens' gradients of the factors, by pieces."""
    width = sum(max(s.in_features, s.out_features) for s in cell.shapes)
    exact = [[t.detach().double() for t in layer] for layer in layers]
    rows = torch.linspace(0, cell.tokens - 1, min(cell.tokens, 256), device=x.device).long()
    expected = exact_block(cell, x[rows].detach().double(), exact)
    training = cell.kind.endswith("training")
    ys = results[:1] if training else [results] if isinstance(results, Tensor) else results
    for y, other in zip(ys, expected, strict=True):
        assert_close("y", y[rows].detach(), other, width, slack=slack(dtype, width))
    if not training or dense:
        return
    sums = [torch.zeros_like(t) for layer in exact for t in layer]
    exact = [[t.requires_grad_() for t in layer] for layer in exact]
    for i in range(0, cell.tokens, 4096):
        part = x[i : i + 4096].detach().double().requires_grad_()
        (y,) = exact_block(cell, part, exact)
        flat = [t for layer in exact for t in layer]
        dx, *grads = torch.autograd.grad(y, [part, *flat], dy[i : i + 4096].double())
        got = results[1][i : i + 4096]
        assert_close("dx", got, dx, width, slack=slack(dtype, width))
        sums = [total + g for total, g in zip(sums, grads, strict=True)]
    for i, (got, other) in enumerate(zip(results[2:], sums, strict=True)):
        n = width * cell.tokens
        # Few entries may happen to be small; this is what their terms let expect.
        scale = max(other.square().mean().sqrt().item(), cell.tokens**0.5)
        got = got.view(other.shape)  # of a library without ranks
        assert_close(f"gradient {i}", got, other, n, scale=scale, slack=slack(dtype, n))


def exact_block(cell: Cell, x: Tensor, layers: list[list[Tensor]]) -> list[Tensor]:
    if cell.kind.startswith("block"):
        (a1, b1, c1), (a2, b2, c2) = layers
        hidden = F.gelu(eager.plain_matmul(x, (a1, b1), c1))
        return [eager.plain_matmul(hidden, (a2, b2), c2)]
    return [eager.plain_matmul(x, (a, b), c) for a, b, c in layers]
