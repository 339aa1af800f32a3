"""One file to carry to a machine with a GPU and without a network: ``kron-gpu.tar.gz``.

    python -m benchmarks.gpu.bundle

It has the sources, the compiled module with its kernels for GPUs, and wheels of what a stack of
torch, Triton and transformers lacks. There:

    tar xzf kron-gpu.tar.gz
    python kron-gpu/run --minutes 10

The module is for Linux on x86-64 and Python 3.11 or later, and is made with nvcc, without a GPU:

    KRON_KERNELS_CUDA=1 pip install -e .
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.environment import ROOT, commit
from kron_kernels.backends import abi, cuda

# What the command needs beyond torch, Triton, transformers and numpy; wheels for every Python.
PACKAGES = (
    *("pytest>=9", "pluggy", "iniconfig", "packaging", "pygments"),
    *("pytest-xdist>=3.8", "execnet"),
    *("lycoris-lora", "einops", "toml"),
)
FILES = (
    *("benchmarks", "csrc", "kron_kernels", "kroneckerbert", "tests/conftest.py", "tests/gpu"),
    *("conftest.py", "docs/gpu-owners.md", "LICENSE", "pyproject.toml", "README.md", "setup.py"),
)
# Ready students, results and pictures are not needed there.
LEFT_OUT = ("benchmarks/results/", "kroneckerbert/students/", "kroneckerbert/demo/text/")
NEEDED = "90"  # H100 and H200
MOST = 60_000_000  # bytes
NAME = "kron-gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(f"{NAME}.tar.gz"), metavar="FILE")
    parser.add_argument("--wheels", type=Path, help="a folder with the wheels, not pip's index")
    args = parser.parse_args(arguments)
    if reason := why_not():
        print(reason)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        wheels = args.wheels or downloaded(Path(folder))
        write(args.out, sorted(wheels.glob("*.whl")))
    size = args.out.stat().st_size
    print(f"{args.out}: {size / 1e6:.1f} MB, with kernels for GPUs {cuda.archs()}")
    if size > MOST:
        print(f"It should have at most {MOST / 1e6:.0f} MB.")
        return 1
    return 0


def why_not() -> str | None:
    """Why the compiled module cannot be carried, or None."""
    remedy = "with CUDA's nvcc on the PATH: KRON_KERNELS_CUDA=1 pip install -e ."
    if abi.module is None:
        return f"{abi.missing}; {remedy}"
    if NEEDED not in {arch.rstrip("a") for arch in cuda.archs().split()}:
        return (
            f"the compiled module has no kernels for sm_{NEEDED}, only {cuda.archs()!r}; {remedy}"
        )
    if not Path(abi.module.__file__).name.endswith(".abi3.so"):
        return f"{abi.module.__file__} is for one version of Python; {remedy}"
    return None


def downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--platform=any", "--python-version=3.11", *PACKAGES]
    subprocess.run(command, check=True)
    return folder


def sources() -> Iterator[Path]:
    """Files of the clone, relative to it, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *FILES],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(LEFT_OUT) and (ROOT / name).exists():
            yield Path(name)


def write(out: Path, wheels: Sequence[Path]) -> None:
    module = Path(abi.module.__file__)
    with tarfile.open(out, "w:gz") as file:
        for path in sources():
            file.add(ROOT / path, f"{NAME}/{path}", filter=plain)
        file.add(module, f"{NAME}/kron_kernels/{module.name}", filter=plain)
        file.add(Path(__file__).with_name("carried.py"), f"{NAME}/run", filter=plain)
        for wheel in wheels:
            file.add(wheel, f"{NAME}/wheels/{wheel.name}", filter=plain)
        text = (commit() or "unknown").encode()
        entry = tarfile.TarInfo(f"{NAME}/COMMIT")
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of users here."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    sys.exit(main())
