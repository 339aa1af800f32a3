"""Workloads to time: which, and their times one by one and replayed as a CUDA graph."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.gpu.contenders import (
    ENGINES,
    OURS,
    Contender,
    Step,
    Workload,
    contenders,
    fresh_layer,
)
from benchmarks.gpu.models import model_contenders
from benchmarks.gpu.timing import Gpu
from kron_kernels import dispatch, kron_matmul, reference
from kron_kernels.backends import BACKENDS
from kron_kernels.shapes import KronShape
from kron_kernels.testing.cases import FEED_FORWARDS, PAIRS, PRESETS, SQUARES, name
from kron_kernels.testing.checks import arithmetic
from kron_kernels.timing import Timing


def workloads(quick: bool) -> list[Workload]:
    tokens = (1, 16, 1024, 16384) if quick else (1, 4, 16, 128, 1024, 16384, 65536)
    dtypes = ("float16",) if quick else ("float16", "bfloat16", "tf32")
    products = [(label, (s,)) for label, s in (PRESETS | {name(s): s for s in SQUARES}).items()]
    blocks = list(PAIRS.items())
    triples = [(label, (PRESETS[label],) * 3) for label in ("8x attention", "21x attention")]
    kinds = {
        "forward": products,
        "training": products,
        "block forward": blocks,
        "block training": blocks,
        "qkv forward": triples,
    }
    return [
        Workload(kind, label, shapes, t, dtype)
        for dtype in dtypes
        for kind, layers in kinds.items()
        for label, shapes in layers
        for t in tokens
    ]


LAYERS = {label: (s,) for label, s in PRESETS.items()}
SIZES = ((1, 16), (1, 128), (32, 128), (64, 512))  # batch, tokens of a sequence


def shown() -> list[Workload]:
    """What the README would show, for a run with a limited time: the most telling first."""
    kinds: list[tuple[str, dict[str, tuple[KronShape, ...]]]] = [
        ("forward", LAYERS),
        ("block forward", PAIRS),
        ("model forward", dict.fromkeys(("8x", "21x"), ())),
        ("model training", dict.fromkeys(("8x", "21x"), ())),
        ("block training", PAIRS),
        ("training", LAYERS),
    ]
    return [
        Workload(kind, label, shapes, batch * length, dtype, 0 if shapes else length)
        for dtype in ("bfloat16", "float16")
        for kind, layers in kinds
        for label, shapes in layers.items()
        for batch, length in SIZES
    ]


def simulated() -> list[Workload]:
    """A small one of every kind, for the simulator."""
    up, down = FEED_FORWARDS[0]
    return [
        Workload("model forward", "21x", (), 10, "float16", 5),
        Workload("forward", "small", (up,), 5, "float16"),
        Workload("block forward", "small", (up, down), 5, "float16"),
        Workload("qkv forward", "small", (up,) * 3, 5, "float16"),
        Workload("block training", "small", (up, down), 5, "float16"),
        Workload("training", "small", (up,), 5, "float16"),
    ]


def made_by(workload: Workload) -> Callable[..., dict[str, Contender]]:
    return model_contenders if workload.kind.startswith("model") else contenders


def compile_workload(workload: Workload, gpu: Gpu) -> dict[str, str]:
    """Call every contender once and check it, which compiles what it needs, before any clock.

    Returns:
        The contenders that are left out, with their reasons.
    """
    left_out: dict[str, str] = {}
    torch._dynamo.reset()
    with arithmetic(workload.dtype) as dtype:
        made = made_by(workload)(workload, gpu.device, dtype, left_out)
        checked({key: [contender] for key, contender in made.items()}, left_out)
    return left_out


def time_workload(workload: Workload, gpu: Gpu) -> dict[str, Any]:
    """Microseconds of each contender: of its calls one by one, and replayed as a CUDA graph.

    A contender that is missing, wrong or refuses is left out, with the reason. If one of ours is
    wrong, it raises.
    """
    left_out: dict[str, str] = {}
    torch._dynamo.reset()  # of other shapes; its limit of recompilations is per function
    is_model = workload.kind.startswith("model")
    with arithmetic(workload.dtype) as dtype:
        each, dense = sizes_in_bytes(workload, dtype)
        room = gpu.free_memory() // 3 // max(each + dense, 1)
        sets = 1 if is_model else max(1, min(gpu.rotation(each), room))
        make = made_by(workload)
        prepared = [make(workload, gpu.device, dtype, left_out) for _ in range(sets)]
        calls = checked({key: [p[key] for p in prepared] for key in prepared[0]}, left_out)
        loop = {key: partial(in_turn, steps) for key, steps in calls.items()}
        loop_times = gpu.time(loop, sets, 0.3)
        pool, graphs = gpu.pool(), {}
        # An optimizer's step would need a graph of its own.
        for key, steps in ({} if workload.kind == "model training" else calls).items():
            try:
                graphs[key] = gpu.captured(steps, pool)
            except Exception as error:
                if key in OURS:
                    raise
                left_out[f"{key}, as a graph"] = peers.first_line(error)
        graph_times = gpu.time(graphs, sets, 0.3) if graphs else {}
    return {
        "kind": workload.kind,
        "label": workload.label,
        "tokens": workload.tokens,
        "dtype": workload.dtype,
        "length": workload.length,
        "row": "" if is_model else row_of(workload),
        "sets": sets,
        "larger_than_L2": is_model or sets * each > gpu.cache_size(),
        "left_out": left_out,
        "loop": microseconds(loop_times),
        "graph": microseconds(graph_times),
    }


def row_of(workload: Workload) -> str:
    """The row of dispatch.GPU_ORDER that applies."""
    s = workload.shapes[0]
    sizes = (workload.tokens, s.in_features), (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2)
    operands = [torch.empty(size, device="meta") for size in sizes]
    with patch.object(dispatch, "GPU_ORDER", {row: row for row in dispatch.GPU_ORDER}):
        return dispatch._order(*operands)


def in_turn(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def microseconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    return {key: [float(f"{1e3 * ms:.5g}") for ms in timing] for key, timing in timings.items()}


def sizes_in_bytes(workload: Workload, dtype: torch.dtype) -> tuple[int, int]:
    """Sizes of one set of operands and results, and of its dense weights."""
    if not workload.shapes:  # a model
        return 0, 0
    s, last = workload.shapes[0], workload.shapes[-1]
    sides = s.in_features + sum(k.out_features for k in workload.shapes)
    factors = sum(k.parameters for k in workload.shapes)
    weights = sum(k.in_features * k.out_features for k in workload.shapes)
    if workload.kind.endswith("training"):
        sides += s.in_features + last.out_features
    return (workload.tokens * sides + factors) * dtype.itemsize, weights * dtype.itemsize


def checked(
    calls: dict[str, list[Contender]], left_out: dict[str, str]
) -> dict[str, list[Contender]]:
    """The contenders whose result is right."""
    right = {}
    for key, some in calls.items():
        try:
            some[0].check(some[0]())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if key in OURS:
                raise
            left_out[key] = peers.first_line(error)
        else:
            right[key] = some
    return right


def launch_overhead() -> dict[str, float]:
    """Microseconds of CPU time of a call with one token, without waiting for the GPU."""
    s = PRESETS["21x attention"]
    a, b, bias = fresh_layer(s, "cuda", torch.float16)
    x = torch.randn(1, s.in_features, device="cuda", dtype=torch.float16)
    weight = reference.materialize(a, b)
    again = [t.detach().clone().requires_grad_() for t in (x, a, b, bias)]
    calls = {
        "kron_matmul, backend auto": lambda: kron_matmul(x, a, b, bias=bias),
        "kron_matmul by eager": lambda: kron_matmul(x, a, b, bias=bias, backend="eager"),
        "F.linear": lambda: F.linear(x, weight, bias),
    }
    for engine in ENGINES:
        if BACKENDS[engine].why_not(x, a, b):
            continue
        by = {"backend": engine}
        calls |= {
            f"kron_matmul by {engine}": lambda by=by: kron_matmul(x, a, b, bias=bias, **by),
            f"kron_matmul by {engine}, with gradients": lambda by=by: kron_matmul(
                *again[:3], bias=again[3], **by
            ),
            f"{engine}'s launcher alone": lambda kernels=BACKENDS[engine]: kernels.kron_matmul(
                x, (a, b), bias
            ),
        }
    times = defaultdict(list)
    for _ in range(20):
        for key, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):  # fewer than the GPU's queue holds
                call()
            times[key].append((time.perf_counter() - start) / 100)
    return {key: float(f"{1e6 * sorted(some)[10]:.4g}") for key, some in times.items()}
