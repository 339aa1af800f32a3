"""CUDA C++ kernels: their sources compiled for the host, and run by an emulator of the GPU.

Its threads and blocks run in a drawn order. test_cuda_sanitized.py runs this file again under
sanitizers, test_cuda_ptx.py executes what nvcc makes of the same sources.
"""

import random
import re
from pathlib import Path

import emulator
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from turns import in_turns

from benchmarks.gpu.cases import (
    ACTIVATIONS,
    DTYPES,
    MIXED,
    PAIRS,
    PRESETS,
    SHAPES,
    SUMS,
    draw,
    name,
)
from benchmarks.gpu.checks import check_feed_forward, check_forward, check_gradients, hold, terms
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

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=str(emulator.why_not()))

LAYERS = [PRESETS[layer] for layer in ("8x attention", "21x attention", "21x up")]
SMALL = 101376  # bytes of shared memory that a block may have on sm_86, 89 and 120
LARGE = 232448  # on sm_90 and 100


@pytest.fixture(autouse=True)
def gpu(monkeypatch, request):
    """The emulated GPU, CPU tensors on it, and an order of threads drawn for each test."""
    emulated = emulator.load()
    monkeypatch.setattr(cuda, "_native", emulated.native)
    monkeypatch.setattr(cuda, "simulating", True)
    forget()
    emulated.seed(1 + sum(map(ord, request.node.name)))
    yield emulated
    emulated.device()
    emulated.seed(0)
    forget()


def forget():
    for answers in (cuda._usable, cuda._unserved, cuda._fuses):
        answers.cache_clear()


every_dtype = pytest.mark.parametrize("dtype", DTYPES, indirect=True)


def launched(gpu, call) -> list[str]:
    """The kernels that a call launches, which are not run."""
    names = []
    with gpu.intercept(lambda kernel, *_: names.append(kernel)):
        call()
    return names


# --- forward


@every_dtype
@pytest.mark.parametrize("tokens", [1, 5, 19, 200])
@pytest.mark.parametrize("s", MIXED, ids=name)
def test_forward_in_every_order_dtype_and_epilogue(s, tokens, dtype, request):
    check_forward(s, tokens, dtype, "cuda", sum(map(ord, request.node.name)) + sum(s))


@every_dtype
@pytest.mark.parametrize("s", [*PRESETS.values(), *SUMS], ids=name)
def test_forward_of_the_presets(s, dtype, request):
    turn = sum(map(ord, request.node.name))
    check_forward(s, (3, 16, 45)[turn % 3], dtype, "cuda", turn)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_products_and_their_gradients(seed, gpu):
    """Any sides, ranks, tokens, dtypes and epilogues, on GPUs of any size."""
    draws = random.Random(seed)
    s = KronShape(*(draws.choice([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 40, 72]) for _ in range(4)))
    s = s._replace(rank=draws.choice([1, 1, 2, 3, 9]))
    gpu.device(draws.choice([1, 2, 40]), draws.choice([SMALL, LARGE]))
    tokens = draws.choice([1, 2, 7, 33, 130])
    dtype = draws.choice([torch.float16, torch.bfloat16, torch.float32])
    x, a, b = draw(s, 1, dtype)
    if reason := cuda.why_not(x, a, b):
        with pytest.raises(ValueError, match="sides of 64"):
            kron_matmul(x, a, b, backend="cuda")
        assert min(s.m1, s.n1, s.m2, s.n2) > 1 and "mix" in reason
        return
    check_forward(s, tokens, dtype, "cuda", seed)
    check_gradients(s, tokens, dtype, "cuda")


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    "s",
    [*LAYERS, SHAPES[3], SHAPES[8]],
    ids=name,
)
@pytest.mark.parametrize("what", ["x", "a", "b", "bias", "residual", "dy"])
def test_operands_that_are_not_aligned(what, s, tokens):
    """A storage offset of one number: no 16 bytes can be read together."""

    def moved(label, t):
        if label != what:
            return t
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    x, a, b = (moved(*t) for t in zip("xab", draw(s, tokens, torch.float16), strict=True))
    bias = moved("bias", torch.randn(s.out_features).half())
    residual = moved("residual", torch.randn(tokens, s.out_features).half())
    y = kron_matmul(x, a, b, bias=bias, residual=residual, backend="cuda")
    expected = reference.kron_matmul(x, a, b, bias=bias, residual=residual)
    hold("y", y, expected, terms(s), torch.float16)
    dy = moved("dy", torch.randn(tokens, s.out_features).half())
    grads = cuda.kron_matmul_backward(dy, x, a, b, [True] * 3)
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    others = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())
    for grad, other in zip(grads, others, strict=True):
        hold("gradient", grad, other, tokens * (terms(s) + s.m1 + s.m2), torch.float16)


