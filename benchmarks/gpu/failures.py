"""What a failing case leaves for a developer who has no such GPU.

A line that repeats the case, the kernels' launches with their arguments, and their PTX. The checks
record every launch before it happens: of a crash or a hang the last one is the cause.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from kron_kernels.backends import cuda

LAUNCHING = (
    "cuda_forward",
    "cuda_backward",
    "cuda_feed_forward",
    "cuda_feed_forward_backward",
)
KEPT = 20  # last launches of a case that are reported
LONGEST = 4000  # characters of the sanitizer's findings
SANITIZER = "compute-sanitizer"


class Launch(NamedTuple):
    kernel: str
    text: str  # grid and arguments
    ptx: str | None = None


class Launches:
    """The launches of the case that is running, of both engines."""

    def __init__(self) -> None:
        self.found: list[Launch] = []

    @contextmanager
    def recorded(self, log: Path | None, case: str, watch: bool = True) -> Iterator[None]:
        """Record launches here and, before each happens, in a file that outlives the process."""
        self.found = []
        if not watch:
            yield
            return
        with ExitStack() as stack:
            file = None
            if log:
                log.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(log.open("w", buffering=1))
                file.write(json.dumps({"case": case}) + "\n")

            def add(launch: Launch) -> None:
                self.found.append(launch)
                if file:
                    file.write(json.dumps({"kernel": launch.kernel, "text": launch.text}) + "\n")

            if find_spec("triton"):
                stack.enter_context(_triton(add))
            if cuda._native is not None:
                stack.enter_context(patch.object(cuda, "_native", _Watched(cuda._native, add)))
            yield

    def evidence(self, out: Path, case: str) -> dict[str, Any]:
        """Write the PTX of the last launches, one file for each kernel, and describe them."""
        folder = out / "failures" / slug(case)
        files: dict[str, str] = {}
        for launch in self.found[-KEPT:]:
            if launch.ptx:
                folder.mkdir(parents=True, exist_ok=True)
                same = [name for name, ptx in files.items() if ptx == launch.ptx]
                if not same:
                    name = f"{len(files)}-{launch.kernel}.ptx"
                    files[name] = launch.ptx
                    (folder / name).write_text(launch.ptx)
        return _described(
            out, case, self.found, [str((folder / f).relative_to(out)) for f in files]
        )


def of_crash(out: Path, worker: str, case: str) -> dict[str, Any]:
    """What the file of a process that ended tells about its last case."""
    log = out / "launches" / f"{worker}.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
    if not lines or lines[0] != {"case": case}:
        return _described(out, case, [], [])
    return _described(out, case, [Launch(**line) for line in lines[1:]], [])


def _described(out: Path, case: str, launches: list[Launch], ptx: list[str]) -> dict[str, Any]:
    return {
        "repeat": repeat(case),
        "launches": [f"{launch.kernel}{launch.text}" for launch in launches[-KEPT:]],
        "ptx": ptx,
    }


def command(case: str) -> list[str]:
    """Python's arguments that run one case by itself."""
    words = ["-m", "pytest", "-n0", "-m", "", "-p", "benchmarks.gpu.plugin"]
    if not torch.cuda.is_available():
        words += ["-p", "benchmarks.gpu.simulated"]
    return [*words, case]


def repeat(case: str) -> str:
    """The command as one line for a shell, in the repository's folder."""
    return f"python {shlex.join(command(case))}"


def slug(case: str) -> str:
    return re.sub(r"[^\w.-]+", "-", case.split("::")[-1]).strip("-")[:100]


def sanitized(case: str, root: Path, seconds: float) -> str | None:
    """The findings of compute-sanitizer in a case that failed, or None without one."""
    found = shutil.which(SANITIZER)
    if not found:
        return None
    words = [found, "--print-limit", "10", sys.executable, *command(case)]
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no result in {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return "\n".join(lines)[:LONGEST] or done.stdout[-LONGEST:]


# --- the engines


@contextmanager
def _triton(add) -> Iterator[None]:
    """Compile each kernel before it is launched, to have its PTX even if the launch crashes."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def recorded(self, *args, grid, warmup, **options):
        if not warmup:
            name = getattr(self.fn, "__name__", "kernel")
            size = grid if isinstance(grid, tuple) else "by a function"
            given = ", ".join([*map(_text, args), *(f"{k}={v!r}" for k, v in options.items())])
            ptx = None
            try:
                ptx = run(self, *args, grid=grid, warmup=True, **options).asm.get("ptx")
            finally:  # of a failing compiler the arguments are what is needed
                add(Launch(name, f"[{size}]({given})", ptx))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    with patch.object(JITFunction, "run", recorded):
        yield


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if not isinstance(value, Tensor):
        return repr(value)
    address = value.data_ptr() % 16
    place = f" at 16 n + {address}" if address else ""
    return f"{str(value.dtype)[6:]}{list(value.shape)} strides {list(value.stride())}{place}"


class _Watched:
    """The compiled module; its calls that launch are recorded, in the order of binding.cpp."""

    def __init__(self, module: Any, add):
        self._module, self._add = module, add

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name not in LAUNCHING:
            return value

        def call(*numbers):
            self._add(Launch(name, str(numbers)))
            return value(*numbers)

        return call
