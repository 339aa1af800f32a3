"""Without a GPU: PTX executed by the simulator, CUDA sources compiled by the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.clocks import Calls, Clock
from kron_kernels.backends.triton import configs as triton_launch
from kron_kernels.timing import Timing


@contextmanager
def clock(folder: Path) -> Iterator[Clock]:
    """CPU tensors stand for a GPU's, tables go to the folder; gives a clock, of instructions."""
    from simulator import Device  # here, for it needs Triton

    def count(calls: Calls) -> dict[str, Timing]:
        found = {}
        for name, (first, *_) in calls.items():
            before = len(gpu.launches)
            first()
            total = sum(sum(launch.instructions.values()) for launch in gpu.launches[before:])
            found[name] = Timing(*[float(total)] * 3)
        return found

    before = triton_launch.TUNED, triton_launch.simulating
    triton_launch.TUNED, triton_launch.simulating = folder, True
    triton_launch._table.cache_clear()
    try:
        with Device(80) as gpu:
            yield count
    finally:
        triton_launch.TUNED, triton_launch.simulating = before
        triton_launch._table.cache_clear()


def why_no_cuda() -> str | None:
    """Why there are no CUDA kernels to simulate, or None."""
    import emulator
    from simulator import cuda

    reason = cuda.why_not() or emulator.why_not()
    return reason and f"no CUDA kernels to simulate: {reason}"


@contextmanager
def cuda() -> Iterator[None]:
    """Within it CUDA's kernels serve CPU tensors, by the PTX that nvcc makes of them."""
    from simulator.cuda import CudaDevice

    with CudaDevice(80):
        yield
