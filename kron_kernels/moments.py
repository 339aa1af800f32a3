"""Second moments of the layers' inputs on real data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.modules import call, evaluating, watching


@torch.no_grad()
def second_moments(
    module: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs x of layers, over all rows that are not padding.

    Args:
        module: Any module; it runs in evaluation mode.
        batches: Its inputs: mappings, tuples or tensors. Where a batch has an ``attention_mask``
            of the shape of a layer's rows, rows at zeros do not count.
        layers: Linear layers within the module, by any name.

    Returns:
        By name, shape ``(in_features, in_features)``, float32. Layers that always read the same
        tensor, such as a query, a key and a value, share one result. Layers that no row reaches
        are left out.

    Raises:
        TypeError: If ``batches`` is a single batch.
        ValueError: If there is no batch, or an input is not finite.
    """
    check_batches(batches)
    sums = _Sums()
    count = 0
    with evaluating(module), watching(layers, sums.read):
        for batch in batches:
            count += 1
            sums.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            call(module, batch)
            sums.flush()
    if not count:
        raise ValueError(
            "calibration is empty (perhaps a generator that was already read); pass batches of "
            "real inputs, or leave it out to measure errors in the weights."
        )
    return sums.means()


class _Sums:
    """``Σ x xᵀ`` by the layers that read x, one product per tensor."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # the current batch's
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.rows: dict[tuple[str, ...], int] = defaultdict(int)
        self.latest: Tensor | None = None  # the tensor that was read last
        self.version: int | None = None
        self.product, self.count = torch.empty(0), 0  # of its rows, and their number
        self.names: list[str] = []  # the layers that have read it

    def read(self, name: str, x: Tensor) -> None:
        # The same tensor again, unless it was written to in between.
        version = None if x.is_inference() else x._version
        if self.latest is not x or version is None or version != self.version:
            self.flush()
            self.latest, self.version = x, version
            rows = real_rows(x, self.mask).float()
            self.product, self.count = rows.mT @ rows, len(rows)
        self.names.append(name)

    def flush(self) -> None:
        """Add the latest product to the sum of the layers that read it."""
        key = tuple(self.names)
        if self.count:
            self.sums[key] = self.sums[key].add_(self.product) if key in self.sums else self.product
            self.rows[key] += self.count
        self.latest, self.count, self.names = None, 0, []

    def means(self) -> dict[str, Tensor]:
        """The mean of each layer, one tensor for layers that always read the same."""
        keys: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for key in self.sums:
            for name in key:  # twice where a layer has read a tensor twice
                keys[name].append(key)
        means: dict[tuple, Tensor] = {}
        for name, own in keys.items():
            if (group := tuple(own)) not in means:
                total = torch.zeros_like(self.sums[own[0]])
                for key in own:
                    total += self.sums[key]
                means[group] = total / sum(self.rows[key] for key in own)
                check_moment(name, means[group])
        return {name: means[tuple(own)] for name, own in keys.items()}


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of ``x (…, n)`` where a mask ``(…)`` is not 0; all rows under any other mask.

    Some inputs are not sequences, such as DeBERTa's relative positions.
    """
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.flatten(0, -2)


def check_batches(batches: Any) -> None:
    """Raise if these are a single batch instead of several."""
    for kind, name in ((Mapping, "mapping"), (Tensor, "tensor")):
        if isinstance(batches, kind):
            raise TypeError(f"calibration is one batch, a {name}; pass a list of batches, [batch].")


def check_moment(path: str, moment: Tensor) -> None:
    """Raise, naming the layer, unless all of its inputs were finite."""
    if not torch.isfinite(moment).all():
        raise ValueError(
            f"the inputs of {path or 'the module'} on calibration are NaN, infinite or so large "
            "that their squares overflow; find the batch, or the layer before it, that makes them "
            "so."
        )
