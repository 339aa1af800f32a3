"""Selection of the cases that run by default; the whole product runs with -m slow."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from kron_kernels.testing.cases import name


def slow(cases: Iterable[Sequence[Any]]) -> list:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def in_turns(
    machines: Sequence[tuple],
    shapes: Iterable[Any],
    *,
    each: int = 1,
    rest: Sequence[tuple] = (),
    label: Callable[[Any], str] = name,
) -> list:
    """Every shape on every machine, as ``(*machine, shape)``.

    By default a shape runs on ``each`` of the machines in turn, which covers all shapes and all
    machines. The other combinations, and all of ``rest``, are slow.
    """
    cases = []
    for i, shape in enumerate(shapes):
        for j, machine in enumerate([*machines, *rest]):
            chosen = j < len(machines) and (j - i) % len(machines) < each
            marks = [] if chosen else [pytest.mark.slow]
            words = "-".join(map(str, machine))
            cases.append(pytest.param(*machine, shape, marks=marks, id=f"{label(shape)}-{words}"))
    return cases
