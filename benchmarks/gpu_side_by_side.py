"""Our Triton and CUDA kernels, those of LyCORIS and a dense GEMM, through one mill, without a GPU.

    pip install triton einops toml tqdm safetensors
    pip install --no-deps lycoris-lora==4.1.3
    TRITON_DEFAULT_FP_FUSION=1 python benchmarks/gpu_side_by_side.py --json side_by_side.json
    python benchmarks/gpu_side_by_side.py --match "384x384 2x2" --arch 80
    python benchmarks/gpu_side_by_side.py --reuse side_by_side.json  # our halves anew: minutes
    python benchmarks/gpu_side_by_side.py --cuda-only --match "8x attention forward" --arch 80

The CUDA kernels take nvcc and a C++ compiler. The last command prints each of their launches; with
``--json`` it writes all rows, of which only theirs are new.

Nothing here is calibrated on hardware and nothing is a time. All are compiled for the architecture,
executed by the PTX simulator of the tests, and held to a float64 oracle on few tokens; their counts
are those of ``TOKENS`` tokens, and ``gpu_static.lower_bound`` makes bounds of them that only rank.
A call's bound is the sum over its launches. What PyTorch computes around the kernels (the sums over
partial gradients; LyCORIS's own products in some compositions) is counted on every side as if it
ran at the peak of DRAM or of the tensor cores: too cheap, and its instructions not at all. Our CUDA
kernels leave it nothing but casts. Spills are in the report, but not in the bound.

How counts are carried over, of what Triton compiles: a dry run at ``TOKENS`` tokens on tensors
without memory compiles the same call and gives the grids. Launches whose grid grows with the tokens
scale with it. Others, whose programs share the tokens, run on two token counts: that tells a
program's part from a token's.

Our CUDA kernels are launched as they are at ``TOKENS`` tokens, with the card's multiprocessors and
shared memory, which their tile rule looks at; of each launch one or two blocks are executed. What a
block does is the same in all blocks that go as often round their loop over tokens, so

- a forward scales with its blocks, and these with the tokens;
- a gradient's blocks are as many as the multiprocessors allow and do not grow with the tokens; a
  block costs ``α + β rounds``, and how often each goes round is read from the launch's arguments.
  Blocks that go round more often than others are in ``tail``, filled in order into whatever block
  ends first;
- ``sum_parts`` costs what the blocks before it leave, by multiprocessors and not by tokens.

DRAM is counted alike: operands once, and what is written, partial sums too.

LyCORIS chooses by timing: an analytic model ranks, a shortlist is timed, and so are the ways to
compose a call (``tiled``, ``gemm``, ``atomic``; backward ``gemm``, ``atomic``, ``dxn``, ``apply``).
Here its own planner and its own shortlist run with the published rates of the device, and our bound
takes the place of the clock, so it gets the best that our cost model sees. Compositions wholly of
PyTorch are no kernels and left out. Its public ``kron_bypass`` takes no factor with a side over
128; the kernels do, and are called directly. ``atomic`` adds up gradients in no fixed order, and
the bound counts an atomic as a store; all that we launch is deterministic. It has neither
feed-forward blocks nor several products of one x.

Columns: bytes is 32 times the sectors of loads, stores and atomics a token; instructions are warp
instructions of PTX a token, without moves, where no side has a product by PyTorch; bound is in
microseconds at ``TOKENS`` tokens. Of ``FEW`` tokens, where bounds mean nothing, both our engines'
launches, multiprocessors at work, bytes moved, and the instructions of a launch's busiest block,
summed over launches: of all its warps, and of one of them on average.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Its choices are made anew and kept nowhere.
_CACHE = tempfile.TemporaryDirectory()
os.environ["LYCORIS_KERNEL_CACHE_DIR"] = _CACHE.name

import emulator  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lycoris.functional import lokr as lycoris_functional  # noqa: E402
from lycoris.kernels import tuner as lycoris_tuner  # noqa: E402
from lycoris.kernels.plans import lokr as lycoris_plans  # noqa: E402
from lycoris.kernels.plans.device import Device as PlanDevice  # noqa: E402
from lycoris.kernels.triton.lokr import apply, bypass, gemm, grad  # noqa: E402
from lycoris.kernels.tuner import model  # noqa: E402
from simulator import Device as Simulator  # noqa: E402
from simulator import Launch, SimulationError, cuda  # noqa: E402
from simulator import launch as simulator_launch  # noqa: E402
from simulator.machine import Machine  # noqa: E402
from simulator.memory import GlobalMemory  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from benchmarks.gpu_static import (  # noqa: E402
    _FREE,
    DEVICES,
    Static,
    lower_bound,
    nvidia_kernels,
    occupancy,
    static_report,
)
from kron_kernels.backends import abi, triton_gpu, triton_launch  # noqa: E402
from kron_kernels.backends import cuda as cuda_gpu  # noqa: E402

RESULTS = Path(__file__).with_name("results") / "gpu_side_by_side.json"
TOKENS = 65536
SIMULATED = (64, 128)  # tokens; the second where programs share them
GPUS = {80: "A100", 90: "H100"}
SHARED = {80: 166912, 90: 232448}  # bytes that a block may have
L2 = {80: 40 << 20, 90: 50 << 20}  # bytes: NVIDIA's data sheets
SHAPES = ["384x384 2x2", "384x48 2x16", "16x2 192x384", "2x16 384x192", "8x2 384x384"]
SHAPES += ["2x8 384x384", "32x32 24x24", "64x64 12x12", "16x16 48x48"]
BF16 = ["384x384 2x2", "32x32 24x24"]
LABELS = {
    "384x384 2x2": "8x attention",
    "384x48 2x16": "21x attention",
    "8x2 384x384": "8x up",
    "2x8 384x384": "8x down",
    "16x2 192x384": "21x up",
    "2x16 384x192": "21x down",
    "8x2 384x384 2x8 384x384": "8x block",
    "16x2 192x384 2x16 384x192": "21x block",
    "3 x 384x384 2x2": "8x qkv",
    "3 x 384x48 2x16": "21x qkv",
}
FEW = (1, 16)  # tokens
EQUAL = 0.02
_UNITS_OF_ERROR = 4  # a rounding of the result, one between the products, and the sums' own


@dataclass(frozen=True)
class Case:
    """``A (m1, n1) ⊗ B (m2, n2)``."""

    m1: int
    n1: int
    m2: int
    n2: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: str, dtype: torch.dtype) -> Case:
        a, b = (tuple(map(int, sides.split("x"))) for sides in shape.split())
        return cls(*a, *b, dtype)

    def __str__(self) -> str:
        return f"{self.m1}x{self.n1} {self.m2}x{self.n2} {str(self.dtype)[6:]}"

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """As LyCORIS names them: w1 (a, b), w2 (c, d)."""
        return self.m1, self.n1, self.m2, self.n2

    def operands(self, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy, x, a and b, of which products have entries of order 1."""
        draw = drawing(self.dtype, device)
        dy = draw(tokens, self.m1 * self.m2)
        x = draw(tokens, self.n1 * self.n2)
        return dy, x, draw(self.m1, self.n1, self.n1), draw(self.m2, self.n2, self.n2)


