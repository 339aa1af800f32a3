"""``python -m kron_kernels.doctor``: this machine, and the backends of KroneckerBERT's layers."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence

import torch

import kron_kernels
from kron_kernels import dispatch
from kron_kernels.backends import cuda, native
from kron_kernels.backends.triton import launch
from kron_kernels.shapes import KronShape

# KroneckerBERT's layers, 8x and 21x (NAACL 2022, Table 1).
_LAYERS = {
    "8x attention": KronShape(384, 384, 2, 2),
    "8x feed-forward up": KronShape(8, 2, 384, 384),
    "8x feed-forward down": KronShape(2, 8, 384, 384),
    "21x attention": KronShape(384, 48, 2, 16),
    "21x feed-forward up": KronShape(16, 2, 192, 384),
    "21x feed-forward down": KronShape(2, 16, 384, 192),
}


def report() -> str:
    """The report, one finding per line."""
    lines = [
        f"kron_kernels {kron_kernels.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"GPU           {_gpu()}",
    ]
    for package, use in {
        "triton": "kernels for GPUs: pip install triton",
        "transformers": "kroneckerbert: pip install kron-kernels[bert]",
        "accelerate": "kroneckerbert's distillation: pip install kron-kernels[bert]",
    }.items():
        lines.append(f"{package:14}{_version(package) or f'not installed ({use})'}")
        if package == "triton" and _version(package) and (reason := launch.why_no_triton()):
            lines[-1] += f", not used: {reason}"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    lines.append(
        f"{'C++ compiler':14}{'found' if compiler else 'not found'} "
        "(needed once, when kron_kernels is installed, for the native backend)"
    )
    if native._native is not None:
        lines.append(f"{'int8 factors':14}multiplied by {native.int8_products()}")
    archs = " ".join(f"sm_{arch}" for arch in cuda.archs().split())
    lines.append(
        f"{'CUDA kernels':14}{archs or 'not compiled'} "
        f"{'' if archs else '(needs nvcc once, when kron_kernels is installed)'}".rstrip()
    )
    lines += [
        "",
        "KroneckerBERT's layers at BERT_BASE size: the backend on this CPU, and eager's plan",
    ]
    for name, s in _LAYERS.items():
        x, a, b = (torch.empty(size) for size in ((1, s.in_features), (s.m1, s.n1), (s.m2, s.n2)))
        *others, eager = kron_kernels.explain_backends(x, a, b).splitlines()
        lines.append(f"  {name:22}{dispatch.choose('auto', x, (a, b)):8}{eager}")
    lines += ["", *others]
    return "\n".join(lines)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report. There are no options."""
    argparse.ArgumentParser("python -m kron_kernels.doctor").parse_args(arguments)
    try:
        print(report(), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


if __name__ == "__main__":
    main()
