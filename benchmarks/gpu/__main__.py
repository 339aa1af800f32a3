"""Check, time and tune the GPU kernels on this machine's GPU, and write a report.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --minutes 10
    python -m benchmarks.gpu --quick --only correctness -- -k feed_forward

Notes the environment; compares the kernels of both engines, Triton's and CUDA's, with a float64
oracle on the CPU; times them beside dense layers, plain PyTorch and, where installed, LyCORIS and
FastKron (pip install lycoris-lora; pip install --no-deps pyfastkron); and measures tiles for
Triton, which go into this GPU's table. A missing engine is left out and named. DIR/report.md and
DIR/report.json say what was checked, what failed and what was not done.

With --minutes it does what would be learnt from most first, stops in that time, and says what it
did not reach. Another run with the same DIR goes on from there. --simulate runs the same on a
simulated GPU: small cases, without real times.

Each section is a run of pytest: a test that crashes, or hangs, costs that test. Arguments after --
are pytest's. The exit status is 0 if nothing failed, 1 if something did, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import STARTED, failures
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.journal import FAILED, NOT_DONE, NOT_REACHED, PASSED, Journal, Result, stamp
from benchmarks.gpu.report import write_report
from kron_kernels.backends import cuda

MEASUREMENTS = "benchmarks/gpu/measurements.py"
TESTS = {
    "correctness": ["tests/gpu/test_on_gpu.py", "tests/gpu/test_gpu_programs.py"],
    # In parallel and before any clock: every contender of the timings is compiled and checked.
    "compilation": [f"{MEASUREMENTS}::test_workload"],
    "timing": [f"{MEASUREMENTS}::test_launch_overhead", f"{MEASUREMENTS}::test_workload"],
    "tuning": [f"{MEASUREMENTS}::test_tile"],
}
SECTIONS = ("environment", "correctness", "timing", "tuning")
# By when a section ends, as a part of --minutes; one that needs less leaves the rest to the next.
SHARES = {"correctness": 0.45, "compilation": 0.65, "timing": 0.9, "tuning": 0.94}
IN_PARALLEL = ("correctness", "compilation")
MOST_WORKERS = 8
WORKER_GB = 10  # of the GPU's memory: the checks beyond 32 bits need that
PATIENCE = 900  # seconds after which a test counts as hung
RESTARTS = 20  # most restarts of a section's workers, after crashes and hangs
SANITIZED = 3  # failing checks that compute-sanitizer repeats
NO_GPU = (
    "PyTorch finds no GPU here, and this command checks and measures one. Without a GPU, "
    "--simulate runs small cases of the same in a simulator."
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
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--simulate", action="store_true", help="on a simulated GPU")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    return args


def main(arguments: Sequence[str] | None = None, start: float | None = None) -> int:
    args = parsed(arguments)
    if not args.simulate:
        if not torch.cuda.is_available():
            print(NO_GPU)
            return 2
        if not cuda.archs() and not importlib.util.find_spec("triton"):
            print("Triton is not installed, and no CUDA kernels are compiled: nothing to check.")
            return 2
    return 1 if Run(args, start or time.time()).all() else 0


def environment() -> tuple[dict[str, Any], list[Result]]:
    """Facts on the machine, from a process that may crash."""
    command = [sys.executable, "-m", "benchmarks.gpu.environment"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        message = f"exit status {done.returncode}"
        return {}, [Result("environment", "environment", FAILED, message, done.stderr)]
    return json.loads(done.stdout), []


class Run:
    """One call of the command: its clock, its log and its journal."""

    def __init__(self, args: argparse.Namespace, start: float):
        self.args, self.start, self.log = args, start, list[str]()
        self.seconds = float("inf") if args.minutes is None else 60 * args.minutes
        args.out.mkdir(parents=True, exist_ok=True)
        self.facts, self.results = simulated_environment() if args.simulate else environment()
        self.journal = Journal(args.out / "journal.jsonl", stamp(self.facts, ROOT))
        self.say("the environment is noted")

    def say(self, text: str) -> None:
        self.log.append(f"{time.time() - self.start:.0f} s: {text}")
        print(f"[{self.log[-1]}]", flush=True)

    def all(self) -> bool:
        """Run the sections and write the report after each; whether something failed."""
        sections = [section for section in SECTIONS if section in self.args.only]
        steps = [section for section in TESTS if section in sections or self.is_first_of(section)]
        self.write(sections)
        for step in steps:
            share = max(SHARES.values()) if step == steps[-1] else SHARES[step]
            self.results += self.section(step, self.start + self.seconds * share)
            self.write(sections)
        counts = Counter(r.state for r in self.results)
        print(", ".join(f"{counts[s]} {s}" for s in (PASSED, FAILED, NOT_DONE)), end="; ")
        print(f"see {self.args.out / 'report.md'}")
        return bool(counts[FAILED])

    def is_first_of(self, section: str) -> bool:
        return section == "compilation" and "timing" in self.args.only

    def write(self, sections: Sequence[str]) -> None:
        args = self.args
        write_report(args.out, self.facts, self.results, sections, args.quick, self.log)

    def section(self, section: str, until: float) -> list[Result]:
        """Run a section's tests in workers that are restarted after a crash or a hang."""
        done = self.journal.done(section)
        only = None
        if section == "timing":  # of what was compiled and right; the rest is reported there
            only = self.journal.done("compilation", PASSED)
        plan = {
            "section": section,
            "out": str(self.args.out),
            "stamp": self.journal.stamp,
            "until": until,
            "done": done,
            "only": only,
            "which": self.which(),
        }
        if until == float("inf"):
            del plan["until"]
        path = self.args.out / "plan.json"
        path.write_text(json.dumps(plan))
        began = time.time()
        self.say(f"{section} begins" + (f", {len(done)} cases done by an earlier run" * bool(done)))
        status = self.pytest(section, path, until)
        results = self.journal.results(section)
        results += unfinished(section, status, results)
        new = [r for r in results if r.at >= began]
        counts = Counter(r.state for r in new)
        left = sum(r.at == 0 and r.state == NOT_DONE for r in results)
        self.say(
            f"{section} ends: {counts[PASSED]} passed, {counts[FAILED]} failed, "
            f"{counts[NOT_DONE]} cannot run here, {left} not reached"
        )
        if section == "correctness" and not self.args.simulate:
            results = self.sanitized(results, until)
        return results

    def which(self) -> str:
        """The workloads to time."""
        return "simulated" if self.args.simulate else "shown" if self.args.minutes else "all"

    def pytest(self, section: str, plan: Path, until: float) -> int | None:
        """pytest's exit status; None if it was ended because the time was over."""
        args = self.args
        command = [sys.executable, "-m", "pytest", *TESTS[section], "-p", "benchmarks.gpu.plugin"]
        marks = "not gpu" if args.simulate and section == "correctness" else "gpu"
        command += ["-m", f"{marks} and not slow"] if args.quick else ["-m", marks]
        command += ["--quick"] * args.quick
        command += ["-p", "benchmarks.gpu.simulated"] * args.simulate
        workers = self.workers() if section in IN_PARALLEL else 1
        command += [f"-n{workers}", "--dist=load", "--maxschedchunk=1"]
        command += [f"--max-worker-restart={RESTARTS}", "-vv", f"--plan={plan}"]
        # Two whole models in a case take Inductor more than a minute.
        part = 4 if section == "compilation" else 8
        patience = min(PATIENCE, max(30, self.seconds / part))
        command += ["-o", f"faulthandler_timeout={patience}"]
        command += ["-o", "faulthandler_exit_on_timeout=true"]
        command += [f"--tiles={args.out / 'tuning.jsonl'}", *args.pytest]
        # A case that began in time has a little more, then pytest is ended.
        end = until + min(15, 0.03 * self.seconds)
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers are many
        with (
            open(args.out / f"{section}.log", "w") as log,  # the stacks of crashes and hangs
            subprocess.Popen(
                command, cwd=ROOT, stderr=log, env=environment, start_new_session=True
            ) as process,
        ):
            try:
                return process.wait(None if end == float("inf") else max(1, end - time.time()))
            except subprocess.TimeoutExpired:
                end_group(process)
                return None
            except KeyboardInterrupt:
                end_group(process)
                return 2

    def workers(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        if self.args.simulate:
            return min(MOST_WORKERS, cores)
        room = int(self.facts.get("memory_GB", WORKER_GB) // WORKER_GB)
        return max(1, min(MOST_WORKERS, cores // 2, room))

    def sanitized(self, results: list[Result], until: float) -> list[Result]:
        """Repeat failing checks under compute-sanitizer, each by itself, while there is time."""
        found, left = [], SANITIZED
        for r in results:
            seconds = min(120.0, until - time.time())
            is_new = r.evidence and "sanitizer" not in r.evidence
            if r.state == FAILED and is_new and left and seconds > 1:
                text = failures.sanitized(r.id, ROOT, seconds)
                if text:
                    left -= 1
                    r = r._replace(evidence={**(r.evidence or {}), "sanitizer": text})
                    self.journal.add(r._asdict())
                    self.say(f"compute-sanitizer has repeated {r.name}")
            found.append(r)
        return found


def simulated_environment() -> tuple[dict[str, Any], list[Result]]:
    from benchmarks.gpu.environment import software

    return software() | {"gpu": "a simulated GPU"}, []


def end_group(process: subprocess.Popen) -> None:
    """End pytest and its workers: politely, then not. All they had is in the journal."""
    for sign, seconds in ((signal.SIGINT, 2), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def unfinished(section: str, status: int | None, results: list[Result]) -> list[Result]:
    """The reason why tests could not run: a status of pytest, or too many crashes."""
    # 0 and 1: passed and failed; 5: there was nothing to do.
    if status is not None and status not in (0, 1) and not (status == 5 and results):
        message = f"pytest ended with status {status}; some tests may not have been run"
        return [Result(section, "pytest", FAILED, message)]
    if status is None and not results:
        return [Result(section, "all cases", NOT_DONE, NOT_REACHED)]
    if sum("crashed while running" in r.message for r in results) > RESTARTS:
        return [Result(section, "other tests", NOT_DONE, f"more than {RESTARTS} tests crashed")]
    return []


if __name__ == "__main__":
    sys.exit(main(start=STARTED))
