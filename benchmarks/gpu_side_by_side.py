"""Our Triton kernels, those of LyCORIS and a dense GEMM, through one mill and without a GPU.

    pip install triton einops toml tqdm safetensors
    pip install --no-deps lycoris-lora==4.1.3
    TRITON_DEFAULT_FP_FUSION=1 python benchmarks/gpu_side_by_side.py --json side_by_side.json
    python benchmarks/gpu_side_by_side.py --match "384x384 2x2" --arch 80
    python benchmarks/gpu_side_by_side.py --reuse side_by_side.json  # our half anew: minutes

Nothing here is calibrated on hardware and nothing is a time. Both sides are compiled for the
architecture, executed by the PTX simulator of the tests on few tokens, held to a float64 oracle,
and their counts carried over to ``TOKENS`` tokens; ``gpu_static.lower_bound`` makes bounds of them
that only rank. A call's bound is the sum over its launches. What PyTorch computes around the
kernels (the sums over partial gradients; LyCORIS's own products in some compositions) is counted on
either side as if it ran at the peak of DRAM or of the tensor cores: too cheap, and its instructions
not at all. Spills are in the report, but not in the bound.

How counts are carried over: a dry run at ``TOKENS`` tokens on tensors without memory compiles the
same call and gives the grids. Launches whose grid grows with the tokens scale with it. Others,
whose programs share the tokens, run on two token counts: that tells a program's part from a
token's.

LyCORIS chooses by timing: an analytic model ranks, a shortlist is timed, and so are the ways to
compose a call (``tiled``, ``gemm``, ``atomic``; backward ``gemm``, ``atomic``, ``dxn``, ``apply``).
Here its own planner and its own shortlist run with the published rates of the device, and our bound
takes the place of the clock, so it gets the best that our cost model sees. Compositions wholly of
PyTorch are no kernels and left out. Its public ``kron_bypass`` takes no factor with a side over
128; the kernels do, and are called directly. ``atomic`` adds up gradients in no fixed order, and
the bound counts an atomic as a store; all that we launch is deterministic.

Columns: bytes is 32 times the sectors of loads, stores and atomics a token; instructions are warp
instructions of PTX a token, without moves, where both sides have no product by PyTorch; bound is in
microseconds at ``TOKENS`` tokens. Ratios are ours over theirs: below 1 we are ahead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

import torch  # noqa: E402
from lycoris.functional import lokr as lycoris_functional  # noqa: E402
from lycoris.kernels import tuner as lycoris_tuner  # noqa: E402
from lycoris.kernels.plans import lokr as lycoris_plans  # noqa: E402
from lycoris.kernels.plans.device import Device as PlanDevice  # noqa: E402
from lycoris.kernels.triton.lokr import apply, bypass, gemm, grad  # noqa: E402
from lycoris.kernels.tuner import model  # noqa: E402
from simulator import Device as Simulator  # noqa: E402
from simulator import Launch, SimulationError  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from benchmarks.gpu_static import _FREE, DEVICES, Static, lower_bound, static_report  # noqa: E402
from kron_kernels.backends import triton_gpu, triton_launch  # noqa: E402

TOKENS = 65536
SIMULATED = (64, 128)  # tokens; the second where programs share them
GPUS = {80: "A100", 90: "H100"}
SHARED = {80: 166912, 90: 232448}  # bytes that a block may have
L2 = {80: 40 << 20, 90: 50 << 20}  # bytes: NVIDIA's data sheets
SHAPES = ["384x384 2x2", "384x48 2x16", "16x2 192x384", "2x16 384x192", "8x2 384x384"]
SHAPES += ["2x8 384x384", "32x32 24x24", "64x64 12x12", "16x16 48x48"]
BF16 = ["384x384 2x2", "32x32 24x24"]
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
        generator = None if device == "meta" else torch.Generator().manual_seed(0)

        def draw(rows: int, columns: int, terms: int) -> Tensor:
            if device == "meta":
                return torch.empty(rows, columns, dtype=self.dtype, device="meta")
            return (torch.randn(rows, columns, generator=generator) / terms**0.5).to(self.dtype)

        dy = draw(tokens, self.m1 * self.m2, 1)
        x = draw(tokens, self.n1 * self.n2, 1)
        return dy, x, draw(self.m1, self.n1, self.n1), draw(self.m2, self.n2, self.n2)


Call = Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # of dy, x, a, b


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
    instructions, traffic = carried_over([(t, k.launch) for t, k in runs], launch)
    traffic["store_sectors"] += traffic["atomic_sectors"]
    blocks = math.prod(launch.grid)
    device = DEVICES[GPUS[arch]]
    bound = lower_bound(device, static, instructions, traffic, blocks, blocks, dry.bytes)
    names = ("dram", "l2", "tensor", "issue", "fp32", "special", "shared")
    return Part(
        launch.name,
        bound.seconds * 1e6,
        32 * (traffic["load_sectors"] + traffic["store_sectors"]) / TOKENS,
        dry.bytes / TOKENS,
        bound.limiter,
        sum(n for code, n in instructions.items() if not _FREE.match(code)) / TOKENS,
        blocks=blocks,
        local_accesses_per_token=(traffic["local_load"] + traffic["local_store"]) / TOKENS,
        mma_flops_per_token=traffic["mma_flops"] / TOKENS,
        roofs={n: getattr(bound, n) * 1e6 for n in names},
        tail=bound.tail,
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
def pretending(arch: int, tokens: int) -> Iterator[None]:
    """Both sides believe in the GPU; few tokens are laid out as ``TOKENS`` would be.

    No multiprocessors means none to keep busy: the largest tiles, and tokens shared by the fewest
    programs.
    """
    units = DEVICES[GPUS[arch]].sms if tokens == TOKENS else 0
    info = replace(lycoris_device(arch), units=units)
    with ExitStack() as stack:
        ours = triton_launch.Device("simulated", units, SHARED[arch])
        stack.enter_context(patch.object(triton_launch, "SIMULATED", ours))
        stack.enter_context(patch.object(triton_launch, "simulating", True))
        for module in (apply, gemm, grad):
            stack.enter_context(patch.object(module, "device_info", lambda _: info))
        yield


def run(call: Call, case: Case, arch: int, tokens: int, **options: bool) -> tuple[Mill, Any]:
    """One run: executed on few tokens, only compiled at ``TOKENS``."""
    dry = tokens == TOKENS
    mill = Mill(arch, execute=not dry, **options)
    with torch.no_grad(), pretending(arch, tokens):
        operands = case.operands(tokens, "meta" if dry else "cpu")
        with mill:
            result = call(*operands)
    return mill, result


def weigh(call: Call, case: Case, arch: int, checks: bool = False) -> tuple[list[Part], Any]:
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


def our_forward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
    """What kron_matmul(backend="triton") launches, without the operator around it."""
    return (triton_gpu.kron_matmul(x, (a[None], b[None])),)


def our_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    dx, da, db = triton_gpu.kron_matmul_backward(dy, x, a[None], b[None], [True] * 3)
    return dx, da[0], db[0]


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


def digest() -> str:
    """Which version of our kernels was weighed, also where it is not committed."""
    sources = sorted(Path(triton_gpu.__file__).parent.glob("triton_*.py"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest()[:16]


# One row -----------------------------------------------------------------------------------------


def expected(case: Case, direction: str) -> tuple[Tensor, ...]:
    """In float64, by torch.kron."""
    dy, x, a, b = (t.double() for t in case.operands(SIMULATED[0], "cpu"))
    if direction == "forward":
        return (x @ torch.kron(a, b).T,)
    a, b = a.requires_grad_(), b.requires_grad_()
    weight = torch.kron(a, b)
    return dy @ weight.detach(), *torch.autograd.grad(weight, (a, b), dy.T @ x)


def errors(result: tuple[Tensor, ...], case: Case, direction: str) -> list[float]:
    """Of every output the error's RMS over the output's, in units of the dtype's epsilon."""
    found = []
    for got, want in zip(result, expected(case, direction), strict=True):
        assert got.dtype == case.dtype and got.shape == want.shape
        error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        found.append(error.item() / torch.finfo(case.dtype).eps)
    if not max(found) <= _UNITS_OF_ERROR:
        raise AssertionError(f"{case} {direction}: errors of {found} units")
    return found


