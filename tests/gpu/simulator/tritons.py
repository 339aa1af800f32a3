"""What differs between Tritons 3.4 to 3.9, as far as the simulator meets it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

try:
    import triton
    from triton.compiler import CompiledKernel
except ImportError:  # run_ptx needs none of it
    triton = CompiledKernel = None


def spilled_by_a_roomy_kernel() -> tuple[int, int, int]:
    """Loads, stores and bytes: the ptxas of 3.4 spills two registers of 255."""
    return (1, 1, 8) if _is_3_4() else (0, 0, 0)


def why_no_amd() -> str | None:
    """Why nothing can be compiled for AMD's GPUs: 3.4 brings no linker for them."""
    linker = os.environ.get("TRITON_HIP_LLD_PATH", "/opt/rocm/llvm/bin/ld.lld")
    if _is_3_4() and not Path(linker).exists():
        return f"Triton 3.4 needs ROCm's linker, {linker}"
    return None


def _is_3_4() -> bool:
    return triton.__version__.startswith("3.4.")


def active_driver() -> Any:
    """The driver in use, or None; asking Triton's property would make one, which needs a GPU."""
    return getattr(triton.runtime.driver, _attribute())


@contextmanager
def using(driver: Any) -> Iterator[None]:
    """Let Triton compile for a driver and launch by it.

    The driver gets a kernel's outputs, ``driver.utils.asm``, before it loads the kernel: Triton
    itself only hands it the last one, and 3.4 has no hook for the others.
    """
    load = CompiledKernel._init_handles

    def init_handles(kernel: Any) -> None:
        driver.utils.asm = dict(kernel.asm)
        load(kernel)

    with (
        patch.object(triton.runtime.driver, _attribute(), driver),
        patch.object(CompiledKernel, "_init_handles", init_handles),
    ):
        yield


def _attribute() -> str:
    """3.4 keeps the driver in ``active``, later ones behind a property of this name."""
    return "_active" if hasattr(triton.runtime.driver, "_active") else "active"
