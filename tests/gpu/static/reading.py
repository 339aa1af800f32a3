"""Resources and instructions of a compiled GPU kernel, read from its machine code without a GPU.

``static_report`` disassembles Triton's output (``CompiledKernel.asm``), ``nvidia_kernels`` a cubin
of any compiler; ``occupancy`` computes how many blocks fit on a multiprocessor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from static.multiprocessors import MULTIPROCESSORS, Multiprocessor

Arch = int | str  # 80 for sm_80, or "gfx942"
Limit = Literal["registers", "shared", "threads", "blocks"]


class Occupancy(NamedTuple):
    """Blocks that one multiprocessor holds at once, and the resource that forbids one more."""

    blocks_per_sm: int
    occupancy: float  # resident warps over the most that could be: 0 to 1
    limited_by: Limit


@dataclass(frozen=True)
class Static:
    """Static properties of a kernel's machine code.

    The counts are of instructions in the code, not of executions. Widths are bits per lane. Bulk
    copies (TMA) have no width per lane and are not among the loads and stores, nor are atomics.
    ``vars`` turns it into a row for ``check_budget``; ``dataclasses.asdict`` would count the items
    of a Counter instead of copying it.
    """

    arch: Arch
    registers: int  # per thread
    spill_loads: int  # instructions on local memory: spills, and arrays indexed at run time
    spill_stores: int
    stack: int  # bytes per thread
    shared: int  # bytes per block, static and dynamic, without what the system reserves
    warps: int  # per block
    blocks_per_sm: int
    occupancy: float  # 0 to 1
    limited_by: Limit
    instructions: int
    tensor: Counter[str]  # tensor-core instructions, as "HMMA.16816.F32"
    global_loads: Counter[int]  # by width; asynchronous copies to shared memory are among them
    global_stores: Counter[int]
    shared_loads: Counter[int]
    shared_stores: Counter[int]
    barriers: int  # of the whole block
    shuffles: int


def occupancy(arch: Arch, threads: int, registers: int, shared: int) -> Occupancy:
    """Residency of blocks of ``threads``, by NVIDIA's rules (cuda_occupancy.h).

    ``registers`` are per thread, ``shared`` bytes per block without the system's reserve. 0 blocks
    if a block does not fit. All memory that can be shared memory is assumed to be. The tensor
    memory of sm_100 limits residency too, but ``asm`` does not tell how much a kernel uses.
    """
    sm = _multiprocessor(arch)
    warps = ceil(threads / sm.warp)
    per_warp = _round_up(max(registers, 1) * sm.warp, sm.register_unit)
    # The check at launch takes a block's warps to be spread over all partitions evenly.
    launches = registers <= sm.registers_per_thread and (
        per_warp * _round_up(warps, sm.partitions) <= sm.registers
    )
    resident_warps = sm.registers // sm.partitions // per_warp * sm.partitions
    per_block = _round_up(shared + sm.shared_reserve, sm.shared_unit)
    limits: dict[Limit, int] = {
        # Of equal limits the first is named: one that no change of registers or tiles could raise.
        "threads": sm.threads // (warps * sm.warp),
        "blocks": sm.blocks,
        "registers": resident_warps // warps if launches else 0,
        "shared": sm.shared // max(per_block, 1) if shared <= sm.shared_per_block else 0,
    }
    limited_by = min(limits, key=limits.__getitem__)
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps * sm.warp / sm.threads, limited_by)


def _multiprocessor(arch: Arch) -> Multiprocessor:
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"no limits are known for {arch!r}, only for {list(MULTIPROCESSORS)}")
    return MULTIPROCESSORS[arch]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def static_report(asm: Mapping[str, Any], arch: Arch, num_warps: int, shared: int) -> Static:
    """Read ``CompiledKernel.asm``: its ``cubin`` for NVIDIA, its ``amdgcn`` for AMD.

    ``num_warps`` and ``shared`` (dynamic bytes per block) are those of ``CompiledKernel.metadata``.
    Disassembling a cubin needs cuobjdump and nvdisasm, from the CUDA toolkit or from Triton.
    """
    threads = num_warps * _multiprocessor(arch).warp
    if isinstance(arch, str):
        resources, census = _amd_resources(asm["amdgcn"]), _amd_census(asm["amdgcn"])
    else:
        resources, census = _nvidia_report(asm["cubin"], arch)
    shared += resources.shared
    return Static(
        arch=arch,
        registers=resources.registers,
        stack=resources.stack,
        shared=shared,
        warps=num_warps,
        **occupancy(arch, threads, resources.registers, shared)._asdict(),
        **vars(census),
    )


class _Resources(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # static bytes per block


@dataclass
class _Census:
    """The part of ``Static`` that is counted instruction by instruction."""

    instructions: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    tensor: Counter[str] = field(default_factory=Counter)
    global_loads: Counter[int] = field(default_factory=Counter)
    global_stores: Counter[int] = field(default_factory=Counter)
    shared_loads: Counter[int] = field(default_factory=Counter)
    shared_stores: Counter[int] = field(default_factory=Counter)
    barriers: int = 0
    shuffles: int = 0


def _one_kernel(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    """Numbers of the only match; with several, the counts of different kernels would be mixed."""
    matches = list(pattern.finditer(text))
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} kernels found by {pattern.pattern!r} instead of one")
    return map(int, matches[0].groups())


# NVIDIA ------------------------------------------------------------------------------------------

_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SECTION = re.compile(r"^\s+\.section\s+\.text\.(\w+),.*$", re.MULTILINE)
_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+\S", re.MULTILINE)
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# Of a warp (HMMA), of a Hopper warpgroup (HGMMA), of a Blackwell SM (UTCHMMA).
_SASS_TENSOR = re.compile(r"[A-Z]G?MMA|UTC[A-Z]MMA")


def _nvidia_report(cubin: bytes, arch: int) -> tuple[_Resources, _Census]:
    reports = nvidia_kernels(cubin, arch)
    if len(reports) != 1:
        raise ValueError(f"{len(reports)} kernels found in a cubin instead of one")
    ((resources, census, _),) = reports.values()
    return resources, census


def nvidia_kernels(cubin: bytes, arch: int) -> dict[str, tuple[_Resources, _Census, int]]:
    """By kernel: its resources, its instructions, and the bytes of its code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = run(nvidia_tool("cuobjdump"), "-res-usage", str(file))
        sass = run(nvidia_tool("nvdisasm"), "-c", str(file))
    sections = _SECTION.split(sass)[1:]
    code = dict(zip(sections[::2], sections[1::2], strict=True))
    # From sm_90 on the section of static shared memory, where there is one, begins with the
    # system's reserve.
    reserve = MULTIPROCESSORS[arch].shared_reserve if arch >= 90 else 0
    reports = {}
    for name, *numbers in _USAGE.findall(usage):
        registers, stack, shared = map(int, numbers)
        resources = _Resources(registers, stack, max(shared - reserve, 0))
        last = max((int(address, 16) for address in _ADDRESS.findall(code[name])), default=-16)
        reports[name] = resources, _nvidia_census(code[name]), last + 16  # bytes an instruction
    return reports


