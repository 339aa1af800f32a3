"""Checks of a backend's products, gradients and feed-forward blocks against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kron_kernels import kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.backends import BACKENDS
from kron_kernels.backends.gpu import precision
from kron_kernels.dispatch import BackendName
from kron_kernels.shapes import KronShape
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import ACTIVATIONS, draw

Layer = tuple[Tensor, Tensor, Tensor | None]  # a, b, bias


@contextmanager
def arithmetic(dtype: str) -> Iterator[torch.dtype]:
    """Yield the dtype of this name; "tf32" is float32 with products in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def terms(s: KronShape) -> int:
    """Terms summed into an entry of the product, as ``assert_close`` counts them."""
    return s.rank * (s.n1 + s.n2)


def slack(dtype: torch.dtype, n: int) -> float:
    """``assert_close``'s slack for sums of n terms, tf32 included.

    tf32 has 10 bits of fraction instead of 23, and rounds every term alike.
    """
    tf32 = dtype == torch.float32 and precision(dtype) == "tf32"
    return 4 * 2.0**13 / n**0.5 if tf32 else 4


def hold(
    label: str,
    actual: Tensor,
    expected: Tensor,
    n: int,
    dtype: torch.dtype,
    scale: float | None = None,
) -> None:
    """``assert_close`` for tensors of any device, and the result's dtype."""
    if actual.dtype != dtype:
        raise AssertionError(f"{label}: {actual.dtype}, not {dtype}")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert_close(label, actual, expected, n, scale=scale, slack=slack(dtype, n))


def close(label: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Require that no entry differs by more than ``rtol`` times the largest expected entry."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not error <= rtol * largest:  # a NaN fails
        raise AssertionError(f"{label}: {error:.3g} off, with entries up to {largest:.3g}")


def same(label: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Require equal bits."""
    for i, (p, q) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(p, q):
            raise AssertionError(f"{label}, result {i}: bits differ")


def oracle(x: Tensor, *factors: Tensor, **epilogue: Any) -> Tensor:
    """``reference.kron_matmul`` on the CPU, for operands on any device."""

    def to_cpu(t: Any) -> Any:
        return t.detach().cpu() if isinstance(t, Tensor) else t

    epilogue = {key: to_cpu(value) for key, value in epilogue.items()}
    return reference.kron_matmul(to_cpu(x), *map(to_cpu, factors), **epilogue)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves in float64 on the CPU."""
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def epilogue_of(
    s: KronShape, tokens: int, dtype: torch.dtype, turn: int, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of ``kron_matmul``; ``turn`` cycles through activations, biases and residuals."""
    bias = torch.randn(s.out_features).to(device, dtype) if turn % 3 else None
    residual = torch.randn(tokens, s.out_features).to(device, dtype) if turn % 2 else None
    return {"bias": bias, "activation": ACTIVATIONS[turn % len(ACTIVATIONS)], "residual": residual}


def check_forward(
    s: KronShape,
    tokens: int,
    dtype: torch.dtype,
    backend: BackendName,
    turn: int,
    device: str = "cpu",
) -> None:
    """Check a product; ``turn`` cycles through the epilogues and the strides of the factors."""
    x, a, b = (t.to(device) for t in draw(s, tokens, dtype))
    if turn % 2:  # transposed factors, as a gradient has them
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    epilogue = epilogue_of(s, tokens, dtype, turn, device)
    y = kron_matmul(x, a, b, **epilogue, backend=backend)
    # The sum may be a single number near zero, and the factors' rounding is that of its terms.
    expected = oracle(x, a, b, **epilogue)
    size = oracle(x.abs(), a.abs(), b.abs()) / (s.rank * s.n1 * s.n2) ** 0.5
    hold("y", y, expected, terms(s), dtype, scale=max(_rms(expected), _rms(size)))


def check_gradients(
    s: KronShape, tokens: int, dtype: torch.dtype, backend: BackendName, device: str = "cpu"
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
        scale = max(_rms(total) / n**0.5, _rms(other))
        hold(label, grad, other, max(tokens, 1) * (s.m1 + s.m2 + terms(s)), dtype, scale=scale)


def check_qkv(
    s: KronShape, tokens: int, dtype: torch.dtype, backend: BackendName, device: str = "cpu"
) -> None:
    """Check three products of one x with different factors, one of them without a bias."""
    x, a, b = (t.to(device) for t in draw(s, tokens, dtype))
    biases = (torch.randn(s.out_features).to(a) if i != 1 else None for i in range(3))
    layers: list[Layer] = [(a.roll(i, 1), b.roll(i, 2), bias) for i, bias in enumerate(biases)]
    for y, (a, b, bias) in zip(kron_qkv(x, *layers, backend=backend), layers, strict=True):
        hold("y", y, oracle(x, a, b, bias=bias), terms(s), dtype)


def check_feed_forward(
    up: KronShape,
    down: KronShape,
    tokens: int,
    dtype: torch.dtype,
    activation: str,
    backend: BackendName,
    bias: bool = True,
    meets: bool | None = True,
    device: str = "cpu",
) -> bool:
    """Check the block and its gradients.

    Args:
        meets: Whether the factors must meet in one kernel; None accepts either.

    Returns:
        Whether they do.
    """
    x, a1, b1 = draw(up, tokens, dtype)
    _, a2, b2 = draw(down, 1, dtype)
    operands = [x, a1, b1, a2, b2]
    if bias:
        operands += [torch.randn(s.out_features).to(dtype) for s in (up, down)]
    operands = [t.to(device) for t in operands]
    dy = torch.randn(tokens, down.out_features).to(device, dtype)
    _, a1, b1, a2, b2 = operands[:5]
    met = BACKENDS[backend].fuses((a1, b1, None), (a2, b2, None))
    if meets is not None and met != meets:
        raise AssertionError(f"the factors {'do not ' * (not met)}meet in one kernel")

    exact = wide(operands)
    expected = _block(_reference_block, exact, activation=activation)
    n = terms(up) + terms(down)
    options = {"activation": activation, "backend": backend}
    y = _block(kron_feed_forward, operands, residual=dy, **options)
    hold("y", y, expected + dy.cpu().double(), n, dtype)
    operands = [t.requires_grad_() for t in operands]
    grads = torch.autograd.grad(_block(kron_feed_forward, operands, **options), operands, dy)
    others = torch.autograd.grad(expected, exact, dy.cpu().double())
    for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
        hold(f"gradient {i}", grad, other, tokens * 4 * n, dtype)
    return met


def _block(call: Callable[..., Tensor], operands: Sequence[Tensor], **options: Any) -> Tensor:
    x, a1, b1, a2, b2, *biases = operands
    bias1, bias2 = biases or (None, None)
    return call(x, (a1, b1, bias1), (a2, b2, bias2), **options)


def _reference_block(x: Tensor, up: Layer, down: Layer, activation: str) -> Tensor:
    hidden = reference.kron_matmul(x, *up[:2], bias=up[2], activation=activation)
    return reference.kron_matmul(hidden, *down[:2], bias=down[2])
