"""Run what was carried: ``python run``, with the arguments of ``python -m benchmarks.gpu``.

This is ``run`` of ``kron-gpu.tar.gz``. It unpacks the wheels of what this Python lacks into a
folder beside it, and needs no pip, no network and no rights. ``python run -m pytest …`` runs
another module in the same way, such as the line by which a report repeats a case.
"""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be started with any
        sys.exit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}.")
    for package in ("torch", "numpy"):
        if installed(package) is None:
            sys.exit(f"{package} is needed, and {sys.executable} does not have it.")
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        unpack(wheel)
    paths = [str(HERE), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A home that cannot be written has no room for Triton's cache.
    cache = os.environ.get("TRITON_CACHE_DIR", str(HERE / "cache" / "triton"))
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(HERE / "cache" / "inductor"))
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": cache,
        "TORCHINDUCTOR_CACHE_DIR": inductor,
        "HF_HUB_OFFLINE": "1",
    }
    words = sys.argv[1:] if sys.argv[1:2] == ["-m"] else ["-m", "benchmarks.gpu", *sys.argv[1:]]
    if words[1] == "benchmarks.gpu" and "--out" not in words:
        end = words.index("--") if "--" in words else len(words)
        words[end:end] = ["--out", str(Path.cwd() / "gpu-report")]
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, *words])


def unpack(wheel: Path) -> None:
    """Unless there is this package already, of this version or a later one."""
    name, carried = wheel.name.split("-")[:2]
    have = installed(name)
    if have is None or numbers(have) < numbers(carried):
        with ZipFile(wheel) as file:
            file.extractall(SITE)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)[:3]]


if __name__ == "__main__":
    main()
