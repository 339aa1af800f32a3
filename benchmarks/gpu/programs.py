"""Checks of what a GPU's programs do around the kernels: compilers, graphs, streams, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.jobs import NotDone, Place
from benchmarks.gpu.products import gradients
from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.testing.cases import PAIRS, PRESETS, SHAPES, draw
from kron_kernels.testing.checks import (
    close,
    drawn,
    hold,
    hold_gradients,
    layer,
    noise,
    oracle,
    require,
    same,
    terms,
    wide,
)


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
    s, (up, down), dtype = PRESETS["21x attention"], PAIRS["21x"], torch.float16
    x, a, b = drawn(place, s, 35, dtype)
    one, two = (layer(place, side, dtype) for side in (up, down))
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
    s, (up, down), dtype = PRESETS["8x attention"], PAIRS["8x"], torch.float16
    x, a, b = (t.requires_grad_() for t in drawn(place, s, 35, dtype))
    one, two = (layer(place, side, dtype) for side in (up, down))
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
