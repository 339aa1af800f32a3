"""Bounds of a launch's time from below, by published peak rates.

``lower_bound`` combines a static report with counts from a simulated run (see its docstring for the
units) into the least time that each resource of a ``Device`` allows.

The bounds are uncalibrated: they were never compared with a clock, they know of no latency, and
they count PTX instructions where the hardware executes SASS. They rank variants of a kernel, and
nothing else; never quote one as a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from static.multiprocessors import Device
from static.reading import Arch, Static, occupancy

_SECTOR = 32  # bytes: what the caches move at once
_SCHEDULERS = 4  # per SM, each of which issues one warp instruction per clock
_WARP = 32
# Parameters are operands of SASS instructions, and ptxas renames registers instead of moving them.
FREE = re.compile(r"(?:mov|cvta|ld\.param)\b")
# PTX opcodes do not tell integer additions from those in floating point; comparisons, selections
# and conversions run on other lanes, and signs are free.
_FP32 = frozenset({"fma", "add", "sub", "mul"})
# A division of either kind begins with a reciprocal.
_SPECIAL = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"})


@dataclass(frozen=True)
class Bound:
    """The least seconds that a launch takes, by the resource that it would have to itself."""

    dram: float
    l2: float
    tensor: float
    issue: float
    fp32: float
    special: float
    shared: float
    limiter: str  # the name of the largest of the above
    tail: float  # ≥ 1: rounds of blocks begun, over rounds filled
    seconds: float  # the largest of the above, times the tail
    coalescing: float  # bytes the lanes load per byte moved; above 1 where lanes share an address
    bank_conflicts: float  # ≥ 1: passes through shared memory, over those without conflicts


def lower_bound(
    device: Device,
    static: Static,
    instructions: Mapping[str, int],
    traffic: Mapping[str, int],
    blocks_counted: int,
    blocks: int,
    dram_bytes: int,
) -> Bound:
    """The least time of a launch of ``blocks``, from the counts of ``blocks_counted`` of them.

    ``instructions`` are executed warp instructions by PTX opcode. ``traffic`` holds
    ``load_sectors`` and ``store_sectors`` (of 32 bytes, per warp instruction), ``load_bytes`` (that
    the lanes asked for), ``smem_load_wavefronts`` and ``smem_store_wavefronts`` (passes through
    shared memory) with the same as ``…_ideal`` had no banks conflicted, and ``mma_flops``; what is
    absent counts as 0. ``dram_bytes`` is what the whole launch must move at least: inputs once and
    outputs once.

    Each resource is taken to do nothing but this work, at its peak rate, on as many SMs as have a
    block: the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009) with more roofs. The
    largest time is multiplied by the tail, the last round of blocks counted as a full one, which
    holds for blocks that take equally long. Three roofs can be too high: ``l2`` where loads hit in
    L1, ``fp32`` where integers are added on lanes of their own, and ``tensor`` for products of 8
    bits, which it times as fp16.
    """
    if blocks_counted < 1 or blocks < 1:
        raise ValueError(f"{blocks_counted} blocks counted for a launch of {blocks}")
    if not _runs_on(static.arch, device.capability):
        raise ValueError(f"code for {static.arch} does not run on sm_{device.capability}")
    # A device may hold more or fewer blocks than the first of its generation, which was compiled
    # for: registers and shared memory are the kernel's, the limits are the device's.
    resident = occupancy(
        device.capability, static.warps * _WARP, static.registers, static.shared
    ).blocks_per_sm
    if resident == 0:
        raise ValueError(f"a block does not fit on an SM of sm_{device.capability}")

    scale = blocks / blocks_counted
    counts = Counter(traffic)
    sectors = counts["load_sectors"] + counts["store_sectors"]
    wavefronts = counts["smem_load_wavefronts"] + counts["smem_store_wavefronts"]
    ideal = counts["smem_load_ideal"] + counts["smem_store_ideal"]
    issued = sum(n for opcode, n in instructions.items() if not FREE.match(opcode))

    def lanes(opcodes: frozenset[str]) -> int:
        return _WARP * sum(instructions.get(opcode, 0) for opcode in opcodes)

    busy = min(device.sms, blocks)
    hertz = device.clock_ghz * 1e9
    clocks = hertz * busy  # of all busy SMs together, in a second
    seconds = {
        "dram": dram_bytes / (device.dram_gb_s * 1e9),
        "l2": scale * sectors * _SECTOR / (device.l2_bytes_per_clock * hertz),
        "tensor": scale * counts["mma_flops"] / (device.tensor_tflops * 1e12 * busy / device.sms),
        "issue": scale * issued / (_SCHEDULERS * clocks),
        "fp32": scale * lanes(_FP32) / (device.fp32_lanes * clocks),
        "special": scale * lanes(_SPECIAL) / (device.special_lanes * clocks),
        "shared": scale * wavefronts / clocks,
    }
    limiter = max(seconds, key=seconds.__getitem__)
    rounds = blocks / (resident * device.sms)
    tail = ceil(rounds) / rounds if rounds > 1 else 1.0
    return Bound(
        **seconds,
        limiter=limiter,
        tail=tail,
        seconds=seconds[limiter] * tail,
        coalescing=counts["load_bytes"] / max(_SECTOR * counts["load_sectors"], 1),
        bank_conflicts=wavefronts / ideal if ideal else 1.0,
    )


def _runs_on(arch: Arch, capability: int) -> bool:
    """A cubin runs within its generation, from the version on that it was compiled for."""
    return isinstance(arch, int) and arch // 10 == capability // 10 and arch % 10 <= capability % 10
