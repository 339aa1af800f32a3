"""What every compiled GPU backend is held to: products, gradients and blocks against the oracle."""

import torch
from operands import SHAPES, draw

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, reference
from kron_kernels.backends import COMPILED
from kron_kernels.backends.gpu import precision
from kron_kernels.testing import assert_close

ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
PRESETS = [
    KronShape(384, 384, 2, 2),
    KronShape(384, 48, 2, 16),
    KronShape(8, 2, 384, 384),
    KronShape(2, 8, 384, 384),
    KronShape(16, 2, 192, 384),
    KronShape(2, 16, 384, 192),
]
SUMS = [
    KronShape(384, 48, 2, 16, 4),
    KronShape(384, 384, 8, 2, 4),
    KronShape(384, 384, 2, 8, 4),
]
# Both orders, either factor as the mix, whatever is odd, and a rank in each.
MIXED = [*SHAPES, KronShape(3, 20, 34, 40), KronShape(70, 66, 8, 2, 2)]


def terms(s: KronShape) -> int:
    return s.rank * (s.n1 + s.n2)


def unit(dtype: torch.dtype) -> float:
    """How much coarser than float32 a product in tf32 may be: 10 bits of fraction, not 23."""
    return 2.0**13 if dtype == torch.float32 and precision(dtype) == "tf32" else 1.0


def check(label, actual, expected, n, dtype, **more):
    assert actual.dtype == dtype
    slack = 4 * unit(dtype) / n**0.5 if unit(dtype) > 1 else 4
    assert_close(label, actual, expected.detach(), n, slack=slack, **more)


def epilogue_of(s: KronShape, tokens: int, dtype: torch.dtype, i: int):
    """Every activation, with and without a bias and a residual, in turn."""
    bias = torch.randn(s.out_features).to(dtype) if i % 3 else None
    residual = torch.randn(tokens, s.out_features).to(dtype) if i % 2 else None
    return {"bias": bias, "activation": ACTIVATIONS[i % 5], "residual": residual}


def check_forward(s, tokens, dtype, backend, i):
    x, a, b = draw(s, tokens, dtype)
    if i % 2:  # transposed factors, as a gradient has them
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    more = epilogue_of(s, tokens, dtype, i)
    y = kron_matmul(x, a, b, **more, backend=backend)
    # The sum may be a single number near zero, and the factors' rounding is that of its terms.
    expected = reference.kron_matmul(x, a, b, **more)
    size = reference.kron_matmul(x.abs(), a.abs(), b.abs()) / (s.rank * s.n1 * s.n2) ** 0.5
    scale = max(expected.square().mean().item(), size.square().mean().item()) ** 0.5
    check("y", y, expected, terms(s), dtype, scale=scale)


def check_gradients(s, tokens, dtype, backend):
    x, a, b = (t.requires_grad_() for t in draw(s, tokens, dtype))
    dy = torch.randn(tokens, s.out_features).to(dtype)
    y = kron_matmul(x, a, b, backend=backend)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())
    size = [t.detach().abs().requires_grad_() for t in wide]
    sums = torch.autograd.grad(reference.kron_matmul(*size), size, dy.double().abs())
    products = (s.m1 * s.m2, tokens * s.m2 * s.n2, tokens * s.m1 * s.n1)
    for label, grad, other, total, n in zip(
        ("dx", "da", "db"), grads, expected, sums, products, strict=True
    ):
        # A gradient may have a single entry, near zero by chance: its scale is at least that of n
        # products of random signs, whose absolute values sum to √n times as much.
        scale = max(total.square().mean().item() / n, other.square().mean().item()) ** 0.5
        check(label, grad, other, max(tokens, 1) * (s.m1 + s.m2 + terms(s)), dtype, scale=scale)


def check_feed_forward(up, down, tokens, dtype, activation, backend, bias=True, meets=True):
    """The block and its gradients, fused or not."""
    x, a1, b1 = draw(up, tokens, dtype)
    _, a2, b2 = draw(down, 1, dtype)
    operands = [x, a1, b1, a2, b2]
    if bias:
        operands += [torch.randn(s.out_features).to(dtype) for s in (up, down)]
    dy = torch.randn(tokens, down.out_features).to(dtype)

    def run(call, x, a1, b1, a2, b2, c1=None, c2=None, **more):
        return call(x, (a1, b1, c1), (a2, b2, c2), **more)

    def oracle(x, first, second):
        hidden = reference.kron_matmul(x, *first[:2], bias=first[2], activation=activation)
        return reference.kron_matmul(hidden, *second[:2], bias=second[2])

    wide = [t.double().requires_grad_() for t in operands]
    expected = run(oracle, *wide)
    assert COMPILED[backend].meet(a1, b1, a2, b2) == meets
    n = terms(up) + terms(down)
    y = run(kron_feed_forward, *operands, residual=dy, activation=activation, backend=backend)
    check("y", y, expected + dy.double(), n, dtype)
    operands = [t.requires_grad_() for t in operands]
    y = run(kron_feed_forward, *operands, activation=activation, backend=backend)
    grads = torch.autograd.grad(y, operands, dy)
    others = torch.autograd.grad(expected, wide, dy.double())
    for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
        check(f"gradient {i}", grad, other, tokens * 4 * n, dtype)
