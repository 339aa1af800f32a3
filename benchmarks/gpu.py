"""Everything that wants a real GPU, by one command: what is right, how fast, by which tiles.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --out report --only environment correctness --quick
    python -m benchmarks.gpu --simulate --quick  # without a GPU

It notes the environment, holds the kernels of both engines, Triton's and CUDA's, to a float64
oracle on the CPU, times them against one another, dense layers, plain PyTorch and, where they are
installed, LyCORIS and FastKron (pip install lycoris-lora; pip install --no-deps pyfastkron), and
calls benchmarks.tune, which writes this GPU's table of tiles for Triton. An engine that is missing
is said to be, and left out. DIR/report.md says what was checked, what failed and what was not
done; DIR/report.json has all of it.

Every section runs in a process of its own, which is started again behind a check that took the GPU
or the process with it, or that gave no sign for a while. The exit status is 0 if all that was done
passed, 1 if something failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import kron_kernels
from benchmarks import tune
from benchmarks.tune import DECODER, NO_GPU, PRESETS, SQUARES, Clock
from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KronShape,
    dispatch,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends import COMPILED, cuda, eager, triton_gpu
from kron_kernels.backends.gpu import precision
from kron_kernels.testing import assert_close
from kron_kernels.timing import Timing

ROOT = Path(__file__).parents[1]
for _folder in ("tests", "benchmarks"):  # no packages: their modules import one another by name
    if str(ROOT / _folder) not in sys.path:
        sys.path.append(str(ROOT / _folder))

import peers  # noqa: E402
from operands import SHAPES, draw, name  # noqa: E402

ENGINES = ("triton", "cuda")
SECTIONS = ("environment", "correctness", "timing", "tuning")
PASSED, FAILED, NOT_DONE = "passed", "failed", "not done"
LOST = 3  # exit status of a section's process that lost the GPU
PATIENCE = 900  # seconds without a result after which a process is given up

# As in tests/test_triton.py: both orders, either factor as the mix, in registers and on tensor
# cores, and a rank in each.
MIXED = [
    *SHAPES,
    *SQUARES,
    KronShape(20, 33, 70, 17),
    KronShape(3, 20, 34, 40),
    KronShape(70, 66, 8, 2, 2),
]
SUMS = [
    KronShape(384, 48, 2, 16, 4),
    KronShape(384, 384, 8, 2, 4),
    KronShape(384, 384, 2, 8, 4),
]
FEED_FORWARDS = [
    (KronShape(4, 2, 12, 24), KronShape(2, 4, 24, 12)),
    (KronShape(5, 3, 7, 9), KronShape(3, 5, 11, 7)),
    (KronShape(4, 2, 12, 24, 2), KronShape(1, 4, 24, 12, 3)),
]
PAIRS = [(PRESETS["8x up"], PRESETS["8x down"]), (PRESETS["21x up"], PRESETS["21x down"])]
DTYPES = ("float16", "bfloat16", "tf32", "float32")  # tf32: float32 multiplied in tf32
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")

NEVER = [
    "KroneckerBERT's models, their distillation and command line on a GPU",
    "training on several GPUs",
    "GPUs and versions of Triton other than those under Environment",
    "profilers and sanitizers: memory traffic, occupancy, races",
]


class NotDone(Exception):
    """What could not be tried, and why."""


@dataclass(frozen=True)
class Place:
    """Where jobs run."""

    device: str  # "cuda", or "cpu" in the simulator
    quick: bool
    out: Path
    clock: Clock
    engine: str = "triton"  # whose kernels a check runs

    @property
    def kernels(self) -> ModuleType:
        return COMPILED[self.engine]

    @property
    def simulated(self) -> bool:
        return self.device == "cpu"

    def needs_gpu(self, why: str) -> None:
        if self.simulated:
            raise NotDone(why)

    def needs_inductor(self) -> None:
        if not self.simulated and importlib.util.find_spec("triton") is None:
            raise NotDone("on a GPU torch.compile needs Triton, which is not installed")

    def needs_memory(self, gigabytes: float) -> None:
        self.needs_gpu("the simulator is too slow for so many tokens")
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            raise NotDone(f"it needs {gigabytes:g} GB of free GPU memory")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it the engine serves this device; an engine that is missing is not tried."""
        with contextlib.ExitStack() as stack:
            if self.simulated and self.engine == "cuda":  # Triton's simulator is always there
                stack.enter_context(simulated_cuda())
            if reason := missing(self.device, self.engine):
                raise NotDone(reason)
            yield


def missing(device: str, engine: str) -> str | None:
    """Why this engine serves nothing here, or None."""
    x, a, b = (
        torch.empty(size, device=device, dtype=torch.float16)
        for size in ((1, 4), (1, 2, 2), (1, 2, 2))
    )
    return COMPILED[engine].why_not(x, a, b)


@contextmanager
def simulated_cuda() -> Iterator[None]:
    import emulator
    from simulator import cuda as simulator

    if reason := simulator.why_not() or emulator.why_not():
        raise NotDone(f"no CUDA kernels to simulate: {reason}")
    with simulator.CudaDevice(80):
        yield


class Job(NamedTuple):
    """A check or a measurement; what it returns goes into report.json."""

    group: str
    name: str
    run: Callable[[Place], Any]
    engine: str | None = None  # without which it cannot be done


# --- what the checks share


