"""Cells to time, and how: calls one by one, and replayed as a CUDA graph."""

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
from benchmarks.gpu import clocks
from benchmarks.gpu.cases import PAIRS, PRESETS, SQUARES, name
from benchmarks.gpu.checks import arithmetic
from benchmarks.gpu.contenders import OURS, Cell, Contender, Step, contenders, fresh_layer
from benchmarks.gpu.jobs import ENGINES, Job, NotDone, Place, lost
from kron_kernels import dispatch, kron_matmul, reference
from kron_kernels.backends import BACKENDS
from kron_kernels.timing import Timing


def timing_jobs(place: Place) -> list[Job]:
    tokens = (1, 16, 1024, 16384) if place.quick else (1, 4, 16, 128, 1024, 16384, 65536)
    dtypes = ("float16",) if place.quick else ("float16", "bfloat16", "tf32")
    shapes = PRESETS | {name(s): s for s in SQUARES}
    cells = [
        Cell(kind, label, (s,), t, dtype)
        for dtype in dtypes
        for kind in ("forward", "training")
        for label, s in shapes.items()
        for t in tokens
    ]
    cells += [
        Cell(kind, label, pair, t, dtype)
        for dtype in dtypes
        for kind in ("block forward", "block training")
        for label, pair in PAIRS.items()
        for t in tokens
    ]
    cells += [
        Cell("qkv forward", label, (PRESETS[label],) * 3, t, dtype)
        for dtype in dtypes
        for label in ("8x attention", "21x attention")
        for t in tokens
    ]
    jobs = [Job(cell.kind, str(cell), partial(time_cell, cell=cell)) for cell in cells]
    return [Job("overhead", "launch overhead of one call", launch_overhead), *jobs]


NO_CLOCK = "the simulator knows no clock"


def time_cell(place: Place, cell: Cell) -> dict[str, Any]:
    """Microseconds of each contender: of its calls one by one, and replayed as a CUDA graph."""
    place.needs_gpu(NO_CLOCK)
    left_out: dict[str, str] = {}
    with arithmetic(cell.dtype) as dtype:
        each, dense = cell_bytes(cell, dtype)
        room = torch.cuda.mem_get_info()[0] // 3 // (each + dense)
        sets = max(1, min(clocks.rotation(each), room))
        try:
            prepared = [contenders(place, cell, dtype, left_out) for _ in range(sets)]
            calls = checked({key: [p[key] for p in prepared] for key in prepared[0]}, left_out)
            loop = {key: partial(in_turn, steps) for key, steps in calls.items()}
            result = {"loop": microseconds(clocks.by_events(loop, sets, 0.3))}
            pool, graphs = torch.cuda.graph_pool_handle(), {}
            for key, steps in calls.items():
                try:
                    graphs[key] = clocks.captured(steps, pool)
                except Exception as error:
                    if lost(place) or key in OURS:
                        raise
                    left_out[f"{key}, as a graph"] = peers.first_line(error)
            result["graph"] = microseconds(clocks.by_events(graphs, sets, 0.3))
        except torch.OutOfMemoryError:
            raise NotDone("the GPU's memory does not hold it") from None
    cold = sets * each > clocks.cache_size()
    facts = {"kind": cell.kind, "label": cell.label, "tokens": cell.tokens, "dtype": cell.dtype}
    facts["row"] = row_of(cell)
    return facts | {"sets": sets, "larger_than_L2": cold, "left_out": left_out} | result


def row_of(cell: Cell) -> str:
    """Of dispatch.GPU_ORDER, which says who is asked first."""
    s = cell.shapes[0]
    sizes = (cell.tokens, s.in_features), (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2)
    operands = [torch.empty(size, device="meta") for size in sizes]
    with patch.object(dispatch, "GPU_ORDER", {row: row for row in dispatch.GPU_ORDER}):
        return dispatch._order(*operands)


def in_turn(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def microseconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    return {key: [float(f"{1e3 * ms:.5g}") for ms in timing] for key, timing in timings.items()}


def cell_bytes(cell: Cell, dtype: torch.dtype) -> tuple[int, int]:
    """Of one set of operands and results, and of the dense weights beside it."""
    s, last = cell.shapes[0], cell.shapes[-1]
    sides = s.in_features + sum(k.out_features for k in cell.shapes)
    factors = sum(k.parameters for k in cell.shapes)
    weights = sum(k.in_features * k.out_features for k in cell.shapes)
    if cell.kind.endswith("training"):
        sides += s.in_features + last.out_features
    return (cell.tokens * sides + factors) * dtype.itemsize, weights * dtype.itemsize


def checked(
    calls: dict[str, list[Contender]], left_out: dict[str, str]
) -> dict[str, list[Contender]]:
    """Those whose first result is right. One of ours that is wrong raises."""
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


def launch_overhead(place: Place) -> dict[str, float]:
    """Microseconds for which a call of one token keeps the CPU, the GPU not waited for."""
    place.needs_gpu(NO_CLOCK)
    s = PRESETS["21x attention"]
    a, b, bias = fresh_layer(place, s, torch.float16)
    x = torch.randn(1, s.in_features, device=place.device, dtype=torch.float16)
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
