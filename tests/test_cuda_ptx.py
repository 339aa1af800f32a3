"""CUDA C++ kernels: the PTX that nvcc makes of them, executed by a simulator of the GPU."""

import pytest
import torch
from operands import SHAPES, draw, name
from simulator.cuda import CudaDevice, why_not

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

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
MIXED = [
    *SHAPES,
    KronShape(16, 16, 24, 24),
    KronShape(20, 33, 7, 17),
    KronShape(3, 20, 34, 40),
    KronShape(70, 66, 8, 2, 2),
]
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


# Every dtype and architecture has a compilation of its own, of half a minute.
MACHINES = [(80, "float16")]
MACHINES += slow(
    [(arch, "float16") for arch in (90, 120)]
    + [(80, dtype) for dtype in ("bfloat16", "tf32", "float32")]
    + [(120, "tf32")]
)


@pytest.fixture
def gpu(request):
    with CudaDevice(request.param) as device:
        yield device


@pytest.fixture
def dtype(request):
    """A dtype, or float32 multiplied in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.float32 if request.param == "tf32" else getattr(torch, request.param)
    torch.set_float32_matmul_precision(before)


def terms(s: KronShape) -> int:
    return s.rank * (s.n1 + s.n2)


machines = pytest.mark.parametrize(("gpu", "dtype"), MACHINES, indirect=True)


def check(label, actual, expected, n, dtype, **more):
    """A product in tf32 may be 2¹³ times as coarse as one in float32."""
    assert actual.dtype == dtype
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    slack = 4 * 2.0**13 / n**0.5 if tf32 else 4
    assert_close(label, actual, expected.detach(), n, slack=slack, **more)


def check_forward(s, tokens, dtype, i):
    x, a, b = draw(s, tokens, dtype)
    more = {
        "bias": torch.randn(s.out_features).to(dtype) if i % 3 else None,
        "activation": ACTIVATIONS[i % 5],
        "residual": torch.randn(tokens, s.out_features).to(dtype) if i % 2 else None,
    }
    if i % 2:  # transposed factors, as a gradient has them
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    y = kron_matmul(x, a, b, **more, backend="cuda")
    check("y", y, reference.kron_matmul(x, a, b, **more), terms(s), dtype)


@machines
@pytest.mark.parametrize("s", [*PRESETS, SUMS[1], *slow([(s,) for s in SUMS[::2]])], ids=name)
def test_forward_of_the_presets(s, dtype, gpu):
    check_forward(s, 35, dtype, 1)
    assert gpu.launches


@machines
@pytest.mark.parametrize("s", MIXED, ids=name)
def test_forward_of_any_shape(s, dtype, gpu):
    turn = sum(s)
    check_forward(s, (1, 5, 19, 40)[turn % 4], dtype, turn)


@machines
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_forward_of_few_tokens(tokens, dtype, gpu):
    check_forward(PRESETS[1], tokens, dtype, 1)
    check_forward(PRESETS[4], tokens, dtype, 2)


@machines
def test_three_products_of_one_x(dtype, gpu):
    s = PRESETS[1]
    x, _, _ = draw(s, 19, dtype)
    layers = []
    for i in range(3):
        _, a, b = draw(s, 1, dtype)
        bias = torch.randn(s.out_features).to(dtype) if i != 1 else None
        layers.append((a.roll(i, 1), b.roll(i, 2), bias))
    ys = kron_qkv(x, *layers, backend="cuda")
    for y, (a, b, bias) in zip(ys, layers, strict=True):
        check("y", y, reference.kron_matmul(x, a, b, bias=bias), terms(s), dtype)
    assert len(gpu.launches) == 1


# How a launch is cut depends on the GPU: columns divided among many multiprocessors, and a part of
# the left operand at a time where shared memory is short.
GPUS = [{"multiprocessors": 132}, {"shared": 49152}, {"multiprocessors": 40, "shared": 40000}]


@pytest.mark.parametrize("more", GPUS, ids=str)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize("s", [PRESETS[0], PRESETS[3], PRESETS[4], SUMS[1]], ids=name)
def test_on_another_gpu(s, dtype, more):
    with CudaDevice(80, **more):
        check_forward(s, 35, dtype, 1)
        check_gradients(s, 19, dtype)


@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize("s", [PRESETS[1], PRESETS[4]], ids=name)
def test_operands_that_are_not_aligned(s, dtype):
    """16 bytes at a time would be a misaligned access."""

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for which in range(5):
        operands = [*draw(s, 9, dtype), torch.randn(s.out_features).to(dtype)]
        operands.append(torch.randn(9, s.out_features).to(dtype))
        operands[which] = shifted(operands[which])
        x, a, b, bias, residual = operands
        with CudaDevice(80):
            y = kron_matmul(x, a, b, bias=bias, residual=residual, backend="cuda")
        expected = reference.kron_matmul(x, a, b, bias=bias, residual=residual)
        check("y", y, expected, terms(s), dtype)


def check_gradients(s, tokens, dtype):
    x, a, b = (t.requires_grad_() for t in draw(s, tokens, dtype))
    dy = torch.randn(tokens, s.out_features).to(dtype)
    grads = torch.autograd.grad(kron_matmul(x, a, b, backend="cuda"), (x, a, b), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())
    size = [t.detach().abs().requires_grad_() for t in wide]
    sums = torch.autograd.grad(reference.kron_matmul(*size), size, dy.double().abs())
    products = (s.m1 * s.m2, tokens * s.m2 * s.n2, tokens * s.m1 * s.n1)
    for label, grad, other, total, n in zip(
        ("dx", "da", "db"), grads, expected, sums, products, strict=True
    ):
        # As in test_triton: a gradient of one entry may be near zero by chance.
        scale = max(total.square().mean().item() / n, other.square().mean().item()) ** 0.5
        check(label, grad, other, tokens * (s.m1 + s.m2 + terms(s)), dtype, scale=scale)


@machines
@pytest.mark.parametrize("s", [*PRESETS, *slow([(s,) for s in SUMS])], ids=name)
def test_gradients_of_the_presets(s, dtype, gpu):
    check_gradients(s, 35, dtype)


@machines
@pytest.mark.parametrize("s", MIXED, ids=name)
def test_gradients_of_any_shape(s, dtype, gpu):
    check_gradients(s, (1, 21, 70)[sum(s) % 3], dtype)


def check_feed_forward(up, down, tokens, dtype, activation, bias=True):
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
    n = terms(up) + terms(down)
    y = run(kron_feed_forward, *operands, residual=dy, activation=activation, backend="cuda")
    check("y", y, expected + dy.double(), n, dtype)
    operands = [t.requires_grad_() for t in operands]
    y = run(kron_feed_forward, *operands, activation=activation, backend="cuda")
    grads = torch.autograd.grad(y, operands, dy)
    others = torch.autograd.grad(expected, wide, dy.double())
    for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
        check(f"gradient {i}", grad, other, tokens * 4 * n, dtype)


@machines
@pytest.mark.parametrize(("up", "down"), [PRESETS[2:4], PRESETS[4:]], ids=["8x", "21x"])
def test_feed_forward_of_the_presets(up, down, gpu, dtype):
    check_feed_forward(up, down, 35, dtype, "gelu")
    assert any("feed_forward_backward" in launch.name for launch in gpu.launches)


@machines
@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_feed_forward_of_odd_shapes(tokens, gpu, dtype):
    up, down = KronShape(5, 3, 7, 9), KronShape(3, 5, 11, 7)
    check_feed_forward(up, down, tokens, dtype, ACTIVATIONS[1 + tokens % 4], bias=tokens > 1)
