"""A GPU of fibers: the CUDA C++ kernels compiled for the host and run on CPU tensors.

    emulator = load()
    emulator.native.cuda_forward(...)  # the module of csrc/binding.cpp
    emulator.seed(7)  # threads and blocks run in a random order

It replaces csrc/cuda/runtime.cpp: emulator.cpp runs a launch's blocks one after another, with a
fiber for each thread. A launch returns an error, which the binding raises as a RuntimeError with
the kernel, block, thread and source line, for

- a barrier that threads reach at different places, or that some never reach; a warp whose lanes
  meet at different instructions, or not all of them; a deadlock;
- misaligned vectors, ldmatrix rows and copies; those outside the block's memory, and any write
  close to either end of it;
- copies not waited for when a thread ends;
- more threads or shared memory than the GPU has.

Shared memory is NaN until it is written, and so is the target of a copy until the copy is waited
for. Sanitizers find the rest: AddressSanitizer finds accesses beyond a tensor. ThreadSanitizer
finds races between threads of a block (only barriers and __syncwarp order them) and between blocks
(nothing orders them). `run_sanitized` runs tests again in a process with one of them.

It shows nothing about weak memory, about nvcc's output (the simulator runs its PTX) or about time.
It does not find endless loops, nor misaligned accesses of a single number (UBSan does).
ThreadSanitizer takes up to 2 GB, and compares each of many blocks only with most of the others.

emulated.h defines CUDA's names in terms of numbers.h, packets.h and matrices.h. engine.h is the
interface to emulator.cpp. fiber.h switches stacks; sanitizers.h tells the sanitizers about it.
"""

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from compiling import ROOT, digest, made

HERE = Path(__file__).parent

Sanitizer = Literal["address", "thread"]

# As with nvcc, memory of one type may be read as another.
FLAGS = f"""-std=c++17 -fPIC -fno-exceptions -fno-rtti -fno-strict-aliasing -fvisibility=hidden
    -DKRON_EMULATED -DKRON_CUDA_ARCHS="emulated" -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi
    -iquote {HERE} -iquote {ROOT}/csrc -iquote {ROOT}/csrc/cuda"""
INSTRUMENTED = {
    None: "-O2",
    # These three take minutes to compile; null and overflowing pointers crash or are found anyway.
    "address": """-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
        -fno-sanitize=null,object-size,pointer-overflow""",
    "thread": "-O1 -g1 -fsanitize=thread",
}


class Unit(NamedTuple):
    """A source file, and flags for it alone."""

    source: Path
    flags: str = ""
    watched: bool = True  # compile with the sanitizer


EMULATOR = Unit(HERE / "emulator.cpp", "-O3", watched=False)
MATH = ["float16", "bfloat16", "tf32", "float32"]


def project(watched: Sequence[str] = MATH) -> list[Unit]:
    """The module's sources: the binding, the CPU kernels it refers to, and the CUDA sources.

    Only the kernels for the ``watched`` math are compiled with a sanitizer, which takes a while.
    """
    csrc = ROOT / "csrc"
    kernels = [
        Unit(csrc / "cuda/kernels.cu", f"-x c++ -DKRON_MATH={math}", math in watched)
        for math in MATH
    ]
    launches = sorted(set((csrc / "cuda").glob("*.cpp")) - {csrc / "cuda/runtime.cpp"})
    include = sysconfig.get_path("include")
    portable = "-O0 -DKRON_ISA=portable -Wno-ignored-attributes"
    return [
        *kernels,
        *map(Unit, launches),
        *(
            Unit(csrc / f"cpu/{part}.cpp", f"{portable} -DKRON_TYPE={type}", False)
            for part in ("kernels", "many", "encoder")
            for type in ("float", "double")
        ),
        Unit(csrc / "cpu/cpu.cpp", watched=False),
        Unit(csrc / "binding.cpp", f"-I{include}", False),
        EMULATOR,
    ]


def compiler() -> list[str] | None:
    """The C++ compiler's command, if there is one."""
    words = shlex.split(os.environ.get("CXX", ""))
    return words or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1] or None


def why_not(sanitizer: Sanitizer | None = None) -> str | None:
    """Why nothing can be emulated on this machine, or None."""
    if sys.platform != "linux":
        return "the emulator needs Linux"
    if not compiler():
        return "there is no C++ compiler (CXX, c++, g++, clang++)"
    if sanitizer and not runtime(sanitizer):
        return f"the compiler has no shared runtime of the {sanitizer} sanitizer"
    return None


def build(sanitizer: Sanitizer | None = None, units: Sequence[Unit] | None = None) -> Path:
    """The module's path; only changed sources are compiled."""
    cache = ROOT / "build" / "emulator"

    def compiled(unit: Unit) -> Path:
        command = _command(unit, sanitizer)
        # The source's contents identify it, not its path.
        key = digest(command[:-1], [unit.source, *_headers(unit.source)])
        return made(cache / f"{key}.o", command)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, project() if units is None else units))
    link = [*compiler(), *INSTRUMENTED[sanitizer].split(), "-shared", *map(str, objects)]
    return made(cache / digest(link, []) / "_native.abi3.so", link)


