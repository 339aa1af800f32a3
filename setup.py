"""Compiles csrc into the module kron_kernels._native; everything else is in pyproject.toml.

The CPU kernels need a C++17 compiler, those for NVIDIA GPUs also CUDA's nvcc. Kernels that cannot
be compiled are left out, and the installation says why: PyTorch's operators work without them.

  KRON_KERNELS_BUILD       0 leaves out all kernels, 1 makes a failure of the CPU kernels an error
  KRON_KERNELS_CUDA        0 leaves out the GPU kernels, 1 makes their absence or failure an error
  KRON_KERNELS_CUDA_ARCHS  the GPUs to compile for, such as "80 90a"

CXX, CFLAGS, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME, CUDA_PATH, NVCC_APPEND_FLAGS and MAX_JOBS have
their usual meaning.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = """-O3 -std=c++17 -fPIC -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti
    -ffp-contract=fast -fvisibility=hidden -Wall -Wextra -Wno-ignored-attributes -Wno-psabi"""
X86 = {"avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma", "avx2": "-mavx2 -mfma"}
# Python's symbols are in the interpreter, on Windows in python3.dll; the C++ library is linked only
# if a symbol of it is used.
LINK = {"macosx": "-shared -undefined dynamic_lookup", "win": "-shared -s"}
LINK_ELF = "-shared -s -Wl,--as-needed"

NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden -Xfatbin=-compress-all"
MATHS = "float16", "bfloat16", "tf32", "float32"
ARCHS = "80 86 89 90 100 120"
# The static CUDA runtime looks for the driver at its first call, so the module needs no library of
# CUDA. Its symbols are hidden, or calls would go to the runtime that torch has loaded.
CUDA_LIBRARIES = "-lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,libcudart_static.a"

# The stable ABI of 3.11 works in every later Python, but not in free-threaded ones.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

# --force-reinstall alone downloads torch again, and pip may have cached the wheel without kernels.
NO_KERNELS = (
    "no compiled kernels; PyTorch's operators are used instead. To get kernels, install a C++17"
    " compiler (GCC or Clang) and Python's headers, then reinstall with pip's options"
    " --force-reinstall --no-deps --no-cache-dir. The reason: {}"
)
FAILURES = (CompileError, OSError)


class Kernels(NamedTuple):
    """The part of the module for one kind of processor."""

    summary: str
    units: dict[str, list[str]]  # the compiling commands by name; each ends in its source
    defines: list[str]  # for binding.cpp
    libraries: list[str]


class BuildKernels(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("kron_kernels._native"))
        module.unlink(missing_ok=True)  # a failure must not leave the module of an earlier build
        try:
            built, summary = self.compile_kernels()
        except FAILURES as reason:
            if "1" in (wish("BUILD"), wish("CUDA")):
                raise CompileError(f"kron_kernels: {reason}") from None
            say(NO_KERNELS.format(reason))
            self.extensions = []  # otherwise a strict editable installation looks for the file
        else:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, module)
            say(f"{summary}; {module.stat().st_size / 1e6:.1f} MB")

    def get_ext_filename(self, fullname):
        # Newer Pythons prefer a name with the platform, which older ones do not find.
        suffix = ".pyd" if self.system() == "win" else ".abi3.so"
        return os.path.join(*fullname.split(".")) + suffix

    def system(self):
        # .ci/wheels compiles for other systems, which it names in _PYTHON_HOST_PLATFORM.
        return self.plat_name.partition("-")[0]

    def compile_kernels(self):
        """Compile for CPUs, and for GPUs if possible; return the module's path and a summary."""
        if wish("BUILD") == "0":
            raise CompileError("KRON_KERNELS_BUILD is 0")
        if sys.platform == "win32" or not STABLE_ABI:
            raise CompileError("Windows and free-threaded Python are not supported")
        if not any(Path(path, "Python.h").exists() for path in self.include_dirs):
            raise CompileError("Python.h is missing")
        cxx = host_compiler()
        cpu = cpu_kernels(cxx)
        try:
            cuda = cuda_kernels(cxx)
            return self.compile_module(cxx, cpu, cuda), f"{cpu.summary} and {cuda.summary}"
        except FAILURES as reason:
            if wish("CUDA") == "1":
                raise
            built = self.compile_module(cxx, cpu)
            return built, f"{cpu.summary}, not for NVIDIA GPUs ({reason})"

    def compile_module(self, cxx, *kernels):
        # pip deletes the folder of an editable build; keep one, or everything is compiled again.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        flags = [f"-I{path}" for path in self.include_dirs]
        units, libraries = {}, []
        for part in kernels:
            units |= part.units
            flags += part.defines
            libraries += part.libraries
        units["binding"] = [*host_command(cxx), *flags, "csrc/binding.cpp"]

        steps = []
        for name, command in units.items():
            out = f"{folder}/{name}.o"
            command = [*command, "-c", "-o", out, "-MMD", "-MF", f"{out}.d"]
            steps.append((out, units[name][-1:], command))
        objects, module = [out for out, *_ in steps], f"{folder}/_native.abi3.so"
        link = [*cxx, *user_flags(), *LINK.get(self.system(), LINK_ELF).split()]
        link += [*objects, *libraries, *words("LDFLAGS")]
        run([*steps, (module, objects, [*link, "-o", module])], folder)
        return module


