"""Launches of the CUDA C++ kernels: how they are cut, and what happens when something goes wrong.

test_engines.py has the checks of every engine.
"""

import re

import pytest
import torch
from compiling import ROOT
from simulator.cuda import CudaDevice, why_not
from turns import in_turns

from kron_kernels import (
    KronShape,
    dispatch,
    explain_backends,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends import abi, cuda
from kron_kernels.backends import gpu as gpu_backends
from kron_kernels.backends.triton import served
from kron_kernels.testing.cases import (
    DTYPES,
    FEED_FORWARDS,
    PAIRS,
    PRESETS,
    SHAPES,
    SUMS,
    draw,
    name,
)
from kron_kernels.testing.checks import (
    arithmetic,
    check_feed_forward,
    check_forward,
    check_gradients,
    hold,
    terms,
)

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    pytest.mark.parametrize("gpu", ["emulated"], indirect=True),
]

SMALL = 101376  # bytes of shared memory that a block may have on sm_86, 89 and 120
LARGE = 232448  # on sm_90 and 100


def operands(tokens=40, dtype=torch.float16):
    return draw(SHAPES[2], tokens, dtype)


def test_products_that_differ_take_a_launch_each(gpu):
    first, second = KronShape(6, 4, 10, 3), KronShape(5, 6, 8, 2)
    x, a, b = draw(first, 9, torch.float32)
    _, c, d = draw(second, 1, torch.float32)
    layers = (a, b, None), (c, d, None), (c.mT.contiguous().mT, d, None)
    with gpu.recorded() as launches:
        ys = kron_qkv(x, *layers, backend="cuda")
    assert len(launches) == 3
    for y, (p, q, _) in zip(ys, layers, strict=True):
        hold("y", y, reference.kron_matmul(x, p, q), terms(first), torch.float32)


@pytest.mark.parametrize("shared", [SMALL, LARGE])
def test_feed_forward_on_gpus_of_little_and_much_shared_memory(shared, gpu):
    gpu.device(2, shared)
    check_feed_forward(*PAIRS["8x"], 70, torch.float16, "gelu", "cuda")


def test_a_few_tokens_go_through_the_block_in_two_launches(gpu):
    """Each launch spreads over the GPU; the fused kernel would run in one block."""
    (up, down), few = PAIRS["21x"], cuda.FEW_TOKENS
    for tokens, count in ((few, 2), (few + 1, 1)):
        x, a1, b1 = draw(up, tokens, torch.float16)
        _, a2, b2 = draw(down, 1, torch.float16)
        layers = (a1, b1, None), (a2, b2, None)
        with gpu.recorded() as launches:
            y = kron_feed_forward(x, *layers, backend="cuda")
        assert len(launches) == count
        hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
        expected = reference.kron_matmul(hidden, a2, b2)
        hold("y", y, expected, terms(up) + terms(down), torch.float16)


# The GPU decides how a launch is cut: columns are divided among many multiprocessors, and the left
# operand is loaded in parts where shared memory is short.
CUT = [PRESETS["8x attention"], PRESETS["8x down"], PRESETS["21x up"], KronShape(192, 192, 8, 2, 4)]
GPUS = [{"multiprocessors": 132}, {"shared": 49152}, {"multiprocessors": 40, "shared": 40000}]


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
@pytest.mark.parametrize(("size", "s"), in_turns([(size,) for size in GPUS], CUT))
def test_nvccs_kernels_on_gpus_of_other_sizes(s, size):
    with CudaDevice(80, **size):
        check_forward(s, 35, torch.float16, "cuda", 1)
        check_gradients(s, 19, torch.float16, "cuda")


