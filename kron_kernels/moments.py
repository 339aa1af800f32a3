"""Second moments of the layers' inputs on real data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.modules import call, hooked
from kron_kernels.plan.layers import Target


def second_moments(
    module: nn.Module, calibration: Iterable[Any], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """``Σ x xᵀ`` (columns, columns) of the inputs of each linear layer that is called, by path.

    Raises:
        TypeError: If calibration is one batch instead of several.
        ValueError: If it leaves out a layer that was called, whose error would then be its
            weight's, or an input is not finite.
    """
    if isinstance(calibration, Mapping):
        raise TypeError("calibration is one batch, a mapping; pass a list of such, [batch].")
    if isinstance(calibration, Tensor):
        raise TypeError("calibration is one batch, a tensor; pass a list of such, [batch].")
    linears = [t for t in targets if not t.embedding]
    found: dict[str, Tensor] = {}
    batches = 0
    for batch in calibration:
        batches += 1
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
    if not batches:
        raise ValueError(
            "calibration is empty (perhaps a generator that was already read); pass batches of "
            "real inputs, or leave it out for the errors of the weights."
        )
    for target in linears:
        path, moment = target.path or "the module", found.get(target.path)
        if moment is None and target.inputs and target.may_change:
            raise ValueError(
                f"calibration gives {path} no input that counts, though inputs call it; pass "
                "batches that reach it with something unmasked, or keep it dense by "
                f"layers={{{target.path!r}: None}}."
            )
        if moment is not None:
            check_moment(path, moment)
    return found


def check_moment(path: str, moment: Tensor) -> None:
    """Raise, naming the layer, unless all of its inputs were finite."""
    if not torch.isfinite(moment).all():
        raise ValueError(
            f"the inputs of {path} on calibration are NaN, infinite or so large that their squares "
            "overflow; find the batch, or the layer before it, that makes them so."
        )