def checked(call: Call, case: Case, arch: int, direction: str) -> dict[str, Any]:
    """A side's parts and totals, its result verified and the simulator's findings noted."""
    finding = None
    try:
        parts, result = weigh(call, case, arch, checks=True)
    except SimulationError as error:
        finding = str(error)
        parts, result = weigh(call, case, arch)
    counted = not any(p.product_by_torch for p in parts)
    return {
        "microseconds": microseconds(parts),
        "bytes_per_token": sum(p.bytes_per_token for p in parts),
        "instructions_per_token": sum(p.instructions_per_token for p in parts) if counted else None,
        "kernels": sum(p.blocks > 0 for p in parts),
        "torch_operations": sum(p.blocks == 0 for p in parts),
        "error_in_epsilons": errors(result, case, direction),
        "finding": finding,
        "parts": [asdict(p) for p in parts],
    }


def dense(case: Case, arch: int, direction: str) -> dict[str, Any]:
    """The floor of a dense layer: of each product, compulsory DRAM or FLOPs at their peak."""
    m, n = case.m1 * case.m2, case.n1 * case.n2
    each = Operation("mm", 2 * (TOKENS * (m + n) + m * n), 2 * TOKENS * m * n)
    parts = [operation_part(arch, each)] * (1 if direction == "forward" else 2)
    return {"microseconds": microseconds(parts), "limiter": parts[0].limiter}


