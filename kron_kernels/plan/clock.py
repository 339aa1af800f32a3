"""Milliseconds of layers, and of whole modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kron_kernels.factorise import Terms, random_layer
from kron_kernels.modules import call
from kron_kernels.plan.layers import Candidate, Target
from kron_kernels.timing import interleaved

LAYER_SECONDS, MODULE_SECONDS = 0.05, 2.0  # of timing one candidate, and the whole


def milliseconds(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Medians of calls that take turns."""
    return {name: t.median for name, t in interleaved(calls, seconds=seconds).items()}


class Clock:
    """Milliseconds of layers by kind and terms, measured when asked for."""

    def __init__(self) -> None:
        self.known: dict[str, dict[Terms, float]] = defaultdict(dict)
        self.rate = 0.0  # FLOPs per millisecond, the best that was seen

    def measure(self, wanted: Iterable[tuple[Target, Terms]]) -> None:
        """Those not measured yet, each beside its dense layer, whose first time is the unit."""
        by_kind: dict[str, tuple[Target, set[Terms]]] = {}
        for target, terms in wanted:
            by_kind.setdefault(target.kind, (target, set()))[1].add(terms)
        for kind, (target, asked) in by_kind.items():
            known = self.known[kind]
            new = sorted(asked - known.keys() - {()})
            if (not new and () in known) or not target.inputs:
                continue
            layers = {(): target.layer} | {t: random_layer("", target.layer, t) for t in new}
            found = dict.fromkeys(layers, 0.0)
            for shape, dtype in target.inputs:
                x = _input_like(target, shape, dtype)
                calls = {_name(t): partial(call, layer.eval(), x) for t, layer in layers.items()}
                times = milliseconds(calls, LAYER_SECONDS * len(calls) / len(target.inputs))
                for t in layers:
                    found[t] += times[_name(t)]
            known.setdefault((), found[()])
            # A clock that drifts; by more than 2 it is another process, which disturbs a GEMM on
            # all cores hundreds of times as much as a small product on one.
            scale = min(max(known[()] / found[()], 0.5), 2.0)
            for t in new:
                known[t] = found[t] * scale
            self._note_rates(target, known)

    def _note_rates(self, target: Target, known: Mapping[Terms, float]) -> None:
        for c in target.candidates:
            if c.terms in known:
                self.rate = max(self.rate, c.flops / known[c.terms])

    def known_of(self, target: Target, terms: Terms) -> float | None:
        return 0.0 if not target.inputs else self.known[target.kind].get(terms)

    def bound(self, target: Target, c: Candidate) -> float:
        """Its time, or less than that if it was not measured."""
        known = self.known_of(target, c.terms)
        return c.flops / self.rate if known is None and self.rate else known or 0.0


def _name(terms: Terms) -> str:
    return str(terms) if terms else "dense"


def _input_like(target: Target, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    device = target.layer.weight.device
    if target.embedding:
        return torch.randint(target.size[0], shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)