@pytest.mark.parametrize("s", [SHAPES[2], PRESETS["21x attention"]], ids=name)
def test_rows_that_are_not_contiguous(s):
    x, a, b = draw(s, 40, torch.float16)
    wide = torch.cat([x, x], 1)
    for rows in (wide[:, : s.in_features], x.T.contiguous().T, x[:1].expand(5, -1), x.flip(0)):
        y = kron_matmul(rows, a, b, backend="cuda")
        hold("y", y, reference.kron_matmul(rows, a, b), terms(s), torch.float16)


def test_no_tokens_is_no_launch(gpu):
    for s in MIXED[:4]:
        x, a, b = draw(s, 0, torch.float16)
        call = lambda x=x, a=a, b=b: kron_matmul(x, a, b, backend="cuda")  # noqa: E731
        assert launched(gpu, call) == [] and call().shape == (0, s.out_features)
        grads = cuda.kron_matmul_backward(x.new_empty(0, s.out_features), x, a, b, [True] * 3)
        for g, t in zip(grads, (x, a, b), strict=True):
            assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("s", MIXED[:10], ids=name)
def test_a_nan_stays_in_its_token(s, tokens):
    x, a, b = draw(s, tokens, torch.float16)
    x[2] = torch.nan
    y = kron_matmul(x, a, b, backend="cuda")
    assert y[2].isnan().all() and not y[[0, 1, *range(3, tokens)]].isnan().any()


@pytest.mark.parametrize("tokens", [2, 19])
@pytest.mark.parametrize("s", [PRESETS["21x attention"], SHAPES[7]], ids=name)
def test_three_products_of_one_x_in_one_launch(s, tokens, gpu):
    x, _, _ = draw(s, tokens, torch.float16)
    layers = []
    for i in range(3):
        _, a, b = draw(s, 1, torch.float16)
        bias = torch.randn(s.out_features).half() if i != 1 else None
        layers.append((a.roll(i, 1), b.roll(i, 2), bias))
    assert len(launched(gpu, lambda: kron_qkv(x, *layers, backend="cuda"))) == 1
    ys = kron_qkv(x, *layers, backend="cuda")
    for y, (a, b, bias) in zip(ys, layers, strict=True):
        hold("y", y, reference.kron_matmul(x, a, b, bias=bias), terms(s), torch.float16)


def test_products_that_differ_take_a_launch_each(gpu):
    first, second = KronShape(6, 4, 10, 3), KronShape(5, 6, 8, 2)
    x, a, b = draw(first, 9, torch.float32)
    _, c, d = draw(second, 1, torch.float32)
    layers = (a, b, None), (c, d, None), (c.mT.contiguous().mT, d, None)
    assert len(launched(gpu, lambda: kron_qkv(x, *layers, backend="cuda"))) == 3
    for y, (p, q, _) in zip(kron_qkv(x, *layers, backend="cuda"), layers, strict=True):
        hold("y", y, reference.kron_matmul(x, p, q), terms(first), torch.float32)


# --- gradients


@every_dtype
@pytest.mark.parametrize("s", MIXED, ids=name)
def test_gradients_in_every_order_and_dtype(s, dtype, request):
    turn = sum(map(ord, request.node.name))
    check_gradients(s, (1, 21, 170)[turn % 3], dtype, "cuda")


DTYPE = [(dtype,) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("dtype", "s"),
    [*in_turns(DTYPE, PRESETS.values(), each=len(DTYPE)), *in_turns(DTYPE, SUMS)],
    indirect=["dtype"],
)
def test_gradients_of_the_presets(s, dtype):
    check_gradients(s, 45, dtype, "cuda")


def test_gradients_are_the_same_bits_whatever_the_schedule(gpu):
    s = SHAPES[3]
    x, a, b = draw(s, 150, torch.float16)
    dy = torch.randn(150, s.out_features).half()
    runs = []
    for seed in (1, 2):
        gpu.seed(seed)
        runs.append(cuda.kron_matmul_backward(dy, x, a, b, [True] * 3))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["dx", "da", "db"])
@pytest.mark.parametrize("s", [SHAPES[2], SHAPES[5]], ids=name)
def test_only_the_gradients_that_are_needed(s, needed, gpu):
    operands = draw(s, 30, torch.float32)
    for t, n in zip(operands, needed, strict=True):
        t.requires_grad_(bool(n))
    kron_matmul(*operands, backend="cuda").sum().backward()
    assert [t.grad is not None for t in operands] == [bool(n) for n in needed]
    backward = cuda.kron_matmul_backward
    call = lambda: backward(torch.ones(30, s.out_features), *operands, needed)  # noqa: E731
    assert len(launched(gpu, call)) == (1 if needed[0] else 2)  # a kernel, and sums of its parts


