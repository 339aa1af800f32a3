"""The CUDA C++ kernels' side: launches of the emulated module execute nvcc's PTX instead.

    with CudaDevice(80) as gpu:
        kron_matmul(x, a, b, backend="cuda")
    gpu.launches[0].traffic

The tensors are ordinary CPU tensors, whose addresses the host code puts into a kernel's struct.
What an access may reach are tensors whose data_ptr was asked for inside `with`. A finding becomes
the error text of the launch, which the backend raises as a RuntimeError; one that leaves the `with`
does so as the SimulationError that it was.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import emulator
import torch

from kron_kernels.backends import cuda as backend

from .access import Options
from .errors import SimulationError
from .launch import Launch, SimulatedDevice, Structure

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
MATHS = ("float16", "bfloat16", "tf32", "float32")
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TARGETS = {90: "sm_90a"}  # others are named after their number
FLAGS = {"ptx": ("-std=c++17", "-ptx", "-lineinfo"), "cubin": ("-std=c++17", "-cubin")}
CACHE = ROOT / "build" / "nvcc"


class CudaDevice(SimulatedDevice):
    """A simulated GPU. Inside `with`, the backend "cuda" serves CPU tensors, and launches on it.

    arch      a compute capability: 80, 90 (compiled as sm_90a) or 120
    edit      a function of a kernel's PTX, applied before it is executed: plants bugs
    execute   False only records the launches, and needs no nvcc
    source    where the kernels are
    module    the emulated module whose launches are executed; `emulator.load()` unless given, and
              with False none: `launch` is the way in
    multiprocessors, shared
              what launches are planned for: how many there are, and bytes that a block may have

    What is looked for is what `Device` looks for.
    """

    def __init__(
        self,
        arch: int = 80,
        edit: Callable[[str], str] | None = None,
        execute: bool = True,
        *,
        source: Path = KERNELS,
        module: emulator.Emulator | bool = True,
        multiprocessors: int = 2,
        shared: int | None = None,
        races: bool = True,
        statistics: bool = True,
        uninitialised: bool = True,
        late_copies: bool = True,
    ):
        super().__init__(execute, edit, Options(races, statistics, uninitialised, late_copies))
        self.arch, self.source, self.module = arch, source, module
        self.multiprocessors, self.shared = multiprocessors, shared or SHARED[arch]
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._error: Exception | None = None

    def __enter__(self) -> "CudaDevice":
        self._stack = ExitStack()
        if self.module:
            with self._stack:
                self._attach(self._stack)
                self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stack.close()
        self._tensors.clear()
        self._names.clear()
        if isinstance(error, RuntimeError) and self._error:
            raise self._error from None

    def _attach(self, stack: ExitStack) -> None:
        emulated = emulator.load() if self.module is True else self.module
        stack.enter_context(serving(emulated, self.multiprocessors, self.shared))
        stack.enter_context(emulated.intercept(self.launch))
        data_ptr = torch.Tensor.data_ptr

        def recorded(tensor: torch.Tensor) -> int:
            self._record(tensor, _name(tensor, sys._getframe(1)))
            return data_ptr(tensor)

        stack.enter_context(patch.object(torch.Tensor, "data_ptr", recorded))

    def address(self, tensor: torch.Tensor) -> int:
        """A tensor's address, which kernels may use from now on: it is kept alive."""
        self._record(tensor, "")
        return tensor.data_ptr()

    def _record(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        if storage.nbytes() and place not in self._names:
            shape = " x ".join(map(str, tensor.shape))
            name = f"{name or 'tensor'} {len(self._names)} ({tensor.dtype}: {shape})"
            self._names[place] = name
            self._tensors[name] = tensor

    def launch(
        self, name: str, grid: int, threads: int, shared: int, arguments: bytes
    ) -> str | None:
        """What the emulator calls instead of running a kernel. Returns what is wrong."""
        try:
            self._launch(name, grid, threads, shared, arguments)
        except Exception as error:  # it cannot pass through C
            self._error = error
            return f"{type(error).__name__}: {error}"
        return None

    def _launch(self, name: str, grid: int, threads: int, shared: int, data: bytes) -> None:
        launch = Launch(name, (grid, 1, 1), -(-threads // 32), shared, {})
        self.launches.append(launch)
        if self.execute:
            launch.asm["ptx"] = kernel_ptx(name, self.arch, self.source)
            self.run(launch, threads, [("arguments", Structure(data, self._tensors))])


@contextmanager
def serving(
    emulated: emulator.Emulator, multiprocessors: int = 2, shared: int = 101376
) -> Iterator[None]:
    """Within it, the backend "cuda" serves CPU tensors by an emulated module."""
    answers = backend._usable, backend._unserved, backend._fuses  # each module has its own
    with (
        patch.object(backend, "_native", emulated.native),
        patch.object(backend, "simulating", True),
    ):
        emulated.device(multiprocessors, shared)
        for one in answers:
            one.cache_clear()
        try:
            yield
        finally:
            emulated.device()
            for one in answers:
                one.cache_clear()


def _name(tensor: torch.Tensor, frame: FrameType | None) -> str:
    """What the outermost of the backend's functions calls a tensor."""
    name = ""
    while frame and Path(frame.f_code.co_filename).parent == Path(backend.__file__).parent:
        name = next((one for one, value in frame.f_locals.items() if value is tensor), name)
        frame = frame.f_back
    return name


def why_not() -> str | None:
    """Why PTX cannot be made here, or None."""
    return None if shutil.which("nvcc") else "needs nvcc"


@lru_cache
def kernel_ptx(name: str, arch: int, source: Path = KERNELS) -> str:
    """The PTX of one kernel, whose name ends in how it multiplies, with the module's variables."""
    math = next((one for one in MATHS if name.endswith(f"_{one}")), None)
    if math is None:
        raise SimulationError(f"{name}: its name does not say how it multiplies")
    text = module_ptx(math, arch, source)
    entries = list(re.finditer(r"^\s*(?://[^\n]*\n\s*)?\.visible \.entry (\w+)\(", text, re.M))
    found = next((one for one in entries if one[1] == name), None)
    if found is None:
        raise SimulationError(f"{name}: is not in {source.name}")
    body = text[found.start() : text.index("\n}\n", found.start()) + 3]
    files = "\n".join(re.findall(r"^\s*\.file\s+.*$", text, re.M))
    return f"{text[: entries[0].start()]}{body}\n{files}\n"


@lru_cache
def module_ptx(math: str, arch: int, source: Path = KERNELS) -> str:
    """nvcc's PTX of all kernels that multiply in one way."""
    return compiled(math, arch, "ptx", source).read_text()


def compiled(math: str, arch: int, form: str, source: Path = KERNELS) -> Path:
    """What nvcc makes of the kernels that multiply in one way, once for all processes."""
    target = TARGETS.get(arch, f"sm_{arch}")
    # Machine code as setup.py has it made: from one PTX, the oldest GPUs'.
    code = f"-gencode=arch=compute_80,code=sm_{arch}" if form == "cubin" else f"-arch={target}"
    command = ["nvcc", *FLAGS[form], code, f"-DKRON_MATH={math}"]
    digest = hashlib.sha256(f"{command} {source.name} {_compiler()}".encode())
    headers = {*(ROOT / "csrc").rglob("*.h"), *source.parent.glob("*.h")}
    for file in [source, *sorted(headers)]:
        digest.update(f"{file.name}\0{file.read_text()}\0".encode())
    made = CACHE / f"{source.stem}-{math}-{target}-{digest.hexdigest()[:24]}.{form}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(made.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers want the same file: one compiles it
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                output = Path(folder, made.name)
                done = subprocess.run(
                    [*command, str(source), "-o", str(output)], capture_output=True, text=True
                )
                if done.returncode:
                    raise SimulationError(f"nvcc failed: {done.stderr.strip()}")
                os.replace(output, made)
    return made


@lru_cache
def _compiler() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
