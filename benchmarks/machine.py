"""What the numbers were taken on, its peaks, and whether it had anything else to do."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

import kron_kernels
from kron_kernels.backends import native

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
BUSY = 0.05  # of all cores, by others: above it times are said to be doubtful


def facts(threads: int) -> dict:
    """The processor, its features, versions, threads; the peaks that one process reaches here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    features = re.search(r"(?:flags|Features)\s*: (.*)", text)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "flags": [f for f in FLAGS if features and f in features[1].split()],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.instruction_set(),
        "threads": threads,
        "gemm_gflops": round(gemm_rate(), 1),
        "gb_per_s": round(bandwidth(), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kron_kernels": kron_kernels.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def gemm_rate() -> float:
    """GFLOP/s of the best of 20 float32 products of 1536 x 1536."""
    a, b = torch.randn(2, 1536, 1536)
    return 2e-9 * 1536**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=20))


def bandwidth() -> float:
    """GB/s of the best of 20 sums of two arrays of 128 MB into a third: memory, no cache."""
    a, b, c = torch.ones(3, 2**25)
    best = min(timeit.repeat(lambda: torch.add(a, b, out=c), number=1, repeat=20))
    return 3 * a.nbytes / best / 1e9


def use_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that bring an OpenMP of their own
    torch.set_num_threads(threads)


@contextmanager
def watched(results: dict) -> Iterator[dict]:
    """Warns if others keep the cores busy, before and meanwhile; ``results`` notes their share."""
    if (before := psutil.cpu_percent(1.0) / 100) > BUSY:
        warn(f"other work takes {before:.0%} of the cores: stop it, or believe no time below")
    start, busy, own = time.time(), _busy(), _own()
    yield results
    spent = (_busy() - busy) - (_own() - own)
    share = max(0.0, spent / (time.time() - start) / (os.cpu_count() or 1))
    results["machine"]["others_busy"] = round(share, 3)
    if share > BUSY:
        warn(f"other work took {share:.0%} of the cores meanwhile: measure again without it")


def _busy() -> float:
    """Seconds of work on all cores since the start of the machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own() -> float:
    """Seconds of this process and of those it has started and seen end."""
    return sum(os.times()[:4])


def warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def title(machine: dict) -> str:
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    cpu = f"{machine['cpu']} ({machine['capability']})"
    return f"{cpu}, {threads}, torch {machine['torch']}, {machine['date'][:10]}"


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
