"""Machines that run the kernels: a GPU, or a simulator on CPU tensors.

A test of the kernels takes the fixture ``machine`` and is the same on each of them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kron_kernels import KronShape
from kron_kernels.backends import COMPILED
from kron_kernels.testing.cases import draw, name

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
ENGINES = ("triton", "cuda")


class Machine(NamedTuple):
    """An engine and the device of its tensors."""

    engine: str  # of ENGINES, a backend of kron_matmul
    device: str  # "cuda", or "cpu" in the simulator

    def __str__(self) -> str:
        return f"simulated {self.engine}" if self.simulated else self.engine

    @property
    def simulated(self) -> bool:
        return self.device == "cpu"

    @property
    def kernels(self) -> ModuleType:
        return COMPILED[self.engine]

    def draw(self, s: KronShape, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """x, a and b; skips the test if the engine has no kernel for their shape."""
        operands = [t.to(self.device) for t in draw(s, tokens, dtype)]
        if self.engine == "cuda" and (reason := self.kernels.why_not(*operands)):
            pytest.skip(reason)  # Triton has kernels for every shape
        return operands

    def noise(self, dtype: torch.dtype, *size: int) -> Tensor:
        return torch.randn(size).to(self.device, dtype)

    def layer(self, s: KronShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and a bias."""
        _, a, b = self.draw(s, 1, dtype)
        return a, b, self.noise(dtype, s.out_features)


ON_GPU = [Machine(engine, "cuda") for engine in ENGINES]
TRITON, CUDA = (Machine(engine, "cpu") for engine in ENGINES)  # simulated


def on(machine: Machine, *arguments: Any, slow: bool = False):
    """A case of a test: a machine and the test's other arguments."""
    marks = [pytest.mark.gpu] * (not machine.simulated) + [pytest.mark.slow] * slow
    texts = [name(a) if isinstance(a, KronShape) else str(a) for a in arguments]
    return pytest.param(machine, *arguments, marks=marks, id="-".join([str(machine), *texts]))


def cases(arguments: str, values: list):
    """Parametrise a test with cases made by ``on``; ``arguments`` are those after the machine."""
    names = ["machine", *arguments.split()]
    return pytest.mark.parametrize(names, values, indirect=["machine"])


def machines(*simulated: Machine, slow: tuple[Machine, ...] = (), gpus: list[Machine] = ON_GPU):
    """Parametrise a test with a GPU and simulated machines."""
    slow_cases = [on(machine, slow=True) for machine in slow]
    return cases("", [*map(on, gpus), *map(on, simulated), *slow_cases])


@contextmanager
def simulated(engine: str) -> Iterator[Any]:
    """Let the engine's kernels run on CPU tensors, and yield the simulated GPU."""
    if engine == "cuda":
        from simulator.cuda import CudaDevice

        with CudaDevice(80) as gpu:
            yield gpu
    else:
        from simulator import Device

        from kron_kernels.backends.triton import configs

        with pytest.MonkeyPatch.context() as patch, Device(80) as gpu:
            patch.setattr(configs, "simulating", True)
            yield gpu


def why_not(machine: Machine) -> str | None:
    """Why the machine cannot be had here, or None."""
    if not machine.simulated:
        return None if torch.cuda.is_available() else "needs an NVIDIA GPU"
    if machine.engine == "triton":
        pytest.importorskip("triton")
        return None
    import emulator
    from simulator import cuda

    return cuda.why_not() or emulator.why_not()


@pytest.fixture
def machine(request) -> Iterator[Machine]:
    """The machine of a case, ready to run its engine's kernels."""
    machine = request.param
    if reason := why_not(machine):
        pytest.skip(reason)
    with ExitStack() as stack:
        if machine.simulated:
            stack.enter_context(simulated(machine.engine))
        if reason := machine.kernels.why_not(*(t.to(machine.device) for t in _smallest())):
            pytest.skip(reason)
        yield machine
    if not machine.simulated:
        gc.collect()
        torch.cuda.empty_cache()


def _smallest() -> tuple[Tensor, ...]:
    return draw(KronShape(1, 1, 1, 1), 1, torch.float16)


@pytest.fixture
def gpu_device() -> str:
    """For tests that run on a GPU only, and leave the engine to the module under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return "cuda"
