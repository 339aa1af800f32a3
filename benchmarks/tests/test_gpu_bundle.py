"""The file that is carried to a machine with a GPU and without a network."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.gpu import bundle, carried
from kron_kernels.backends import abi, cuda


def wheel(folder: Path, name: str, version: str, text: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    return path


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """The bundle in a folder, with one package that no machine has and an older pytest."""
    if abi.module is None:
        pytest.skip(abi.missing)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "kron_carried", "1.0", "import kron_kernels as k; print(k.__file__)")
    wheel(wheels, "pytest", "0.1", "")
    monkeypatch.setattr(cuda, "archs", lambda: "80 90")
    monkeypatch.setattr(bundle, "commit", lambda: "abc1234")
    out = tmp_path / "carried.tar.gz"
    assert bundle.main(["--out", str(out), "--wheels", str(wheels)]) == 0
    with tarfile.open(out) as file:
        assert {entry.uname for entry in file} == {""}
        file.extractall(tmp_path / "there", filter="data")
    return tmp_path / "there" / "kron-gpu"


def test_it_runs_from_a_folder_without_installation(unpacked):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(unpacked / "run"), "-m", "kron_carried"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.stdout.strip() == str(unpacked / "kron_kernels" / "__init__.py"), done.stderr
    assert [path.name for path in (unpacked / "site").glob("*.py")] == ["kron_carried.py"]
    assert (unpacked / "COMMIT").read_text() == "abc1234"
    for needed in ("tests/conftest.py", "tests/gpu/simulator/ptx.py", "csrc/kron.h"):
        assert (unpacked / needed).exists()
    assert not (unpacked / "kroneckerbert" / "students").exists()


@pytest.mark.slow
def test_without_a_network_and_a_gpu_it_says_so(unpacked):
    alone = ["unshare", "-rn"] if shutil.which("unshare") else []
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []  # not everyone may
    command = [*alone, sys.executable, str(unpacked / "run"), "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=unpacked)
    assert done.returncode == 2 and "no GPU" in done.stdout, done.stderr


def test_a_module_without_the_kernels_is_not_carried(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(abi, "module", abi)
    monkeypatch.setattr(cuda, "archs", lambda: "80")
    assert bundle.main(["--out", str(tmp_path / "x.tar.gz")]) == 2
    assert "no kernels for sm_90, only '80'; with CUDA's nvcc" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_package_is_replaced_only_by_a_later_one(monkeypatch, tmp_path):
    monkeypatch.setattr(carried, "SITE", tmp_path / "site")
    for have, unpacks in ((None, True), ("8.4.2", True), ("9.2.0", False), ("10.0", False)):
        monkeypatch.setattr(carried, "installed", lambda name, have=have: have)
        carried.unpack(wheel(tmp_path, "fake", "9.2.0", ""))
        assert (tmp_path / "site").exists() == unpacks
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
