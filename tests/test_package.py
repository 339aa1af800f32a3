"""setup.py with fake compilers; the libraries that the module needs; the source distribution."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kron_kernels.backends import abi

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", minversion="77")  # pyproject.toml needs it

# Fake compilers: they log their arguments and write the file of -o.
LOG = '#!/bin/sh\necho "$*" >> "$0.log"\n'
WRITE = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done; exit 0\n'
CXX = f'{LOG}case "$*" in *-dumpmachine*) echo x86_64-linux-gnu; exit;; esac\n{WRITE}'
NVCC = f"""{LOG}
case "$*" in
*--version*) echo "Cuda compilation tools, release 12.9, V12.9.86"; exit;;
*--dryrun*-arch=sm_80\\ * | *--dryrun*-arch=sm_90\\ * | *--dryrun*-arch=sm_90a\\ *) exit;;
*--dryrun*-arch=*) echo "nvcc fatal : Unsupported gpu architecture"; exit 1;;
*--dryrun*) echo '#$ INCLUDES="-I/cuda/include"  '; echo '#$ LIBRARIES=  "-L/cuda/lib"'; exit;;
esac
{WRITE}"""
FAILING = "#!/bin/sh\necho 'nvcc fatal : no licence'\nexit 1\n"
TOO_OLD = NVCC.replace(WRITE, "exit 2\n")


class Machine:
    """A PATH with the given compilers, and what setup.py builds there."""

    def __init__(self, folder: Path, **scripts: str):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("sh", "uname"):
            (self.bin / name).symlink_to(shutil.which(name))
        for name, script in scripts.items():
            self.add(self.bin / name.replace("cxx", "c++"), script)

    @staticmethod
    def add(file: Path, script: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "VIRTUAL_ENV")}
        command = [sys.executable, "setup.py", "build_ext"]
        command += [f"--build-lib={self.folder / 'lib'}", f"--build-temp={self.folder / 'temp'}"]
        environment = kept | {"PATH": str(self.bin)} | variables
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    @property
    def built(self) -> bool:
        return (self.folder / "lib" / "kron_kernels" / "_native.abi3.so").exists()

    def calls(self, compiler: str, about: str = "") -> list[str]:
        lines = (self.bin / f"{compiler}.log").read_text().splitlines()
        return [line for line in lines if about in line]


def test_cpu_and_gpu_kernels_are_compiled(tmp_path):
    machine = Machine(tmp_path, cxx=CXX, nvcc=NVCC)
    done = machine.build(CFLAGS="-g0", LDFLAGS="-lmine")
    assert done.returncode == 0 and machine.built
    assert "left out, unknown to this nvcc: 86 89 100 120" in done.stderr
    assert "for CPUs (avx512, avx2, portable) and NVIDIA GPUs (80 90, by CUDA 12.9)" in done.stderr
    kernels = machine.calls("nvcc", "kernels.cu")
    assert len(kernels) == 4
    for line in kernels:
        assert "-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]" in line
        assert "-ccbin c++ " in line
    (binding,) = machine.calls("c++", "csrc/binding.cpp")
    assert '-DKRON_CUDA_ARCHS="80 90"' in binding and "-g0" in binding
    host = machine.calls("c++", "csrc/cuda/")
    assert len(host) == len(list((ROOT / "csrc" / "cuda").glob("*.cpp")))
    assert all("-I/cuda/include" in line and "-g0" in line for line in host)
    (link,) = machine.calls("c++", "-shared")
    assert "-L/cuda/lib -lcudart_static" in link and link.index("-lcudart") < link.index("-lmine")


def test_an_architecture_with_a_letter_has_its_own_code_and_no_ptx(tmp_path):
    machine = Machine(tmp_path, cxx=CXX, nvcc=NVCC)
    machine.build(KRON_KERNELS_CUDA_ARCHS="90 90a")
    both = "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=[sm_90,compute_90]"
    assert len(machine.calls("nvcc", both)) == 4
    machine.build(KRON_KERNELS_CUDA_ARCHS="90a")
    assert len(machine.calls("nvcc", "-gencode=arch=compute_90a,code=sm_90a -DKRON_MATH")) == 4


@pytest.mark.parametrize(
    ("nvcc", "variables", "reason"),
    [
        (None, {}, "there is no nvcc"),
        (NVCC, {"KRON_KERNELS_CUDA": "0"}, "KRON_KERNELS_CUDA is 0"),
        (FAILING, {}, "nvcc fatal : no licence"),
        (TOO_OLD, {}, "a command failed, see its output above"),
        (NVCC, {"KRON_KERNELS_CUDA_ARCHS": "35 999"}, "nvcc knows no architecture of 35 999"),
    ],
    ids=["missing", "left out", "failing", "failing at compiling", "too new for it"],
)
def test_without_cuda_the_cpu_kernels_are_built_and_the_reason_is_given(
    tmp_path, nvcc, variables, reason
):
    machine = Machine(tmp_path, cxx=CXX, **({"nvcc": nvcc} if nvcc else {}))
    done = machine.build(**variables)
    assert done.returncode == 0 and machine.built
    assert "for CPUs (avx512, avx2, portable), not for NVIDIA GPUs (" in done.stderr
    assert reason in done.stderr
    assert "cudart" not in machine.calls("c++", "-shared")[-1]
    assert "KRON_CUDA" not in machine.calls("c++", "csrc/binding.cpp")[-1]
    if "KRON_KERNELS_CUDA" not in variables:
        done = machine.build(KRON_KERNELS_CUDA="1", **variables)
        assert done.returncode and reason in done.stderr and not machine.built


def test_variables_locate_nvcc_before_the_path(tmp_path):
    machine = Machine(tmp_path, cxx=CXX, nvcc=FAILING)
    machine.add(tmp_path / "toolkit" / "bin" / "nvcc", NVCC)
    machine.add(tmp_path / "mine", NVCC)
    assert "by CUDA 12.9" in machine.build(CUDA_HOME=str(tmp_path / "toolkit")).stderr
    assert "by CUDA 12.9" in machine.build(NVCC=str(tmp_path / "mine")).stderr


def test_without_a_compiler_the_installation_succeeds_unless_kernels_are_required(tmp_path):
    machine = Machine(tmp_path)
    done = machine.build()
    assert done.returncode == 0 and not machine.built
    assert "no compiled kernels; PyTorch's operators are used instead" in done.stderr
    for variable in ("KRON_KERNELS_BUILD", "KRON_KERNELS_CUDA"):
        assert machine.build(**{variable: "1"}).returncode


@pytest.mark.skipif(abi.module is None, reason="the kernels are not compiled")
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_module_needs_no_library_of_cuda_or_torch_and_exports_only_its_entry():
    def readelf(option: str) -> str:
        command = ["readelf", "--wide", option, abi.module.__file__]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    needed = re.findall(r"NEEDED.*\[(.*)\]", readelf("--dynamic"))
    assert needed
    assert not [name for name in needed if re.match(r"lib(cu|nv|torch|c10|python)", name)]
    exported = re.findall(r" GLOBAL +DEFAULT +\d+ (\w+)", readelf("--dyn-syms"))
    assert exported == ["PyInit__native"]


def test_the_source_distribution_has_every_source_and_test(tmp_path):
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*.so", "results")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "tests", "benchmarks"):
        files = [file for file in (tree / folder).rglob("*") if file.is_file()]
        assert {str(file.relative_to(tree)) for file in files} <= packed


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_module_of_the_real_compilers_can_be_imported(tmp_path):
    machine = Machine(tmp_path)
    here = {"PATH": os.environ["PATH"], "CXXFLAGS": "-O0", "KRON_KERNELS_CUDA_ARCHS": "80"}
    done = machine.build(**here, KRON_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stderr
    code = "import _native; print(_native.isa(), getattr(_native, 'cuda_archs', ''))"
    folder = tmp_path / "lib" / "kron_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == (["80"] if shutil.which("nvcc") else [])
