"""Our Triton kernels and LyCORIS's: counts of few tokens carried over to many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from lycoris.kernels import tuner as lycoris_tuner
from lycoris.kernels.triton.lokr import apply, gemm, grad
from simulator import Launch, SimulationError

from benchmarks.gpu.devices import DEVICES
from benchmarks.gpu.side_by_side.costs import Part, bounded, operation_part, totals
from benchmarks.gpu.side_by_side.mill import GPUS, SHARED, Kernel, Mill, Operation
from benchmarks.gpu.side_by_side.works import SIMULATED, TOKENS, Call, Work, errors
from benchmarks.gpu.static import Static, static_report
from kron_kernels.backends.triton import configs as triton_launch


@lru_cache(maxsize=512)
def _static(cubin: bytes, arch: int, num_warps: int, shared: int) -> Static:
    return static_report({"cubin": cubin}, arch, num_warps, shared)


def carried_over(runs: list[tuple[int, Launch]], target: Launch) -> tuple[Counter, Counter]:
    """Instructions and traffic of the target's grid, from a run or two of other token counts.

    A count is ``c = α programs + β tokens``. Where the programs grow with the tokens one run tells.
    """
    (tokens, first), *more = runs
    programs = math.prod(first.grid), math.prod(target.grid)
    if not more:
        times = TOKENS / tokens
        return tuple(
            Counter({k: round(v * times) for k, v in getattr(first, kind).items()})
            for kind in ("instructions", "traffic")
        )
    ((tokens2, second),) = more
    programs2 = math.prod(second.grid)
    determinant = programs[0] * tokens2 - programs2 * tokens

    def solve(kind: str) -> Counter:
        one, two = getattr(first, kind), getattr(second, kind)
        found = Counter()
        for k in one | two:
            alpha = (one[k] * tokens2 - two[k] * tokens) / determinant
            beta = (programs[0] * two[k] - programs2 * one[k]) / determinant
            found[k] = round(alpha * programs[1] + beta * TOKENS)
        return found

    return solve("instructions"), solve("traffic")


def kernel_part(arch: int, dry: Kernel, runs: list[tuple[int, Kernel]]) -> Part:
    """The bound of one launch at ``TOKENS`` tokens."""
    launch = dry.launch
    static = _static(launch.asm["cubin"], arch, launch.num_warps, launch.shared)
    counts = carried_over([(t, k.launch) for t, k in runs], launch)
    return bounded(arch, launch, static, *counts, dry.bytes)


@contextmanager
def pretending(arch: int, units: int) -> Iterator[None]:
    """Both sides believe in the GPU, with so many multiprocessors.

    None means none to keep busy: the largest tiles, and tokens shared by the fewest programs. So
    few tokens are laid out as ``TOKENS`` would be.
    """
    info = replace(lycoris_device(arch), units=units)
    with ExitStack() as stack:
        ours = triton_launch.Device("simulated", units, SHARED[arch])
        stack.enter_context(patch.object(triton_launch, "SIMULATED", ours))
        stack.enter_context(patch.object(triton_launch, "simulating", True))
        for module in (apply, gemm, grad):
            stack.enter_context(patch.object(module, "device_info", lambda _: info))
        yield


def run(call: Call, case: Work, arch: int, tokens: int, **options: bool) -> tuple[Mill, Any]:
    """One run: executed on few tokens, only compiled at ``TOKENS``."""
    dry = tokens == TOKENS
    mill = Mill(arch, execute=not dry, **options)
    with torch.no_grad(), pretending(arch, DEVICES[GPUS[arch]].sms if dry else 0):
        operands = case.operands(tokens, "meta" if dry else "cpu")
        with mill:
            result = call(*operands)
    return mill, result


def weigh(call: Call, case: Work, arch: int, checks: bool = False) -> tuple[list[Part], Any]:
    """The parts of a call, and its result of the first run."""
    dry, _ = run(call, case, arch, TOKENS)
    first, result = run(call, case, arch, SIMULATED[0], checks=checks)
    runs = [(SIMULATED[0], first)]

    def proportional(small: Kernel | Operation, large: Kernel | Operation) -> bool:
        if isinstance(small, Operation):
            return True
        grids = math.prod(small.launch.grid), math.prod(large.launch.grid)
        return grids[0] * TOKENS == grids[1] * SIMULATED[0]

    if not all(map(proportional, first.parts, dry.parts)):
        runs.append((SIMULATED[1], run(call, case, arch, SIMULATED[1], checks=checks)[0]))
    parts = []
    for i, part in enumerate(dry.parts):
        if isinstance(part, Operation):
            parts.append(operation_part(arch, part))
            continue
        same = [(t, mill.parts[i]) for t, mill in runs]
        if any(s.launch.name != part.launch.name for _, s in same):
            raise RuntimeError(f"{case}: other kernels at {TOKENS} tokens than at {SIMULATED}")
        if proportional(same[0][1], part):
            same = same[:1]
        parts.append(kernel_part(arch, part, same))
    return parts, result


def checked(call: Call, case: Work, arch: int, direction: str) -> dict[str, Any]:
    """A side's parts and totals, its result verified and the simulator's findings noted."""
    finding = None
    try:
        parts, result = weigh(call, case, arch, checks=True)
    except SimulationError as error:
        finding = str(error)
        parts, result = weigh(call, case, arch)
    return totals(parts, errors(result, case, direction), finding)


def lycoris_device(arch: int) -> lycoris_tuner.DeviceInfo:
    """The GPU as its planner asks the driver for it."""
    return lycoris_tuner.DeviceInfo(
        kind="cuda",
        arch=f"sm_{arch}",
        name=GPUS[arch],
        index=0,
        units=DEVICES[GPUS[arch]].sms,
        capability=divmod(arch, 10),
        l2_bytes=L2[arch],
        smem=SHARED[arch],
        bf16=True,
        mma=True,
        smem_sm=SHARED[arch] + 1024,
        smem_reserved=1024,
    )


L2 = {80: 40 << 20, 90: 50 << 20}  # bytes: NVIDIA's data sheets
