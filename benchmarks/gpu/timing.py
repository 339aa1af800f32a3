"""Clocks: a GPU's events around CUDA graphs, and the simulator's count of instructions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch

from kron_kernels.timing import Timing

Calls = Mapping[str, Sequence[Callable[[], Any]]]  # by contender, one for each set of operands
Clock = Callable[[Calls], dict[str, Timing]]


def cache_size() -> int:
    """Bytes of the L2 cache; many, where PyTorch does not say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**27


def rotation(each: int) -> int:
    """How many sets of operands of ``each`` bytes outgrow the L2 cache, where memory allows."""
    room = torch.cuda.mem_get_info()[0] // 4 // max(each, 1)
    return max(1, min(max(2, ceil(2 * cache_size() / max(each, 1))), 256, room))


def captured(calls: Sequence[Callable[[], Any]], pool: Any = None) -> Callable[[], None]:
    """The calls as a CUDA graph, whose replay has no cost of launching each.

    Graphs that share a pool of memory overwrite one another's results.
    """
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


def by_events(
    turns: Mapping[str, Callable[[], Any]], each: int, seconds: float, at_least: int = 7
) -> dict[str, Timing]:
    """Milliseconds of one of the ``each`` calls of a turn; turns alternate, in rotating order."""
    rounds: list[dict[str, float]] = []
    names = list(turns)
    end, warm = time.perf_counter() + seconds, 2
    while len(rounds) < warm + at_least or time.perf_counter() < end:
        names = names[1:] + names[:1]
        events = {name: _between_events(turns[name]) for name in names}
        torch.cuda.synchronize()
        rounds.append({n: start.elapsed_time(stop) / each for n, (start, stop) in events.items()})
    return {name: summary([r[name] for r in rounds[warm:]]) for name in turns}


def _between_events(turn: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    turn()
    stop.record()
    return start, stop


def summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def graph_clock(calls: Calls, seconds: float = 0.2) -> dict[str, Timing]:
    """Milliseconds on the GPU."""
    pool = torch.cuda.graph_pool_handle()
    turns = {name: captured(some, pool) for name, some in calls.items()}
    return by_events(turns, len(next(iter(calls.values()))), seconds)
