"""Programs that only a GPU runs: CUDA graphs, streams, Inductor, much memory, and too little."""

import pytest
import torch
import torch.nn.functional as F
from machines import ON_GPU, cases, machines, on

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.testing.cases import PAIRS, PRESETS, draw
from kron_kernels.testing.checks import (
    check_gradients,
    close,
    hold,
    hold_gradients,
    oracle,
    same,
    terms,
    wide,
)

on_both_engines = machines()
HALF = torch.float16


# --- modules, which choose the engine themselves


@pytest.mark.gpu
def test_chunked_cross_entropy(gpu_device):
    table = KroneckerEmbedding(1000, 96, 8, device=gpu_device)
    table.reset_parameters(0.1)
    h = torch.randn(3, 700, 96, device=gpu_device).requires_grad_()  # three chunks
    labels = torch.randint(0, 1000, (3, 700), device=gpu_device)
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


@pytest.mark.gpu
def test_torch_compile_of_modules(gpu_device):
    pytest.importorskip("triton", reason="on a GPU torch.compile needs Triton")
    torch._dynamo.reset()
    new = {"device": gpu_device, "dtype": torch.bfloat16}
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


# --- CUDA graphs and streams


def replay_and_compare(run, change, rtol=0.0):
    """Require that a replayed graph agrees with plain calls, after changes of the inputs too."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # PyTorch asks for a warm-up before a capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for i in range(3):
        change()
        graph.replay()
        torch.cuda.synchronize()
        for j, (got, expected) in enumerate(zip(results, run(), strict=True)):
            close(f"replay {i}, result {j}", got, expected, rtol)


@on_both_engines
def test_a_cuda_graph_of_inference(machine):
    s, (up, down), engine = PRESETS["21x attention"], PAIRS["21x"], machine.engine
    x, a, b = machine.draw(s, 35, HALF)
    first, second = machine.layer(up, HALF), machine.layer(down, HALF)
    table = KroneckerEmbedding(41, 48, 8, device="cuda", dtype=HALF).requires_grad_(False)
    ids = torch.randint(0, 41, (19,), device="cuda")

    def run():
        return [
            kron_matmul(x, a, b, activation="gelu", backend=engine),
            kron_feed_forward(x, first, second, backend=engine),
            *kron_qkv(x, *[(a, b, None)] * 3, backend=engine),
            table(ids),
        ]

    replay_and_compare(run, lambda: (x.normal_(), a.normal_(0, 0.05), ids.random_(0, 41)))
    hold("y", run()[0], oracle(x, a, b, activation="gelu"), terms(s), HALF)


@on_both_engines
def test_a_cuda_graph_of_training(machine):
    s, (up, down), engine = PRESETS["8x attention"], PAIRS["8x"], machine.engine
    x, a, b = (t.requires_grad_() for t in machine.draw(s, 35, HALF))
    first, second = machine.layer(up, HALF), machine.layer(down, HALF)
    leaves = [x, a, b, *(t.requires_grad_() for t in (*first, *second))]
    dy = machine.noise(HALF, 35, down.out_features)

    def run():
        hidden = kron_matmul(x, a, b, backend=engine)
        y = kron_feed_forward(hidden, first, second, backend=engine)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    @torch.no_grad()
    def change():
        x.normal_()
        dy.normal_()
        first[0].mul_(0.9)

    # Some gradients are PyTorch's products, which may take other algorithms in a graph.
    replay_and_compare(run, change, rtol=4e-3)


@on_both_engines
def test_a_side_stream(machine):
    """A kernel on the default stream would read x before it is written."""
    s = PRESETS["8x up"]
    x, a, b = machine.draw(s, 300, HALF)
    source = torch.randn_like(x)
    kron_matmul(x, a, b, backend=machine.engine)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles
        x.copy_(source)
        y = kron_matmul(x, a, b, backend=machine.engine)
        grads = machine.kernels.kron_matmul_backward(y, x, a, b, [True] * 3)
    stream.synchronize()
    hold("y", y, oracle(source, a, b), terms(s), HALF)
    same("gradients", grads, machine.kernels.kron_matmul_backward(y, source, a, b, [True] * 3))


@on_both_engines
def test_a_second_gpu_while_the_first_is_current(machine):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    s = PRESETS["21x up"]
    x, a, b = (t.to("cuda:1").requires_grad_() for t in draw(s, 35, HALF))
    dy = torch.randn(35, s.out_features).to("cuda:1", HALF)
    y = kron_matmul(x, a, b, backend=machine.engine)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    assert torch.cuda.current_device() == 0
    hold("y", y, oracle(x, a, b), terms(s), HALF)
    hold_gradients(s, (x, a, b), dy, grads, HALF)


# --- memory


def needs_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] / 1e9 < gigabytes:
        pytest.skip(f"needs {gigabytes:.3g} GB of free GPU memory")


@cases(
    "s backward",
    [
        on(gpu, s, backward)
        for gpu in ON_GPU
        for s, backward in (
            (PRESETS["8x up"], False),  # y has more than 2^31 entries
            (PRESETS["8x down"], False),  # x has
            (PRESETS["8x down"], True),
        )
    ],
)
def test_more_than_32_bits_of_entries(machine, s, backward):
    """Seen at the first and the last rows."""
    tokens = 2**31 // max(s.in_features, s.out_features) + 1000
    size = 2e-9 * tokens * (s.in_features + s.out_features)
    needs_memory((2.2 if backward else 1.2) * size + 1)
    _, a, b = machine.draw(s, 1, HALF)
    x = torch.randn(tokens, s.in_features, device="cuda", dtype=HALF)
    ends = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device="cuda")
    y = kron_matmul(x, a, b, backend=machine.engine)
    hold("y", y[ends], oracle(x[ends], a, b), terms(s), HALF)
    assert not y[-5000:].isnan().any() and not y[:5000].isnan().any()
    if not backward:
        return
    # Only the ends have gradients, hence the factors' gradients are those of the ends.
    y.zero_()
    y[ends] = machine.noise(HALF, 5, s.out_features)
    dx, da, db = machine.kernels.kron_matmul_backward(y, x, a, b, [True] * 3)
    exact = wide((x[ends], a, b))
    expected = torch.autograd.grad(reference.kron_matmul(*exact), exact, y[ends].cpu().double())
    for label, g, other in zip(("dx", "da", "db"), (dx[ends], da, db), expected, strict=True):
        scale = other.square().mean().sqrt().item() + 1
        hold(label, g, other, 5 * (s.m1 + s.m2 + terms(s)), HALF, scale=scale)


@machines(gpus=ON_GPU[:1])
def test_a_lookup_of_more_than_32_bits_of_entries(machine):
    size, columns = 8, 96
    tokens = 2**31 // (size * columns) + 1000
    needs_memory(1.2 * 2e-9 * tokens * size * columns + 1)
    table = KroneckerEmbedding(1000, size * columns, size, device="cuda", dtype=HALF)
    ids = torch.randint(0, 1000, (tokens,), device="cuda")
    with torch.no_grad():
        y = table(ids)
    ends = torch.tensor([0, tokens // 2, tokens - 1], device="cuda")
    dense = reference.materialize(*(t.detach().cpu().double() for t in (table.a, table.b)))
    hold("rows", y[ends], dense[ids[ends].cpu()], 1, HALF)


@on_both_engines
def test_out_of_memory_is_raised_and_the_next_calls_are_right(machine):
    s = PRESETS["8x up"]
    x, a, b = machine.draw(s, 2**17, HALF)
    dy = torch.randn(2**17, s.out_features, device="cuda").to(HALF)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + 2**26) / total  # y takes 768 MB, dx 192 MB
        )
        with pytest.raises(torch.OutOfMemoryError):
            kron_matmul(x, a, b, backend=machine.engine)
        with pytest.raises(torch.OutOfMemoryError):
            machine.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    y = kron_matmul(x, a, b, backend=machine.engine)
    hold("y", y[-35:], oracle(x[-35:], a, b), terms(s), HALF)
    check_gradients(s, 35, HALF, machine.engine, "cuda")
