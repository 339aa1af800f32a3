"""Stand-ins for a GPU."""

import emulator
import pytest
from simulator.cuda import CudaDevice, serving
from simulator.cuda import why_not as why_no_nvcc

from kron_kernels.backends.triton.served import why_no_triton


def _why_not(engine: str) -> str | None:
    if engine == "triton":
        return why_no_triton()
    return emulator.why_not() or (why_no_nvcc() if engine == "nvcc" else None)


@pytest.fixture
def gpu(request):
    """One of three stand-ins for a GPU; within a test CPU tensors count as a GPU's.

    - "triton-80", or another architecture: the simulator executes Triton's PTX.
    - "nvcc-80": the simulator executes nvcc's PTX of the CUDA C++ kernels.
    - "emulated": the same sources compiled for the host; each test runs threads in its own order.
    """
    engine, _, arch = request.param.partition("-")
    if reason := _why_not(engine):
        pytest.skip(reason)
    if engine == "emulated":
        emulated = emulator.load()
        with serving(emulated):
            emulated.seed(1 + sum(map(ord, request.node.name)))
            yield emulated
        emulated.seed(0)
    elif engine == "nvcc":
        with CudaDevice(int(arch)) as device:
            yield device
    else:
        from simulator import Device

        with Device(int(arch)) as device:
            yield device
