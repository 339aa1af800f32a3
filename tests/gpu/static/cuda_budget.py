"""What the compiled CUDA C++ kernels cost, for every GPU generation; needs no GPU.

    python -m static.cuda_budget [--match TEXT] [--arch 80 90 …] [--write]

Reads the machine code in the installed module or, where that has no kernels for a generation, has
nvcc compile what is missing. Prints what each kernel takes and holds, and how many of its blocks a
multiprocessor has when KroneckerBERT's layers launch it. ``cuda_budget.json`` says what is allowed;
--write makes it from what is seen, with a little room. The tests hold the kernels to it.
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

from static.budget import command
from static.multiprocessors import DEVICES
from static.reading import nvidia_kernels, nvidia_tool, occupancy, run
from static.triton_budget import LAYERS
from kron_kernels import KronShape, kron_feed_forward, kron_matmul, kron_qkv
from kron_kernels.backends import cuda as backend

BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHS = (80, 86, 89, 90, 100, 120)
CODE_ROOM = 1.1  # of the bytes of code; what they are spent on is limited by other means
CODE = "code"  # the case of what is known without a launch
TOKENS = 16384  # a large batch: launches are cut for speed, not to occupy the GPU at all


def installed() -> Path | None:
    spec = find_spec("kron_kernels._native")
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache
def embedded(module: Path) -> dict[int, list[bytes]]:
    """The cubins in a module, by architecture."""
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
    """The machine code of all kernels for an architecture: the installed one, else nvcc's."""
    module = installed()
    if module and (found := embedded(module).get(arch)):
        return found
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda math: cuda.compiled(math, arch, "cubin"), cuda.MATHS)
        return [file.read_bytes() for file in files]


def cases(dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, Callable[[], object]]]:
    """What KroneckerBERT's layers ask for."""

    def layer(s: KronShape) -> tuple[torch.Tensor, ...]:
        sizes = (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2), (s.out_features,)
        return tuple(torch.zeros(size, dtype=dtype) for size in sizes)

    def tokens(features: int) -> torch.Tensor:
        return torch.zeros(TOKENS, features, dtype=dtype)

    for name, s in LAYERS.items():
        x, (a, b, bias) = tokens(s.in_features), layer(s)
        if backend.why_not(x, a, b):
            continue
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
        up, down = layer(LAYERS[f"{size} up"]), layer(LAYERS[f"{size} down"])
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
    x, one = tokens(768), layer(LAYERS["21x attention"])
    yield "21x QKV forward", lambda: kron_qkv(x, *[one] * 3, backend="cuda")


def launches(arch: int, registers: dict[str, int]) -> Iterator[dict[str, object]]:
    """How many blocks of each launch a multiprocessor has; of those that only add up parts not."""
    multiprocessors = next(one.sms for one in DEVICES.values() if one.capability == arch)
    device = cuda.CudaDevice(arch, execute=False, multiprocessors=multiprocessors)
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
    """Of each kernel whose name contains ``match``, of all code, and of each launch."""
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
    """What a later compilation of the same kernel may cost, and never a spill."""
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


if __name__ == "__main__":
    command(__doc__, BUDGET, ARCHS, rows, show, entry)