def require(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@contextmanager
def arithmetic(dtype: str) -> Iterator[torch.dtype]:
    """A dtype by name, with float32's products in tf32 if it is that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def terms(s: KronShape) -> int:
    return s.rank * (s.n1 + s.n2)


def slack(dtype: torch.dtype, n: int) -> float:
    """Tf32 has 10 bits of fraction instead of 23, in every term alike."""
    tf32 = dtype == torch.float32 and precision(dtype) == "tf32"
    return 4 * 2.0**13 / n**0.5 if tf32 else 4


def hold(label: str, actual: Tensor, expected: Tensor, n: int, dtype: torch.dtype, **more) -> None:
    require(actual.dtype == dtype, f"{label}: {actual.dtype}, not {dtype}")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert_close(label, actual, expected, n, slack=slack(dtype, n), **more)


def same(label: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for i, (p, q) in enumerate(zip(first, second, strict=True)):
        require(torch.equal(p, q), f"{label}, result {i}: bits differ")


def oracle(x: Tensor, *factors: Tensor, **more: Any) -> Tensor:
    """In float64 on the CPU."""

    def home(t: Any) -> Any:
        return t.detach().cpu() if isinstance(t, Tensor) else t

    more = {key: home(value) for key, value in more.items()}
    return reference.kron_matmul(home(x), *map(home, factors), **more)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def drawn(place: Place, s: KronShape, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """x, a and b on the device."""
    operands = [t.to(place.device) for t in draw(s, tokens, dtype)]
    if place.engine == "cuda" and (reason := cuda.why_not(*operands)):  # Triton serves them all
        raise NotDone(reason)
    return operands


def noise(place: Place, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size).to(dtype).to(place.device)


def layers_of(place: Place, s: KronShape, dtype: torch.dtype, n: int = 3) -> list[triton_gpu.Layer]:
    """Different factors, and a bias in all but the second."""
    _, a, b = drawn(place, s, 1, dtype)
    biases = (noise(place, dtype, s.out_features) if i != 1 else None for i in range(n))
    return [(a.roll(i, 1), b.roll(i, 2), bias) for i, bias in enumerate(biases)]


# --- forward


def forward(place: Place, s: KronShape, name: str, tokens: int, turn: int) -> None:
    """Every activation, bias, residual and stride of the factors, in turn."""
    with arithmetic(name) as dtype:
        x, a, b = drawn(place, s, tokens, dtype)
        if turn % 2:  # as a gradient has them
            a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
        more = {
            "bias": noise(place, dtype, s.out_features) if turn % 3 else None,
            "activation": ACTIVATIONS[turn % 5],
            "residual": noise(place, dtype, tokens, s.out_features) if turn % 2 else None,
        }
        y = kron_matmul(x, a, b, **more, backend=place.engine)
        hold("y", y, oracle(x, a, b, **more), terms(s), dtype)


def numbers_of_tokens(place: Place) -> None:
    s, dtype = PRESETS["21x attention"], torch.float16
    if place.simulated:
        s = SHAPES[2]
    for tokens in (0, 1, 2, 3, 17) if place.simulated else (0, 1, 2, 3, 17, 33, 129, 1001, 8191):
        x, a, b = drawn(place, s, tokens, dtype)
        y = kron_matmul(x, a, b, backend=place.engine)
        hold(f"{tokens} tokens", y, oracle(x, a, b), terms(s), dtype)
        dy = torch.zeros_like(y)
        for g, t in zip(
            place.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3), (x, a, b), strict=True
        ):
            require(g.shape == t.shape and not g.any(), f"{tokens} tokens: gradient of zeros")


def strides(place: Place) -> None:
    """Operands that are not contiguous, or begin at an odd address."""
    s, dtype = SHAPES[2], torch.float16
    x, a, b = drawn(place, s, 6, dtype)
    residual, bias = noise(place, dtype, 6, s.out_features), noise(place, dtype, s.out_features)

    def odd(t: Tensor) -> Tensor:
        """At one entry behind a multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    forms = {
        "every second column of x": ({"x": torch.stack([x, x], 2)[..., 0]}, {}),
        "x by columns": ({"x": x.mT.contiguous().mT}, {}),
        "x at an odd address": ({"x": odd(x)}, {}),
        "factors at odd addresses": ({"a": odd(a), "b": odd(b)}, {}),
        "slices of factors": (
            {"a": torch.cat([a, a], 1)[:, : s.m1], "b": torch.cat([b, b], 2)[..., : s.n2]},
            {},
        ),
        "one row for all": ({"x": x[:1].expand(6, -1)}, {}),
        "bias and residual": (
            {},
            {"bias": bias[:1].expand(s.out_features), "residual": residual.mT.contiguous().mT},
        ),
        "both at odd addresses": ({}, {"bias": odd(bias), "residual": odd(residual)}),
    }
    for label, (changed, more) in forms.items():
        at = {"x": x, "a": a, "b": b} | changed
        y = kron_matmul(at["x"], at["a"], at["b"], **more, backend=place.engine)
        hold(label, y, oracle(at["x"], at["a"], at["b"], **more), terms(s), dtype)
    y = kron_matmul(x.view(2, 3, -1).transpose(0, 1), a, b, backend=place.engine)
    hold("three axes", y, oracle(x.view(2, 3, -1).transpose(0, 1), a, b), terms(s), dtype)


def nan_stays(place: Place) -> None:
    for s in SHAPES[1 : 2 if place.simulated else 4]:
        x, a, b = drawn(place, s, 5, torch.float16)
        x[2] = torch.nan
        y = kron_matmul(x, a, b, backend=place.engine)
        others = torch.cat([y[:2], y[3:]])
        require(y[2].isnan().all() and not others.isnan().any(), "a NaN left its token")


def dispatching(place: Place) -> None:
    """Who is taken, and what is refused by name."""
    x, a, b = drawn(place, SHAPES[2], 3, torch.float16)
    if not place.simulated:  # whose tensors are a CPU's
        order = dispatch._order(x, a, b)
        first = next(e for e in order if not dispatch.why_not(e, x, a, b))
        chosen = dispatch.choose("auto", x, (a, b))
        require(chosen == first, f"auto takes {chosen} and not {first}")
    try:
        kron_matmul(x.double(), a.double(), b.double(), backend=place.engine)
    except ValueError as error:
        require("float64" in str(error), str(error))
    else:
        raise AssertionError("float64 was not refused")
    y = kron_matmul(x.double(), a.double(), b.double())
    hold("float64 by another backend", y, oracle(x, a, b), terms(SHAPES[2]), torch.float64)


def beyond_32_bits(place: Place, s: KronShape, backward: bool = False) -> None:
    """More than 2^31 entries in y, or in x, seen at the first and last rows."""
    tokens = 2**31 // max(s.in_features, s.out_features) + 1000
    size = 2e-9 * tokens * (s.in_features + s.out_features)
    place.needs_memory((2.2 if backward else 1.2) * size + 1)
    _, a, b = drawn(place, s, 1, torch.float16)
    x = torch.randn(tokens, s.in_features, device=place.device, dtype=torch.float16)
    ends = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=place.device)
    y = kron_matmul(x, a, b, backend=place.engine)
    hold("y", y[ends], oracle(x[ends], a, b), terms(s), torch.float16)
    require(not y[-5000:].isnan().any() and not y[:5000].isnan().any(), "rows were not written")
    if not backward:
        return
    # Only the ends have gradients: those of the factors are the ends' as well.
    y.zero_()
    y[ends] = noise(place, torch.float16, 5, s.out_features)
    got = place.kernels.kron_matmul_backward(y, x, a, b, [True] * 3)
    some = wide((x[ends], a, b))
    expected = torch.autograd.grad(reference.kron_matmul(*some), some, y[ends].cpu().double())
    for label, g, other in zip(("dx", "da", "db"), (got[0][ends], *got[1:]), expected, strict=True):
        scale = other.square().mean().sqrt().item() + 1
        hold(label, g, other, 5 * (s.m1 + s.m2 + terms(s)), torch.float16, scale=scale)


