"""What an error of a layer does to the module's output.

The error is a real one, of the layer at low rank. Noise of the same energy misleads: where a few
outputs carry most of a layer's energy, factors err there, while noise drowns the others. By noise
the last feed-forward weight of MiniLM weighed as much as the 22 lightest layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kron_kernels.decompose import cholesky, shrunk
from kron_kernels.modules import Dense, call, linear_weight

_COMPRESSION = 4  # of the layer whose error is tried
_LEAST = 1e-3  # of the mean influence: a layer's error is never free


class Influences:
    """The relative squared change of a module's output, over the error of a layer that causes it.

    Args:
        module: Any module, in evaluation mode.
        inputs: Its inputs. Where they have an ``attention_mask`` of the shape of an output's first
            two sides, outputs at zeros do not count.
    """

    def __init__(self, module: nn.Module, inputs: Any):
        self.module, self.inputs = module, inputs
        self.mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        self.clean = self._outputs()
        self.found: dict[str, float | None] = {}

    @torch.no_grad()
    def measure(self, name: str, layer: Dense, moment: Tensor | None) -> None:
        """Run the module with this layer at low rank.

        Args:
            name: Any name for the layer.
            layer: A layer within the module.
            moment: ``E[x xᵀ]`` of its inputs: the error is then that of its outputs.
        """
        is_table = isinstance(layer, nn.Embedding)
        change, error = _at_low_rank(linear_weight(layer).detach(), moment)

        def disturb(_: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            if is_table:
                return y + F.embedding(x, change).to(y.dtype)
            return y + F.linear(x.to(change.dtype), change).to(y.dtype)

        handle = layer.register_forward_hook(disturb, with_kwargs=True)
        try:
            outputs = self._outputs()
        finally:
            handle.remove()
        changes = [
            ((y - x).square().sum() / x.square().sum().clamp_min(1e-30)).item()
            for x, y in zip(self.clean, outputs, strict=True)
            if x.numel()
        ]
        total = sum(changes) / max(len(changes), 1)
        # Neither a layer of low rank nor one that these inputs do not reach says anything.
        self.found[name] = total / error if error > 1e-6 and 0 < total < torch.inf else None

    def relative(self) -> dict[str, float]:
        """By name, relative to their mean; 1 where nothing is known."""
        known = [value for value in self.found.values() if value is not None]
        mean = sum(known) / max(len(known), 1)
        return {
            name: 1.0 if value is None else max(value / mean, _LEAST)
            for name, value in self.found.items()
        }

    def _outputs(self) -> list[Tensor]:
        """The outputs in floating point, without those at padding."""
        found = []
        for y in _tensors(call(self.module, self.inputs)):
            y = y.detach().double()
            if self.mask is not None and self.mask.shape == y.shape[:2]:
                y = y[self.mask.to(y.device).bool()]
            found.append(y)
        return found


def _at_low_rank(w: Tensor, moment: Tensor | None) -> tuple[Tensor, float]:
    """What low rank changes in a weight ``(m, n)``, and its relative squared error."""
    scale = w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    w = (w / scale).float()  # squares of its entries do not overflow
    (m, n), whole = w.shape, w
    if moment is not None:
        whole = w @ cholesky(shrunk(moment)).float()
    gram = whole @ whole.mT if m <= n else whole.mT @ whole
    values, vectors = torch.linalg.eigh(gram)
    rank = max(m * n // (m + n) // _COMPRESSION, 1)
    basis = vectors[:, -rank:]  # (m, rank), or of the other side
    if m > n:
        basis = whole @ (basis / values[-rank:].clamp_min(1e-30 + 1e-12 * values[-1]).sqrt())
    change = basis @ (basis.mT @ w) - w
    energy = values.clamp_min(0)
    error = energy[:-rank].sum() / energy.sum().clamp_min(1e-30)
    return change * scale, error.item()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