def drawing(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """Draws tensors, of which so many terms are summed; ``meta`` and ``empty`` ones have no values.

    Memory of an empty one that nobody touches is not there.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        if device in ("meta", "empty"):
            where = "cpu" if device == "empty" else "meta"
            return torch.empty(sizes[:2], dtype=dtype, device=where)
        *shape, terms = sizes if len(sizes) == 3 else (*sizes, 1)
        return (torch.randn(shape, generator=generator) / terms**0.5).to(dtype)

    return draw


@dataclass(frozen=True)
class FeedForward:
    """Two layers that meet, with biases."""

    up: Case
    down: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    def __str__(self) -> str:
        up, down = (str(layer).rsplit(" ", 1)[0] for layer in (self.up, self.down))
        return f"{up} {down} {str(self.dtype)[6:]}"

    def operands(self, tokens: int, device: str) -> tuple[Tensor, ...]:
        """dy, x, and a, b and bias of either layer."""
        draw, up, down = drawing(self.dtype, device), self.up, self.down
        layers = [
            layer
            for c in (up, down)
            for layer in (draw(c.m1, c.n1, c.n1), draw(c.m2, c.n2, c.n2), draw(1, c.m1 * c.m2)[0])
        ]
        return draw(tokens, down.m1 * down.m2), draw(tokens, up.n1 * up.n2), *layers


@dataclass(frozen=True)
class Three:
    """Three products of one x, with biases."""

    layer: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    def __str__(self) -> str:
        return f"3 x {self.layer}"

    def operands(self, tokens: int, device: str) -> tuple[Tensor, ...]:
        """x, and a, b and bias of each."""
        draw, c = drawing(self.dtype, device), self.layer
        layers = [
            layer
            for _ in range(3)
            for layer in (draw(c.m1, c.n1, c.n1), draw(c.m2, c.n2, c.n2), draw(1, c.m1 * c.m2)[0])
        ]
        return draw(tokens, c.n1 * c.n2), *layers


Work = Case | FeedForward | Three
Call = Callable[..., Any]  # of the operands


# What a call launches ----------------------------------------------------------------------------


@dataclass
class Operation:
    """What PyTorch computes between the kernels."""

    name: str
    bytes: int
    flops: int


@dataclass
class Kernel:
    """A launch, and the bytes of the tensors that it was given."""

    launch: Launch
    bytes: int


def extent(tensors: Iterator[Tensor]) -> int:
    """Bytes of the tensors, each once, and of an expanded one what it has."""
    sizes = {}
    for t in tensors:
        numel = math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s or not n)
        place = t.untyped_storage()._cdata, t.storage_offset()
        sizes[place] = max(sizes.get(place, 0), numel * t.element_size())
    return sum(sizes.values())


def flat(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from flat(value)


class Mill(Simulator):
    """The simulated GPU, which also notes what else the call has PyTorch compute."""

    def __init__(self, arch: int, *, execute: bool = True, checks: bool = True):
        super().__init__(arch, execute=execute, races=checks, late_copies=checks)
        self.parts: list[Kernel | Operation] = []
        self.launching = False

    def launch(self, grid, source, metadata, asm, values) -> None:  # type: ignore[no-untyped-def]
        self.launching = True
        try:
            super().launch(grid, source, metadata, asm, values)
        finally:
            self.launching = False
        self.parts.append(Kernel(self.launches[-1], extent(flat(values))))

    def __enter__(self) -> Mill:
        super().__enter__()
        self._operations = _Operations(self)
        self._operations.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._operations.__exit__(*error)
        super().__exit__(*error)


class _Operations(TorchDispatchMode):
    """Notes what moves bytes: no views and no allocations."""

    def __init__(self, mill: Mill):
        super().__init__()
        self.mill = mill

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if self.mill.launching or "empty" in name or not isinstance(out, Tensor):
            return out
        reads = list(flat(args))
        mutates = func._schema.is_mutable
        storage = out.untyped_storage()._cdata
        if not mutates and storage in {t.untyped_storage()._cdata for t in reads}:
            return out  # a view
        moved = extent(iter(reads)) + extent(iter([out]))  # in place: read and written
        flops = 2 * out.numel() * reads[0].shape[-1] if name in ("mm", "bmm") else 0
        self.mill.parts.append(Operation(name, moved, flops))
        return out


# What it costs -----------------------------------------------------------------------------------


@dataclass
class Part:
    """A launch, or an operation of PyTorch, at ``TOKENS`` tokens."""

    name: str
    microseconds: float
    bytes_per_token: float
    dram_bytes_per_token: float
    limiter: str = "dram"
    instructions_per_token: float = 0.0
    product_by_torch: bool = False
    blocks: int = 0
    load_bytes_per_token: float = 0.0  # in sectors of 32; what is stored is the rest
    passes_per_token: float = 0.0  # through shared memory
    opcodes: dict[str, float] = field(default_factory=dict)  # the most frequent, a token
    local_accesses_per_token: float = 0.0  # of threads, by PTX
    mma_flops_per_token: float = 0.0
    roofs: dict[str, float] = field(default_factory=dict)  # microseconds by resource
    tail: float = 1.0
    bank_conflicts: float = 1.0
    registers: int = 0
    spill_loads: int = 0  # instructions in the machine code
    spill_stores: int = 0
    shared: int = 0
    warps: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    limited_by: str = ""


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


def bounded(
    arch: int,
    launch: Launch,
    static: Static,
    instructions: Counter,
    traffic: Counter,
    dram_bytes: int,
    unequal: float = 1.0,
) -> Part:
    """A launch by its counts; ``unequal``: times the bound, where blocks take unequally long."""
    traffic["store_sectors"] += traffic["atomic_sectors"]
    blocks = math.prod(launch.grid)
    device = DEVICES[GPUS[arch]]
    bound = lower_bound(device, static, instructions, traffic, blocks, blocks, dram_bytes)
    names = ("dram", "l2", "tensor", "issue", "fp32", "special", "shared")
    issued = {code: n / TOKENS for code, n in instructions.items() if not _FREE.match(code)}
    passes = traffic["smem_load_wavefronts"] + traffic["smem_store_wavefronts"]
    return Part(
        launch.name,
        bound.seconds * unequal * 1e6,
        32 * (traffic["load_sectors"] + traffic["store_sectors"]) / TOKENS,
        dram_bytes / TOKENS,
        bound.limiter,
        sum(issued.values()),
        blocks=blocks,
        load_bytes_per_token=32 * traffic["load_sectors"] / TOKENS,
        passes_per_token=passes / TOKENS,
        opcodes=dict(Counter(issued).most_common(12)),
        local_accesses_per_token=(traffic["local_load"] + traffic["local_store"]) / TOKENS,
        mma_flops_per_token=traffic["mma_flops"] / TOKENS,
        roofs={n: getattr(bound, n) * 1e6 for n in names},
        tail=bound.tail * unequal,
        bank_conflicts=bound.bank_conflicts,
        registers=static.registers,
        spill_loads=static.spill_loads,
        spill_stores=static.spill_stores,
        shared=static.shared,
        warps=static.warps,
        blocks_per_sm=static.blocks_per_sm,
        occupancy=static.occupancy,
        limited_by=static.limited_by,
    )


def operation_part(arch: int, operation: Operation) -> Part:
    """The least that PyTorch can take: each byte once, or the tensor cores' peak."""
    device = DEVICES[GPUS[arch]]
    dram = operation.bytes / (device.dram_gb_s * 1e9)
    tensor = operation.flops / (device.tensor_tflops * 1e12)
    moved = operation.bytes / TOKENS
    return Part(
        f"torch {operation.name}",
        max(dram, tensor) * 1e6,
        moved,
        moved,
        "tensor" if tensor > dram else "dram",
        product_by_torch=operation.flops > 0,
        mma_flops_per_token=operation.flops / TOKENS,
    )


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


def microseconds(parts: list[Part]) -> float:
    """The bound of a call."""
    return sum(part.microseconds for part in parts)


# Ours --------------------------------------------------------------------------------------------


def our_call(engine: Any, work: Work, direction: str) -> Call:
    """What the operators launch with this backend, without the operators around it."""

    def forward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (engine.kron_matmul(x, (a[None], b[None])),)

    def backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        dx, da, db = engine.kron_matmul_backward(dy, x, a[None], b[None], [True] * 3)
        return dx, da[0], db[0]

    def layers(operands: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        each = zip(*[iter(operands)] * 3, strict=True)
        return [(a[None], b[None], bias) for a, b, bias in each]

    def block(dy: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        up, down = layers(operands)
        return (engine.kron_feed_forward(x, up, "gelu", down, None),)

    def block_backward(dy: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        up, down = layers(operands)
        grads = engine.kron_feed_forward_backward(dy, x, up, "gelu", down, [True] * 6)
        return tuple(g[0] if g.dim() == 3 else g for g in grads)

    def three(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(engine.kron_qkv(x, layers(operands)))

    if isinstance(work, Three):
        return three
    calls = (forward, backward) if isinstance(work, Case) else (block, block_backward)
    return calls[direction == "backward"]


# Ours in CUDA C++ --------------------------------------------------------------------------------

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


# LyCORIS -----------------------------------------------------------------------------------------


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


def published(arch: int) -> model.Throughput:
    """What its planner would measure: the rates published, and its own latency of DRAM."""
    device = DEVICES[GPUS[arch]]
    dram, hertz = device.dram_gb_s * 1e9, device.clock_ghz * 1e9
    in_flight = [1024.0 * 2**i for i in range(7)]
    curve = [(x, min(dram, device.sms * x / model._DRAM_LATENCY_S)) for x in in_flight]
    return model.Throughput(
        dram_bps=dram,
        l2_bps=device.l2_bytes_per_clock * hertz,
        inflight_curve=tuple(curve),
        mma_flops=device.tensor_tflops * 1e12,
        fma_flops=2 * device.fp32_lanes * device.sms * hertz,
    )


class Lycoris:
    """Its call of one case, composed and laid out as its own tuner would by our bound."""

    def __init__(self, case: Case, arch: int):
        self.case, self.arch, self.dev = case, arch, lycoris_device(arch)
        self.chosen: dict[str, Any] = {}  # configurations by the tuner's name of a kernel
        self.refused: dict[str, str] = {}
        self.small = bypass.kron_factors_supported(*case.sides)
        self.tiled = gemm.in_scope(*case.sides)

    @contextmanager
    def choices(self) -> Iterator[None]:
        """Its launches take what is chosen here, and a failure is not replaced by PyTorch."""

        def select(dev: Any, key: tuple, plan: Any, measure: Any) -> Any:
            return self.chosen[key[0]]

        def tuned(name: str, *_: Any) -> Any:
            return self.chosen[name]

        def guarded(dev: Any, key: Any, config: Any, launch: Any, too_big: Any) -> Any:
            return launch(config)

        with ExitStack() as stack:
            for module in (apply, gemm, grad):
                stack.enter_context(patch.object(module, "select", select))
                stack.enter_context(patch.object(module, "guarded", guarded))
            stack.enter_context(patch.object(bypass.tune, "tuned", tuned))
            stack.enter_context(patch.object(model, "throughput", lambda _: published(self.arch)))
            yield

    def weigh(self, call: Call, name: str, config: Any) -> float:
        """The bound with one configuration, infinite where it does not run."""
        self.chosen[name] = config
        try:
            return microseconds(weigh(call, self.case, self.arch)[0])
        except (OutOfResources, ValueError, RuntimeError, SimulationError) as error:
            self.refused[f"{name} {config}"] = f"{type(error).__name__}: {error}"[:200]
            return math.inf

    def tune(self, name: str, ranked: list[Any], call: Call) -> float:
        """Choose: its shortlists of tiles and launch settings, judged by our bound."""
        if ranked and not isinstance(ranked[0], dict):  # the older planner ranks plans
            seconds = {plan: self.weigh(call, name, plan) for plan in ranked}
        else:
            seconds = {}
            tiles = [c for c in ranked if "impl" not in c]
            if not tiles:
                self.chosen[name] = lycoris_tuner.TORCH
                return math.inf

            def measure(configs: list[dict]) -> list[float]:
                bounds = [self.weigh(call, name, c) for c in configs]
                seconds.update({tuple(c.items()): s for c, s in zip(configs, bounds, strict=True)})
                return bounds

            lycoris_tuner.Tuner()._tune_key(self.dev, (name, (str(self.case),), ()), tiles, measure)
        best = min(seconds, key=seconds.__getitem__)
        self.chosen[name] = dict(best) if isinstance(best, tuple) else best
        return seconds[best]

    def older_plans(self) -> list[Any]:
        """The shortlist of the register-only kernels."""
        device, info = DEVICES[GPUS[self.arch]], self.dev
        dev = PlanDevice(
            name=info.name,
            sms=info.units,
            regs_per_sm=info.regs_sm,
            smem_per_cta=info.smem,
            smem_per_sm=info.smem_sm,
            max_threads_per_sm=info.max_threads_sm,
            l2_bytes=info.l2_bytes,
            cc_major=self.arch // 10,
            cc_minor=self.arch % 10,
            mma_peak=device.tensor_tflops,
            dram_bw=device.dram_gb_s,
        )
        return lycoris_plans.topk_apply(TOKENS, *self.case.sides, 2, dev)

    def forward(self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (apply.lokr_bypass_fwd(x, a, b),)

    def backward(self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.lokr_bypass_bwd(dy, x, a, b))

    def tune_forward(self) -> dict[str, dict[str, Any]]:
        """The choices of every composition that has a kernel."""
        found = {}
        name = "lokr.bypass_fwd"
        self.tune(name, apply._plan(self.dev, TOKENS, *self.case.sides, 2, False, []), self.forward)
        found["tiled"] = {name: self.chosen[name]}
        if self.tiled:
            self.chosen[name] = gemm.GEMM
            ranked = gemm._plan_fwd(self.dev, TOKENS, 1, *self.case.sides, 2, False)
            self.tune("lokr.gemm_fwd", ranked, self.forward)
            found["gemm"] = dict(self.chosen)
        if self.small:
            self.chosen[name] = apply.ATOMIC
            self.tune("triton.lokr.bypass_fwd", self.older_plans(), self.forward)
            found["atomic"] = dict(self.chosen)
        return found

    def tune_backward(self) -> dict[str, dict[str, Any]]:
        """The same of the backward, compositions that DRAM alone rules out not tuned."""
        a, b, c, d = self.case.sides
        found, best = {}, math.inf
        name = "lokr.bypass_bwd"
        if self.tiled:
            ranked = gemm._plan_dx(self.dev, TOKENS, 1, a, b, c, d, 2)
            best = self.tune(
                "lokr.gemm_dx",
                ranked,
                lambda dy, x, w1, w2: gemm.lokr_gemm_dx(dy[None], x, w1[None], w2[None], (1.0,)),
            )
            best += self.tune(
                "lokr.gemm_gw2",
                gemm._plan_gw2(self.dev, TOKENS, 1, a, b, c, d, 2),
                lambda dy, x, w1, w2: gemm.lokr_gemm_gw2(dy[None], x, w1[None], c, d, (1.0,)),
            )
            self.chosen[name] = gemm.GEMM
            found["gemm"] = dict(self.chosen)
        if self.small:
            self.chosen[name] = grad.ATOMIC
            bound = self.tune("triton.lokr.bypass_bwd", self.older_plans(), self.backward)
            best = min(best, bound)
            found["atomic"] = dict(self.chosen)

        planned = {
            "lokr.bypass_dxn": grad._plan_dxn(self.dev, TOKENS, a, b, c, d, 2),
            "lokr.bypass_dx": apply._plan(self.dev, TOKENS, b, a, d, c, 2, False, []),
            "lokr.grad_w1": grad._plan_gw1(self.dev, TOKENS, a, b, c, 2),
        }
        calls: dict[str, Call] = {
            "lokr.bypass_dxn": lambda dy, x, w1, w2: grad._dxn(dy, w1, w2, 1.0, x.dtype),
            "lokr.bypass_dx": lambda dy, x, w1, w2: apply._apply(
                "lokr.bypass_dx", dy, w1.t(), w2.t(), 1.0, None, x.dtype, []
            ),
            "lokr.grad_w1": lambda dy, x, w1, w2: grad._grad_w1(dy, x, w1, w2, 1.0),
        }
        for kind, first in (("dxn", "lokr.bypass_dxn"), ("apply", "lokr.bypass_dx")):
            for kernel in (first, "lokr.grad_w1"):
                self.chosen[kernel] = next(iter(planned[kernel]), lycoris_tuner.TORCH)
            self.chosen[name] = {"impl": kind}
            least = self.dram_alone()
            if least > best:
                self.refused[kind] = f"DRAM alone would take {least:.1f} µs"
                continue
            for kernel in (first, "lokr.grad_w1"):
                self.tune(kernel, planned[kernel], calls[kernel])
            found[kind] = dict(self.chosen)
        return found

    def dram_alone(self) -> float:
        """The least time of the backward that is chosen, from a dry run."""
        mill, _ = run(self.backward, self.case, self.arch, TOKENS)
        return sum(p.bytes for p in mill.parts) / (DEVICES[GPUS[self.arch]].dram_gb_s * 1e3)


def digest(folder: Path, pattern: str) -> str:
    """Which version of our kernels was weighed, also where it is not committed."""
    sources = sorted(folder.glob(pattern))
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest()[:16]


# One row -----------------------------------------------------------------------------------------


def expected(work: Work, direction: str, tokens: int) -> tuple[Tensor, ...]:
    """In float64, by torch.kron."""
    operands = [t.double() for t in work.operands(tokens, "cpu")]
    if isinstance(work, Three):
        x, *layers = operands
        each = zip(*[iter(layers)] * 3, strict=True)
        return tuple(x @ torch.kron(a, b).T + bias for a, b, bias in each)
    dy, x, *layers = operands
    inputs = [x, *layers[:5]]
    if direction == "backward":
        inputs = [t.requires_grad_() for t in inputs]
    if isinstance(work, Case):
        y = inputs[0] @ torch.kron(*inputs[1:3]).T
    else:
        x, a1, b1, bias, a2, b2 = inputs
        hidden = torch.nn.functional.gelu(x @ torch.kron(a1, b1).T + bias)
        y = hidden @ torch.kron(a2, b2).T + layers[5]
    return (y,) if direction == "forward" else torch.autograd.grad(y, inputs, dy)


def errors(
    result: tuple[Tensor, ...], case: Work, direction: str, tokens: int = SIMULATED[0]
) -> list[float]:
    """Of every output the error's RMS over the output's, in units of the dtype's epsilon."""
    found = []
    for got, want in zip(result, expected(case, direction, tokens), strict=True):
        assert got.dtype == case.dtype and got.shape == want.shape
        error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        found.append(error.item() / torch.finfo(case.dtype).eps)
    if not max(found) <= _UNITS_OF_ERROR:
        raise AssertionError(f"{case} {direction}: errors of {found} units")
    return found


def checked(call: Call, case: Work, arch: int, direction: str) -> dict[str, Any]:
    """A side's parts and totals, its result verified and the simulator's findings noted."""
    finding = None
    try:
        parts, result = weigh(call, case, arch, checks=True)
    except SimulationError as error:
        finding = str(error)
        parts, result = weigh(call, case, arch)
    return totals(parts, errors(result, case, direction), finding)


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


def totals(parts: list[Part], deviations: list[float], finding: str | None) -> dict[str, Any]:
    """A side of a row."""
    counted = not any(p.product_by_torch for p in parts)
    return {
        "microseconds": microseconds(parts),
        "bytes_per_token": sum(p.bytes_per_token for p in parts),
        "instructions_per_token": sum(p.instructions_per_token for p in parts) if counted else None,
        "kernels": sum(p.blocks > 0 for p in parts),
        "torch_operations": sum(p.blocks == 0 for p in parts),
        "error_in_epsilons": deviations,
        "finding": finding,
        "parts": [asdict(replace(p, opcodes={})) for p in parts],  # opcodes are for reading
    }


def layers_of(work: Work) -> list[Case]:
    if isinstance(work, Case):
        return [work]
    return [work.layer] * 3 if isinstance(work, Three) else [work.up, work.down]


def dense(work: Work, arch: int, direction: str) -> dict[str, Any]:
    """The floor of dense layers: of each product, compulsory DRAM or FLOPs at their peak."""
    parts = []
    for layer in layers_of(work):
        m, n = layer.m1 * layer.m2, layer.n1 * layer.n2
        each = Operation("mm", 2 * (TOKENS * (m + n) + m * n), 2 * TOKENS * m * n)
        parts += [operation_part(arch, each)] * (1 if direction == "forward" else 2)
    return {"microseconds": microseconds(parts), "limiter": parts[0].limiter}


def public_call(case: Case) -> str:
    """What the public function does with such factors."""
    w1, w2 = torch.empty(case.m1, case.n1), torch.empty(case.m2, case.n2)
    if lycoris_functional._apply_supported(w1, None, None, w2, None, None, None):
        return "kron_bypass takes it"
    cap = lycoris_functional._apply_factor_cap()
    return f"kron_bypass refuses it: a factor has a side over {cap}; it runs torch.compile"


def side_by_side(
    work: Work, arch: int, direction: str, old: dict[str, Any], cuda_only: bool
) -> dict[str, Any]:
    """One row of the results; LyCORIS's half from an old row, where there is one.

    If only our CUDA kernels are weighed, what Triton's cost is from the old row too.
    """
    row = {"case": str(work), "arch": arch, "direction": direction}
    row["ours"] = cuda_only and old.get("ours")
    if not row["ours"]:
        row["ours"] = checked(our_call(triton_gpu, work, direction), work, arch, direction)
    row["cuda"] = cuda_checked(work, arch, direction)
    row["dense"] = dense(work, arch, direction)
    if not isinstance(work, Case):
        return row | {"theirs": None}  # it has neither
    if old:
        return row | {key: value for key, value in old.items() if key.startswith("their")}
    return row | their_half(work, arch, direction)


def their_half(case: Case, arch: int, direction: str) -> dict[str, Any]:
    """What LyCORIS's best composition costs, and the others."""
    lycoris = Lycoris(case, arch)
    alternatives, best = {}, None
    with lycoris.choices():
        call = lycoris.forward if direction == "forward" else lycoris.backward
        tune = lycoris.tune_forward if direction == "forward" else lycoris.tune_backward
        for kind, chosen in tune().items():
            lycoris.chosen = chosen
            try:
                theirs = checked(call, case, arch, direction)
            except (OutOfResources, ValueError, RuntimeError, AssertionError) as error:
                lycoris.refused[kind] = f"{type(error).__name__}: {error}"[:200]
                continue
            theirs["composition"] = kind
            theirs["choices"] = {name: str(config) for name, config in chosen.items()}
            alternatives[kind] = theirs["microseconds"]
            if not theirs["kernels"]:
                lycoris.refused[kind] = "PyTorch throughout"
            elif best is None or theirs["microseconds"] < best["microseconds"]:
                best = theirs
    fixed = [us for kind, us in alternatives.items() if kind != "atomic"]
    return {
        "theirs": best,
        "their_alternatives": alternatives,
        "their_refusals": lycoris.refused,
        "their_deterministic_microseconds": min(fixed, default=None),
        "their_public_call": public_call(case),
    }


# Few tokens --------------------------------------------------------------------------------------


def few_tokens(work: Work, arch: int, tokens: int) -> dict[str, Any]:
    """What both our engines launch for few tokens, forward, where bounds mean nothing."""
    engines = {"triton": triton_gpu} | ({} if unserved(work) else {"cuda": cuda_gpu})
    row: dict[str, Any] = {"case": str(work), "arch": arch, "tokens": tokens}
    for name, engine in engines.items():
        call = our_call(engine, work, "forward")
        row[name] = of_few_tokens(engine, call, work, arch, tokens)
    return row


def of_few_tokens(engine: Any, call: Call, work: Work, arch: int, tokens: int) -> dict[str, Any]:
    sms = DEVICES[GPUS[arch]].sms
    operands = work.operands(tokens, "cpu")

    @contextmanager
    def device() -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if engine is cuda_gpu:
                yield stack.enter_context(cuda_device(arch))
            else:
                stack.enter_context(pretending(arch, sms))
                yield stack.enter_context(Mill(arch))

    with device() as gpu:
        result = call(*operands)
    errors(result, work, "forward", tokens)

    def some(launch: Launch, _: list) -> list[int]:
        blocks = math.prod(launch.grid)
        return sorted({0, blocks // 2, blocks - 1})

    with sampled(some) as samples, device():
        call(*operands)
    launches = [
        {
            "name": launch.name,
            "blocks": math.prod(launch.grid),
            "warps": launch.num_warps,
            "bytes": 32 * (launch.traffic["load_sectors"] + launch.traffic["store_sectors"]),
            "instructions_of_a_block": max(
                sum(n for code, n in counts[0].items() if not _FREE.match(code))
                for counts in blocks.values()
            ),
        }
        for launch, blocks in zip(gpu.launches, samples, strict=True)
    ]
    path = [one["instructions_of_a_block"] for one in launches]
    warps = [one["warps"] for one in launches]
    return {
        "launches": len(launches),
        "multiprocessors_at_work": min(min(sms, one["blocks"]) for one in launches),
        "bytes": sum(one["bytes"] for one in launches),
        "instructions_of_the_busiest_blocks": sum(path),
        "of_a_warp_of_theirs": sum(p / w for p, w in zip(path, warps, strict=True)),
        "kernels": launches,
    }


# Printing ----------------------------------------------------------------------------------------

METRICS = {
    "bytes": "bytes_per_token",
    "instructions": "instructions_per_token",
    "bound": "microseconds",
}
SIDES = {"LyCORIS": "theirs", "Triton": "ours", "CUDA": "cuda"}


def value(row: dict[str, Any], side: str, metric: str) -> float | None:
    return (row.get(SIDES[side]) or {}).get(METRICS[metric])


def verdict(row: dict[str, Any], metric: str, side: str, other: str) -> str:
    """How a side is to another: ahead, equal, behind, or - where they cannot be compared."""
    one, two = (value(row, name, metric) for name in (side, other))
    if one is None or two is None:
        return "-"
    if abs(one / two - 1) <= EQUAL:
        return "equal"
    return "ahead" if one < two else "behind"


def ahead(row: dict[str, Any]) -> str:
    """Whose bound is the least, all who are within ``EQUAL`` of it named."""
    bounds = {side: us for side in SIDES if (us := value(row, side, "bound"))}
    return " = ".join(
        side for side, us in bounds.items() if us <= min(bounds.values()) * (1 + EQUAL)
    )


def print_row(row: dict[str, Any]) -> None:
    cells = []
    for metric in METRICS:
        values = [value(row, side, metric) for side in SIDES]
        shown = "/".join("-" if v is None else f"{v:.0f}" for v in values)
        cells.append(f"{shown:>20}")
    shape = row["case"].rsplit(" ", 1)[0]
    name = f"{LABELS.get(shape, '')} {row['case']}".strip()
    print(
        f"{name:<50} {row['arch']} {row['direction']:<8} {' | '.join(cells)} | "
        f"{row['dense']['microseconds']:>5.0f} | {ahead(row)}",
        flush=True,
    )


def print_few(row: dict[str, Any]) -> None:
    for name in ("triton", "cuda"):
        if one := row.get(name):
            print(
                f"{row['case']:<42} {row['arch']} {row['tokens']:>3} tokens {name:<6} "
                f"{one['launches']} launches, {one['multiprocessors_at_work']:>3} multiprocessors, "
                f"{one['bytes']:>8} B, {one['instructions_of_the_busiest_blocks']:>6} instructions "
                f"of a block, {one['of_a_warp_of_theirs']:>5.0f} of a warp",
                flush=True,
            )


def title(work: Work, direction: str) -> str:
    shape, dtype = str(work).rsplit(" ", 1)
    return " ".join(filter(None, (LABELS.get(shape), shape, dtype, direction)))


def matches(text: str, work: Work, direction: str) -> bool:
    """Whether the words of a text are all in the title."""
    return set(text.split()) <= set(title(work, direction).split())


def works() -> Iterator[tuple[Work, str]]:
    """All that is compared, and in which direction."""
    cases = [Case.of(shape, torch.float16) for shape in SHAPES]
    cases += [Case.of(shape, torch.bfloat16) for shape in BF16]
    for case in cases:
        yield from ((case, "forward"), (case, "backward"))
    for up, down in (("8x2 384x384", "2x8 384x384"), ("16x2 192x384", "2x16 384x192")):
        block = FeedForward(Case.of(up, torch.float16), Case.of(down, torch.float16))
        yield from ((block, "forward"), (block, "backward"))
    for shape in SHAPES[:2]:
        yield Three(Case.of(shape, torch.float16)), "forward"


def print_launch(p: dict[str, Any]) -> None:
    """All of one launch, by the token and as bounds."""
    if p["microseconds"] < 1 or not p["blocks"]:
        grid = f", grid {p['blocks']}" if p["blocks"] else ""
        print(f"  {p['name']}: {p['microseconds']:.1f} µs by {p['limiter']}{grid}")
        return
    roofs = "  ".join(f"{name} {us:.1f}" for name, us in p["roofs"].items())
    stores = p["bytes_per_token"] - p["load_bytes_per_token"]
    opcodes = "  ".join(f"{code} {n:.1f}" for code, n in p["opcodes"].items())
    print(
        f"  {p['name']}: grid {p['blocks']}, {32 * p['warps']} threads, {p['shared']} B shared, "
        f"{p['registers']} registers, spills {p['spill_loads']}/{p['spill_stores']}, "
        f"{p['blocks_per_sm']} blocks/SM by {p['limited_by']}\n"
        f"    a token: {p['instructions_per_token']:.1f} instructions; "
        f"{p['load_bytes_per_token']:.0f} B loaded + {stores:.0f} B stored in sectors, "
        f"{p['dram_bytes_per_token']:.0f} B of DRAM; {p['passes_per_token']:.1f} passes through "
        f"shared memory ({p['bank_conflicts']:.2f} of the least); "
        f"{p['mma_flops_per_token']:.0f} mma FLOPs\n"
        f"    {opcodes}\n"
        f"    µs: {roofs}  x tail {p['tail']:.3f} = {p['microseconds']:.1f} by {p['limiter']}"
    )


def print_launches(work: Work, arch: int, direction: str, old: dict[str, Any]) -> None:
    """Our CUDA kernels' launches, beside what is stored of the same cell."""
    print(f"\n{title(work, direction)}, sm_{arch}", flush=True)
    if reason := unserved(work):
        print(f"  unserved: {reason}")
        return
    parts = cuda_weigh(our_call(cuda_gpu, work, direction), work, arch)
    for part in parts:
        print_launch(asdict(part))
    line = [f"CUDA {microseconds(parts):.1f}"]
    for side in ("Triton", "LyCORIS"):
        if us := value(old, side, "bound"):
            line.append(f"{side} {us:.1f}")
    print(f"  bounds in µs: {', '.join(line)}", flush=True)


def compile_ahead(archs: list[int], kinds: set[str]) -> None:
    """All that compilers make, at once: the sources may be edited while this runs."""
    pairs = [(kind, arch) for kind in sorted(kinds) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_emulator), pool.submit(_layouts)]
        jobs += [pool.submit(cuda.module_ptx, *pair, cuda.KERNELS) for pair in pairs]
        jobs += [pool.submit(_machine_code, *pair) for pair in pairs]
        for job in jobs:
            job.result()


def part_line(p: dict[str, Any]) -> str:
    line = f"{p['name']:<24} {p['microseconds']:7.1f} µs by {p['limiter']}"
    if p["blocks"]:
        line += (
            f", {p['bytes_per_token']:.0f} B, {p['instructions_per_token']:.0f} instructions, "
            f"{p['registers']} registers, {p['spill_loads']}+{p['spill_stores']} spills, "
            f"{p['shared']} B shared, {p['blocks_per_sm']} blocks/SM"
        )
    return line


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Counts of cells, and what holds our CUDA kernels back where they are behind."""
    print(f"\n{'cells':<34} ahead  equal  behind  not comparable")
    pairs = [("Triton", "LyCORIS"), ("CUDA", "LyCORIS"), ("CUDA", "Triton")]
    for metric in METRICS:
        for side, other in pairs:
            c = Counter(verdict(row, metric, side, other) for row in rows)
            numbers = "  ".join(f"{c[who]:>5}" for who in ("ahead", "equal", "behind", "-"))
            print(f"{f'{metric}, {side} to {other}':<34} {numbers}")
    for row in rows:
        if "CUDA" not in ahead(row) and value(row, "CUDA", "bound"):
            print(f"\nbehind: {row['case']} {row['arch']} {row['direction']}, to {ahead(row)}")
            for side, key in SIDES.items():
                for p in (row[key] or {}).get("parts", []):
                    print(f"  {side:<7} {part_line(p)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--reuse", type=Path, help="take LyCORIS's half from these results")
    parser.add_argument("--match", default="", help="only cases with these words: 8x up backward")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument(
        "--cuda-only",
        action="store_true",
        help="weigh our CUDA kernels only, print their launches; with --json also all rows",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    knobs.language.default_fp_fusion = True  # whatever the environment says

    source = options.reuse or (RESULTS if options.cuda_only else None)
    old = json.loads(source.read_text()) if source else {"rows": []}
    known = {(row["case"], row["arch"], row["direction"]): row for row in old["rows"]}
    chosen = [one for one in works() if matches(options.match, *one)]
    compile_ahead(options.arch, {str(work.dtype)[6:] for work, _ in chosen})
    if options.cuda_only and not options.json:
        for arch in options.arch:
            for work, direction in chosen:
                print_launches(work, arch, direction, known.get((str(work), arch, direction), {}))
        return

    names = ("torch", "triton", "lycoris-lora")
    results: dict[str, Any] = {
        "about": "uncalibrated lower bounds that only rank; see benchmarks/gpu_side_by_side.py",
        "tokens": TOKENS,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "our_kernels": digest(Path(triton_gpu.__file__).parent, "triton_*.py"),
        "cuda_kernels": digest(ROOT / "csrc" / "cuda", "*"),
        "rows": [],
        "few_tokens": [],
    }
    if options.cuda_only:
        results["our_kernels"] = old["our_kernels"]

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    header = " | ".join(f"{metric:>20}" for metric in METRICS)
    print(f"{'LyCORIS/Triton/CUDA':<50} {'sm':<2} {'':<8} {header} | dense | least bound")
    for arch in options.arch:
        for work, direction in chosen:
            began = time.monotonic()
            half = known.get((str(work), arch, direction), {})
            row = side_by_side(work, arch, direction, half, options.cuda_only)
            row["seconds_of_simulation"] = round(time.monotonic() - began, 1)
            results["rows"].append(row)
            print_row(row)
            keep()
    for arch in options.arch:
        for work, direction in chosen:
            preset = str(work).rsplit(" ", 1)[0] in LABELS and work.dtype == torch.float16
            for tokens in FEW if preset and direction == "forward" else ():
                results["few_tokens"].append(few_tokens(work, arch, tokens))
                print_few(results["few_tokens"][-1])
                keep()
    print_summary(results["rows"])


if __name__ == "__main__":
    main()