def many_rows_of_a_table(place: Place) -> None:
    size, columns = 8, 96
    tokens = 2**31 // (size * columns) + 1000
    place.needs_memory(1.2 * 2e-9 * tokens * size * columns + 1)
    table = KroneckerEmbedding(1000, size * columns, size, device=place.device, dtype=torch.float16)
    ids = torch.randint(0, 1000, (tokens,), device=place.device)
    with torch.no_grad():
        y = table(ids)
    ends = torch.tensor([0, tokens // 2, tokens - 1], device=place.device)
    dense = reference.materialize(table.a.detach().cpu().double(), table.b.detach().cpu().double())
    hold("rows", y[ends], dense[ids[ends].cpu()], 1, torch.float16)


def products_of_one_x(place: Place, s: KronShape, name: str) -> None:
    with arithmetic(name) as dtype:
        x, _, _ = drawn(place, s, 19, dtype)
        layers = layers_of(place, s, dtype)
        ys = kron_qkv(x, *layers, backend=place.engine)
        for y, (a, b, bias) in zip(ys, layers, strict=True):
            hold("y", y, oracle(x, a, b, bias=bias), terms(s), dtype)


# --- gradients


def gradients(place: Place, s: KronShape, name: str, tokens: int) -> None:
    with arithmetic(name) as dtype:
        x, a, b = (t.requires_grad_() for t in drawn(place, s, tokens, dtype))
        dy = noise(place, dtype, tokens, s.out_features)
        y = kron_matmul(x, a, b, backend=place.engine)
        grads = torch.autograd.grad(y, (x, a, b), dy)
        hold_gradients(s, (x, a, b), dy, grads, dtype)


def hold_gradients(
    s: KronShape, operands: Sequence[Tensor], dy: Tensor, grads: Sequence[Tensor], dtype
) -> None:
    exact, tokens = wide(operands), len(dy)
    dy = dy.detach().cpu().double()
    expected = torch.autograd.grad(reference.kron_matmul(*exact), exact, dy)
    size = [t.detach().abs().requires_grad_() for t in exact]
    sums = torch.autograd.grad(reference.kron_matmul(*size), size, dy.abs())
    products = (s.m1 * s.m2, tokens * s.m2 * s.n2, tokens * s.m1 * s.n1)
    for label, grad, other, total, n in zip(
        ("dx", "da", "db"), grads, expected, sums, products, strict=True
    ):
        # What is multiplied twice is rounded to 16 bits between, so a gradient of few entries is
        # held to the size of its terms.
        scale = total.square().mean().sqrt().item() / n**0.5
        hold(label, grad, other, max(tokens, 1) * (s.m1 + s.m2 + terms(s)), dtype, scale=scale)


def gradients_that_are_needed(place: Place) -> None:
    for s in (SHAPES[2], SHAPES[5]):
        for needed in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            operands = drawn(place, s, 9, torch.float32)
            for t, n in zip(operands, needed, strict=True):
                t.requires_grad_(bool(n))
            kron_matmul(*operands, backend=place.engine).sum().backward()
            got = [t.grad is not None for t in operands]
            require(got == [bool(n) for n in needed], f"asked for {needed}, got {got}")


def same_bits(place: Place) -> None:
    """Forward, gradients and the feed-forward block, again and again."""
    small = place.simulated
    s, tokens = (SHAPES[3], 70) if small else (PRESETS["8x attention"], 5000)
    up, down = FEED_FORWARDS[0] if small else PAIRS[0]
    x, a, b = drawn(place, s, tokens, torch.float16)
    dy = noise(place, torch.float16, tokens, s.out_features)
    first, _, _ = drawn(place, up, tokens // 4, torch.float16)
    (one,), (two,) = (layers_of(place, side, torch.float16, 1) for side in (up, down))
    back = noise(place, torch.float16, tokens // 4, down.out_features)

    def run() -> list[Tensor]:
        return [
            kron_matmul(x, a, b, backend=place.engine),
            *place.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3),
            place.kernels.kron_feed_forward(first, one, "gelu", two, None),
            *place.kernels.kron_feed_forward_backward(back, first, one, "gelu", two, [True] * 6),
        ]

    expected = run()
    for i in range(1 if small else 10):
        same(f"time {i + 2}", run(), expected)


def second_order(place: Place) -> None:
    x, a, b = (t.requires_grad_() for t in drawn(place, SHAPES[2], 3, torch.float32))

    def second(call: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(call(*operands).square().sum(), operands[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), operands)

    got = second(lambda *o: kron_matmul(*o, backend=place.engine), x, a, b)
    expected = second(reference.kron_matmul, *wide((x, a, b)))
    for label, g, other in zip("xab", got, expected, strict=True):
        close(label, g, other, 1e-4)


def close(label: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Within rtol of the largest entry."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    error, most = (actual - expected).abs().max().item(), expected.abs().max().item()
    require(error <= rtol * most, f"{label}: {error:.3g} off, with entries up to {most:.3g}")


def transforms(place: Place) -> None:
    x, a, b = drawn(place, SHAPES[2], 3, torch.float32)
    xs = torch.stack([x, 2 * x])
    ys = torch.vmap(lambda v: kron_matmul(v, a, b, backend=place.engine))(xs)
    close("vmap", ys[1], oracle(2 * x, a, b), 1e-5)
    _, tangent = torch.func.jvp(
        lambda v: kron_matmul(v, a, b, backend=place.engine), (x,), (2 * x,)
    )
    close("jvp", tangent, oracle(2 * x, a, b), 1e-5)
    grad = torch.func.grad(lambda v: kron_matmul(v, a, b, backend=place.engine).sum())(x)
    close("grad", grad, oracle(torch.ones_like(ys[0]), a.mT, b.mT), 1e-5)


def autocast(place: Place, dtype: torch.dtype) -> None:
    s = SHAPES[2]
    x, a, b = (t.requires_grad_() for t in drawn(place, s, 9, torch.float32))
    with torch.autocast(place.device, dtype):
        y = kron_matmul(x, a, b, activation="gelu", backend=place.engine)
    hold("y", y, oracle(*(t.to(dtype) for t in (x, a, b)), activation="gelu"), terms(s), dtype)
    y.float().sum().backward()
    require(all(t.grad.dtype == torch.float32 for t in (x, a, b)), "gradients are not float32")
    exact = wide((x, a, b))
    reference.kron_matmul(*exact, activation="gelu").sum().backward()
    for label, t, other in zip("xab", (x, a, b), exact, strict=True):
        close(f"gradient of {label}", t.grad, other.grad, 16 * torch.finfo(dtype).eps)


# --- the feed-forward block


def feed_forward(
    place: Place, up: KronShape, down: KronShape, name: str, tokens: int, activation: str
) -> dict[str, bool]:
    with arithmetic(name) as dtype:
        x, a1, b1 = drawn(place, up, tokens, dtype)
        _, a2, b2 = drawn(place, down, 1, dtype)
        met = place.kernels.meet(a1, b1, a2, b2)
        # CUDA's meet in one kernel without ranks and up to two vectors, and otherwise in two.
        few = up.rank == down.rank == 1 and min(up.n1, up.n2) <= 2
        expects = few or place.engine == "triton"
        require(met or not expects, "these factors should meet in one kernel")
        operands = [x, a1, b1, a2, b2, *(noise(place, dtype, s.out_features) for s in (up, down))]
        dy = noise(place, dtype, tokens, down.out_features)
        exact = wide(operands)
        expected = block(reference_block, exact, activation=activation)
        n = terms(up) + terms(down)
        more = {"activation": activation, "backend": place.engine}
        y = block(kron_feed_forward, operands, residual=dy, **more)
        hold("y", y, expected + dy.cpu().double(), n, dtype)
        operands = [t.requires_grad_() for t in operands]
        grads = torch.autograd.grad(block(kron_feed_forward, operands, **more), operands, dy)
        others = torch.autograd.grad(expected, exact, dy.cpu().double())
        for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
            hold(f"gradient {i}", grad, other, tokens * 4 * n, dtype)
    return {"meet": met}


def block(call: Callable[..., Tensor], operands: Sequence[Tensor], **more: Any) -> Tensor:
    x, a1, b1, a2, b2, bias1, bias2 = operands
    return call(x, (a1, b1, bias1), (a2, b2, bias2), **more)


def reference_block(x: Tensor, up: triton_gpu.Layer, down: triton_gpu.Layer, activation: str):
    hidden = reference.kron_matmul(x, *up[:2], bias=up[2], activation=activation)
    return reference.kron_matmul(hidden, *down[:2], bias=down[2])


def feed_forward_in_two(place: Place) -> None:
    up, down = KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4)
    x, a1, b1 = drawn(place, up, 5, torch.float32)
    _, a2, b2 = drawn(place, down, 5, torch.float32)
    require(not place.kernels.meet(a1, b1, a2, b2), "these factors should not meet")
    y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend=place.engine)
    hidden = oracle(x, a1, b1, activation="gelu")
    n = terms(up) + terms(down)
    hold("y", y, oracle(hidden, a2.double(), b2.double()), n, torch.float32)


# --- tables


def embedding(place: Place, rank: int, size: int, name: str) -> None:
    with arithmetic(name) as dtype:
        new = {"dtype": dtype, "device": place.device}
        table = KroneckerEmbedding(41, 6 * size, size, rank, padding_idx=3, **new)
        ids = torch.randint(0, 41, (3, 7))
        ids[0, 0] = 3
        out = table(ids.to(place.device))
        exact = wide((table.a, table.b))
        expected = F.embedding(ids, reference.materialize(*exact))
        hold("rows", out, expected, rank, dtype)
        dy = torch.randn_like(out)
        out.backward(dy)
        others = torch.autograd.grad(expected, exact, dy.cpu().double())
        others[0][:, 3] = 0
        for label, grad, other in zip("ab", (table.a.grad, table.b.grad), others, strict=True):
            hold(label, grad, other, ids.numel() * 6 * size, dtype)


def unknown_ids(place: Place) -> None:
    table = KroneckerEmbedding(5, 24, 8, dtype=torch.float16, device=place.device)
    with torch.no_grad():
        out = table(torch.tensor([4, 5, -1, 0], device=place.device))
    got = out.isnan().all(-1).tolist()
    require(got == [False, True, True, False], f"NaN in rows {got}")


def tied_decoder(place: Place) -> None:
    s = KronShape(1000, 12, 1, 8) if place.simulated else DECODER
    h, a, b = drawn(place, s, 35, torch.float16)
    y = kron_matmul(h, a, b, backend=place.engine)
    hold("logits", y, oracle(h, a, b), terms(s), torch.float16)


def cross_entropy(place: Place) -> None:
    place.needs_gpu("the loss takes the backend by itself, which for a CPU's tensors is native")
    table = KroneckerEmbedding(1000, 96, 8, device=place.device)
    table.reset_parameters(0.1)
    h = torch.randn(3, 700, 96, device=place.device).requires_grad_()  # three pieces
    labels = torch.randint(0, 1000, (3, 700), device=place.device)
    labels[1, :50] = -100
    loss = table.cross_entropy(h, labels)
    grads = torch.autograd.grad(loss, (h, table.a, table.b))
    exact = wide((h, table.a, table.b))
    logits = F.linear(exact[0], reference.materialize(*exact[1:])).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.cpu().flatten())
    close("loss", loss, expected, 1e-5)
    for label, g, other in zip("hab", grads, torch.autograd.grad(expected, exact), strict=True):
        close(f"gradient of {label}", g, other, 1e-4)
    with torch.no_grad():
        low = table.half().cross_entropy(h.half(), labels)
    close("loss in float16", low, expected, 1e-2)


# --- what a GPU's programs do around the kernels


def compiled(place: Place, training: bool) -> None:
    """One graph; in the simulator without Inductor, which would compile for the CPU."""
    place.needs_inductor()
    torch._dynamo.reset()
    s = SHAPES[2]
    more = {"backend": "eager"} if place.simulated else {}
    call = torch.compile(
        lambda *o: kron_matmul(*o, activation="gelu", backend=place.engine), fullgraph=True, **more
    )
    for tokens in (5, 12):  # another number compiles again, for any
        x, a, b = (t.requires_grad_(training) for t in drawn(place, s, tokens, torch.float32))
        y = call(x, a, b)
        hold("y", y, oracle(x, a, b, activation="gelu"), terms(s), torch.float32)
        if training:
            grads = torch.autograd.grad(y.sum(), (x, a, b))
            exact = wide((x, a, b))
            loss = reference.kron_matmul(*exact, activation="gelu").sum()
            for label, g, other in zip("xab", grads, torch.autograd.grad(loss, exact), strict=True):
                close(f"gradient of {label}", g, other, 1e-4)


def compiled_module(place: Place) -> None:
    place.needs_gpu("modules take the backend by themselves, which for a CPU's tensors is native")
    place.needs_inductor()
    torch._dynamo.reset()
    new = {"device": place.device, "dtype": torch.bfloat16}
    module = torch.nn.Sequential(
        KroneckerLinear(768, 768, (384, 384), **new),
        KroneckerFeedForward(
            KroneckerLinear(768, 3072, (8, 2), **new), KroneckerLinear(3072, 768, (2, 8), **new)
        ),
    )
    call = torch.compile(module, fullgraph=True)
    x = torch.randn(64, 768, **new)
    with torch.no_grad():
        close("inference", call(x), module(x), 0.02)
    grads = torch.autograd.grad(call(x).float().square().sum(), list(module.parameters()))
    plain = torch.autograd.grad(module(x).float().square().sum(), list(module.parameters()))
    for (label, _), g, other in zip(module.named_parameters(), grads, plain, strict=True):
        close(f"gradient of {label}", g, other, 0.05)


def warmed_up(call: Callable[[], Any]) -> None:
    """As PyTorch asks before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)


def graph_of_inference(place: Place) -> None:
    place.needs_gpu("the simulator has no CUDA graphs")
    s, (up, down), dtype = PRESETS["21x attention"], PAIRS[1], torch.float16
    x, a, b = drawn(place, s, 35, dtype)
    (one,), (two,) = (layers_of(place, side, dtype, 1) for side in (up, down))
    table = KroneckerEmbedding(41, 48, 8, device=place.device, dtype=dtype).requires_grad_(False)
    ids = torch.randint(0, 41, (19,), device=place.device)

    def run() -> list[Tensor]:
        return [
            kron_matmul(x, a, b, activation="gelu", backend=place.engine),
            kron_feed_forward(x, one, two, backend=place.engine),
            *kron_qkv(x, (a, b, None), (a, b, None), (a, b, None), backend=place.engine),
            table(ids),
        ]

    replay_and_compare(run, lambda: (x.normal_(), a.normal_(0, 0.05), ids.random_(0, 41)))
    hold("y", run()[0], oracle(x, a, b, activation="gelu"), terms(s), dtype)


def graph_of_training(place: Place) -> None:
    place.needs_gpu("the simulator has no CUDA graphs")
    s, (up, down), dtype = PRESETS["8x attention"], PAIRS[0], torch.float16
    x, a, b = (t.requires_grad_() for t in drawn(place, s, 35, dtype))
    (one,), (two,) = (layers_of(place, side, dtype, 1) for side in (up, down))
    leaves = [x, a, b, *(t.requires_grad_() for t in (*one, *two))]
    dy = noise(place, dtype, 35, down.out_features)

    def run() -> list[Tensor]:
        y = kron_feed_forward(
            kron_matmul(x, a, b, backend=place.engine), one, two, backend=place.engine
        )
        return [y, *torch.autograd.grad(y, leaves, dy)]

    @torch.no_grad()
    def change() -> None:
        x.normal_()
        dy.normal_()
        one[0].mul_(0.9)

    # Some of these gradients are products of PyTorch's, which may take other ways in a graph.
    replay_and_compare(run, change, rtol=4e-3)


def replay_and_compare(
    run: Callable[[], list[Tensor]], change: Callable[[], Any], rtol: float = 0
) -> None:
    """A replay must give what plain calls do, with inputs that changed in place as well."""
    warmed_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for i in range(3):
        change()
        graph.replay()
        torch.cuda.synchronize()
        for j, (got, expected) in enumerate(zip(results, run(), strict=True)):
            close(f"replay {i}, result {j}", got, expected, rtol)


def side_stream(place: Place) -> None:
    """A kernel on the default stream would read x before it is there."""
    place.needs_gpu("the simulator has no streams")
    s, dtype = PRESETS["8x up"], torch.float16
    x, a, b = drawn(place, s, 300, dtype)
    source = torch.randn_like(x)
    kron_matmul(x, a, b, backend=place.engine)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)
        y = kron_matmul(x, a, b, backend=place.engine)
        grads = place.kernels.kron_matmul_backward(y, x, a, b, [True] * 3)
    stream.synchronize()
    hold("y", y, oracle(source, a, b), terms(s), dtype)
    same("gradients", grads, place.kernels.kron_matmul_backward(y, source, a, b, [True] * 3))


def second_gpu(place: Place) -> None:
    """With the first as the current one."""
    place.needs_gpu("the simulator has one GPU")
    if torch.cuda.device_count() < 2:
        raise NotDone("there is one GPU")
    s, dtype = PRESETS["21x up"], torch.float16
    x, a, b = (t.to("cuda:1").requires_grad_() for t in draw(s, 35, dtype))
    dy = torch.randn(35, s.out_features).to(dtype).to("cuda:1")
    y = kron_matmul(x, a, b, backend=place.engine)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    require(torch.cuda.current_device() == 0, "the current GPU has changed")
    hold("y", y, oracle(x, a, b), terms(s), dtype)
    hold_gradients(s, (x, a, b), dy, grads, dtype)


def out_of_memory(place: Place) -> None:
    """It is raised, and what follows is right."""
    place.needs_gpu("the simulator's memory is the CPU's")
    s, dtype = PRESETS["8x up"], torch.float16
    x, a, b = drawn(place, s, 2**17, dtype)
    dy = torch.randn(2**17, s.out_features, device=place.device).to(dtype)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + 2**26) / total  # y takes 768 MB, dx 192 MB
        )
        for label, call in {
            "forward": lambda: kron_matmul(x, a, b, backend=place.engine),
            "backward": lambda: place.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3),
        }.items():
            try:
                call()
            except torch.OutOfMemoryError:
                continue
            raise AssertionError(f"{label}: there was to be no memory left")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    y = kron_matmul(x, a, b, backend=place.engine)
    hold("y", y[-35:], oracle(x[-35:], a, b), terms(s), dtype)
    gradients(place, s, "float16", 35)


# Those of modules that take an engine by themselves, and those of kernels that only Triton has.
BY_ITSELF = (cross_entropy, compiled_module)
TRITONS = (embedding, unknown_ids, many_rows_of_a_table)


def correctness_jobs(place: Place) -> list[Job]:
    few = place.simulated and place.quick
    jobs = [*_shape_jobs(place), *(_few_jobs() if few else _other_jobs(place))]
    by_cuda = _simulated_cuda_jobs() if place.simulated else jobs
    by_itself = [job for job in jobs if _check(job) in BY_ITSELF]
    return [*of_engine("triton", jobs), *of_engine("cuda", by_cuda), *by_itself]


def of_engine(engine: str, jobs: Sequence[Job]) -> list[Job]:
    others = BY_ITSELF if engine == "triton" else BY_ITSELF + TRITONS
    return [
        Job(f"{engine}: {job.group}", f"{engine}: {job.name}", job.run, engine)
        for job in jobs
        if _check(job) not in others
    ]


def _check(job: Job) -> Callable[..., Any]:
    return getattr(job.run, "func", job.run)


def _simulated_cuda_jobs() -> list[Job]:
    """Of each kind a few, all in float16: nvcc takes half a minute for a dtype, once."""
    (up, down), s, new = FEED_FORWARDS[0], SHAPES[1], {"name": "float16"}
    block = partial(feed_forward, up=up, down=down, tokens=19, activation="gelu", **new)
    few, more = (
        Job(
            "forward",
            f"forward {name(s)}, float16, {tokens} tokens",
            partial(forward, s=s, tokens=tokens, turn=tokens, **new),
        )
        for tokens in (3, 19)  # without and with tensor cores
    )
    return [
        few,
        more,
        Job(
            "gradients",
            f"gradients {name(s)}, float16, 19 tokens",
            partial(gradients, s=s, tokens=19, **new),
        ),
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("query, key, value", "query, key, value", partial(products_of_one_x, s=s, **new)),
        Job("feed-forward", "feed-forward", block),
    ]


def _shape_jobs(place: Place) -> list[Job]:
    """Forward and gradients of every shape and dtype; a quick run takes dtypes in turn."""
    shapes = [*MIXED, *PRESETS.values(), *SUMS]
    if place.simulated:
        shapes = [SHAPES[1], SHAPES[8]] if place.quick else MIXED
    jobs = []
    for i, s in enumerate(shapes):
        for j, dtype in enumerate(DTYPES):
            if place.quick and (i + j) % 4:
                continue
            turn = 7 * i + j
            some = (5,) if place.simulated else ((1, 19, 300)[turn % 3], 35)
            for t in some:
                jobs.append(
                    Job(
                        "forward",
                        f"forward {name(s)}, {dtype}, {t} tokens",
                        partial(forward, s=s, name=dtype, tokens=t, turn=turn + t),
                    )
                )
            tokens = 9 if place.simulated else (1, 70, 1000)[turn % 3]
            jobs.append(
                Job(
                    "gradients",
                    f"gradients {name(s)}, {dtype}, {tokens} tokens",
                    partial(gradients, s=s, name=dtype, tokens=tokens),
                )
            )
    return jobs


def _few_jobs() -> list[Job]:
    """One of each kind, with small sizes, and all that the simulator must leave out."""
    up, down = FEED_FORWARDS[1]
    return [
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("forward", "backends", dispatching),
        Job(
            "query, key, value",
            "query, key, value",
            partial(products_of_one_x, s=SHAPES[8], name="float16"),
        ),
        Job(
            "feed-forward",
            "feed-forward",
            partial(feed_forward, up=up, down=down, name="float16", tokens=5, activation="gelu"),
        ),
        Job("tables", "embedding", partial(embedding, rank=2, size=5, name="float32")),
        Job("tables", "ids that are no rows", unknown_ids),
        *_device_jobs(),
    ]


def _device_jobs() -> list[Job]:
    big = PRESETS["8x up"], PRESETS["8x down"]
    return [
        Job("tables", "chunked cross-entropy", cross_entropy),
        Job("programs", "torch.compile, inference", partial(compiled, training=False)),
        Job("programs", "torch.compile of modules", compiled_module),
        Job("programs", "CUDA graph of inference", graph_of_inference),
        Job("programs", "CUDA graph of training", graph_of_training),
        Job("programs", "a side stream", side_stream),
        Job("programs", "a second GPU", second_gpu),
        Job("programs", "out of memory", out_of_memory),
        Job("size", "y of more than 2^31 entries", partial(beyond_32_bits, s=big[0])),
        Job("size", "x of more than 2^31 entries", partial(beyond_32_bits, s=big[1])),
        Job(
            "size",
            "gradients of more than 2^31 entries",
            partial(beyond_32_bits, s=big[1], backward=True),
        ),
        Job("size", "a lookup of more than 2^31 entries", many_rows_of_a_table),
    ]


def _other_jobs(place: Place) -> list[Job]:
    quick = place.quick
    jobs = [
        Job("forward", "numbers of tokens", numbers_of_tokens),
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("forward", "backends", dispatching),
        Job("gradients", "those that are needed", gradients_that_are_needed),
        Job("gradients", "the same bits every time", same_bits),
        Job("gradients", "second order", second_order),
        Job("programs", "vmap, jvp, grad", transforms),
        Job("programs", "torch.compile, training", partial(compiled, training=True)),
        Job("feed-forward", "feed-forward in two launches", feed_forward_in_two),
        Job("tables", "ids that are no rows", unknown_ids),
        Job("tables", "tied decoder", tied_decoder),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        label = f"autocast to {str(dtype)[6:]}"
        jobs.append(Job("programs", label, partial(autocast, dtype=dtype)))
    for s in (PRESETS["21x attention"], SHAPES[8], PRESETS["8x attention"]):
        for dtype in DTYPES[: 1 if quick else 4]:
            run = partial(products_of_one_x, s=s, name=dtype)
            jobs.append(Job("query, key, value", f"{name(s)}, {dtype}", run))
    for i, (up, down) in enumerate([*FEED_FORWARDS, *([] if place.simulated else PAIRS)]):
        for j, dtype in enumerate(DTYPES[: 1 if quick else 4]):
            for tokens in (5,) if place.simulated else (1, 35, 1000):
                activation = ACTIVATIONS[1 + (i + j + tokens) % 4]
                more = {"name": dtype, "tokens": tokens, "activation": activation}
                label = f"{name(up)}, {name(down)}, {dtype}, {activation}, {tokens} tokens"
                run = partial(feed_forward, up=up, down=down, **more)
                jobs.append(Job("feed-forward", label, run))
    for rank, size in ((1, 8), (2, 5), (1, 1)):
        for dtype in ("float16", "bfloat16", "float32"):
            run = partial(embedding, rank=rank, size=size, name=dtype)
            jobs.append(Job("tables", f"embedding, rank {rank}, {size} wide, {dtype}", run))
    return [*jobs, *_device_jobs()]


# --- timing


class Cell(NamedTuple):
    """What is timed: one product, a block of two, or three of one x."""

    kind: str  # "forward", "training"; with "block" or "qkv" before
    label: str
    shapes: tuple[KronShape, ...]
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} {self.label}, {self.dtype}, {self.tokens} tokens"


def timing_jobs(place: Place) -> list[Job]:
    tokens = (1, 16, 1024, 16384) if place.quick else (1, 4, 16, 128, 1024, 16384, 65536)
    dtypes = ("float16",) if place.quick else ("float16", "bfloat16", "tf32")
    shapes = PRESETS | {name(s): s for s in SQUARES}
    cells = [
        Cell(kind, label, (s,), t, dtype)
        for dtype in dtypes
        for kind in ("forward", "training")
        for label, s in shapes.items()
        for t in tokens
    ]
    pairs = dict(zip(("8x", "21x"), PAIRS, strict=True))
    cells += [
        Cell(kind, label, pair, t, dtype)
        for dtype in dtypes
        for kind in ("block forward", "block training")
        for label, pair in pairs.items()
        for t in tokens
    ]
    cells += [
        Cell("qkv forward", label, (PRESETS[label],) * 3, t, dtype)
        for dtype in dtypes
        for label in ("8x attention", "21x attention")
        for t in tokens
    ]
    jobs = [Job(cell.kind, str(cell), partial(time_cell, cell=cell)) for cell in cells]
    return [Job("overhead", "launch overhead of one call", launch_overhead), *jobs]


NO_CLOCK = "the simulator knows no clock"
Step = Callable[[], Any]


def time_cell(place: Place, cell: Cell) -> dict[str, Any]:
    """Microseconds of each contender: of its calls one by one, and replayed as a CUDA graph."""
    place.needs_gpu(NO_CLOCK)
    left_out: dict[str, str] = {}
    with arithmetic(cell.dtype) as dtype:
        each, dense = cell_bytes(cell, dtype)
        room = torch.cuda.mem_get_info()[0] // 3 // (each + dense)
        sets = max(1, min(tune.rotation(each), room))
        try:
            prepared = [contenders(place, cell, dtype, left_out) for _ in range(sets)]
            calls = checked({key: [p[key] for p in prepared] for key in prepared[0]}, left_out)
            loop = {key: partial(in_turn, steps) for key, steps in calls.items()}
            result = {"loop": microseconds(tune.by_events(loop, sets, 0.3))}
            pool, graphs = torch.cuda.graph_pool_handle(), {}
            for key, steps in calls.items():
                try:
                    graphs[key] = tune.captured(steps, pool)
                except Exception as error:
                    if lost(place) or key in OURS:
                        raise
                    left_out[f"{key}, as a graph"] = peers.first_line(error)
            result["graph"] = microseconds(tune.by_events(graphs, sets, 0.3))
        except torch.OutOfMemoryError:
            raise NotDone("the GPU's memory does not hold it") from None
    cold = sets * each > tune.cache_size()
    facts = {"kind": cell.kind, "label": cell.label, "tokens": cell.tokens, "dtype": cell.dtype}
    facts["row"] = row_of(cell)
    return facts | {"sets": sets, "larger_than_L2": cold, "left_out": left_out} | result


def row_of(cell: Cell) -> str:
    """Of dispatch.GPU_ORDER, which says who is asked first."""
    s = cell.shapes[0]
    sizes = (cell.tokens, s.in_features), (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2)
    operands = [torch.empty(size, device="meta") for size in sizes]
    with patch.object(dispatch, "GPU_ORDER", {row: row for row in dispatch.GPU_ORDER}):
        return dispatch._order(*operands)


def in_turn(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def microseconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    return {key: [float(f"{1e3 * ms:.5g}") for ms in timing] for key, timing in timings.items()}


def cell_bytes(cell: Cell, dtype: torch.dtype) -> tuple[int, int]:
    """Of one set of operands and results, and of the dense weights beside it."""
    s, last = cell.shapes[0], cell.shapes[-1]
    sides = s.in_features + sum(k.out_features for k in cell.shapes)
    factors = sum(k.parameters for k in cell.shapes)
    weights = sum(k.in_features * k.out_features for k in cell.shapes)
    if cell.kind.endswith("training"):
        sides += s.in_features + last.out_features
    return (cell.tokens * sides + factors) * dtype.itemsize, weights * dtype.itemsize


# By one kernel, or what an engine has nearest to it: a block and qkv are Triton's "fused". The
# others' times are multiples of the first that is there.
OURS = ("triton", "fused", "cuda")


class Contender(NamedTuple):
    """A call to time, and the check of its result."""

    step: Step
    check: Callable[[Any], None]

    def __call__(self) -> Any:
        return self.step()


def checked(
    calls: dict[str, list[Contender]], left_out: dict[str, str]
) -> dict[str, list[Contender]]:
    """Those whose first result is right. One of ours that is wrong raises."""
    right = {}
    for key, some in calls.items():
        try:
            some[0].check(some[0]())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if key in OURS:
                raise
            left_out[key] = peers.first_line(error)
        else:
            right[key] = some
    return right


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
        reasons = [COMPILED[engine].why_not(x, a, b) for a, b, _ in layers]
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
        hidden = F.gelu(eager.kron_matmul(x, a1, b1, bias=c1))
        return [eager.kron_matmul(hidden, a2, b2, bias=c2)]
    return [eager.kron_matmul(x, a, b, bias=c) for a, b, c in layers]


def launch_overhead(place: Place) -> dict[str, float]:
    """Microseconds for which a call of one token keeps the CPU, the GPU not waited for."""
    place.needs_gpu(NO_CLOCK)
    s = PRESETS["21x attention"]
    a, b, bias = fresh_layer(place, s, torch.float16)
    x = torch.randn(1, s.in_features, device=place.device, dtype=torch.float16)
    weight = reference.materialize(a, b)
    again = [t.detach().clone().requires_grad_() for t in (x, a, b, bias)]
    calls = {
        "kron_matmul, backend auto": lambda: kron_matmul(x, a, b, bias=bias),
        "kron_matmul by eager": lambda: kron_matmul(x, a, b, bias=bias, backend="eager"),
        "F.linear": lambda: F.linear(x, weight, bias),
    }
    for engine in ENGINES:
        if COMPILED[engine].why_not(x, a, b):
            continue
        by = {"backend": engine}
        calls |= {
            f"kron_matmul by {engine}": lambda by=by: kron_matmul(x, a, b, bias=bias, **by),
            f"kron_matmul by {engine}, with gradients": lambda by=by: kron_matmul(
                *again[:3], bias=again[3], **by
            ),
            f"{engine}'s launcher alone": lambda kernels=COMPILED[engine]: kernels.kron_matmul(
                x, (a, b), bias
            ),
        }
    times = defaultdict(list)
    for _ in range(20):
        for key, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):  # fewer than the GPU's queue holds
                call()
            times[key].append((time.perf_counter() - start) / 100)
    return {key: float(f"{1e6 * sorted(some)[10]:.4g}") for key, some in times.items()}


# --- environment and tuning


def environment(place: Place) -> dict[str, Any]:
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "kron_kernels": kron_kernels.__version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    for package in ("triton", "lycoris-lora", "pyfastkron"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    facts["GPUs that CUDA's kernels are compiled for"] = cuda.archs() or None
    if place.simulated:
        return facts | {"gpu": "none: simulated, sm_80"}
    p = torch.cuda.get_device_properties(0)
    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    query += ("power.limit", "temperature.gpu", "persistence_mode", "mig.mode.current")
    which = f"GPU-{p.uuid}" if hasattr(p, "uuid") else "0"
    columns = f"--query-gpu={','.join(query)}"
    line = _output("nvidia-smi", columns, "--format=csv,noheader", "-i", which)
    values = line.split(", ") if line else []
    return facts | {
        "gpu": p.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_GB": round(p.total_memory / 1e9, 1),
        "L2_MB": round(getattr(p, "L2_cache_size", 0) / 1e6, 1),
        "shared_memory": getattr(p, "shared_memory_per_block_optin", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **{f"engine {e}": missing(place.device, e) or "serves" for e in ENGINES},
        **dict(zip(query, values, strict=False)),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment_jobs(place: Place) -> list[Job]:
    return [Job("environment", "environment", environment)]


def tuning_jobs(place: Place) -> list[Job]:
    some = tune.SIMULATED if place.simulated else tune.cases(place.quick)
    return [Job("tuning", case.key, partial(tuned, case=case), "triton") for case in some]


def tuned(place: Place, case: tune.Case) -> dict[str, Any]:
    bench = tune.Bench(place.device, place.clock, 1 if place.quick else 3)
    try:
        (record,) = tune.run([case], bench, place.out / "tuning.jsonl")
    except torch.OutOfMemoryError:
        raise NotDone("the GPU's memory does not hold it") from None
    require(not record["wrong"], f"tiles with a wrong result: {record['wrong']}")
    return record


JOBS = {
    "environment": environment_jobs,
    "correctness": correctness_jobs,
    "timing": timing_jobs,
    "tuning": tuning_jobs,
}


# --- running


def outcome(section: str, job: Job, state: str, **more: Any) -> dict[str, Any]:
    return {"section": section, "group": job.group, "name": job.name, "state": state, **more}


def attempt(section: str, job: Job, place: Place) -> dict[str, Any]:
    """Run a job; whatever it raises is its result."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            if job.engine:
                place = replace(place, engine=job.engine)
                stack.enter_context(place.serving())
            stack.enter_context(unwritten_is_nan(section == "correctness"))
            data = job.run(place)
        if not place.simulated:
            torch.cuda.synchronize()  # or the next job would get the blame
    except NotDone as why:
        return outcome(section, job, NOT_DONE, message=str(why))
    except Exception as error:
        more = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        return outcome(section, job, FAILED, **more)
    seconds = round(time.perf_counter() - start, 2)
    return outcome(section, job, PASSED, seconds=seconds, data=data)


@contextmanager
def unwritten_is_nan(wanted: bool) -> Iterator[None]:
    """A result that a kernel forgot to write fails, instead of passing with what lay there."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    if wanted:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations without a deterministic form
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.set_deterministic_debug_mode(mode)


def lost(place: Place) -> bool:
    """Whether an error took the GPU from this process, as an illegal address does."""
    if place.simulated:
        return False
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device=place.device).item() != 1
    except Exception:
        return True


def run_jobs(section: str, jobs: Sequence[Job], place: Place, lines: Path) -> bool:
    """Run jobs, a line of the file for each; False where the GPU was lost."""
    for job in jobs:
        if not place.simulated:  # there most are not done
            print(f"{section}: {job.name}", file=sys.stderr, flush=True)
        result = attempt(section, job, place)
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if result["state"] == FAILED:
            what = f"{job.name} FAILED: {result['message']}".splitlines()[0]
            print(what, file=sys.stderr, flush=True)
            if lost(place):
                return False
        if not place.simulated:
            gc.collect()
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file; a line that a kill tore off is none."""
    found = []
    for line in path.read_text().split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def in_processes(
    section: str,
    jobs: Sequence[Job],
    lines: Path,
    command: Callable[[int], list[str]],
    patience: float = PATIENCE,
) -> None:
    """Run ``command(first)`` for jobs ``first`` and on, again behind one that ended it."""
    barren = 0
    while (done := len(read_lines(lines))) < len(jobs):
        status = watched(command(done), lines, patience)
        now = len(read_lines(lines))
        barren = 0 if now > done else barren + 1
        if now == len(jobs) or (status == LOST and now > done):
            continue
        how = f"no result for {patience:g} s" if status is None else f"exit status {status}"
        add_line(lines, outcome(section, jobs[now], FAILED, message=f"its process ended: {how}"))
        if barren > 1:  # not these jobs' fault
            for job in jobs[now + 1 :]:
                add_line(lines, outcome(section, job, NOT_DONE, message="processes end at once"))


def add_line(path: Path, result: dict[str, Any]) -> None:
    """Behind a line that may be torn off."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(result) + "\n")


def watched(command: list[str], lines: Path, patience: float) -> int | None:
    """Its exit status, or None if it was killed, because the file did not grow for so long."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = lines.stat().st_size if lines.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                process.kill()
                process.wait()
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(1.0, patience / 10))
    return process.returncode


def run_section(section: str, args: argparse.Namespace, place: Place) -> list[dict[str, Any]]:
    jobs, lines = JOBS[section](place), args.out / f"jobs-{section}.jsonl"
    lines.unlink(missing_ok=True)
    if place.simulated:
        run_jobs(section, jobs, place, lines)
    else:
        flags = ["--out", str(args.out), *(["--quick"] if args.quick else [])]
        start = [sys.executable, "-m", "benchmarks.gpu", *flags, "--child", section]
        in_processes(section, jobs, lines, lambda first: [*start, str(first)])
    return read_lines(lines)


# --- the report


def write_report(out: Path, results: list[dict[str, Any]], sections: Sequence[str], args) -> None:
    gaps = [f"the section {s}: it was not asked for" for s in SECTIONS if s not in sections]
    if args.simulate:
        gaps.insert(0, "a GPU: nothing here was run on one, the checks ran in the simulator")
    if args.quick:
        gaps.append("the cases that --quick leaves out")
    report = {
        "simulated": args.simulate,
        "quick": args.quick,
        "sections": list(sections),
        "counts": dict(Counter(r["state"] for r in results)),
        "not_done": not_done(results) + gaps + NEVER,
        "results": results,
    }
    write(out / "report.json", json.dumps(report, indent=1) + "\n")
    write(out / "report.md", markdown(report))


def write(path: Path, text: str) -> None:
    """At once, or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    os.replace(aside, path)


def not_done(results: list[dict[str, Any]]) -> list[str]:
    """A line a reason."""
    reasons = defaultdict(list)
    for r in results:
        if r["state"] == NOT_DONE:
            reasons[r["section"], r["message"]].append(r["name"])
    lines = []
    for (section, why), names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{section}: {'; '.join(names[:4])}{more}: {why}")
    for library, why in missing_contenders(results).items():
        lines.append(f"timing: {library}: {why}")
    return lines


def missing_contenders(results: list[dict[str, Any]]) -> dict[str, str]:
    """Who was left out of every cell, and why first."""
    cells = [r["data"] for r in results if r["section"] == "timing" and "left_out" in _data(r)]
    missing: dict[str, str] = {}
    for cell in cells:
        missing |= {k: why for k, why in cell["left_out"].items() if k not in missing}
    timed = {key for cell in cells for key in cell["loop"]}
    return {k: why for k, why in missing.items() if k not in timed}


def _data(result: dict[str, Any]) -> dict[str, Any]:
    return result.get("data") or {}


def markdown(report: dict[str, Any]) -> str:
    results, counts = report["results"], Counter(report["counts"])
    facts = next((_data(r) for r in results if r["section"] == "environment"), {})
    where = "in the simulator" if report["simulated"] else f"on {facts.get('gpu', 'a GPU')}"
    lines = [
        f"# kron_kernels {where}",
        "",
        f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[NOT_DONE]} not done.",
        "",
        *failures(results),
        *checked_groups(results),
        *timing_tables(results),
        *tuning_lines(results),
        "## Not done",
        "",
        *(f"- {line}" for line in report["not_done"]),
        "",
        "## Environment",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        *order_table(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def failures(results: list[dict[str, Any]]) -> list[str]:
    failed = [r for r in results if r["state"] == FAILED]
    lines = ["## Failures", ""] if failed else ["Nothing that was done failed.", ""]
    for r in failed:
        detail = r.get("traceback") or r["message"]
        lines += [f"### {r['section']}: {r['name']}", "", "```", detail.rstrip(), "```", ""]
    return lines


def checked_groups(results: list[dict[str, Any]]) -> list[str]:
    table = defaultdict(Counter)
    for r in results:
        table[r["section"], r["group"]][r["state"]] += 1
    lines = ["## What was done", "", "| section | what | passed | failed | not done |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (section, group), n in table.items():
        lines.append(f"| {section} | {group} | {n[PASSED]} | {n[FAILED]} | {n[NOT_DONE]} |")
    return [*lines, ""]


def timing_tables(results: list[dict[str, Any]]) -> list[str]:
    """By kind and dtype: one of ours in microseconds, and the others' time over it."""
    done = [_data(r) for r in results if r["section"] == "timing" and r["state"] == PASSED]
    tables = defaultdict(list)
    for cell in done:
        if "loop" in cell:
            tables[cell["kind"], cell["dtype"]].append(cell)
    lines = ["## Timing", ""] if done else []
    for cell in done:
        if "loop" not in cell:
            lines.append("Launching one call keeps the CPU for, in microseconds:")
            lines += ["", *(f"- {key}: {us}" for key, us in cell.items()), ""]
    if tables:
        lines.append(
            "The first column in microseconds a call, the median and in brackets the quartiles; "
            "the others' medians as multiples of it. Ours are triton, or for blocks and qkv fused "
            "and calls, and cuda. Calls are made one by one, or replayed as a CUDA graph. "
            "A star marks operands that fit into the L2 cache."
        )
    for (kind, dtype), cells in tables.items():
        lines += ["", f"### {kind}, {dtype}", "", *ratio_table(cells)]
    return [*lines, ""] if lines else []


def ratio_table(cells: list[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(k for cell in cells for k in cell["loop"])
    own = next((key for key in OURS if key in keys), "ours")
    names = [key for key in keys if key != own]
    columns = [f"{key}{how}" for how in ("", ", graph") for key in (own, *names)]
    lines = [f"| | tokens | {' | '.join(columns)} |", f"|{' --- |' * 2}{' ---: |' * len(columns)}"]
    for cell in cells:
        entries = [*ratios(cell["loop"], own, names), *ratios(cell["graph"], own, names)]
        star = "" if cell["larger_than_L2"] else " *"
        lines.append(f"| {cell['label']}{star} | {cell['tokens']} | {' | '.join(entries)} |")
    return lines


def ratios(times: dict[str, list[float]], own: str, names: Sequence[str]) -> list[str]:
    if own not in times:
        return ["-"] * (1 + len(names))
    middle, low, high = times[own]
    others = [f"{times[key][0] / middle:.2f}" if key in times else "-" for key in names]
    return [f"{middle:.4g} ({low:.4g} to {high:.4g})", *others]


SPANS = ((4, "up to 4"), (16, "5 to 16"))


def order_table(results: list[dict[str, Any]]) -> list[str]:
    """Whether dispatch.GPU_ORDER has the faster engine first."""
    table: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for cell in map(_data, results):
        if "row" not in cell or "cuda" not in cell["loop"]:
            continue
        # Triton's time over CUDA's, of calls one by one and of graphs.
        pair = [
            times[key][0] / times["cuda"][0]
            for times in (cell["loop"], cell["graph"])
            for key in ("triton", "fused")
            if key in times
        ]
        if len(pair) == 2:
            tokens = next((span for most, span in SPANS if cell["tokens"] <= most), "more")
            table[cell["row"], cell["kind"].split()[-1], tokens].append(pair)
    if not table:
        return []
    lines = [
        "## Who comes first",
        "",
        "The rows of dispatch.GPU_ORDER, whom each asks first, and in how many of the cells under "
        "Timing that had both engines CUDA's was faster: called one by one, and as CUDA graphs. "
        "Behind them Triton's time over CUDA's, of graphs: the median, the least and the greatest.",
        "",
        "| row | order | | tokens | cells | cuda faster | cuda faster, graph | triton / cuda |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows, measured = list(dispatch.GPU_ORDER), {row for row, *_ in table}
    for (row, kind, tokens), cells in sorted(table.items(), key=lambda e: rows.index(e[0][0])):
        who = ", ".join(dispatch.GPU_ORDER[row])
        wins = [sum(pair[i] > 1 for pair in cells) for i in (0, 1)]
        some = [pair[1] for pair in cells]
        spread = f"{median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
        lines.append(
            f"| {row} | {who} | {kind} | {tokens} | {len(cells)} | {wins[0]} | {wins[1]} "
            f"| {spread} |"
        )
    return [*lines, *(f"\nNo cell of the row: {row}." for row in rows if row not in measured), ""]


def tuning_lines(results: list[dict[str, Any]]) -> list[str]:
    records = [_data(r) for r in results if r["section"] == "tuning" and r["state"] == PASSED]
    if not records:
        return []
    better = [r for r in records if r["best"] != r["rule"]]
    simulated = any(r["device"] == "simulated" for r in records)
    clock = " Times are counts of simulated instructions, not times." * simulated
    head = f"{len(better)} of {len(records)} cases have a tile that beats the rule's.{clock}"
    return ["## Tuning", "", head, "", *(f"- {tune.line(r)}" for r in better), ""]


# --- the command


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="fewer cases of everything")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="without a GPU: the checks with small sizes, in the simulator of tests/simulator",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    if not args.simulate and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    if importlib.util.find_spec("triton") is None and (args.simulate or not cuda.archs()):
        why = "the simulator needs it" if args.simulate else "there are no CUDA kernels either"
        print(f"Triton is not installed, and {why}.")
        return 2
    # Triton 3.9 warns while the first is unset; cuBLAS is deterministic with the second.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.simulate:
        return run_all(args, Place("cuda", args.quick, args.out, tune.graph_clock))
    with tune.simulator(args.out / "tuned") as clock:
        return run_all(args, Place("cpu", args.quick, args.out, clock))


def run_all(args: argparse.Namespace, place: Place) -> int:
    if args.child:
        section, first = args.child[0], int(args.child[1])
        lines = args.out / f"jobs-{section}.jsonl"
        ok = run_jobs(section, JOBS[section](place)[first:], place, lines)
        return 0 if ok else LOST
    results: list[dict[str, Any]] = []
    sections = [s for s in SECTIONS if s in args.only]
    for section in sections:
        results += run_section(section, args, place)
        write_report(args.out, results, sections, args)  # a killed run leaves what it has
    counts = Counter(r["state"] for r in results)
    print(", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, NOT_DONE)), end="; ")
    print(f"see {args.out / 'report.md'}")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
