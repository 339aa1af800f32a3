"""Second moments of the layers' inputs on real data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kron_kernels.plan.forward import call, hooked
from kron_kernels.plan.layers import Target


def second_moments(
    module: nn.Module, calibration: Iterable[Any], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """``Σ x xᵀ`` (columns, columns) of the inputs of each linear layer that was called, by path."""
    linears = [t for t in targets if not t.embedding]
    found: dict[str, Tensor] = {}
    for batch in calibration:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def add(target: Target, x: Tensor, mask: Tensor | None = mask) -> None:
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x[mask.bool()]
            x = x.flatten(0, -2).float()
            if len(x):
                moment = found.setdefault(target.path, x.new_zeros(x.shape[1], x.shape[1]))
                moment.addmm_(x.mT, x)

        with hooked(linears, add):
            call(module, batch)
    return found
