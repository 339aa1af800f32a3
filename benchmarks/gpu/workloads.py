"""Workloads to time: which, and their times one by one and replayed as a CUDA graph."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
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
from benchmarks.gpu.timing import Gpu
from kron_kernels import dispatch, kron_matmul, reference
from kron_kernels.backends import BACKENDS
from kron_kernels.testing.cases import PAIRS, PRESETS, SQUARES, name
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


def time_workload(workload: Workload, gpu: Gpu) -> dict[str, Any]:
    """Microseconds of each contender: of its calls one by one, and replayed as a CUDA graph.

    A contender that is missing, wrong or refuses is left out, with the reason. If one of ours is
    wrong, it raises.
    """
    left_out: dict[str, str] = {}
    with arithmetic(workload.dtype) as dtype:
        each, dense = sizes_in_bytes(workload, dtype)
        room = gpu.free_memory() // 3 // (each + dense)
        sets = max(1, min(gpu.rotation(each), room))
        prepared = [contenders(workload, gpu.device, dtype, left_out) for _ in range(sets)]
        calls = checked({key: [p[key] for p in prepared] for key in prepared[0]}, left_out)
        loop = {key: partial(in_turn, steps) for key, steps in calls.items()}
        loop_times = gpu.time(loop, sets, 0.3)
        pool, graphs = gpu.pool(), {}
        for key, steps in calls.items():
            try:
                graphs[key] = gpu.captured(steps, pool)
            except Exception as error:
                if key in OURS:
                    raise
                left_out[f"{key}, as a graph"] = peers.first_line(error)
        graph_times = gpu.time(graphs, sets, 0.3)
    return {
        "kind": workload.kind,
        "label": workload.label,
        "tokens": workload.tokens,
        "dtype": workload.dtype,
        "row": row_of(workload),
        "sets": sets,
        "larger_than_L2": sets * each > gpu.cache_size(),
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
