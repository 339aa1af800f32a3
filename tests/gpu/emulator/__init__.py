"""A GPU of fibers: CUDA C++ kernels (csrc/cuda) compiled for the host and run on CPU tensors.

    emulator = load()
    emulator.native.cuda_forward(...)  # the module as csrc/binding.cpp makes it
    emulator.seed(7)  # threads and blocks in a drawn order

Where `runtime.h`'s run launches a kernel on a GPU, emulator.cpp runs it: a fiber for each thread
of a block, one block after another. A launch returns an error, which the binding raises as a
RuntimeError, with the kernel, the block, the thread and the source's line, for

- a barrier that threads reach at different places, or that some never reach; a warp whose lanes
  meet at different instructions, or not all; deadlock;
- misaligned vectors, rows of ldmatrix and copies; those beyond the block's memory, and any write
  shortly before or behind it;
- copies not waited for when a thread ends;
- more threads or shared memory than the GPU has.

Shared memory is NaN until it is written, and the target of a copy until the copy is waited for.
Sanitizers find the rest: AddressSanitizer accesses beyond a tensor, ThreadSanitizer races between
threads of a block, which only barriers and __syncwarp order, and between blocks, which nothing
orders. `run_sanitized` runs tests again in a process that has one of them.

It proves nothing about weak memory, about what nvcc makes of the source (the simulator runs its
PTX), or about time, and does not find an endless loop, nor a misaligned access of a single number
(AddressSanitizer's companion does). ThreadSanitizer takes up to 2 GB, and of many blocks compares
each only with most of the others.

emulated.h has CUDA's words; numbers.h, packets.h and matrices.h what they do; engine.h is between
them and emulator.cpp; fiber.h changes stacks, and sanitizers.h says so to the sanitizers.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent

Sanitizer = Literal["address", "thread"]

# Memory of one type may be read as another, as with nvcc.
FLAGS = f"""-std=c++17 -fPIC -fno-exceptions -fno-rtti -fno-strict-aliasing -fvisibility=hidden
    -DKRON_EMULATED -DKRON_CUDA_ARCHS="emulated" -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi
    -iquote {HERE} -iquote {ROOT}/csrc -iquote {ROOT}/csrc/cuda"""
INSTRUMENTED = {
    None: "-O2",
    # Null pointers and overflows of pointers crash or are found anyway, and compile for minutes.
    "address": """-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
        -fno-sanitize=null,object-size,pointer-overflow""",
    "thread": "-O1 -g1 -fsanitize=thread",
}


class Unit(NamedTuple):
    """A source, with the flags that only it needs."""

    source: Path
    flags: str = ""
    watched: bool = True  # by the sanitizer


EMULATOR = Unit(HERE / "emulator.cpp", "-O3", watched=False)
MATH = ["float16", "bfloat16", "tf32", "float32"]


def project(watched: Sequence[str] = MATH) -> list[Unit]:
    """What makes the module: the binding, the CPU kernels that it names, and the CUDA sources.

    ``watched`` is the math whose kernels a sanitizer watches, and is compiled with it, for a while.
    """
    csrc = ROOT / "csrc"
    kernels = [
        Unit(csrc / "cuda/kernels.cu", f"-x c++ -DKRON_MATH={math}", math in watched)
        for math in MATH
    ]
    launches = sorted(set((csrc / "cuda").glob("*.cpp")) - {csrc / "cuda/runtime.cpp"})
    include = sysconfig.get_path("include")
    return [
        *kernels,
        *map(Unit, launches),
        Unit(csrc / "cpu/kernels.cpp", "-O0 -DKRON_ISA=portable -Wno-ignored-attributes", False),
        Unit(csrc / "cpu/cpu.cpp", watched=False),
        Unit(csrc / "binding.cpp", f"-I{include}", False),
        EMULATOR,
    ]


def compiler() -> list[str] | None:
    """The C++ compiler's command, if there is one."""
    words = shlex.split(os.environ.get("CXX", ""))
    return words or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1] or None


def why_not(sanitizer: Sanitizer | None = None) -> str | None:
    """Why nothing can be emulated here; None if it can."""
    if sys.platform != "linux":
        return "the emulator needs Linux"
    if not compiler():
        return "there is no C++ compiler (CXX, c++, g++, clang++)"
    if sanitizer and not runtime(sanitizer):
        return f"the compiler has no shared runtime of the {sanitizer} sanitizer"
    return None


