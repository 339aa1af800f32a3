"""What the checks share, those of the tests too: how results are held to the oracle, and whose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import ACTIVATIONS, draw
from benchmarks.gpu.jobs import NotDone, Place
from kron_kernels import KronShape, kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.backends import BACKENDS, cuda
from kron_kernels.backends.gpu import precision
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.testing import assert_close


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


def close(label: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Within rtol of the largest entry."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    error, most = (actual - expected).abs().max().item(), expected.abs().max().item()
    require(error <= rtol * most, f"{label}: {error:.3g} off, with entries up to {most:.3g}")


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


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def epilogue_of(
    s: KronShape, tokens: int, dtype: torch.dtype, turn: int, device: str = "cpu"
) -> dict[str, Any]:
    """Every activation, with and without a bias and a residual, in turn."""
    bias = torch.randn(s.out_features).to(device, dtype) if turn % 3 else None
    residual = torch.randn(tokens, s.out_features).to(device, dtype) if turn % 2 else None
    return {"bias": bias, "activation": ACTIVATIONS[turn % 5], "residual": residual}


def check_forward(
    s: KronShape, tokens: int, dtype: torch.dtype, backend: str, turn: int, device: str = "cpu"
) -> None:
    """Every activation, bias, residual and stride of the factors, in turn."""
    x, a, b = (t.to(device) for t in draw(s, tokens, dtype))
    if turn % 2:  # transposed factors, as a gradient has them
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    more = epilogue_of(s, tokens, dtype, turn, device)
    y = kron_matmul(x, a, b, **more, backend=backend)
    # The sum may be a single number near zero, and the factors' rounding is that of its terms.
    expected = oracle(x, a, b, **more)
    size = oracle(x.abs(), a.abs(), b.abs()) / (s.rank * s.n1 * s.n2) ** 0.5
    hold("y", y, expected, terms(s), dtype, scale=max(rms(expected), rms(size)))


def check_gradients(
    s: KronShape, tokens: int, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    x, a, b = (t.to(device).requires_grad_() for t in draw(s, tokens, dtype))
    dy = torch.randn(tokens, s.out_features).to(device, dtype)
    y = kron_matmul(x, a, b, backend=backend)
    hold_gradients(s, (x, a, b), dy, torch.autograd.grad(y, (x, a, b), dy), dtype)


def hold_gradients(
    s: KronShape,
    operands: Sequence[Tensor],
    dy: Tensor,
    grads: Sequence[Tensor],
    dtype: torch.dtype,
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
        # A gradient may have a single entry, near zero by chance: its scale is at least that of n
        # products of random signs, whose absolute values sum to √n times as much.
        scale = max(rms(total) / n**0.5, rms(other))
        hold(label, grad, other, max(tokens, 1) * (s.m1 + s.m2 + terms(s)), dtype, scale=scale)


def check_qkv(
    s: KronShape, tokens: int, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Three products of one x, with factors of their own."""
    x, a, b = (t.to(device) for t in draw(s, tokens, dtype))
    layers = layers_of(s, a, b)
    for y, (a, b, bias) in zip(kron_qkv(x, *layers, backend=backend), layers, strict=True):
        hold("y", y, oracle(x, a, b, bias=bias), terms(s), dtype)


def layers_of(s: KronShape, a: Tensor, b: Tensor, n: int = 3) -> list[triton_gpu.Layer]:
    """Different factors, and a bias in all but the second."""
    biases = (torch.randn(s.out_features).to(a) if i != 1 else None for i in range(n))
    return [(a.roll(i, 1), b.roll(i, 2), bias) for i, bias in enumerate(biases)]


def check_feed_forward(
    up: KronShape,
    down: KronShape,
    tokens: int,
    dtype: torch.dtype,
    activation: str,
    backend: str,
    bias: bool = True,
    meets: bool | None = True,
    device: str = "cpu",
) -> bool:
    """The block and its gradients; whether they meet in one kernel, which ``meets`` may require."""
    x, a1, b1 = draw(up, tokens, dtype)
    _, a2, b2 = draw(down, 1, dtype)
    operands = [x, a1, b1, a2, b2]
    if bias:
        operands += [torch.randn(s.out_features).to(dtype) for s in (up, down)]
    operands = [t.to(device) for t in operands]
    dy = torch.randn(tokens, down.out_features).to(device, dtype)
    met = BACKENDS[backend].fuses((*operands[1:3], None), (*operands[3:5], None))
    require(met == meets or meets is None, f"the factors {'do not ' * (not met)}meet in one kernel")

    exact = wide(operands)
    expected = _block(reference_block, exact, activation=activation)
    n = terms(up) + terms(down)
    more = {"activation": activation, "backend": backend}
    y = _block(kron_feed_forward, operands, residual=dy, **more)
    hold("y", y, expected + dy.cpu().double(), n, dtype)
    operands = [t.requires_grad_() for t in operands]
    grads = torch.autograd.grad(_block(kron_feed_forward, operands, **more), operands, dy)
    others = torch.autograd.grad(expected, exact, dy.cpu().double())
    for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
        hold(f"gradient {i}", grad, other, tokens * 4 * n, dtype)
    return met


def _block(call: Callable[..., Tensor], operands: Sequence[Tensor], **more: Any) -> Tensor:
    x, a1, b1, a2, b2, *biases = operands
    bias1, bias2 = biases or (None, None)
    return call(x, (a1, b1, bias1), (a2, b2, bias2), **more)


def reference_block(x: Tensor, up: tuple, down: tuple, activation: str) -> Tensor:
    hidden = reference.kron_matmul(x, *up[:2], bias=up[2], activation=activation)
    return reference.kron_matmul(hidden, *down[:2], bias=down[2])


# --- operands where jobs run


def drawn(place: Place, s: KronShape, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """x, a and b on the device."""
    operands = [t.to(place.device) for t in draw(s, tokens, dtype)]
    if place.engine == "cuda" and (reason := cuda.why_not(*operands)):  # Triton serves them all
        raise NotDone(reason)
    return operands


def noise(place: Place, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size).to(dtype).to(place.device)


def layer(place: Place, s: KronShape, dtype: torch.dtype) -> triton_gpu.Layer:
    """With a bias."""
    _, a, b = drawn(place, s, 1, dtype)
    return a, b, noise(place, dtype, s.out_features)