def public_call(case: Case) -> str:
    """What the public function does with such factors."""
    w1, w2 = torch.empty(case.m1, case.n1), torch.empty(case.m2, case.n2)
    if lycoris_functional._apply_supported(w1, None, None, w2, None, None, None):
        return "kron_bypass takes it"
    cap = lycoris_functional._apply_factor_cap()
    return f"kron_bypass refuses it: a factor has a side over {cap}; it runs torch.compile"


def side_by_side(case: Case, arch: int, direction: str, old: dict[str, Any]) -> dict[str, Any]:
    """One row of the results; LyCORIS's half from an old row, where there is one."""
    ours = checked(our_forward if direction == "forward" else our_backward, case, arch, direction)
    row = {"case": str(case), "arch": arch, "direction": direction, "ours": ours}
    row["dense"] = dense(case, arch, direction)
    if old:
        return row | {key: value for key, value in old.items() if key.startswith("their")}
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
    row["theirs"] = best
    row["their_alternatives"] = alternatives
    row["their_refusals"] = lycoris.refused
    fixed = [us for kind, us in alternatives.items() if kind != "atomic"]
    row["their_deterministic_microseconds"] = min(fixed, default=None)
    row["their_public_call"] = public_call(case)
    return row


# Printing ----------------------------------------------------------------------------------------

METRICS = {
    "bytes": "bytes_per_token",
    "instructions": "instructions_per_token",
    "bound": "microseconds",
}


def verdict(row: dict[str, Any], metric: str) -> tuple[float | None, str]:
    """Ours over theirs, and who is ahead."""
    ours, theirs = (row[side] and row[side][METRICS[metric]] for side in ("ours", "theirs"))
    if ours is None or theirs is None:
        return None, "-"
    ratio = ours / theirs
    if abs(ratio - 1) <= EQUAL:
        return ratio, "equal"
    return ratio, "ours" if ratio < 1 else "theirs"


def print_row(row: dict[str, Any]) -> None:
    theirs = row["theirs"] or dict.fromkeys(METRICS.values())
    cells = []
    for metric, key in METRICS.items():
        ratio, who = verdict(row, metric)
        values = [f"{v:.0f}" if v is not None else "-" for v in (row["ours"][key], theirs[key])]
        shown = "-" if ratio is None else f"{ratio:.2f}"
        cells.append(f"{'/'.join(values):>15} {shown:>5} {who:<6}")
    kind = theirs.get("composition", "none")
    print(
        f"{row['case']:<22} {row['arch']} {row['direction']:<8} {' | '.join(cells)} | "
        f"{row['dense']['microseconds']:>7.0f} | {kind}",
        flush=True,
    )


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
    """Counts of cells, and what holds ours back where it is behind."""
    counts: dict[str, Counter[str]] = {metric: Counter() for metric in METRICS}
    for row in rows:
        for metric in METRICS:
            counts[metric][verdict(row, metric)[1]] += 1
    print("\ncells         ahead  equal  behind  not comparable")
    for metric, c in counts.items():
        numbers = [c[who] for who in ("ours", "equal", "theirs", "-")]
        print(f"{metric:<13} " + "  ".join(f"{n:>5}" for n in numbers))
    for row in rows:
        behind = [metric for metric in METRICS if verdict(row, metric)[1] == "theirs"]
        if behind:
            print(
                f"\nbehind in {', '.join(behind)}: {row['case']} {row['arch']} {row['direction']}"
            )
            for side in ("ours", "theirs"):
                for p in row[side]["parts"]:
                    print(f"  {side:<6} {part_line(p)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--reuse", type=Path, help="take LyCORIS's half from these results")
    parser.add_argument("--match", default="", help="only cases with this text: 2x2, bfloat16")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    knobs.language.default_fp_fusion = True  # whatever the environment says

    cases = [Case.of(shape, torch.float16) for shape in SHAPES]
    cases += [Case.of(shape, torch.bfloat16) for shape in BF16]
    names = ("torch", "triton", "lycoris-lora")
    old = json.loads(options.reuse.read_text()) if options.reuse else {"rows": []}
    known = {(row["case"], row["arch"], row["direction"]): row for row in old["rows"]}
    results: dict[str, Any] = {
        "about": "uncalibrated lower bounds that only rank; see benchmarks/gpu_side_by_side.py",
        "tokens": TOKENS,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "our_kernels": digest(),
        "rows": [],
    }
    header = [f"{f'{metric}, ours/theirs':<28}" for metric in METRICS]
    print(f"{'shape':<22} {'sm':<2} {'':<8} {' | '.join(header)} |   dense | their composition")
    for arch in options.arch:
        for case in cases:
            if options.match not in str(case):
                continue
            for direction in ("forward", "backward"):
                began = time.monotonic()
                half = known.get((str(case), arch, direction), {})
                row = side_by_side(case, arch, direction, half)
                row["seconds_of_simulation"] = round(time.monotonic() - began, 1)
                results["rows"].append(row)
                print_row(row)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results["rows"])


if __name__ == "__main__":
    main()
