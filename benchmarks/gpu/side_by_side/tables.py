"""What is printed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.gpu.side_by_side.costs import Part, microseconds
from benchmarks.gpu.side_by_side.cuda import cuda_weigh, unserved
from benchmarks.gpu.side_by_side.works import LABELS, Work, our_call, title
from kron_kernels.backends import cuda as cuda_gpu

EQUAL = 0.02
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


def print_launch(p: Part) -> None:
    """All of one launch, by the token and as bounds."""
    if p.microseconds < 1 or not p.blocks:
        grid = f", grid {p.blocks}" if p.blocks else ""
        print(f"  {p.name}: {p.microseconds:.1f} µs by {p.limiter}{grid}")
        return
    roofs = "  ".join(f"{name} {us:.1f}" for name, us in p.roofs.items())
    stores = p.bytes_per_token - p.load_bytes_per_token
    opcodes = "  ".join(f"{code} {n:.1f}" for code, n in p.opcodes.items())
    print(
        f"  {p.name}: grid {p.blocks}, {32 * p.warps} threads, {p.shared} B shared, "
        f"{p.registers} registers, spills {p.spill_loads}/{p.spill_stores}, "
        f"{p.blocks_per_sm} blocks/SM by {p.limited_by}\n"
        f"    a token: {p.instructions_per_token:.1f} instructions; "
        f"{p.load_bytes_per_token:.0f} B loaded + {stores:.0f} B stored in sectors, "
        f"{p.dram_bytes_per_token:.0f} B of DRAM; {p.passes_per_token:.1f} passes through "
        f"shared memory ({p.bank_conflicts:.2f} of the least); "
        f"{p.mma_flops_per_token:.0f} mma FLOPs\n"
        f"    {opcodes}\n"
        f"    µs: {roofs}  x tail {p.tail:.3f} = {p.microseconds:.1f} by {p.limiter}"
    )


def print_launches(work: Work, arch: int, direction: str, old: dict[str, Any]) -> None:
    """Our CUDA kernels' launches, beside what is stored of the same cell."""
    print(f"\n{title(work, direction)}, sm_{arch}", flush=True)
    if reason := unserved(work):
        print(f"  unserved: {reason}")
        return
    parts = cuda_weigh(our_call(cuda_gpu, work, direction), work, arch)
    for part in parts:
        print_launch(part)
    line = [f"CUDA {microseconds(parts):.1f}"]
    for side in ("Triton", "LyCORIS"):
        if us := value(old, side, "bound"):
            line.append(f"{side} {us:.1f}")
    print(f"  bounds in µs: {', '.join(line)}", flush=True)


def part_line(p: Part) -> str:
    line = f"{p.name:<24} {p.microseconds:7.1f} µs by {p.limiter}"
    if p.blocks:
        line += (
            f", {p.bytes_per_token:.0f} B, {p.instructions_per_token:.0f} instructions, "
            f"{p.registers} registers, {p.spill_loads}+{p.spill_stores} spills, "
            f"{p.shared} B shared, {p.blocks_per_sm} blocks/SM"
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
                    print(f"  {side:<7} {part_line(Part(**p))}")
