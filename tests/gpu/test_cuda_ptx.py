"""CUDA C++ kernels: the PTX that nvcc makes of them, executed by a simulator of the GPU."""

import pytest
import torch
from simulator.cuda import CudaDevice, why_not
from turns import in_turns, slow

from kron_kernels import KronShape, kron_matmul, reference
from kron_kernels.testing.cases import (
    ACTIVATIONS,
    MIXED,
    PAIRS,
    PRESETS,
    SUMS,
    draw,
    name,
)
from kron_kernels.testing.checks import (
    check_feed_forward,
    check_forward,
    check_gradients,
    check_qkv,
    hold,
    terms,
)

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

SQUARES = [KronShape(16, 16, 24, 24), KronShape(20, 33, 7, 17)]


# Every dtype and architecture has a compilation of its own, of half a minute.
MACHINES = [(80, "float16")]
MACHINES += slow(
    [(arch, "float16") for arch in (90, 120)]
    + [(80, dtype) for dtype in ("bfloat16", "tf32", "float32")]
    + [(120, "tf32")]
)

LAYERS = [*PRESETS.values(), SUMS[1], *slow(zip(SUMS[::2]))]


@pytest.fixture
def gpu(request):
    with CudaDevice(request.param) as device:
        yield device


machines = pytest.mark.parametrize(("gpu", "dtype"), MACHINES, indirect=True)


@machines
@pytest.mark.parametrize("s", LAYERS, ids=name)
def test_forward_of_the_presets(s, dtype, gpu):
    check_forward(s, 35, dtype, "cuda", 1)
    assert gpu.launches


@machines
@pytest.mark.parametrize("s", [*MIXED, *SQUARES], ids=name)
def test_forward_of_any_shape(s, dtype, gpu):
    turn = sum(s)
    check_forward(s, (1, 5, 19, 40)[turn % 4], dtype, "cuda", turn)


@machines
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_forward_of_few_tokens(tokens, dtype, gpu):
    check_forward(PRESETS["21x attention"], tokens, dtype, "cuda", 1)
    check_forward(PRESETS["21x up"], tokens, dtype, "cuda", 2)


@machines
def test_three_products_of_one_x(dtype, gpu):
    s = PRESETS["21x attention"]
    check_qkv(s, 19, dtype, "cuda")
    assert len(gpu.launches) == 1


# How a launch is cut depends on the GPU: columns divided among many multiprocessors, and a part of
# the left operand at a time where shared memory is short.
CUT = [PRESETS["8x attention"], PRESETS["8x down"], PRESETS["21x up"], SUMS[1]]
GPUS = [{"multiprocessors": 132}, {"shared": 49152}, {"multiprocessors": 40, "shared": 40000}]


@pytest.mark.parametrize(("more", "s"), in_turns([(more,) for more in GPUS], CUT))
def test_on_another_gpu(s, more):
    with CudaDevice(80, **more):
        check_forward(s, 35, torch.float16, "cuda", 1)
        check_gradients(s, 19, torch.float16, "cuda")


@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize("s", [PRESETS["21x attention"], PRESETS["21x up"]], ids=name)
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
        hold("y", y, expected, terms(s), dtype)


@machines
@pytest.mark.parametrize("s", [*PRESETS.values(), *slow(zip(SUMS))], ids=name)
def test_gradients_of_the_presets(s, dtype, gpu):
    check_gradients(s, 35, dtype, "cuda")


@machines
@pytest.mark.parametrize("s", [*MIXED, *SQUARES], ids=name)
def test_gradients_of_any_shape(s, dtype, gpu):
    check_gradients(s, (1, 21, 70)[sum(s) % 3], dtype, "cuda")


@machines
@pytest.mark.parametrize(("up", "down"), PAIRS.values(), ids=PAIRS)
def test_feed_forward_of_the_presets(up, down, gpu, dtype):
    check_feed_forward(up, down, 35, dtype, "gelu", "cuda")
    assert any("feed_forward_backward" in launch.name for launch in gpu.launches)


@machines
@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_feed_forward_of_odd_shapes(tokens, gpu, dtype):
    up, down = KronShape(5, 3, 7, 9), KronShape(3, 5, 11, 7)
    activation = ACTIVATIONS[1 + tokens % 4]
    check_feed_forward(up, down, tokens, dtype, activation, "cuda", tokens > 1, meets=False)