def build(sanitizer: Sanitizer | None = None, units: Sequence[Unit] | None = None) -> Path:
    """The module's path; what it is made of is compiled only if it has changed."""
    units = project() if units is None else units
    keys = [_key(unit, sanitizer) for unit in units]
    cache = Path(tempfile.gettempdir()) / f"kron-emulator-{os.getuid()}"
    folder = cache / hashlib.sha256(repr(keys).encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    module = folder / "_native.abi3.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the one that compiles
        if module.exists():
            return module
        objects = [cache / f"{key}.o" for key in keys]
        missing = [(u, out) for u, out in zip(units, objects, strict=True) if not out.exists()]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: _make(_command(one[0], sanitizer), one[1]), missing))
        options = INSTRUMENTED[sanitizer].split()
        _make([*compiler(), *options, "-shared", *map(str, objects)], module)
    return module


def _command(unit: Unit, sanitizer: Sanitizer | None) -> list[str]:
    options = INSTRUMENTED[sanitizer if unit.watched else None]
    words = [*FLAGS.split(), *options.split(), *unit.flags.split()]
    return [*compiler(), *words, "-c", str(unit.source)]


def _key(unit: Unit, sanitizer: Sanitizer | None) -> str:
    """Of all that the object is made of; the source's own path is none of it."""
    csrc = ROOT / "csrc"
    part = csrc / ("cpu" if unit.source.parent == csrc / "cpu" else "cuda")
    key = hashlib.sha256(repr(_command(unit, sanitizer)[:-1]).encode())
    headers = [*csrc.glob("*.h"), *part.glob("*.h"), *HERE.glob("*.h")]
    for path in [unit.source, *sorted(headers)]:
        key.update(path.read_bytes() + b"\0")
    return key.hexdigest()[:20]


def _make(command: list[str], out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / "made"
        plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # a sanitizer slows it
        done = subprocess.run(
            [*command, "-o", str(made)], capture_output=True, text=True, env=plain
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        made.replace(out)  # all of it, or nothing


# ---- the module, and the emulator's own functions

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
    """A module that was built, loaded."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.path = path

    @functools.cached_property
    def native(self) -> ModuleType:
        """What csrc/binding.cpp defines."""
        spec = importlib.util.spec_from_file_location("_native", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def seed(self, seed: int) -> None:
        """Draws the order of threads and blocks from now on; 0: as they are numbered."""
        self.library.kron_emulator_seed(ctypes.c_uint64(seed))

    def device(self, multiprocessors: int = 2, shared: int = 101376) -> None:
        """Sets what the GPU has: multiprocessors, and bytes of shared memory for a block."""
        self.library.kron_emulator_device(ctypes.c_int64(multiprocessors), ctypes.c_int64(shared))

    @contextmanager
    def intercept(
        self, callback: Callable[[str, int, int, int, bytes], str | None]
    ) -> Iterator[None]:
        """Calls callback(kernel, grid, threads, shared, arguments) instead of running kernels.

        It returns what is wrong, or None. What it raises is raised at the end of the `with`.
        """
        texts, raised = [], []

        def called(kernel, grid, threads, shared, arguments, size):
            try:
                packed = ctypes.string_at(arguments, size)
                error = callback(kernel.decode(), grid, threads, shared, packed)
            except BaseException as exception:
                raised.append(exception)
                error = f"{type(exception).__name__}: {exception}"
            if error is None:
                return None
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


@functools.cache
def load(units: tuple[Unit, ...] | None = None) -> Emulator:
    """Builds and loads the module, with the sanitizer that the process was started for."""
    sanitizer = os.environ.get("KRON_EMULATOR") or None
    if sanitizer and units is None:
        units = project(os.environ.get("KRON_EMULATOR_MATH", " ".join(MATH)).split())
    return Emulator(build(sanitizer, units))


# ---- sanitizers in Python


def runtime(sanitizer: Sanitizer) -> str | None:
    """The sanitizer's shared library, which has to be loaded before everything else."""
    return _library({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer])


def _library(name: str) -> str | None:
    """The path of one of the compiler's libraries."""
    path = subprocess.check_output([*compiler(), f"-print-file-name={name}"], text=True).strip()
    return path if Path(path).is_absolute() else None


def environment(sanitizer: Sanitizer, watched: Sequence[str] = MATH) -> dict[str, str]:
    """What a process of Python needs to load a module built with a sanitizer."""
    # AddressSanitizer looks for what throws exceptions of C++ when it starts, and ends the process
    # at the first one if Python loads that library only later. Triton 3.8 throws while imported.
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
    """Runs pytest again, with load() giving a sanitized module. 66 is ThreadSanitizer's or
    AddressSanitizer's exit status; the first finding ends the process."""
    options = ["-p", "no:cacheprovider", "-n", "0", "-s"]  # a report must not stay captured
    command = [sys.executable, "-m", "pytest", *options, *pytest_args]
    return subprocess.run(
        command, env=environment(sanitizer, watched), cwd=ROOT, capture_output=True, text=True
    )
