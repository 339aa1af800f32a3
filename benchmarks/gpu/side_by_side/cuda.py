"""Our CUDA C++ kernels: some blocks of the launches of ``TOKENS`` tokens, for all."""

from __future__ import annotations

import heapq
import math
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import emulator
import numpy as np
import torch
from simulator import Launch, SimulationError, cuda
from simulator import launch as simulator_launch
from simulator.machine import Machine
from simulator.memory import GlobalMemory
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.devices import DEVICES
from benchmarks.gpu.side_by_side.costs import Part, bounded, operation_part, totals
from benchmarks.gpu.side_by_side.mill import GPUS, SHARED, Kernel, Operation, _Operations
from benchmarks.gpu.side_by_side.works import (
    SIMULATED,
    TOKENS,
    Call,
    Work,
    errors,
    layers_of,
    our_call,
)
from benchmarks.gpu.static import Static, nvidia_kernels, occupancy
from kron_kernels.backends import abi
from kron_kernels.backends import cuda as cuda_gpu

# What is read of a kernel's struct, and which struct is whose.
_FORWARD = (
    "tokens n_products terms vectors rows splits other mixes in.vectors in.length out.vectors "
    "out.length dot.columns dot.depth products[0].bias products[0].residual products[0].y"
)
_FEED_FORWARD = (
    "tokens hidden rows shares bias down_bias residual in.vectors in.length out.vectors out.length "
    "up.columns"
)
_DOT_GRADIENT = (
    "tokens vectors terms shares sides[0].layout.vectors sides[0].layout.length "
    "sides[1].layout.vectors sides[1].layout.length"
)
_FIELDS = {
    "ForwardArguments": _FORWARD.split(),
    "FeedForwardArguments": _FEED_FORWARD.split(),
    "DotGradientArguments": _DOT_GRADIENT.split(),
    "SumArguments": ["count", "shares"],
}
_STRUCTS = {
    "feed_forward": "FeedForwardArguments",
    "feed_forward_backward": "FeedForwardArguments",
    "dot_gradient": "DotGradientArguments",
    "sum_parts": "SumArguments",
}


@lru_cache(maxsize=1)
def _layouts() -> tuple[dict[tuple[str, str], tuple[int, int]], dict[str, int]]:
    """Where the structs of csrc/cuda/arguments.h have what, by the compiler, and constants."""
    lines = ["#include <cstddef>", "#include <cstdio>", '#include "cuda/arguments.h"']
    lines += ["int main() {", 'printf("MEETING . %d 0\\n", int(kron::MEETING));']
    lines.append('printf("gradient_rows . %d 0\\n", kron::gradient_rows(2));')
    for struct, fields in _FIELDS.items():
        for one in fields:
            size = f"sizeof static_cast<kron::{struct} *>(nullptr)->{one}"
            place = f"offsetof(kron::{struct}, {one}), {size}"
            lines.append(f'printf("{struct} {one} %zu %zu\\n", {place});')
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "layouts.cpp"), Path(folder, "layouts")
        source.write_text("\n".join([*lines, "}"]))
        command = [*(emulator.compiler() or []), "-std=c++17", f"-I{ROOT / 'csrc'}", str(source)]
        subprocess.run([*command, "-Wno-invalid-offsetof", "-o", str(program)], check=True)
        text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in text.splitlines()]
    places = {(s, one): (int(at), int(size)) for s, one, at, size in rows if one != "."}
    return places, {s: int(value) for s, one, value, _ in rows if one == "."}


