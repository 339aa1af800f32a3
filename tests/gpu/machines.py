"""Machines that run the kernels: a GPU, or a simulator on CPU tensors.

A test of the kernels takes the fixture ``machine`` and is the same on each of them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kron_kernels import KronShape
from kron_kernels.backends import BACKENDS
from kron_kernels.backends.triton import configs
from kron_kernels.backends.triton.served import why_no_triton
from kron_kernels.testing.cases import draw, name

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
ENGINES = ("triton", "cuda")


class Machine(NamedTuple):
    """An engine and the device of its tensors."""

    engine: str  # one of ENGINES: a backend of kron_matmul
    device: str  # "cuda", or "cpu" in the simulator

    def __str__(self) -> str:
        return f"simulated {self.engine}" if self.simulated else self.engine

    @property
    def simulated(self) -> bool:
        return self.device == "cpu"

    @property
    def kernels(self) -> ModuleType:
        return BACKENDS[self.engine]

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
    """Parametrise a test with cases made by ``on``; ``arguments`` are those after the machine.

    A dtype is given by name, and goes through the fixture ``dtype``.
    """
    names = ["machine", *arguments.split()]
    indirect = [name for name in names if name in ("machine", "dtype")]
    return pytest.mark.parametrize(names, values, indirect=indirect)


def machines(*simulated: Machine, slow: tuple[Machine, ...] = (), gpus: list[Machine] = ON_GPU):
    """Parametrise a test with a GPU and simulated machines."""
    slow_cases = [on(machine, slow=True) for machine in slow]
    return cases("", [*map(on, gpus), *map(on, simulated), *slow_cases])


@contextmanager
def simulated(engine: str) -> Iterator[Any]:
    """Let the engine's kernels run on CPU tensors, and yield the simulated GPU."""
    if engine == "cuda":
        from simulator.cuda import CudaDevice as Device
    else:
        from simulator import Device
    with Device(80) as gpu:
        yield gpu


def needs_triton() -> None:
    """Skip a module's tests without a Triton that compiles the kernels correctly."""
    if reason := why_no_triton():
        pytest.skip(reason, allow_module_level=True)


def why_not(machine: Machine) -> str | None:
    """Why the machine is not available here, or None."""
    if not machine.simulated:
        return None if torch.cuda.is_available() else "needs an NVIDIA GPU"
    if machine.engine == "triton":
        return why_no_triton()
    import emulator
    from simulator import cuda

    return cuda.why_not() or emulator.why_not()


@contextmanager
def ready(machine: Machine) -> Iterator[None]:
    """Start a simulated machine; skip the test if the machine or its engine is missing."""
    if reason := why_not(machine):
        pytest.skip(reason)
    with simulated(machine.engine) if machine.simulated else nullcontext():
        smallest = draw(KronShape(1, 1, 1, 1), 1, torch.float16)
        if reason := machine.kernels.why_not(*(t.to(machine.device) for t in smallest)):
            pytest.skip(reason)
        yield


@pytest.fixture
def machine(request) -> Iterator[Machine]:
    with ready(request.param):
        yield request.param
    if not request.param.simulated:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def gpu_device() -> str:
    """For tests that run on a GPU only, and leave the engine to the module under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return "cuda"


@pytest.fixture
def simulator(tmp_path, monkeypatch):
    """The simulated GPU, which runs Triton's kernels; measured tiles go to a temporary folder."""
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned")
    configs._table.cache_clear()
    if reason := why_not(TRITON):
        pytest.skip(reason)
    with simulated("triton") as gpu:
        yield gpu
    configs._table.cache_clear()


@pytest.fixture
def emulated_cuda():
    """CUDA's kernels run on CPU tensors, by the emulator."""
    import emulator
    from simulator.cuda import serving

    if reason := emulator.why_not():
        pytest.skip(reason)
    with serving(emulator.load()):
        yield
