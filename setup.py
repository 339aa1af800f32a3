"""Compiles the CPU kernels; everything else is declared in pyproject.toml.

Where that fails, the installation says why and goes on: PyTorch's own operators serve as well.
KRON_KERNELS_BUILD=0 leaves the kernels out, KRON_KERNELS_BUILD=1 makes a failure an error; CXX,
CFLAGS, CXXFLAGS and LDFLAGS are obeyed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = """-O3 -std=c++17 -fPIC -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti
    -ffp-contract=fast -fvisibility=hidden -Wall -Wextra -Wno-ignored-attributes -Wno-psabi"""
X86 = {"avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma", "avx2": "-mavx2 -mfma"}
# The interpreter brings Python's symbols; the C++ library is linked only if a symbol of it is used.
LINK = "-shared -s -Wl,--as-needed"
if sys.platform == "darwin":
    LINK = "-bundle -undefined dynamic_lookup"

# The stable ABI of 3.11 is every later Python's, but no free-threaded one's.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

# --force-reinstall alone fetches torch again, and pip's cache may hold the wheel without kernels.
NO_KERNELS = (
    "kron_kernels: no compiled kernels; the portable PyTorch backend serves. To get them, install a"
    " C++17 compiler (GCC or Clang) and Python's headers, then reinstall with pip's options"
    " --force-reinstall --no-deps --no-cache-dir. What failed: {}"
)


class BuildKernels(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("kron_kernels._native"))
        module.unlink(missing_ok=True)  # a failure must not leave an earlier build's
        try:
            built = self.compile_kernels()
        except (CompileError, subprocess.CalledProcessError, OSError) as reason:
            if os.environ.get("KRON_KERNELS_BUILD") == "1":
                raise CompileError(f"kron_kernels: {reason}") from None
            print(NO_KERNELS.format(reason), file=sys.stderr, flush=True)
            self.extensions = []  # or a strict editable installation looks for the file
        else:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, module)

    def get_ext_filename(self, fullname):
        # Not the name with the platform that newer Pythons prefer: older ones would not find it.
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def compile_kernels(self):
        cxx, is_x86 = compiler()
        if not any(Path(path, "Python.h").exists() for path in self.include_dirs):
            raise CompileError("Python.h is missing")
        units = {
            isa: ("csrc/cpu/kernels.cpp", [*flags.split(), f"-DKRON_ISA={isa}"])
            for isa, flags in [*(X86.items() if is_x86 else ()), ("portable", "")]
        }
        units["cpu"] = "csrc/cpu/cpu.cpp", ["-DKRON_HAS_X86"] if is_x86 else []
        units["binding"] = "csrc/binding.cpp", [f"-I{path}" for path in self.include_dirs]

        # pip throws an editable build's folder away, and with it what need not be compiled again.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        steps, user = [], words("CFLAGS") + words("CXXFLAGS")
        for name, (source, flags) in units.items():
            out = f"{folder}/{name}.o"
            flags = [*FLAGS.split(), *flags, *user, "-MMD", "-MF", f"{out}.d"]
            steps.append((out, [source], [*cxx, *flags, "-c", source, "-o", out]))
        objects, module = [out for out, *_ in steps], f"{folder}/_native.abi3.so"
        link = [*cxx, *user, *LINK.split(), *objects, *words("LDFLAGS"), "-o", module]
        run([*steps, (module, objects, link)], folder)
        return module


def words(variable):
    return shlex.split(os.environ.get(variable, ""))


def compiler():
    """The compiler's command, and whether it compiles for x86-64."""
    if os.environ.get("KRON_KERNELS_BUILD") == "0":
        raise CompileError("nothing, KRON_KERNELS_BUILD is 0")
    if sys.platform == "win32" or not STABLE_ABI:
        raise CompileError("Windows and free-threaded Python are not supported")
    cxx = words("CXX") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not cxx:
        raise CompileError("there is no C++ compiler (CXX, c++, g++, clang++)")
    machine = subprocess.check_output([*cxx, "-dumpmachine"], text=True)
    return cxx, machine.startswith(("x86_64", "amd64"))


def run(steps, folder):
    """Run the steps (output, inputs, command); given ninja, in parallel and only what changed."""
    ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else [shutil.which("ninja")]
    if ninja == [None]:
        for *_, command in steps:
            subprocess.run(command, check=True)
        return
    lines = [f"builddir = {folder}", "rule run", "  command = $step"]
    for out, inputs, command in steps:
        lines.append(f"build {out}: run {' '.join(inputs)}")
        lines.append(f"  step = {shlex.join(command).replace('$', '$$')}")
        if out.endswith(".o"):
            lines += [f"  depfile = {out}.d", "  deps = gcc"]
    plan = folder / "build.ninja"
    plan.write_text("\n".join([*lines, ""]))
    subprocess.run([*ninja, "-f", str(plan)], check=True)


setup(
    ext_modules=[Extension("kron_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
