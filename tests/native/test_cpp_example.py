"""csrc/example as a C++ user compiles it: without Python, torch or a build system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "csrc" / "example"
CXX = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(not shutil.which(CXX.split()[0]), reason="no C++ compiler")


def build_and_run(folder: Path, **variables: str) -> str:
    command = [EXAMPLE / "build.sh", folder]
    built = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([folder / "example"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cpu_result_is_right(tmp_path):
    flags = "-O0 -Werror -Wall -Wextra"
    output = build_and_run(tmp_path / "a folder", CUDA_ARCH="", CXXFLAGS=flags)
    assert output.startswith("CPU: right")
    assert "GPU" not in output


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_gpu_result_is_right_or_the_reason_is_printed(tmp_path):
    lines = build_and_run(tmp_path, CXXFLAGS="-O0").splitlines()
    assert lines[0].startswith("CPU: right")
    assert lines[1].startswith(("GPU: right", "GPU: not tried: "))
