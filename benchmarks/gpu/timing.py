"""Times of calls on a GPU, by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch

from kron_kernels.timing import Timing

Call = Callable[[], Any]


class Gpu:
    """The current GPU: its memory, and the times of calls on it. Tests replace it."""

    device = "cuda"

    def free_memory(self) -> int:
        """Bytes."""
        return torch.cuda.mem_get_info()[0]

    def cache_size(self) -> int:
        """Bytes of the L2 cache; 128 MiB, more than any has, if PyTorch does not know."""
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**27

    def rotation(self, each: int) -> int:
        """Number of sets of operands, of ``each`` bytes, that outgrow the L2 cache."""
        room = self.free_memory() // 4 // max(each, 1)
        return max(1, min(max(2, ceil(2 * self.cache_size() / max(each, 1))), 256, room))

    def pool(self) -> Any:
        """Memory for CUDA graphs, which overwrite one another's results in it."""
        return torch.cuda.graph_pool_handle()

    def captured(self, calls: Sequence[Call], pool: Any) -> Call:
        """The calls as one CUDA graph; a replay has no cost of launching each."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
        return graph.replay

    def time(
        self, turns: Mapping[Any, Call], each: int, seconds: float, at_least: int = 7
    ) -> dict[Any, Timing]:
        """Milliseconds of one of a turn's ``each`` calls; turns alternate, in rotating order."""
        rounds: list[dict[Any, float]] = []
        names = list(turns)
        end, warm = time.perf_counter() + seconds, 2
        while len(rounds) < warm + at_least or time.perf_counter() < end:
            names = names[1:] + names[:1]
            events = {name: _between_events(turns[name]) for name in names}
            torch.cuda.synchronize()
            rounds.append(
                {n: first.elapsed_time(last) / each for n, (first, last) in events.items()}
            )
        return {name: _summary([r[name] for r in rounds[warm:]]) for name in turns}

    def time_graphs(self, calls: Mapping[Any, Sequence[Call]]) -> dict[Any, Timing]:
        """Milliseconds of each contender's calls, one for each set of operands, as CUDA graphs."""
        pool = self.pool()
        graphs = {name: self.captured(some, pool) for name, some in calls.items()}
        return self.time(graphs, len(next(iter(calls.values()))), seconds=0.2)


def _between_events(turn: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    turn()
    last.record()
    return first, last


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)