@pytest.mark.parametrize("training", [False, True])
def test_a_compiler_keeps_the_kernels_in_one_graph(training):
    s = SHAPES[2]
    operands = [t.requires_grad_(training) for t in draw(s, 5, torch.float32)]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def call(*operands):
        return kron_matmul(*operands, activation="gelu", backend="cuda")

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y = torch.compile(call, fullgraph=True, backend=compiler)(*operands)
    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = reference.kron_matmul(*wide, activation="gelu")
    hold("y", y, expected, terms(s), torch.float32)
    assert len(graphs) == 1 and "kron_kernels.kron_matmul" in graphs[0]
    if training:
        grads = torch.autograd.grad(y.sum(), operands)
        assert "kron_kernels.kron_matmul_backward" in graphs[1]
        for grad, other in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
            hold("gradient", grad, other, 5 * terms(s) * s.m1 * s.m2, torch.float32)


# --- feed-forward

FEED_FORWARDS = {
    "plain": (KronShape(4, 2, 12, 24), KronShape(2, 4, 24, 12)),
    "odd": (KronShape(5, 2, 7, 9), KronShape(1, 5, 11, 7)),
    "wide": (KronShape(7, 1, 130, 72), KronShape(2, 7, 200, 130)),
    "8x": PAIRS["8x"],
    "21x": PAIRS["21x"],
}


@every_dtype
@pytest.mark.parametrize("shapes", FEED_FORWARDS.values(), ids=FEED_FORWARDS)
def test_feed_forward_and_its_gradients(shapes, dtype, request):
    turn = sum(map(ord, request.node.name))
    activation = ACTIVATIONS[1 + turn % 4]
    tokens = (17, 33, 70)[turn % 3]
    check_feed_forward(*shapes, tokens, dtype, activation, "cuda", bias=bool(turn % 3))


@pytest.mark.parametrize("shared", [SMALL, LARGE])
def test_feed_forward_on_gpus_of_little_and_much_shared_memory(shared, gpu):
    gpu.device(2, shared)
    check_feed_forward(*PAIRS["8x"], 70, torch.float16, "gelu", "cuda")


def test_a_few_tokens_go_through_the_block_in_two_launches(gpu):
    """Each spread over the GPU; fused, one block would do it all."""
    (up, down), few = PAIRS["21x"], cuda.FEW_TOKENS
    for tokens, count in ((few, 2), (few + 1, 1)):
        x, a1, b1 = draw(up, tokens, torch.float16)
        _, a2, b2 = draw(down, 1, torch.float16)
        layers = (a1, b1, None), (a2, b2, None)
        call = lambda x=x, layers=layers: kron_feed_forward(x, *layers, backend="cuda")  # noqa: E731
        assert len(launched(gpu, call)) == count
        hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
        expected = reference.kron_matmul(hidden, a2, b2)
        hold("y", call(), expected, terms(up) + terms(down), torch.float16)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4)),  # they mix on the right
        (KronShape(4, 3, 12, 24), KronShape(3, 4, 24, 12)),  # three vectors
        (KronShape(4, 2, 12, 24, 2), KronShape(2, 4, 24, 12, 2)),  # sums
    ],
)
def test_a_feed_forward_that_does_not_meet_goes_in_two_launches(up, down):
    x, a1, b1 = draw(up, 30, torch.float32)
    _, a2, b2 = draw(down, 5, torch.float32)
    assert not cuda.fuses((a1, b1, None), (a2, b2, None))
    y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend="cuda")
    hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
    hold("y", y, reference.kron_matmul(hidden, a2, b2), terms(up) + terms(down), torch.float32)


# --- launches


