"""Results on disk: measurements, with the facts of the machine.

A file holds ``machine``, the facts, and ``rows``, one for each measurement.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
import time
import timeit
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Column, Table

import kron_kernels
from kron_kernels.backends import native
from kron_kernels.files import write_file

RESULTS = Path(__file__).parent / "results"
PICTURES = RESULTS.parents[1] / "docs/assets"
DENSE = "dense eager"  # the contender that all others are compared with
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
BUSY = 0.05  # share of all cores that other work may take before times are called doubtful


class Recording:
    """Rows measured on one machine, written to ``path`` after each."""

    def __init__(self, path: Path, machine: dict[str, Any], rows: Sequence[dict] = ()) -> None:
        self.path, self.machine, self.rows = path, machine, [*rows]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        write(self.path, {"machine": self.machine, "rows": self.rows})


@contextmanager
def recording(path: Path, threads: int, rows: Sequence[dict] = ()) -> Iterator[Recording]:
    """Set the threads; yield a recording that starts with ``rows``; note what else was running.

    Warns if other work takes more than 5 % of the cores, before or during the measurements.
    """
    use_threads(threads)
    record = Recording(path, facts(threads), rows)
    if (before := psutil.cpu_percent(1.0) / 100) > BUSY:
        warn(f"other work takes {before:.0%} of the cores: stop it, or trust no time below")
    start, busy, own = time.time(), _busy(), _own()
    yield record
    spent = (_busy() - busy) - (_own() - own)
    share = max(0.0, spent / (time.time() - start) / (os.cpu_count() or 1))
    record.machine["others_busy"] = round(share, 3)
    record.write()
    if share > BUSY:
        warn(f"other work took {share:.0%} of the cores meanwhile: measure again without it")


def use_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries with another OpenMP
    torch.set_num_threads(threads)


def facts(threads: int) -> dict[str, Any]:
    """The processor and its features, versions, threads, and the peaks that one process reaches."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    features = re.search(r"(?:flags|Features)\s*: (.*)", text)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "flags": [f for f in FLAGS if features and f in features[1].split()],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.instruction_set(),
        "threads": threads,
        "gemm_gflops": round(gemm_rate(), 1),
        "gb_per_s": round(bandwidth(), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kron_kernels": kron_kernels.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def gemm_rate() -> float:
    """GFLOP/s of the best of 20 float32 products of 1536 x 1536."""
    a, b = torch.randn(2, 1536, 1536)
    return 2e-9 * 1536**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=20))


def bandwidth() -> float:
    """GB/s of the best of 20 sums of two arrays of 128 MB, too large for the caches."""
    a, b, c = torch.ones(3, 2**25)
    best = min(timeit.repeat(lambda: torch.add(a, b, out=c), number=1, repeat=20))
    return 3 * a.nbytes / best / 1e9


def _busy() -> float:
    """Seconds of work on all cores since the machine started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own() -> float:
    """Seconds of work of this process and of its finished children."""
    return sum(os.times()[:4])


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    progress(f"WARNING: {text}")


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The results in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def pictures_of(folder: Path) -> Path:
    """Pictures lie beside their results; those of the committed results in the documentation."""
    return PICTURES if folder.resolve() == RESULTS else folder


def title(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    cpu = f"{machine['cpu']} ({machine['capability']})"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{cpu}, {threads}, torch {machine['torch']}, {machine['date'][:10]}"


def table(title: str, headings: Iterable[str], left: Collection[str] = (), **options) -> Table:
    """An empty table; the columns are aligned to the right, except those in ``left``."""
    columns = (Column(h, justify="left" if h in left else "right") for h in headings)
    return Table(*columns, title=title, **options)


def filled(
    title: str, headings: Sequence[str], body: Iterable[Sequence[str]], left: Collection[str] = ()
) -> Table:
    """A table with its rows."""
    made = table(title, headings, left)
    for row in body:
        made.add_row(*row)
    return made


def versus_dense(
    heading: str,
    results: dict[str, Any],
    values: Callable[[dict[str, Any]], dict[str, float]],
    digits: int = 0,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """A line for each contender, a column for each row: its value, and dense's over it.

    ``more`` are columns after these: an entry for each contender.
    """
    of = [values(row) for row in results["rows"]]
    sizes = (f"{row['batch']} x {row['tokens']}" for row in results["rows"])
    heading = f"{heading} (times less than {DENSE})\n{title(results['machine'])}"
    shown = table(heading, ("", *sizes, *(more or {})), left=("",))
    for i, name in enumerate(of[0]):
        entries = (f"{row[name]:.{digits}f} ({row[DENSE] / row[name]:.1f})" for row in of)
        shown.add_row(name, *entries, *(column[i] for column in (more or {}).values()))
    return shown