class Given:
    """What a launch of ours was given, by the names in its struct, and how its blocks share it."""

    def __init__(self, launch: Launch, data: bytes):
        self.kernel, self.math = launch.name.removeprefix("kron_").rsplit("_", 1)
        self.grid = math.prod(launch.grid)
        self.struct, self.data = _STRUCTS.get(self.kernel, "ForwardArguments"), data
        self.item = 2  # bytes of a number

    def __getitem__(self, one: str) -> int:
        at, size = _layouts()[0][self.struct, one]
        return int.from_bytes(self.data[at : at + size], "little")

    def numbers(self, *layouts: str) -> int:
        """Of a token, in these layouts."""
        return sum(self[f"{one}.vectors"] * self[f"{one}.length"] for one in layouts)

    @property
    def rounds(self) -> list[int]:
        """How often each block goes round its loop over tokens."""
        if self.kernel in ("sum_parts", "one_token", "few_tokens", "feed_forward"):
            return [1] * self.grid
        constants = _layouts()[1]
        if self.kernel == "feed_forward_backward":
            tokens = self["rows"] // constants["MEETING"]
        else:
            rows = constants["gradient_rows"] if self.kernel == "dot_gradient" else self["rows"]
            tokens = rows // 16 * (16 // self["vectors"])
        pieces = -(-self["tokens"] // tokens)
        if self.kernel in ("forward", "mix_gradient"):
            apart = self["n_products"] * self["splits"]
            return [len(range(b // apart, pieces, self.grid // apart)) for b in range(self.grid)]
        shares, each = self["shares"], self.grid // self["shares"]
        ends = [pieces * share // shares for share in range(shares + 1)]
        return [ends[b // each + 1] - ends[b // each] for b in range(self.grid)]

    @property
    def dram_bytes(self) -> int:
        """The least that the launch must move: its operands once, and what it writes."""
        if self.kernel == "sum_parts":
            return 4 * self["count"] * (self["shares"] + 1)
        if self.kernel == "dot_gradient":
            n, m = (self[f"sides[{i}].layout.length"] for i in range(2))
            operands = self["tokens"] * self.numbers("sides[0].layout", "sides[1].layout")
            return self.item * operands + 4 * self["shares"] * self["terms"] * n * m
        if self.struct == "FeedForwardArguments":
            h, n = self["hidden"], self["up.columns"]
            u, k, p, m = (self[one] for one in _FEED_FORWARD.split()[7:11])
            weights = h * (u + p) + n * (k + m) + (h * n if self["bias"] else 0)
            token = self.numbers("in", "out")
            if self.kernel == "feed_forward":
                token += p * m if self["residual"] else 0
                return self.item * (self["tokens"] * token + weights + p * m)
            token += (u + p) * n  # v and dz
            sums = self.grid * h * (u + p) + self["shares"] * h * n
            return self.item * (self["tokens"] * token + weights) + 4 * sums
        out = self.numbers("out")
        pointers = ("products[0].y", "products[0].residual", "other")
        token = self.numbers("in") + self["n_products"] * out * sum(self[p] > 0 for p in pointers)
        mix = self["terms"] * self["in.vectors"] * self["out.vectors"] if self["mixes"] else 0
        weights = mix + self["terms"] * self["dot.columns"] * self["dot.depth"]
        weights += out if self["products[0].bias"] else 0
        sums = self.grid * mix if self.kernel == "mix_gradient" else 0
        given = self["tokens"] * token + self["n_products"] * weights
        return self.item * given + 4 * sums


Counts = tuple[Counter, Counter]  # instructions, traffic


@contextmanager
def sampled(choose: Callable[[Launch, list], list[int]]) -> Iterator[list[dict[int, Counts]]]:
    """Launches execute only the blocks that are chosen; yields the counts of each block."""
    found: list[dict[int, Counts]] = []

    def execute(kernel, launch, block, arguments, options, written=None):  # type: ignore[no-untyped-def]
        found.append({})
        memory = GlobalMemory()
        parameters = simulator_launch._parameter_bytes(kernel, memory, arguments, written or {})
        machine = Machine(
            kernel,
            launch.grid,
            block,
            parameters,
            memory,
            batch=1,
            dynamic_shared=launch.shared,
            options=options,
        )
        with closing(machine), np.errstate(all="ignore"):
            before: Counts = (Counter(), Counter())
            for number in choose(launch, arguments):
                machine.run(number, 1)
                after = machine.counts(), Counter(machine.accesses.traffic)
                found[-1][number] = after[0] - before[0], after[1] - before[1]
                before = after

    with patch.object(simulator_launch, "execute", execute):
        yield found


@lru_cache(maxsize=1)
def _emulator() -> emulator.Emulator:
    """The host's half of our calls; its kernels never run, and need not be optimised."""
    units = [unit._replace(flags=f"{unit.flags} -O0") for unit in emulator.project()]
    return emulator.Emulator(emulator.build(units=units))


@contextmanager
def cuda_device(arch: int, multiprocessors: int | None = None, **options: bool) -> Iterator[Any]:
    """A simulated card for our CUDA kernels, with as many multiprocessors as it has."""
    gpu = cuda.CudaDevice(arch, **options)
    with patch.object(emulator, "load", _emulator), gpu:
        _emulator().device(multiprocessors or DEVICES[GPUS[arch]].sms, SHARED[arch])
        yield gpu


@lru_cache(maxsize=8)
def _machine_code(kind: str, arch: int) -> dict[str, Any]:
    return nvidia_kernels(cuda.compiled(kind, arch, "cubin").read_bytes(), arch)


def cuda_static(launch: Launch, kind: str, arch: int) -> Static:
    """What the kernel takes by nvcc's machine code, with the launch's shared memory."""
    resources, census, _ = _machine_code(kind, arch)[launch.name]
    shared = launch.shared + resources.shared
    threads = 32 * launch.num_warps
    return Static(
        arch=arch,
        registers=resources.registers,
        stack=resources.stack,
        shared=shared,
        warps=launch.num_warps,
        **occupancy(arch, threads, resources.registers, shared)._asdict(),
        **vars(census),
    )


def all_blocks(rounds: list[int], samples: dict[int, Counts]) -> Counts:
    """The counts of all blocks: a block's are ``α + β rounds``, of which two are known."""
    (first, one), (last, two) = next(iter(samples.items())), list(samples.items())[-1]
    mean, least, most = sum(rounds) / len(rounds), rounds[last], rounds[first]
    share = (mean - least) / (most - least) if most > least else 0.5  # of the first
    products = one[1]["mma_flops"] * least, two[1]["mma_flops"] * most
    if products[0] != products[1]:
        raise RuntimeError(f"blocks of {most} and {least} rounds multiply otherwise: {products}")
    scaled = []
    for a, b in zip(one, two, strict=True):
        value = {k: len(rounds) * (share * a[k] + (1 - share) * b[k]) for k in a | b}
        scaled.append(Counter({k: round(v) for k, v in value.items()}))
    return scaled[0], scaled[1]


def unequal(rounds: list[int], slots: int) -> float:
    """How much later the last block ends than the tail of ``lower_bound`` says, of equal blocks."""
    slots = min(slots, len(rounds))
    ends = [0] * slots
    for one in rounds:
        heapq.heapreplace(ends, ends[0] + one)
    tail = math.ceil(len(rounds) / slots) * slots / len(rounds)
    return max(ends) * slots / sum(rounds) / tail


class _Parts:
    """Where the operations of PyTorch around our launches go."""

    def __init__(self) -> None:
        self.parts: list[Kernel | Operation] = []
        self.launching = False


def cuda_run(call: Call, work: Work, arch: int, **options: bool) -> tuple[Tensor, ...]:
    """The call's result of a few tokens, in the tiles of many: one multiprocessor is busy."""
    with torch.no_grad(), cuda_device(arch, 1, **options):
        return call(*work.operands(SIMULATED[0], "cpu"))


def cuda_weigh(call: Call, work: Work, arch: int) -> list[Part]:
    """The parts of a call: its launches at ``TOKENS`` tokens, some blocks of each executed."""
    given: list[Given] = []

    def choose(launch: Launch, arguments: list) -> list[int]:
        one = Given(launch, arguments[0][1].data)
        given.append(one)
        rounds = one.rounds
        if min(rounds) == max(rounds):
            return sorted({0, len(rounds) // 2})
        return [rounds.index(max(rounds)), rounds.index(min(rounds))]

    around = _Parts()
    options = {"races": False, "late_copies": False, "uninitialised": False}
    with torch.no_grad(), sampled(choose) as samples, cuda_device(arch, **options) as gpu:
        operands = work.operands(TOKENS, "empty")
        with _Operations(around):
            call(*operands)
    parts = [operation_part(arch, one) for one in around.parts]
    for launch, one, blocks in reversed(list(zip(gpu.launches, given, samples, strict=True))):
        static, rounds = cuda_static(launch, one.math, arch), one.rounds
        slots = static.blocks_per_sm * DEVICES[GPUS[arch]].sms
        counts = all_blocks(rounds, blocks)
        times = unequal(rounds, slots)
        parts.insert(0, bounded(arch, launch, static, *counts, one.dram_bytes, times))
    return parts


def unserved(work: Work) -> str | None:
    """Why our CUDA kernels do not serve it, by the first of its layers that is not served."""
    for c in layers_of(work):
        sizes = [(1, c.m1, c.n1), (1, c.m2, c.n2)]
        if reason := _emulator().native.cuda_unserved(*abi.product_of_shapes(sizes)):
            return reason
    return None


def cuda_checked(work: Work, arch: int, direction: str) -> dict[str, Any]:
    """The same of our CUDA kernels, or why there are none."""
    if reason := unserved(work):
        return {"unserved": reason}
    call = our_call(cuda_gpu, work, direction)
    finding = None
    try:
        result = cuda_run(call, work, arch)
    except SimulationError as error:
        finding = str(error)
        result = cuda_run(call, work, arch, races=False, late_copies=False, uninitialised=False)
    return totals(cuda_weigh(call, work, arch), errors(result, work, direction), finding)


def compile_ahead(archs: list[int], kinds: set[str]) -> None:
    """All that compilers make, at once: the sources may be edited while this runs."""
    pairs = [(kind, arch) for kind in sorted(kinds) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_emulator), pool.submit(_layouts)]
        jobs += [pool.submit(cuda.module_ptx, *pair, cuda.KERNELS) for pair in pairs]
        jobs += [pool.submit(_machine_code, *pair) for pair in pairs]
        for job in jobs:
            job.result()