def _command(unit: Unit, sanitizer: Sanitizer | None) -> list[str]:
    options = INSTRUMENTED[sanitizer if unit.watched else None]
    words = [*FLAGS.split(), *options.split(), *unit.flags.split()]
    return [*compiler(), *words, "-c", str(unit.source)]


def _headers(source: Path) -> list[Path]:
    csrc = ROOT / "csrc"
    part = csrc / ("cpu" if source.parent == csrc / "cpu" else "cuda")
    return sorted([*csrc.glob("*.h"), *part.glob("*.h"), *HERE.glob("*.h")])


# ---- the module, and the emulator's own functions

RUN = 1  # a callback's answer

INTERCEPT = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
)


class Emulator:
    """A loaded module."""

    backend = "cuda"  # of kron_kernels

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.path = path

    @functools.cached_property
    def native(self) -> ModuleType:
        """The Python module that csrc/binding.cpp defines."""
        spec = importlib.util.spec_from_file_location("_native", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def seed(self, seed: int) -> None:
        """Run threads and blocks in a random order from now on; in numerical order if 0."""
        self.library.kron_emulator_seed(ctypes.c_uint64(seed))

    def device(self, multiprocessors: int = 2, shared: int = 101376) -> None:
        """Set the GPU's number of multiprocessors and a block's bytes of shared memory."""
        self.library.kron_emulator_device(ctypes.c_int64(multiprocessors), ctypes.c_int64(shared))

    @contextmanager
    def intercept(
        self, callback: Callable[[str, int, int, int, bytes], str | int | None]
    ) -> Iterator[None]:
        """Call callback(kernel, grid, threads, shared, arguments) instead of running kernels.

        It returns an error message, None, or RUN to run the kernel after all. Its exceptions are
        raised at the end of the `with`.
        """
        texts, raised = [], []

        def called(kernel, grid, threads, shared, arguments, size):
            try:
                packed = ctypes.string_at(arguments, size)
                error = callback(kernel.decode(), grid, threads, shared, packed)
            except BaseException as exception:
                raised.append(exception)
                error = f"{type(exception).__name__}: {exception}"
            if error is None or error is RUN:
                return error
            texts.append(ctypes.create_string_buffer(error.encode()))
            return ctypes.addressof(texts[-1])

        function = INTERCEPT(called)
        self.library.kron_emulator_intercept(function)
        try:
            yield
        except RuntimeError:
            if not raised:
                raise
        finally:
            self.library.kron_emulator_intercept(None)
        if raised:
            raise raised[0]

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """Yields a list that gets the name of each launched kernel."""
        names: list[str] = []

        def record(kernel: str, *_: object) -> int:
            names.append(kernel)
            return RUN

        with self.intercept(record):
            yield names


@functools.cache
def load(units: tuple[Unit, ...] | None = None) -> Emulator:
    """Build and load the module, with the sanitizer that `environment` chose for this process."""
    sanitizer = os.environ.get("KRON_EMULATOR") or None
    if sanitizer and units is None:
        units = project(os.environ.get("KRON_EMULATOR_MATH", " ".join(MATH)).split())
    return Emulator(build(sanitizer, units))


# ---- sanitizers in Python


def runtime(sanitizer: Sanitizer) -> str | None:
    """The sanitizer's shared library, which must be loaded before all others."""
    return _library({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer])


def _library(name: str) -> str | None:
    """The path of a library of the compiler."""
    path = subprocess.check_output([*compiler(), f"-print-file-name={name}"], text=True).strip()
    return path if Path(path).is_absolute() else None


def environment(sanitizer: Sanitizer, watched: Sequence[str] = MATH) -> dict[str, str]:
    """Environment variables with which Python can load a module built with a sanitizer."""
    # AddressSanitizer looks up __cxa_throw when it starts, and aborts at the first exception if
    # Python loads libstdc++ later. Triton 3.8 throws while it is imported.
    preloaded = filter(None, [runtime(sanitizer), _library("libstdc++.so.6")])
    return os.environ | {
        "KRON_EMULATOR": sanitizer,
        "KRON_EMULATOR_MATH": " ".join(watched),
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:die_after_fork=0",
        "OMP_NUM_THREADS": "1",
    }


def run_sanitized(
    sanitizer: Sanitizer, pytest_args: Sequence[str], watched: Sequence[str] = MATH
) -> subprocess.CompletedProcess:
    """Run pytest with a sanitized module. The first finding ends it, with exit status 66."""
    options = ["-p", "no:cacheprovider", "-n", "0", "-s"]  # a report must not stay captured
    command = [sys.executable, "-m", "pytest", *options, *pytest_args]
    return subprocess.run(
        command, env=environment(sanitizer, watched), cwd=ROOT, capture_output=True, text=True
    )
