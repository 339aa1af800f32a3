"""Jobs: a check or a measurement, the place where it runs, and what becomes of it."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import simulated
from benchmarks.gpu.clocks import Clock
from kron_kernels.backends import BACKENDS, Backend

ENGINES = ("triton", "cuda")
PASSED, FAILED, NOT_DONE = "passed", "failed", "not done"


class NotDone(Exception):
    """What could not be tried, and why."""


@dataclass(frozen=True)
class Place:
    """Where jobs run."""

    device: str  # "cuda", or "cpu" in the simulator
    quick: bool
    out: Path
    clock: Clock
    engine: str = "triton"  # whose kernels a check runs

    @property
    def kernels(self) -> Backend:
        return BACKENDS[self.engine]

    @property
    def simulated(self) -> bool:
        return self.device == "cpu"

    def needs_gpu(self, why: str) -> None:
        if self.simulated:
            raise NotDone(why)

    def needs_inductor(self) -> None:
        if not self.simulated and importlib.util.find_spec("triton") is None:
            raise NotDone("on a GPU torch.compile needs Triton, which is not installed")

    def needs_memory(self, gigabytes: float) -> None:
        self.needs_gpu("the simulator is too slow for so many tokens")
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            raise NotDone(f"it needs {gigabytes:g} GB of free GPU memory")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it the engine serves this device; an engine that is missing is not tried."""
        with contextlib.ExitStack() as stack:
            if self.simulated and self.engine == "cuda":  # Triton's simulator is always there
                if reason := simulated.why_no_cuda():
                    raise NotDone(reason)
                stack.enter_context(simulated.cuda())
            if reason := missing(self.device, self.engine):
                raise NotDone(reason)
            yield


def missing(device: str, engine: str) -> str | None:
    """Why this engine serves nothing here, or None."""
    x, a, b = (
        torch.empty(size, device=device, dtype=torch.float16)
        for size in ((1, 4), (1, 2, 2), (1, 2, 2))
    )
    return BACKENDS[engine].why_not(x, a, b)


class Job(NamedTuple):
    """A check or a measurement; what it returns goes into report.json."""

    group: str
    name: str
    run: Callable[[Place], Any]
    engine: str | None = None  # without which it cannot be done


def outcome(section: str, job: Job, state: str, **more: Any) -> dict[str, Any]:
    return {"section": section, "group": job.group, "name": job.name, "state": state, **more}


def attempt(section: str, job: Job, place: Place) -> dict[str, Any]:
    """Run a job; whatever it raises is its result."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            if job.engine:
                place = replace(place, engine=job.engine)
                stack.enter_context(place.serving())
            stack.enter_context(unwritten_is_nan(section == "correctness"))
            data = job.run(place)
        if not place.simulated:
            torch.cuda.synchronize()  # or the next job would get the blame
    except NotDone as why:
        return outcome(section, job, NOT_DONE, message=str(why))
    except Exception as error:
        more = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        return outcome(section, job, FAILED, **more)
    seconds = round(time.perf_counter() - start, 2)
    return outcome(section, job, PASSED, seconds=seconds, data=data)


@contextmanager
def unwritten_is_nan(wanted: bool) -> Iterator[None]:
    """A result that a kernel forgot to write fails, instead of passing with what lay there."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    if wanted:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations without a deterministic form
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.set_deterministic_debug_mode(mode)


def lost(place: Place) -> bool:
    """Whether an error took the GPU from this process, as an illegal address does."""
    if place.simulated:
        return False
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device=place.device).item() != 1
    except Exception:
        return True


def run_jobs(section: str, jobs: Sequence[Job], place: Place, lines: Path) -> bool:
    """Run jobs, a line of the file for each; False where the GPU was lost."""
    for job in jobs:
        if not place.simulated:  # there most are not done
            print(f"{section}: {job.name}", file=sys.stderr, flush=True)
        result = attempt(section, job, place)
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if result["state"] == FAILED:
            what = f"{job.name} FAILED: {result['message']}".splitlines()[0]
            print(what, file=sys.stderr, flush=True)
            if lost(place):
                return False
        if not place.simulated:
            gc.collect()
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return True