def cpu_kernels(cxx):
    is_x86 = output([*cxx, "-dumpmachine"]).startswith(("x86_64", "amd64"))
    sets = (X86 if is_x86 else {}) | {"portable": ""}
    command = host_command(cxx)
    # The longest first: 18 files for x86, which take 74 s on one core.
    units = {
        f"{isa}_{type}_{part}": [
            *(*command, *flags.split(), f"-DKRON_ISA={isa}", f"-DKRON_TYPE={type}"),
            f"csrc/cpu/{part}.cpp",
        ]
        for isa, flags in sets.items()
        for part in ("kernels", "many", "encoder")
        for type in ("float", "double")
    }
    units["cpu"] = [*command, *(["-DKRON_HAS_X86"] if is_x86 else []), "csrc/cpu/cpu.cpp"]
    return Kernels(f"compiled for CPUs ({', '.join(sets)})", units, [], [])


def cuda_kernels(cxx):
    """nvcc compiles the kernels; the C++ compiler, with its flags, the code that calls them."""
    nvcc = cuda_compiler(cxx)
    version = re.search(r"release ([\d.]+)", output([*nvcc, "--version"]))
    includes, libraries = cuda_folders(nvcc)
    archs = architectures(nvcc)
    command = [*nvcc, *NVCC_FLAGS.split(), *code_for(archs)]
    units = {math: [*command, f"-DKRON_MATH={math}", "csrc/cuda/kernels.cu"] for math in MATHS}
    defines = [f'-DKRON_CUDA_ARCHS="{" ".join(archs)}"']
    for source in sorted(Path("csrc/cuda").glob("*.cpp")):
        units[source.stem] = [*host_command(cxx), *includes, *defines, str(source)]
    summary = f"NVIDIA GPUs ({' '.join(archs)}, by CUDA {version[1] if version else '?'})"
    return Kernels(summary, units, defines, [*libraries, *CUDA_LIBRARIES.split()])


def cuda_compiler(cxx):
    """The command of nvcc, from the variables or the PATH."""
    if wish("CUDA") == "0":
        raise CompileError("KRON_KERNELS_CUDA is 0")
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    places = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", os.defpath)]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    nvcc = words("NVCC") or ([found] if found else [])
    if not nvcc:
        raise CompileError("there is no nvcc (NVCC, CUDA_HOME, CUDA_PATH, PATH)")
    # -ccbin takes one program: g++ of "ccache g++ -m64".
    return [*nvcc, "-ccbin", [word for word in cxx if not word.startswith("-")][-1]]


def cuda_folders(nvcc):
    """Options for CUDA's headers and libraries, whose places differ between distributions."""
    plan = dry_run(nvcc)
    found = [re.findall(rf"^#\$ {name}=(.*)", plan, re.M) for name in ("INCLUDES", "LIBRARIES")]
    return [shlex.split(" ".join(options)) for options in found]


def architectures(nvcc):
    """The wanted architectures that this nvcc knows (--list-gpu-code omits some of them)."""
    known, unknown = [], []
    for arch in os.environ.get("KRON_KERNELS_CUDA_ARCHS", ARCHS).split():
        try:
            dry_run(nvcc, f"-arch=sm_{arch}")
            known.append(arch)
        except CompileError:
            unknown.append(arch)
    if not known:
        raise CompileError(f"nvcc knows no architecture of {' '.join(unknown)}")
    if unknown:
        say(f"left out, unknown to this nvcc: {' '.join(unknown)}")
    return known


def code_for(archs):
    """Options of nvcc: machine code for each architecture, and PTX for newer GPUs.

    Compiling to PTX is most of the work. It is done once, for the lowest architecture, and used for
    all above it; an architecture with a letter needs its own PTX.
    """
    plain = sorted((arch for arch in archs if arch.isdigit()), key=int)
    code = [(arch, f"sm_{arch}") for arch in archs if arch not in plain]
    if plain:
        machine = ",".join(f"sm_{arch}" for arch in plain)
        code.append((plain[0], f"[{machine},compute_{plain[0]}]"))
    return [f"-gencode=arch=compute_{ptx},code={what}" for ptx, what in code]


def dry_run(nvcc, *options):
    return output([*nvcc, "--dryrun", *options, "-c", "-x", "cu", os.devnull])


def host_compiler():
    cxx = words("CXX") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not cxx:
        raise CompileError("there is no C++ compiler (CXX, c++, g++, clang++)")
    return cxx


def host_command(cxx):
    return [*cxx, *FLAGS.split(), *user_flags()]


def user_flags():
    return words("CFLAGS") + words("CXXFLAGS")


def words(variable):
    return shlex.split(os.environ.get(variable, ""))


def wish(part):
    return os.environ.get(f"KRON_KERNELS_{part}")


def output(command):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}: {done.stdout.strip() or done.returncode}")
    return done.stdout


def say(text):
    print(f"kron_kernels: {text}", file=sys.stderr, flush=True)


def run(steps, folder):
    """Run the steps (output, inputs, command); with ninja, in parallel and only what changed."""
    ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else [shutil.which("ninja")]
    if ninja == [None]:
        for *_, command in steps:
            call(command)
        return
    lines = [f"builddir = {folder}", "rule run", "  command = $step"]
    for out, inputs, command in steps:
        lines.append(f"build {out}: run {' '.join(inputs)}")
        lines.append(f"  step = {shlex.join(command).replace('$', '$$')}")
        if out.endswith(".o"):
            lines += [f"  depfile = {out}.d", "  deps = gcc"]
    plan = folder / "build.ninja"
    plan.write_text("\n".join([*lines, ""]))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    call([*ninja, "-f", str(plan), *jobs])


def call(command):
    if subprocess.run(command).returncode:
        raise CompileError("a command failed, see its output above (pip shows it with -v)")


setup(
    ext_modules=[Extension("kron_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
