"""The layers that a plan may replace, and the candidates for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from kron_kernels.factors import (
    Entry,
    Shapes,
    Term,
    check_ranks,
    deciding_name,
    ends_of,
    names_layer,
    no_such_layer,
    parse,
    shapes_of,
    terms_text,
)
from kron_kernels.modules import Dense, dense_layers, linear_weight, obstacles, refused
from kron_kernels.shapes import check_mapping


class Candidate(NamedTuple):
    """One choice for a layer; without shapes it is the dense layer."""

    shapes: Shapes
    parameters: int
    flops: int  # in one forward pass of the module
    error: float  # relative and squared


@dataclass(eq=False)
class Target:
    """A layer that a plan may replace."""

    path: str
    layer: Dense
    decision: Shapes | None = None  # from the argument ``layers``; () means dense
    inputs: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)  # one per call
    influence: float = 1.0  # of its error on the module's output; relative to other layers
    candidates: list[Candidate] = field(default_factory=list)  # the first is dense if undecided

    @cached_property
    def size(self) -> tuple[int, int]:
        rows, columns = linear_weight(self.layer).shape
        return rows, columns

    @property
    def decided(self) -> bool:
        return self.decision is not None

    @property
    def may_change(self) -> bool:
        """Whether it is decided to be factorised, or is undecided and called."""
        return bool(self.decision) if self.decided else bool(self.inputs)

    @property
    def is_table(self) -> bool:
        return isinstance(self.layer, nn.Embedding)

    @cached_property
    def tokens(self) -> int:
        """Rows that it multiplies or looks up in one forward pass of the module."""
        width = 1 if self.is_table else self.size[1]
        return sum(shape.numel() // width for shape, _ in self.inputs)

    @cached_property
    def kind(self) -> str:
        """Equal for layers that take equal time."""
        bias = getattr(self.layer, "bias", None) is not None
        layer = type(self.layer).__name__
        return str((layer, self.size, bias, self.layer.weight.dtype, self.inputs))

    @cached_property
    def dense(self) -> Candidate:
        return self.candidate((), 0.0)

    def candidate(self, shapes: Shapes, error: float) -> Candidate:
        rows, columns = self.size
        flops, parameters = 2 * rows * columns, rows * columns
        if shapes:
            flops, parameters = sum(s.flops for s in shapes), sum(s.parameters for s in shapes)
        return Candidate(shapes, parameters, 0 if self.is_table else flops * self.tokens, error)


def find_targets(
    module: nn.Module,
    names: Iterable[str] | None = None,
    decisions: Mapping[str, Entry | Term | None] | None = None,
    allow_tied: bool = False,
) -> list[Target]:
    """The layers with these names, or all linear layers that are not tied, and those decided on.

    Args:
        module: Any module.
        names: Ends of paths.
        decisions: Terms, or None for a dense layer, by the end of a path; the longest decides.
        allow_tied: Whether a layer that is tied to another may be named.
    """
    layers, reasons = dense_layers(module), obstacles(module, allow_tied)

    def paths_of(name: str, argument: str) -> list[str]:
        paths = [path for path in layers if names_layer(name, path)]
        if not paths:
            why = no_such_layer(name, ends_of(layers), module)
            raise ValueError(f"{argument} has {name!r}, {why}")
        return paths

    if names is None:
        tied = obstacles(module)
        chosen = {p for p, m in layers.items() if p not in tied and not isinstance(m, nn.Embedding)}
    else:
        chosen = {path for name in _checked(names) for path in paths_of(name, "names")}
    decisions = {} if decisions is None else decisions
    check_mapping("layers", decisions, '{"up": {"a_shape": [16, 2], "rank": 1}}')
    parts = {name: parse(entry, f"layers[{name!r}]") for name, entry in decisions.items()}
    for name in parts:
        paths = paths_of(name, "layers")
        chosen.update(paths if parts[name] else ())
    targets = []
    for path, layer in layers.items():
        if path not in chosen:
            continue
        if path in reasons:
            raise ValueError(f"{path!r} cannot be factorised: {reasons[path]}; leave it out.")
        target = Target(path, layer)
        if (decider := deciding_name(parts, path)) is not None:
            label = f"layers[{decider!r}], for {path or 'the module'}"
            target.decision = shapes_of(parts[decider], target.size, target.is_table, label)
            check_ranks(target.decision, label)
            _check_is_smaller(target, target.decision, label)
        targets.append(target)
    if not targets:
        why_not = first_refused(module, allow_tied)
        notes = [why_not or "it has no nn.Linear"]
        if tables := [
            p for p, m in layers.items() if isinstance(m, nn.Embedding) and p not in reasons
        ]:
            notes.append(f"names={tables[:1]} would factorise an nn.Embedding")
        raise ValueError(f"the module has no layer that can be factorised: {'; '.join(notes)}.")
    return targets


def first_refused(module: nn.Module, allow_tied: bool = False) -> str:
    """The layers that cannot be factorised and why: one for each reason, of three."""
    first: dict[str, str] = {}
    for path, reason in refused(module, allow_tied).items():
        first.setdefault(reason, path or "the module")
    return "; ".join(f"{path!r}: {reason}" for reason, path in [*first.items()][:3])


def _checked(names: Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise TypeError(f"names = {names!r} must be a list of strings, the ends of paths.")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names has {name!r}, but must be strings, the ends of paths.")
    return names


def _check_is_smaller(target: Target, shapes: Shapes, label: str) -> None:
    parameters, dense = sum(s.parameters for s in shapes), target.layer.weight.numel()
    if parameters >= dense:
        raise ValueError(
            f"{label}: {terms_text(shapes)} has {parameters:,} parameters, no fewer than the dense "
            f"layer's {dense:,}; lower the rank, choose another a_shape, or write None for a dense "
            "layer."
        )
