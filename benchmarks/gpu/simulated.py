"""The simulated GPU as a pytest plugin: it has no clock."""

import pytest

from benchmarks.gpu.timing import Gpu
from kron_kernels.timing import Timing


class SimulatedGpu(Gpu):
    """The first turn takes one unit of time, the second two, and so on.

    Only the tuner's times mean something: they are counts of instructions.
    """

    device = "cpu"

    def __init__(self, simulator):
        self.simulator = simulator

    def free_memory(self):
        return 2**30

    def cache_size(self):
        return 1000

    def rotation(self, each):
        return 2

    def pool(self):
        return None

    def captured(self, calls, pool):
        return lambda: [call() for call in calls]

    def time(self, turns, each, seconds, at_least=7):
        for turn in turns.values():
            turn()
        return {name: Timing(*[1e-3 * i] * 3) for i, name in enumerate(turns, 1)}

    def time_graphs(self, calls):
        found = {}
        for name, (first, *_) in calls.items():
            before = len(self.simulator.launches)
            first()
            launches = self.simulator.launches[before:]
            count = sum(sum(launch.instructions.values()) for launch in launches)
            found[name] = Timing(*[float(count)] * 3)
        return found


@pytest.fixture
def gpu(simulator):
    return SimulatedGpu(simulator)