def nvidia_tool(name: str) -> str:
    """Path of a program of the CUDA toolkit, or of Triton's copy of it."""
    if found := shutil.which(name):
        return found
    # Imported here because CUDA's budget needs no Triton if the toolkit is installed.
    from triton import knobs

    return getattr(knobs.nvidia, name).path


def run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _nvidia_census(sass: str) -> _Census:
    census = _Census()
    for predicate, mnemonic in _SASS.findall(sass):
        # ptxas pads the end with NOPs and puts loads that never execute next to barriers.
        if mnemonic == "NOP" or predicate in ("!PT", "!UPT"):
            continue
        census.instructions += 1
        opcode, *modifiers = mnemonic.split(".")
        width = next((_SASS_WIDTHS[m] for m in modifiers if m in _SASS_WIDTHS), 32)
        match opcode:
            case "LDG" | "LDGSTS" | "LD":
                census.global_loads[width] += 1
            case "STG" | "ST":
                census.global_stores[width] += 1
            case "LDS":
                census.shared_loads[width] += 1
            case "STS":
                census.shared_stores[width] += 1
            case "LDSM":
                census.shared_loads[_matrices(modifiers)] += 1
            case "STSM":
                census.shared_stores[_matrices(modifiers)] += 1
            case "LDL":
                census.spill_loads += 1
            case "STL":
                census.spill_stores += 1
            case "BAR":
                census.barriers += 1
            case "SHFL":
                census.shuffles += 1
            case _ if _SASS_TENSOR.fullmatch(opcode):
                census.tensor[mnemonic] += 1
    return census


def _matrices(modifiers: list[str]) -> int:
    """LDSM.16.M88.4 moves four matrices of 8 × 8 halves, each of which is 32 bits a lane."""
    return 32 * int(modifiers[-1]) if modifiers[-1].isdigit() else 32


# AMD ---------------------------------------------------------------------------------------------

_AMD = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)
_AMD_MEMORY = re.compile(
    r"(?P<space>global|buffer|flat|ds)_(?P<way>load|read|store|write)(?P<pair>2?)(?:st64)?_(?:lds_)?"
    r"(?:[us]?(?P<unit>dword|short|byte)(?:x(?P<times>\d))?|[biu](?P<bits>\d+))"
)
_AMD_UNITS = {"dword": 32, "short": 16, "byte": 8}
_AMD_SHUFFLE = re.compile(r"permute|permlane|swizzle|_dpp")


def _amd_resources(assembly: str) -> _Resources:
    """From the kernel's metadata; its vector registers include the accumulation registers."""
    (registers,) = _one_kernel(_amd_field("vgpr_count"), assembly)
    (stack,) = _one_kernel(_amd_field("private_segment_fixed_size"), assembly)
    (shared,) = _one_kernel(_amd_field("group_segment_fixed_size"), assembly)
    return _Resources(registers, stack, shared)


def _amd_field(name: str) -> re.Pattern[str]:
    return re.compile(rf"^[\s-]+\.{name}:\s+(\d+)", re.MULTILINE)


def _amd_census(assembly: str) -> _Census:
    census = _Census()
    for mnemonic in _AMD.findall(assembly):
        census.instructions += 1
        if memory := _AMD_MEMORY.match(mnemonic):
            place = "shared" if memory["space"] == "ds" else "global"
            way = "loads" if memory["way"] in ("load", "read") else "stores"
            getattr(census, f"{place}_{way}")[_amd_width(memory)] += 1
        elif mnemonic.startswith("scratch_load"):
            census.spill_loads += 1
        elif mnemonic.startswith("scratch_store"):
            census.spill_stores += 1
        elif mnemonic.startswith(("v_mfma", "v_smfmac")):
            census.tensor[mnemonic] += 1
        elif mnemonic == "s_barrier":
            census.barriers += 1
        elif _AMD_SHUFFLE.search(mnemonic):
            census.shuffles += 1
    return census


def _amd_width(memory: re.Match[str]) -> int:
    """global_load_dwordx4 and ds_read_b128 move 128 bits, ds_read2_b64 twice 64."""
    if memory["bits"]:
        width = int(memory["bits"])
    else:
        width = _AMD_UNITS[memory["unit"]] * int(memory["times"] or 1)
    return 2 * width if memory["pair"] else width