@pytest.mark.parametrize("tokens", [17, 300])
@pytest.mark.parametrize("shape", [(1, SMALL // 2), (2, SMALL), (500, LARGE)], ids=str)
@pytest.mark.parametrize("s", [PRESETS["8x attention"], PRESETS["21x up"], SUMS[1]], ids=name)
def test_tiles_follow_the_gpu(s, shape, tokens, gpu):
    gpu.device(*shape)
    x, a, b = draw(s, tokens, torch.float32)
    y = kron_matmul(x, a, b, backend="cuda")
    hold("y", y, reference.kron_matmul(x, a, b), terms(s), torch.float32)


def test_every_kernel_that_is_compiled_is_launched(gpu):
    seen = set()

    def everything(dtype):
        for tokens in (1, 4, 40):
            x, a, b = draw(SHAPES[2], tokens, dtype)
            kron_matmul(x, a, b, backend="cuda")
        cuda.kron_matmul_backward(x.new_ones(40, SHAPES[2].out_features), x, a, b, [True] * 3)
        up, down = FEED_FORWARDS["plain"]
        x, a1, b1 = draw(up, 40, dtype)
        _, a2, b2 = draw(down, 1, dtype)
        layers = (a1, b1, None), (a2, b2, None)
        y = kron_feed_forward(x, *layers, backend="cuda")
        cuda.kron_feed_forward_backward(y, x, layers[0], "gelu", layers[1], [True] * 6)

    for math in DTYPES:
        torch.set_float32_matmul_precision("high" if math == "tf32" else "highest")
        kind = torch.float32 if math == "tf32" else getattr(torch, math)
        seen.update(launched(gpu, lambda kind=kind: everything(kind)))
    torch.set_float32_matmul_precision("highest")
    source = (Path(__file__).parents[2] / "csrc/cuda/kernels.cu").read_text()
    kernels = re.findall(r"^KRON_KERNEL\(KRON_NAME\((\w+)\)", source, re.M)
    assert seen == {f"kron_{kernel}_{math}" for kernel in kernels for math in DTYPES}


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
    assert dispatch.choose("auto", x, (a, b)) == "eager"  # on meta nothing else serves


def test_the_first_in_order_that_can_serves(monkeypatch):
    x, a, b = operands()
    monkeypatch.setattr(dispatch, "_order", lambda *_: ("triton", "cuda"))
    assert "x is on cpu" in dispatch.why_not("triton", x, a, b)
    assert dispatch.choose("auto", x, (a, b)) == "cuda"


# --- what goes wrong


def operands(tokens=40, dtype=torch.float16):
    return draw(SHAPES[2], tokens, dtype)


@pytest.mark.parametrize("tokens", [5, 40])
def test_without_memory_nothing_is_launched_and_the_next_call_is_right(tokens, gpu, monkeypatch):
    x, a, b = operands(tokens)
    new_empty, full = torch.Tensor.new_empty, [True]

    def allocate(*sizes, **more):
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return new_empty(*sizes, **more)

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)

    def refused():
        with pytest.raises(torch.OutOfMemoryError):
            kron_matmul(x, a, b, backend="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            cuda.kron_matmul_backward(x, x, a, b, [True] * 3)

    assert launched(gpu, refused) == []
    full[0] = False
    y = kron_matmul(x, a, b, backend="cuda")
    hold("y", y, reference.kron_matmul(x, a, b), terms(SHAPES[2]), torch.float16)


def test_a_launch_that_fails_says_why(gpu):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        gpu.intercept(lambda *_: "out of memory"),
    ):
        kron_matmul(*operands(), backend="cuda")
    gpu.device(2, 1000)
    with pytest.raises(RuntimeError, match="shared memory"):
        kron_matmul(*operands(), backend="cuda")


def test_another_gpu_is_asked_for_by_its_index(gpu):
    x, a, b = operands()
    y = x.new_empty(40, SHAPES[2].out_features)
    product = abi.product((a, b), None, None, None, y)
    with pytest.raises(RuntimeError, match="GPU 3"):
        gpu.native.cuda_forward(3, 0, 0, abi.DTYPES[x.dtype], 40, x.data_ptr(), 1, *product)
    assert "GPU 3" in gpu.native.cuda_why_not(3) and gpu.native.cuda_why_not(0) is None
    with pytest.raises(ValueError, match="factor 0 is on meta but x is on cpu"):
        kron_matmul(x, a.to("meta"), b, backend="cuda")


def test_a_graph_can_capture_a_call():
    """Of CUDA's functions those are called that capturing allows: nothing allocates or waits."""
    source = (Path(__file__).parents[2] / "csrc/cuda/runtime.cpp").read_text()
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\(", source)) == {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaLaunchKernel",
        "cudaSetDevice",
    }


def test_the_c_interface_refuses_what_it_cannot_do(gpu):
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
def test_what_it_does_not_serve_is_refused_with_the_reason(call, reason):
    x, *factors = call()
    assert reason in explain_backends(x, *factors).splitlines()[0]
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        kron_matmul(x, *factors, backend="cuda")


def test_without_kernels_or_a_gpu_the_reason_has_the_remedy(monkeypatch):
    x, a, b = operands(3)
    monkeypatch.setattr(cuda, "_native", None)
    monkeypatch.setattr(abi, "missing", "the compiled module is missing; reinstall it")
    assert dispatch.why_not("cuda", x, a, b).endswith("kernels for GPUs need CUDA's nvcc as well")
    monkeypatch.setattr(cuda, "simulating", False)
    assert "x is on cpu" in dispatch.why_not("cuda", x, a, b)
