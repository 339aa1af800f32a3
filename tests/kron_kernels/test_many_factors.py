"""Products of three to eight factors by the compiled kernels, and their gradients, in every way."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kron_kernels import autograd, kron_matmul, reference
from kron_kernels.backends import native
from kron_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(native._native is None, reason="the kernels are not compiled")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# A dense end of one factor, of two or four multiplied out, turned ends, pairs of 2x2, an end as
# long as the row, expanding and contracting factors, sides of one.
SIDES = {
    "2x16^2": [(2, 2), (16, 16), (16, 16)],
    "4^4": [(4, 4)] * 4,
    "2^8": [(2, 2)] * 8,
    "2^3": [(2, 2)] * 3,
    "3^5": [(3, 3)] * 5,
    "6x8^2": [(6, 5), (8, 8), (8, 8)],
    "7x5x11": [(7, 7), (5, 5), (11, 11)],
    "24 last": [(3, 4), (2, 2), (24, 17)],
    "expanding": [(6, 1), (5, 2), (4, 3), (3, 1)],
    "contracting": [(1, 6), (2, 5), (3, 4), (1, 3)],
    "of one": [(1, 1), (1, 1), (1, 1)],
}
# Several passes over memory, the last of them with strips of a tail.
LONG = {"32^3x2": [(2, 2), (32, 32), (32, 32), (32, 32)], "8^5x6": [(6, 5), *[(8, 8)] * 5]}
by_name = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(sides, tokens, dtype=torch.float64, rank=1):
    """x and factors, whose product has entries of order 1."""
    torch.manual_seed(0)
    n = torch.Size([side[1] for side in sides]).numel()
    factors = [torch.randn(rank, *side).div(side[1] ** 0.5).to(dtype) for side in sides]
    return torch.randn(tokens, n).to(dtype), factors


def terms(sides, rank=1):
    return rank * sum(m + n for m, n in sides)


def gradients(call, operands, dy):
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    return torch.autograd.grad(call(*leaves), leaves, dy)


def check_gradients(sides, tokens, dtype, rank, given=None):
    x, factors = draw(sides, tokens, dtype, rank)
    dy = torch.randn(kron_matmul(x, *factors).shape).to(dtype)
    x, *factors = operands = given or [x, *factors]
    found = gradients(lambda *t: kron_matmul(*t, backend="native"), operands, dy)
    wide = [t.double() for t in operands]
    expected = gradients(reference.kron_matmul, wide, dy.double())
    sizes = gradients(reference.kron_matmul, [t.abs() for t in wide], dy.double().abs())
    width = max(x.shape[1], dy.shape[1])
    for i, (grad, other, size) in enumerate(zip(found, expected, sizes, strict=True)):
        assert grad.dtype == dtype
        # Products of many normal numbers differ in size: their rounding is that of the largest. A
        # sum of n products of random signs has 1 / sqrt(n) of their absolute values.
        n = width if i == 0 else width * max(tokens, 1)
        scale = max(rms(other), rms(size) / n**0.5)
        assert_close(f"gradient {i}", grad, other, terms(sides, rank) * n, scale=scale, slack=8)


def rms(t):
    return t.square().mean().sqrt().item() if t.numel() else 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@by_name
def test_products_are_the_references(sides, dtype, isa):
    for tokens, rank in ((0, 1), (1, 2), (7, 1), (33, 1)):
        check_product(sides, tokens, dtype, rank)


def check_product(sides, tokens, dtype, rank):
    x, factors = draw(sides, tokens, dtype, rank)
    m = torch.Size([side[0] for side in sides]).numel()
    epilogue = {
        "bias": torch.randn(m).to(dtype) if tokens != 7 else None,
        "activation": "gelu" if tokens == 33 else None,
        "residual": torch.randn(tokens, m).to(dtype) if tokens != 1 else None,
    }
    y = kron_matmul(x, *factors, **epilogue, backend="native")
    expected = reference.kron_matmul(x, *factors, **epilogue)
    scale = max(1.0, rms(expected)) * rank**0.5
    assert_close("y", y, expected, terms(sides, rank), scale=scale, slack=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@by_name
def test_gradients_are_the_references(sides, dtype, isa):
    for tokens, rank in ((0, 1), (1, 2), (33, 1)):
        check_gradients(sides, tokens, dtype, rank)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("sides", LONG.values(), ids=LONG)
def test_products_that_exceed_the_cache(sides, rank, threads):
    """Against a contraction axis by axis in float64: the reference would form 65,536 columns."""
    x, factors = draw(sides, 3, torch.float32, rank)
    bias = torch.randn(torch.Size([m for m, _ in sides]).numel())

    def by_axis(x, *factors):
        total = 0
        for term in zip(*factors, strict=True):
            y = x.unflatten(1, [n for _, n in sides])
            for axis, f in enumerate(term):
                y = torch.tensordot(f, y, ([1], [axis + 1])).movedim(0, axis + 1)
            total = total + y.flatten(1)
        return total

    wide = [t.double() for t in (x, *factors)]
    expected = by_axis(*wide)
    dy = torch.randn(expected.shape)
    others = gradients(by_axis, wide, dy.double())
    y = kron_matmul(x, *factors, bias=bias, backend="native")
    found = gradients(lambda *t: kron_matmul(*t, backend="native"), (x, *factors), dy)
    assert_close("y", y, expected + bias.double(), terms(sides, rank), slack=8)
    for i, (grad, other) in enumerate(zip(found, others, strict=True)):
        n = terms(sides, rank) * (dy.numel() if i else 1)
        assert_close(f"gradient {i}", grad, other, n, slack=8)


@pytest.mark.parametrize("threads", [2, 5], indirect=True)
def test_tokens_are_divided_among_threads(threads):
    sides = [(8, 8)] * 3
    x, factors = draw(sides, 300, torch.float32)
    y = kron_matmul(x, *factors, backend="native")
    check_gradients(sides, 300, torch.float32, 1)
    assert_close("y", y, reference.kron_matmul(x, *factors), terms(sides))


def test_factors_of_any_strides():
    x, factors = draw([(4, 4), (3, 3), (16, 16)], 5)
    turned = [f.mT.contiguous().mT for f in factors]
    check_gradients([(4, 4), (3, 3), (16, 16)], 5, torch.float64, 1, [x, *turned])
    (wide,) = draw([(4, 4)], 0, rank=3)[1]
    every_other = [wide[:, ::2, ::2], wide[:, :2, 1:3].mT, wide[:, 1:, :1].expand(3, 3, 3)]
    x = torch.randn(6, 2 * 2 * 3, dtype=torch.float64)
    y = kron_matmul(x, *every_other, backend="native")
    assert_close("y", y, reference.kron_matmul(x, *every_other), 30)


@by_name
def test_derivatives_are_those_of_finite_differences(sides):
    if torch.Size([n for _, n in sides]).numel() > 81:
        sides = sides[-3:]
    x, factors = draw([(min(m, 5), min(n, 5)) for m, n in sides[:3]], 2, rank=2)
    bias = torch.randn(kron_matmul(x, *factors).shape[1], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, bias, *factors)]

    def call(x, bias, *factors):
        return kron_matmul(x, *factors, bias=bias, activation="silu", backend="native")

    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", [(), (0,), (1,), (3,), (0, 2), (4,)])
def test_only_the_gradients_that_are_needed(needed):
    sides = [(2, 2), (3, 4), (16, 16)]
    x, factors = draw(sides, 6)
    operands = [x, *factors, torch.randn(96, dtype=torch.float64)]
    for i in needed:
        operands[i].requires_grad_()
    *factors, bias = operands
    y = kron_matmul(*factors, bias=bias, backend="native")
    expected = reference.kron_matmul(*factors, bias=bias)
    assert y.requires_grad == bool(needed)
    if needed:
        wanted = [operands[i] for i in needed]
        dy = torch.randn(y.shape, dtype=torch.float64)
        grads = torch.autograd.grad(y, wanted, dy)
        for grad, other in zip(grads, torch.autograd.grad(expected, wanted, dy), strict=True):
            assert_close("gradient", grad, other, 1000)


def test_gradients_run_in_the_kernels_whatever_the_shape_of_x(monkeypatch):
    calls = []
    kernel = native.kron_matmul_of_many_backward
    monkeypatch.setattr(
        native, "kron_matmul_of_many_backward", lambda *args: calls.append(1) or kernel(*args)
    )
    rows, factors = draw([(3, 3), (2, 2), (5, 5)], 6)
    expected = gradients(reference.kron_matmul, [rows, *factors], torch.ones(6, 30).double())
    for x in (rows, rows.view(2, 3, 30), rows.t().contiguous().t()):
        dy = torch.ones(1, dtype=torch.float64).expand(*x.shape[:-1], 30)
        found = gradients(kron_matmul, [x, *factors], dy)
        assert found[0].shape == x.shape
        for grad, other in zip(found, expected, strict=True):
            assert_close("gradient", grad.reshape(other.shape), other, 200)
    assert len(calls) == 3
    kron_matmul(rows[0].requires_grad_(), *factors).sum().backward()
    assert len(calls) == 4


def test_a_batch_of_gradients_a_negated_one_and_one_under_a_mode():
    from torch.utils.flop_counter import FlopCounterMode

    x, factors = draw([(3, 3), (2, 2), (5, 5)], 4)
    leaves = [t.requires_grad_() for t in (x, *factors)]
    dys = torch.randn(3, 4, 30, dtype=torch.float64)
    y = kron_matmul(*leaves, backend="native")
    assert isinstance(y.grad_fn, autograd.KronMatmulOfMany._backward_cls)
    one_by_one = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    batch = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for several, single in zip(batch, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(several, torch.stack(single))
    negated = torch._neg_view(dys[0])
    for grad, other in zip(
        torch.autograd.grad(y, leaves, negated, retain_graph=True), one_by_one[0], strict=True
    ):
        torch.testing.assert_close(grad, -other)
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(y, leaves, dys[0])
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(grads, one_by_one[0])


def test_a_repeated_call_computes_with_the_numbers_of_the_moment():
    x, factors = draw([(3, 3), (2, 2), (5, 5)], 4)
    for _ in range(4):
        y = kron_matmul(x, *factors, backend="native")
        assert_close("y", y, reference.kron_matmul(x, *factors), 30)
        factors[1].mul_(-2)
        x = x + 1


def test_transforms_and_compilers_take_the_expression():
    x, factors = draw([(3, 3), (2, 2), (5, 5)], 4)
    expected = reference.kron_matmul(x, *factors)
    each = torch.vmap(lambda row: kron_matmul(row, *factors))(x)
    _, tangent = torch.func.jvp(lambda x: kron_matmul(x, *factors), (x,), (x,))
    for found in (each, tangent):
        assert_close("y", found, expected, 30)
    leaf = factors[0].clone().requires_grad_()
    compiled = torch.compile(kron_matmul, backend="eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(x, leaf, *factors[1:]).sum(), leaf)
    dy = torch.ones_like(expected)
    assert_close("gradient", grad, gradients(reference.kron_matmul, [x, *factors], dy)[1], 200)
