"""What a launch or an operation of PyTorch costs at ``TOKENS`` tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from simulator import Launch

from benchmarks.gpu.bounds import FREE, lower_bound
from benchmarks.gpu.devices import DEVICES
from benchmarks.gpu.side_by_side.mill import GPUS, Operation
from benchmarks.gpu.side_by_side.works import TOKENS
from benchmarks.gpu.static import Static


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


def microseconds(parts: list[Part]) -> float:
    """The bound of a call."""
    return sum(part.microseconds for part in parts)


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
    issued = {code: n / TOKENS for code, n in instructions.items() if not FREE.match(code)}
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
        "parts": [stored(p) for p in parts],
    }


def stored(part: Part) -> dict[str, Any]:
    """What is not as in a part without it; ``Part(**…)`` is its other side."""
    fields = asdict(replace(part, opcodes={}))  # opcodes are for reading
    plain = asdict(Part(part.name, 0.0, 0.0, 0.0))
    least = ("name", "microseconds", "bytes_per_token", "dram_bytes_per_token")
    return {k: v for k, v in fields.items() if k in least or v != plain[k]}


def compact(results: dict[str, Any]) -> str:
    """JSON, of which a row is a line; numbers of six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    lines = []
    for key, value in results.items():
        text = json.dumps(short(value))
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(short(row)) for row in value) + "\n]"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
