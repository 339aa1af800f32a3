"""The machine's software and GPU, as JSON: ``python -m benchmarks.gpu.environment``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import kron_kernels
from benchmarks.gpu.contenders import ENGINES, why_not
from kron_kernels.backends import cuda

ROOT = Path(__file__).parents[2]


def software() -> dict[str, Any]:
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "kron_kernels": kron_kernels.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    for package in ("triton", "transformers", "lycoris-lora", "pyfastkron"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts | {"GPUs that CUDA's kernels are compiled for": cuda.archs() or None}


def commit() -> str | None:
    """Of a clone, or of the clone that a file was carried from."""
    carried = ROOT / "COMMIT"
    if carried.exists():
        return carried.read_text()
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def hardware() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(0)
    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    query += ("power.limit", "temperature.gpu", "persistence_mode", "mig.mode.current")
    which = f"GPU-{p.uuid}" if hasattr(p, "uuid") else "0"
    columns = f"--query-gpu={','.join(query)}"
    line = _output("nvidia-smi", columns, "--format=csv,noheader", "-i", which)
    return {
        "gpu": p.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_GB": round(p.total_memory / 1e9, 1),
        "L2_MB": round(getattr(p, "L2_cache_size", 0) / 1e6, 1),
        "shared_memory": getattr(p, "shared_memory_per_block_optin", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **{f"engine {e}": why_not(e, "cuda") or "available" for e in ENGINES},
        **dict(zip(query, line.split(", ") if line else [], strict=False)),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(software() | hardware()))
