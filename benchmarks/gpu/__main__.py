"""Check, time and tune the GPU kernels on this machine's GPU, and write a report.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --quick --only correctness -- -k feed_forward

Notes the environment; compares the kernels of both engines, Triton's and CUDA's, with a float64
oracle on the CPU; times them beside dense layers, plain PyTorch and, where installed, LyCORIS and
FastKron (pip install lycoris-lora; pip install --no-deps pyfastkron); and measures tiles for
Triton, which go into this GPU's table. A missing engine is left out and named. DIR/report.md and
DIR/report.json say what was checked, what failed and what was not done.

Each section is a run of pytest: a test that crashes, or hangs for 15 minutes, costs that test.
Arguments after -- are pytest's. The exit status is 0 if nothing failed, 1 if something did, 2 if
there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.report import FAILED, NOT_DONE, PASSED, Result, read_results, write_report
from kron_kernels.backends import cuda

TESTS = {
    "correctness": ["tests/gpu/test_on_gpu.py", "tests/gpu/test_gpu_programs.py"],
    "timing": [
        "benchmarks/gpu/measurements.py::test_launch_overhead",
        "benchmarks/gpu/measurements.py::test_workload",
    ],
    "tuning": ["benchmarks/gpu/measurements.py::test_tile"],
}
SECTIONS = ("environment", *TESTS)
PATIENCE = 900  # seconds after which a test counts as hung
RESTARTS = 20  # most restarts of a section's worker, after crashes and hangs
NO_GPU = (
    "PyTorch finds no GPU here, and this command checks and measures one. Without a GPU the same "
    "checks run in a simulator: pytest tests/gpu/test_on_gpu.py."
)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="fewer cases of everything")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    if not cuda.archs() and not importlib.util.find_spec("triton"):
        print("Triton is not installed, and no CUDA kernels are compiled: nothing to check.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    facts, results = environment()
    sections = [section for section in SECTIONS if section in args.only]
    for section in sections:
        if section in TESTS:
            results += run_section(section, args)
        write_report(args.out, facts, results, sections, args.quick)
    counts = Counter(r.state for r in results)
    print(", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, NOT_DONE)), end="; ")
    print(f"see {args.out / 'report.md'}")
    return 1 if counts[FAILED] else 0


def environment() -> tuple[dict[str, Any], list[Result]]:
    """Facts on the machine, from a process that may crash."""
    command = [sys.executable, "-m", "benchmarks.gpu.environment"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        message = f"exit status {done.returncode}"
        return {}, [Result("environment", "environment", FAILED, message, done.stderr)]
    return json.loads(done.stdout), []


def run_section(section: str, args: argparse.Namespace) -> list[Result]:
    """Run a section's tests in a worker that is restarted after a crash or a hang."""
    xml = args.out / f"{section}.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *TESTS[section], "-p", "benchmarks.gpu.plugin"]
    command += ["-m", "gpu and not slow", "--quick"] if args.quick else ["-m", "gpu"]
    command += [
        "-n1",
        "--dist=load",
        f"--max-worker-restart={RESTARTS}",
        "-vv",
        f"--junitxml={xml}",
    ]
    command += ["-o", f"faulthandler_timeout={PATIENCE}", "-o", "faulthandler_exit_on_timeout=true"]
    command += [f"--tiles={args.out / 'tuning.jsonl'}", *args.pytest]
    with (
        open(args.out / f"{section}.log", "w") as log,  # the stacks of crashes and hangs
        subprocess.Popen(command, cwd=ROOT, stderr=log) as process,
    ):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # pytest gets it as well, and writes its results so far
            status = process.wait()
    results = read_results(section, xml)
    return results + unfinished(section, status, results)


def unfinished(section: str, status: int, results: list[Result]) -> list[Result]:
    """The reason why tests could not run: a status of pytest, or too many crashes."""
    if status > 1:  # neither passed nor failed
        message = f"pytest ended with status {status}; some tests may not have been run"
        return [Result(section, "pytest", FAILED, message)]
    if sum("crashed while running" in r.message for r in results) > RESTARTS:
        return [Result(section, "other tests", NOT_DONE, f"more than {RESTARTS} tests crashed")]
    return []


if __name__ == "__main__":
    sys.exit(main())
