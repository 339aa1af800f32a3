"""Front end for the CUDA C++ kernels: runs nvcc's PTX for launches of the emulated module.

    with CudaDevice(80) as gpu:
        kron_matmul(x, a, b, backend="cuda")
    gpu.launches[0].traffic

The tensors are ordinary CPU tensors, whose addresses the host code puts into a kernel's struct.
Kernels may access the tensors whose data_ptr was read inside `with`. A finding becomes the launch's
error text, which the backend raises as a RuntimeError. If that leaves the `with`, the original
SimulationError is raised instead.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import emulator
import torch
from compiling import ROOT, digest, made
from standin import cpu_as_gpu

from kron_kernels.backends import cuda as backend

from .access import Options
from .errors import SimulationError
from .launch import Launch, SimulatedDevice, Structure

KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
MATHS = ("float16", "bfloat16", "tf32", "float32")
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TARGETS = {90: "sm_90a"}  # others are named after their number
FLAGS = {"ptx": ("-std=c++17", "-ptx", "-lineinfo"), "cubin": ("-std=c++17", "-cubin")}
CACHE = ROOT / "build" / "nvcc"


class CudaDevice(SimulatedDevice):
    """A simulated GPU. Inside `with`, the backend "cuda" takes CPU tensors and launches on it.

    arch        a compute capability: 80, 90 (compiled as sm_90a) or 120
    edit        a function of a kernel's PTX, applied before execution: plants bugs
    execute     if False, only record the launches, without nvcc
    source      the file with the kernels
    attached    if False, leave the backend alone: call `launch` directly
    multiprocessors, shared
                the size of GPU that launches are planned for
    statistics  if False, do not count sectors and wavefronts
    """

    backend = "cuda"

    def __init__(
        self,
        arch: int = 80,
        edit: Callable[[str], str] | None = None,
        execute: bool = True,
        *,
        source: Path = KERNELS,
        attached: bool = True,
        multiprocessors: int = 2,
        shared: int | None = None,
        statistics: bool = True,
    ):
        super().__init__(execute, edit, Options(statistics=statistics))
        self.arch, self.source, self.attached = arch, source, attached
        self.multiprocessors, self.shared = multiprocessors, shared or SHARED[arch]
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._error: Exception | None = None

    def __enter__(self) -> "CudaDevice":
        self._stack = ExitStack()
        if self.attached:
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
        emulated = emulator.load()
        stack.enter_context(serving(emulated, self.multiprocessors, self.shared))
        stack.enter_context(emulated.intercept(self.launch))
        data_ptr = torch.Tensor.data_ptr

        def recorded(tensor: torch.Tensor) -> int:
            self._record(tensor, _name(tensor, sys._getframe(1)))
            return data_ptr(tensor)

        stack.enter_context(patch.object(torch.Tensor, "data_ptr", recorded))

    def address(self, tensor: torch.Tensor) -> int:
        """A tensor's address, which kernels may now use; the tensor is kept alive."""
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
        """The emulator's callback for a launch. Returns an error message or None."""
        try:
            self._launch(name, grid, threads, shared, arguments)
        except Exception as error:  # cannot propagate through C
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
    """The backend "cuda" runs an emulated module on CPU tensors."""
    caches = backend._usable, backend._unserved, backend._fuses  # these depend on the module
    with (
        patch.object(backend, "_native", emulated.native),
        patch.object(backend, "_stream", lambda index: 0),
        cpu_as_gpu(),
    ):
        emulated.device(multiprocessors, shared)
        for cache in caches:
            cache.cache_clear()
        try:
            yield
        finally:
            emulated.device()
            for cache in caches:
                cache.cache_clear()


def _name(tensor: torch.Tensor, frame: FrameType | None) -> str:
    """The name of a tensor in the outermost of the backend's functions."""
    name = ""
    while frame and Path(frame.f_code.co_filename).parent == Path(backend.__file__).parent:
        name = next((one for one, value in frame.f_locals.items() if value is tensor), name)
        frame = frame.f_back
    return name


def why_not() -> str | None:
    """Why there is no PTX on this machine, or None."""
    return None if shutil.which("nvcc") else "needs nvcc"


@lru_cache
def kernel_ptx(name: str, arch: int, source: Path = KERNELS) -> str:
    """The PTX of one kernel, whose name ends in its math, with the module's variables."""
    math = next((one for one in MATHS if name.endswith(f"_{one}")), None)
    if math is None:
        raise SimulationError(f"{name}: the name must end in one of {', '.join(MATHS)}")
    text = module_ptx(math, arch, source)
    entries = list(re.finditer(r"^\s*(?://[^\n]*\n\s*)?\.visible \.entry (\w+)\(", text, re.M))
    found = next((one for one in entries if one[1] == name), None)
    if found is None:
        raise SimulationError(f"{source.name} has no kernel {name}")
    body = text[found.start() : text.index("\n}\n", found.start()) + 3]
    files = "\n".join(re.findall(r"^\s*\.file\s+.*$", text, re.M))
    return f"{text[: entries[0].start()]}{body}\n{files}\n"


@lru_cache
def module_ptx(math: str, arch: int, source: Path = KERNELS) -> str:
    """nvcc's PTX of all kernels for one kind of math."""
    return compiled(math, arch, "ptx", source).read_text()


def compiled(math: str, arch: int, form: str, source: Path = KERNELS) -> Path:
    """nvcc's output for one kind of math, as PTX or as a cubin."""
    target = TARGETS.get(arch, f"sm_{arch}")
    # As in setup.py, machine code comes from a single PTX, that of the oldest GPU.
    code = f"-gencode=arch=compute_80,code=sm_{arch}" if form == "cubin" else f"-arch={target}"
    command = ["nvcc", *FLAGS[form], code, f"-DKRON_MATH={math}"]
    headers = sorted({*(ROOT / "csrc").rglob("*.h"), *source.parent.glob("*.h")})
    key = digest([*command, source.name, _compiler()], [source, *headers])
    output = CACHE / f"{source.stem}-{math}-{target}-{key}.{form}"
    return made(output, [*command, str(source)])


@lru_cache
def _compiler() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
