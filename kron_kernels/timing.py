"""Timing of calls in turns: the median over the repeats, and its spread."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from kron_kernels.shapes import check_integer, check_number


class Timing(NamedTuple):
    """Milliseconds per call: the median over the repeats, and their quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds: float = 2.0, at_least: int = 5
) -> dict[str, Timing]:
    """Wall time of each call, measured in rounds: a slow phase of the machine slows all calls.

    Each round has a new order. In a fixed one a call would always find the caches as the same other
    call leaves them. A call of less than a millisecond is repeated within its turn, and averaged.
    One of less than 10 ms is first called untimed, or it would pay for its predecessor's caches.
    CUDA work is waited for.

    Args:
        calls: By name; each is called twice before it is timed.
        seconds: Approximate duration of the measurement of all calls together.
        at_least: Least number of rounds, for any duration; at least 2.

    Raises:
        ValueError: If ``seconds`` is not a finite number, or ``at_least`` not an integer.
    """
    seconds = check_number("seconds", seconds)
    at_least = check_integer("at_least", at_least, 0)
    if not calls:
        return {}
    once = {}
    for name, call in calls.items():
        call()
        once[name] = max(_time(call, 1), 1e-7)
    rounds: list[dict[str, float]] = []
    shuffle = random.Random(0)  # leaves the caller's random numbers alone
    end = time.perf_counter() + seconds
    while len(rounds) < max(at_least, 2) or time.perf_counter() < end:
        order = shuffle.sample(list(calls), len(calls))
        rounds.append({name: _turn(calls[name], once[name]) for name in order})
    return {name: _summary([r[name] for r in rounds]) for name in calls}


def _turn(call: Callable[[], Any], expected: float) -> float:
    if expected < 10e-3:
        call()
    return _time(call, max(1, int(1e-3 / expected)))


def _time(call: Callable[[], Any], repeats: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(1e3 * median, 1e3 * low, 1e3 * high)
