"""Everything that wants a real GPU, by one command: what is right, how fast, by which tiles.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --out report --only environment correctness --quick
    python -m benchmarks.gpu --simulate --quick  # without a GPU

It notes the environment, holds the kernels of both engines, Triton's and CUDA's, to a float64
oracle on the CPU, times them against one another, dense layers, plain PyTorch and, where they are
installed, LyCORIS and FastKron (pip install lycoris-lora; pip install --no-deps pyfastkron), and
calls benchmarks.tune, which writes this GPU's table of tiles for Triton. An engine that is missing
is said to be, and left out. DIR/report.md says what was checked, what failed and what was not
done; DIR/report.json has all of it.

Every section runs in a process of its own, which is started again behind a check that took the GPU
or the process with it, or that gave no sign for a while. The exit status is 0 if all that was done
passed, 1 if something failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import clocks, simulated
from benchmarks.gpu.correctness import correctness_jobs
from benchmarks.gpu.environment import environment_jobs
from benchmarks.gpu.jobs import FAILED, NOT_DONE, PASSED, Place, run_jobs
from benchmarks.gpu.processes import LOST, in_processes, read_lines
from benchmarks.gpu.report import SECTIONS, write_report
from benchmarks.gpu.timing import timing_jobs
from benchmarks.gpu.tune import NO_GPU, tuning_jobs
from kron_kernels.backends import cuda

JOBS = {
    "environment": environment_jobs,
    "correctness": correctness_jobs,
    "timing": timing_jobs,
    "tuning": tuning_jobs,
}


def run_section(section: str, args: argparse.Namespace, place: Place) -> list[dict[str, Any]]:
    jobs, lines = JOBS[section](place), args.out / f"jobs-{section}.jsonl"
    lines.unlink(missing_ok=True)
    if place.simulated:
        run_jobs(section, jobs, place, lines)
    else:
        flags = ["--out", str(args.out), *(["--quick"] if args.quick else [])]
        start = [sys.executable, "-m", "benchmarks.gpu", *flags, "--child", section]
        in_processes(section, jobs, lines, lambda first: [*start, str(first)])
    return read_lines(lines)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="fewer cases of everything")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="without a GPU: the checks with small sizes, in the simulator of tests/gpu/simulator",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    if not args.simulate and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    if importlib.util.find_spec("triton") is None and (args.simulate or not cuda.archs()):
        why = "the simulator needs it" if args.simulate else "there are no CUDA kernels either"
        print(f"Triton is not installed, and {why}.")
        return 2
    # Triton 3.9 warns while the first is unset; cuBLAS is deterministic with the second.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.simulate:
        return run_all(args, Place("cuda", args.quick, args.out, clocks.graph_clock))
    with simulated.clock(args.out / "tuned") as clock:
        return run_all(args, Place("cpu", args.quick, args.out, clock))


def run_all(args: argparse.Namespace, place: Place) -> int:
    if args.child:
        section, first = args.child[0], int(args.child[1])
        lines = args.out / f"jobs-{section}.jsonl"
        ok = run_jobs(section, JOBS[section](place)[first:], place, lines)
        return 0 if ok else LOST
    results: list[dict[str, Any]] = []
    sections = [s for s in SECTIONS if s in args.only]
    for section in sections:
        results += run_section(section, args, place)
        write_report(args.out, results, sections, args)  # a killed run leaves what it has
    counts = Counter(r["state"] for r in results)
    print(", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, NOT_DONE)), end="; ")
    print(f"see {args.out / 'report.md'}")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
