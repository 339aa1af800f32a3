"""Resources of the compiled CUDA C++ kernels for every GPU generation; needs no GPU.

The machine code is that of the installed module or, for a generation that it lacks, nvcc's.
``cuda_budget.json`` has the limits, with a little room: on each kernel's code, and on the blocks
that a multiprocessor holds when KroneckerBERT's layers launch it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from simulator import cuda

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, kron_qkv
from kron_kernels.backends import cuda as backend
from kron_kernels.testing.cases import PRESETS
from static.multiprocessors import CARDS
from static.reading import nvidia_kernels, nvidia_tool, occupancy, run

BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHS = tuple(CARDS)
CODE_ROOM = 1.1  # slack on the bytes of code, whose parts have their own limits
CODE = "code"  # the case of rows that need no launch
TOKENS = 16384  # a large batch, where launches are planned for speed rather than for occupancy


def installed() -> Path | None:
    spec = find_spec("kron_kernels._native")
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache
def embedded(module: Path) -> dict[int, list[bytes]]:
    """Cubins in a module, by architecture."""
    found: dict[int, list[bytes]] = {}
    if b".nv_fatbin" not in module.read_bytes():
        return found
    with tempfile.TemporaryDirectory() as folder:
        run(nvidia_tool("cuobjdump"), "-xelf", "all", str(module.resolve()), cwd=folder)
        for file in sorted(Path(folder).glob("*.cubin")):
            arch = int(re.search(r"sm_(\d+)a?\.", file.name)[1])
            found.setdefault(arch, []).append(file.read_bytes())
    return found


@lru_cache
def cubins(arch: int) -> list[bytes]:
    """Machine code of all kernels for an architecture: the installed one, else nvcc's."""
    module = installed()
    if module and (found := embedded(module).get(arch)):
        return found
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda math: cuda.compiled(math, arch, "cubin"), cuda.MATHS)
        return [file.read_bytes() for file in files]


def cases(dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, Callable[[], object]]]:
    """KroneckerBERT's calls, by name."""

    def layer(s: KronShape) -> tuple[torch.Tensor, ...]:
        sizes = (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2), (s.out_features,)
        return tuple(torch.zeros(size, dtype=dtype) for size in sizes)

    def tokens(features: int) -> torch.Tensor:
        return torch.zeros(TOKENS, features, dtype=dtype)

    for name, s in PRESETS.items():
        x, (a, b, bias) = tokens(s.in_features), layer(s)
        dy = tokens(s.out_features)
        yield (
            f"{name} forward",
            lambda x=x, a=a, b=b, c=bias: kron_matmul(x, a, b, bias=c, backend="cuda"),
        )
        yield (
            f"{name} backward",
            lambda dy=dy, x=x, a=a, b=b: backend.kron_matmul_backward(dy, x, a, b, [True] * 3),
        )
    for size in ("8x", "21x"):
        up, down = layer(PRESETS[f"{size} up"]), layer(PRESETS[f"{size} down"])
        x = tokens(768)
        yield (
            f"{size} block forward",
            lambda x=x, up=up, down=down: kron_feed_forward(x, up, down, backend="cuda"),
        )
        yield (
            f"{size} block backward",
            lambda x=x, up=up, down=down: backend.kron_feed_forward_backward(
                x, x, up, "gelu", down, [True] * 6
            ),
        )
    x, one = tokens(768), layer(PRESETS["21x attention"])
    yield "21x QKV forward", lambda: kron_qkv(x, *[one] * 3, backend="cuda")


def launches(arch: int, registers: dict[str, int]) -> Iterator[dict[str, object]]:
    """Rows with the occupancy of each launch, except those that only add up partial sums."""
    device = cuda.CudaDevice(arch, execute=False, multiprocessors=CARDS[arch])
    with device:
        for case, call in cases():
            device.launches.clear()
            call()
            seen: Counter[str] = Counter()
            for launch in device.launches:
                if launch.name not in registers or launch.name.startswith("kron_sum_parts"):
                    continue
                seen[launch.name] += 1
                again = f", {seen[launch.name]}" if seen[launch.name] > 1 else ""
                found = occupancy(
                    arch, 32 * launch.num_warps, registers[launch.name], launch.shared
                )
                yield {
                    "case": f"{case}{again}",
                    "kernel": launch.name,
                    "arch": arch,
                    "warps": launch.num_warps,
                    "dynamic": launch.shared,
                    **found._asdict(),
                }


def rows(match: str = "", archs: Sequence[int] = ARCHS) -> Iterator[dict[str, object]]:
    """Rows of each kernel whose name contains ``match``, of all code, and of each launch."""
    for arch in archs:
        size, registers = 0, {}
        for cubin in cubins(arch):
            size += len(cubin)
            for name, (resources, census, code) in sorted(nvidia_kernels(cubin, arch).items()):
                if match not in name:
                    continue
                registers[name] = resources.registers
                yield {
                    "case": CODE,
                    "kernel": name,
                    "arch": arch,
                    **resources._asdict(),
                    **vars(census),
                    "code": code,
                    "wide_loads": sum(n for bits, n in census.global_loads.items() if bits >= 128),
                }
        if not match:
            yield {"case": CODE, "kernel": "all", "arch": arch, "bytes": size}
        yield from launches(arch, registers)


def entry(row: dict[str, object]) -> dict[str, object]:
    """Limits for later compilations of the same kernel: this row's resources, and no spills."""
    match = {key: row[key] for key in ("case", "kernel", "arch")}
    if "bytes" in row:
        return {"match": match, "max": {"bytes": int(row["bytes"] * CODE_ROOM)}}
    if row["case"] != CODE:
        return {
            "match": match,
            "max": {"dynamic": row["dynamic"]},
            "min": {"blocks_per_sm": row["blocks_per_sm"], "warps": row["warps"]},
        }
    return {
        "match": match,
        "max": {
            "spill_loads": 0,
            "spill_stores": 0,
            "stack": 0,
            "registers": row["registers"],
            "shared": row["shared"],
            "code": int(row["code"] * CODE_ROOM),
        },
        "min": {"tensor": row["tensor"].total(), "wide_loads": row["wide_loads"]},
    }


def show(row: dict[str, object]) -> str:
    if "bytes" in row:
        return f"{row['kernel']:28} {row['arch']:4} {row['bytes']:,} bytes"
    if row["case"] != CODE:
        return (
            f"{row['case']:24} {row['kernel']:36} {row['arch']:4} shared {row['dynamic']:6}  "
            f"{row['warps']} warps x {row['blocks_per_sm']:2} blocks, "
            f"limited by {row['limited_by']}"
        )
    return (
        f"{row['kernel']:28} {row['arch']:4} registers {row['registers']:3}  "
        f"spills {row['spill_loads']}/{row['spill_stores']}  stack {row['stack']}  "
        f"shared {row['shared']}  tensor {row['tensor'].total():3}  barriers {row['barriers']:2}  "
        f"code {row['code']:6}  loads by bits {dict(row['global_loads'])}  "
        f"stores {dict(row['global_stores'])}"
    )
