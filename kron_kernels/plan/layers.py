"""The layers that may be factorised, and what may become of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from kron_kernels.decompose import check_finite
from kron_kernels.factorise import (
    Dense,
    Entry,
    Terms,
    dense_of,
    factorisable,
    no_such_layer,
    shapes_of,
    terms_of,
)
from kron_kernels.plan.result import terms_text
from kron_kernels.shapes import check_mapping


def _fits(name: str, path: str) -> bool:
    return f".{path}".endswith(f".{name}")


class Candidate(NamedTuple):
    terms: Terms
    parameters: int
    flops: int  # of one forward pass
    error: float


@dataclass(eq=False)
class Target:
    """A layer that may be factorised."""

    path: str
    layer: Dense
    decided: bool = False  # by ``layers``
    terms: Terms = ()  # if decided
    inputs: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)  # of each call
    candidates: list[Candidate] = field(default_factory=list)

    @cached_property
    def size(self) -> tuple[int, int]:
        rows, columns = dense_of(self.layer).shape
        return rows, columns

    @property
    def may_change(self) -> bool:
        """Whether the plan may replace it.

        Not if it was decided to stay dense, nor if undecided and never called.
        """
        return bool(self.terms or (self.inputs and not self.decided))

    @property
    def embedding(self) -> bool:
        return isinstance(self.layer, nn.Embedding)

    @cached_property
    def tokens(self) -> int:
        ids = self.embedding
        return sum(shape.numel() // (1 if ids else shape[-1]) for shape, _ in self.inputs)

    @cached_property
    def kind(self) -> str:
        """Equal for layers that take equal time."""
        bias = getattr(self.layer, "bias", None) is not None
        layer = type(self.layer).__name__
        return str((layer, self.size, bias, self.layer.weight.dtype, self.inputs))


def find_targets(
    module: nn.Module,
    names: Iterable[str] | None,
    decided: Mapping[str, Entry | dict[str, Any] | None],
    allow_tied: bool,
) -> list[Target]:
    plain, named = factorisable(module), factorisable(module, allow_tied)

    def fitting(name: str, argument: str) -> list[str]:
        paths = [path for path in named if _fits(name, path)]
        if not paths:
            raise ValueError(f"{argument} has {name!r}, {no_such_layer(name, named)}")
        return paths

    chosen = {p for p, (m, why) in plain.items() if not why and not isinstance(m, nn.Embedding)}
    if names is not None:
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Iterable):
            raise TypeError(f"names = {names!r} must be a list of strings, the ends of paths.")
        names = list(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names has {name!r}, but must be strings, the ends of paths.")
        chosen = {path for name in names for path in fitting(name, "names")}
    check_mapping("layers", decided, '{"up": {"a_shape": [16, 2], "rank": 1}}')
    decisions = {name: terms_of(e, f"layers[{name!r}]") for name, e in decided.items()}
    for name, terms in decisions.items():
        paths = fitting(name, "layers")
        chosen.update(paths if terms else ())
    targets = []
    for path, (layer, reason) in named.items():
        decision = max((n for n in decisions if _fits(n, path)), key=len, default=None)
        if path not in chosen:
            continue
        if reason:
            raise ValueError(f"{path!r} cannot be factorised: {reason}; leave it out.")
        terms = () if decision is None else decisions[decision]
        target = Target(path, layer, decision is not None, terms)
        if terms:
            _check_decision(target, f"layers[{decision!r}], for {path or 'the module'}")
        targets.append(target)
    if not targets:
        raise ValueError(
            "the module has no layer that could be factorised: no nn.Linear that is called and not "
            "tied to another; name an nn.Embedding in names, or nothing can be planned."
        )
    return targets


def check_weights(targets: Iterable[Target]) -> None:
    """Raise, naming the layer, if there are entries whose errors would be NaN."""
    for target in targets:
        if target.may_change:
            check_finite(f"the weight of {target.path or 'the module'}", target.layer.weight)


def _check_decision(target: Target, what: str) -> None:
    shapes = shapes_of(target.layer, target.terms, what)
    parameters, dense = sum(s.parameters for s in shapes), target.layer.weight.numel()
    if parameters >= dense:
        raise ValueError(
            f"{what}: {terms_text(target.size, target.terms)} has {parameters:,} parameters, no "
            f"fewer than the dense layer's {dense:,}; lower the rank, choose another a_shape, or "
            "write None for a dense layer."
        )


def dense_candidate(target: Target) -> Candidate:
    rows, columns = target.size
    flops = 0 if target.embedding else 2 * rows * columns * target.tokens
    return Candidate((), rows * columns, flops, 0.0)


def entry_of(terms: Terms) -> Entry | None:
    return [{"a_shape": list(shape), "rank": rank} for shape, rank in terms] or None