@pytest.mark.parametrize("tokens", [17, 300])
@pytest.mark.parametrize("shape", [(1, SMALL // 2), (2, SMALL), (500, LARGE)], ids=str)
@pytest.mark.parametrize("s", [PRESETS["8x attention"], PRESETS["21x up"], SUMS[1]], ids=name)
def test_tiles_follow_the_gpu(s, shape, tokens, gpu):
    gpu.device(*shape)
    x, a, b = draw(s, tokens, torch.float32)
    y = kron_matmul(x, a, b, backend="cuda")
    hold("y", y, reference.kron_matmul(x, a, b), terms(s), torch.float32)


def test_every_compiled_kernel_is_launched(gpu):
    def launch_all(dtype):
        s, (up, down) = SHAPES[2], FEED_FORWARDS[0]
        for tokens in (1, 4, 40):
            x, a, b = draw(s, tokens, dtype)
            kron_matmul(x, a, b, backend="cuda")
        cuda.kron_matmul_backward(x.new_ones(40, s.out_features), x, a, b, [True] * 3)
        x, a1, b1 = draw(up, 40, dtype)
        _, a2, b2 = draw(down, 1, dtype)
        layers = (a1, b1, None), (a2, b2, None)
        y = kron_feed_forward(x, *layers, backend="cuda")
        cuda.kron_feed_forward_backward(y, x, layers[0], "gelu", layers[1], [True] * 6)

    with gpu.recorded() as launches:
        for math in DTYPES:
            with arithmetic(math) as dtype:
                launch_all(dtype)
    source = (ROOT / "csrc/cuda/kernels.cu").read_text()
    kernels = re.findall(r"^KRON_KERNEL\(KRON_NAME\((\w+)\)", source, re.M)
    assert set(launches) == {f"kron_{kernel}_{math}" for kernel in kernels for math in DTYPES}


@pytest.mark.parametrize(
    ("tokens", "s", "row"),
    [
        (4, PRESETS["8x attention"], "up to 4 tokens"),
        (5, KronShape(16, 16, 48, 48), "both factors over 8 on a side"),
        (5, PRESETS["21x attention"], "16 interleaved vectors"),
        *((5, s, "anything else") for layer, s in PRESETS.items() if layer != "21x attention"),
    ],
)
def test_the_order_of_engines_on_a_gpu(tokens, s, row):
    x, a, b = (t.to("meta") for t in draw(s, (1, tokens), torch.float16))
    assert dispatch._order(x, a, b) == dispatch.GPU_ORDER[row]
    assert dispatch.choose("auto", x, (a, b)) == "eager"  # the only backend for meta tensors


def test_auto_takes_the_first_backend_in_order_that_accepts_the_call(monkeypatch):
    x, a, b = operands()
    monkeypatch.setattr(dispatch, "_order", lambda *_: ("triton", "cuda"))
    monkeypatch.setattr(served, "_without_triton", lambda: "there is no Triton")
    assert dispatch.why_not("triton", x, a, b) == "there is no Triton"
    assert dispatch.choose("auto", x, (a, b)) == "cuda"


# --- what goes wrong


@pytest.mark.parametrize("tokens", [5, 40])
def test_without_memory_nothing_is_launched_and_the_next_call_is_right(tokens, gpu, monkeypatch):
    x, a, b = operands(tokens)
    new_empty, full = torch.Tensor.new_empty, [True]

    def allocate(*sizes, **options):
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return new_empty(*sizes, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)

    with gpu.recorded() as launches:
        with pytest.raises(torch.OutOfMemoryError):
            kron_matmul(x, a, b, backend="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            cuda.kron_matmul_backward(x, x, a, b, [True] * 3)
    assert not launches
    full[0] = False
    y = kron_matmul(x, a, b, backend="cuda")
    hold("y", y, reference.kron_matmul(x, a, b), terms(SHAPES[2]), torch.float16)


def test_a_failed_launch_raises_the_drivers_message(gpu):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        gpu.intercept(lambda *_: "out of memory"),
    ):
        kron_matmul(*operands(), backend="cuda")
    gpu.device(2, 1000)
    with pytest.raises(RuntimeError, match="shared memory"):
        kron_matmul(*operands(), backend="cuda")


def test_a_gpu_that_does_not_exist_is_refused_by_its_index(gpu):
    x, a, b = operands()
    y = x.new_empty(40, SHAPES[2].out_features)
    product = abi.product((a, b), None, None, None, y)
    with pytest.raises(RuntimeError, match="GPU 3"):
        gpu.native.cuda_forward(3, 0, 0, abi.DTYPES[x.dtype], 40, x.data_ptr(), 1, *product)
    assert "GPU 3" in gpu.native.cuda_why_not(3) and gpu.native.cuda_why_not(0) is None
    with pytest.raises(ValueError, match="factor 0 is on meta but x is on cpu"):
        kron_matmul(x, a.to("meta"), b, backend="cuda")


def test_a_graph_can_capture_a_call():
    """The only CUDA functions called are allowed during capture: none allocates or waits."""
    source = (ROOT / "csrc/cuda/runtime.cpp").read_text()
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\(", source)) == {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaLaunchKernel",
        "cudaSetDevice",
    }


def test_the_c_interface_refuses_invalid_arguments(gpu):
    x, a, b = operands()
    forward = gpu.native.cuda_forward
    product = abi.product((a, b), None, None, None, x.new_empty(40, SHAPES[2].out_features))
    code = abi.DTYPES[torch.float16]
    for arguments, message in (
        ((0, 0, 0, abi.DTYPES[torch.float64], 40, x.data_ptr(), 1, *product), "float32, float16"),
        ((0, 0, 0, code, -1, x.data_ptr(), 1, *product), "negative"),
        ((0, 0, 0, code, 40, x.data_ptr(), 0), "products"),
        ((0, 0, 0, code, 40, x.data_ptr(), 1, 0, *product[1:]), "rank must be at least 1"),
        ((0, 0, 0, code, 40, x.data_ptr(), 1, 17, *product[1:]), "sums up to 16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: draw(SHAPES[2], 3, torch.float64), "float64"),
        (lambda: (torch.ones(2, 8), *(torch.ones(2, 2),) * 3), "two factors"),
        (lambda: draw(KronShape(70, 70, 66, 66), 1, torch.float16), "sides of 64"),
        (lambda: draw(KronShape(2, 2, 8, 8, 17), 1, torch.float16), "sums up to 16"),
    ],
    ids=["dtype", "factors", "sizes", "rank"],
)
def test_unsupported_calls_are_refused_with_the_reason(call, reason):
    x, *factors = call()
    assert reason in explain_backends(x, *factors).splitlines()[0]
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        kron_matmul(x, *factors, backend="cuda")


def test_without_kernels_or_a_gpu_the_reason_has_the_remedy(monkeypatch):
    x, a, b = operands(3)
    # The fixtures' own patches must be undone after these.
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_native", None)
        patch.setattr(abi, "missing", "the compiled module is missing; reinstall it")
        reason = dispatch.why_not("cuda", x, a, b)
        assert reason.endswith("kernels for GPUs need CUDA's nvcc as well")
        patch.setattr(gpu_backends, "on_gpu", lambda x: x.is_cuda)
        assert "x is on cpu" in dispatch.why_not("cuda", x, a, b)
