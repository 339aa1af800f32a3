"""The backends of a CPU with the dtypes they support; native with each instruction set here."""

from collections.abc import Callable
from typing import Any

import torch

from kron_kernels.backends import native

SETS = native._ISAS[: native._isa + 1] if native._native else ()
REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EAGER = [("eager", dtype) for dtype in (*REAL, torch.complex64)]
NATIVE = [(instruction_set, dtype) for instruction_set in SETS for dtype in REAL]


def backend_of(engine: str, monkeypatch) -> str:
    """The backend's name, after setting native's instruction set."""
    if engine not in SETS:
        return engine
    monkeypatch.setattr(native, "_isa", SETS.index(engine))
    return "native"


def at_threads(call: Callable[[], Any]) -> list:
    """What a call gives with 1, 2 and 5 threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call())
        return results
    finally:
        torch.set_num_threads(before)
