"""Milliseconds of layers, and of whole modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kron_kernels.factors import Shapes, random_layer
from kron_kernels.modules import call
from kron_kernels.plan.layers import Candidate, Target
from kron_kernels.timing import interleaved

LAYER_SECONDS, MODULE_SECONDS = 0.05, 2.0  # spent timing a candidate, and the module


def milliseconds(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Medians of calls that take turns."""
    return {name: t.median for name, t in interleaved(calls, seconds=seconds).items()}


class Clock:
    """Milliseconds of layers by kind and shapes, measured on demand."""

    def __init__(self) -> None:
        self.known: dict[str, dict[Shapes, float]] = defaultdict(dict)
        self.rate = 0.0  # FLOPs per millisecond, the best measured

    def measure(self, wanted: Iterable[tuple[Target, Shapes]]) -> None:
        """Time layers that are not known yet, each kind beside its dense layer."""
        by_kind: dict[str, tuple[Target, set[Shapes]]] = {}
        for target, shapes in wanted:
            by_kind.setdefault(target.kind, (target, set()))[1].add(shapes)
        for kind, (target, all_shapes) in by_kind.items():
            new = sorted(all_shapes - self.known[kind].keys() - {()})
            if target.inputs and (new or () not in self.known[kind]):
                self._measure(target, new)

    def _measure(self, target: Target, new: Iterable[Shapes]) -> None:
        known = self.known[target.kind]
        layers = {(): target.layer} | {s: random_layer(target.layer, s) for s in new}
        found = dict.fromkeys(layers, 0.0)
        for size, dtype in target.inputs:
            x = _input_like(target, size, dtype)
            calls = {str(s): partial(call, m.eval(), x) for s, m in layers.items()}
            times = milliseconds(calls, LAYER_SECONDS * len(calls) / len(target.inputs))
            for shapes in layers:
                found[shapes] += times[str(shapes)]
        known.setdefault((), found[()])
        # The first time of the dense layer is the unit: the machine's clock may drift. By more than
        # a factor of 2 it is another process, which disturbs a GEMM on all cores hundreds of times
        # as much as a small product on one.
        scale = min(max(known[()] / found[()], 0.5), 2.0)
        known |= {shapes: found[shapes] * scale for shapes in new}
        for c in target.candidates:
            if c.shapes in known:
                self.rate = max(self.rate, c.flops / known[c.shapes])

    def known_of(self, target: Target, shapes: Shapes) -> float | None:
        return 0.0 if not target.inputs else self.known[target.kind].get(shapes)

    def bound(self, target: Target, c: Candidate) -> float:
        """Its time if measured, otherwise a lower bound."""
        known = self.known_of(target, c.shapes)
        return c.flops / self.rate if known is None and self.rate else known or 0.0


def _input_like(target: Target, size: torch.Size, dtype: torch.dtype) -> Tensor:
    device = target.layer.weight.device
    if target.is_table:
        return torch.randint(target.size[0], size, dtype=dtype, device=device)
    return torch.randn(size, device=device).to(dtype)
