"""A simulated GPU that notes all that a call launches and has PyTorch compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simulator import Device as Simulator
from simulator import Launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GPUS = {80: "A100", 90: "H100"}
SHARED = {80: 166912, 90: 232448}  # bytes that a block may have


@dataclass
class Operation:
    """What PyTorch computes between the kernels."""

    name: str
    bytes: int
    flops: int


@dataclass
class Kernel:
    """A launch, and the bytes of the tensors that it was given."""

    launch: Launch
    bytes: int


def extent(tensors: Iterator[Tensor]) -> int:
    """Bytes of the tensors, each once, and of an expanded one what it has."""
    sizes = {}
    for t in tensors:
        numel = math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s or not n)
        place = t.untyped_storage()._cdata, t.storage_offset()
        sizes[place] = max(sizes.get(place, 0), numel * t.element_size())
    return sum(sizes.values())


def flat(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from flat(value)


class Mill(Simulator):
    """The simulated GPU, which also notes what else the call has PyTorch compute."""

    def __init__(self, arch: int, *, execute: bool = True, checks: bool = True):
        super().__init__(arch, execute=execute, races=checks, late_copies=checks)
        self.parts: list[Kernel | Operation] = []
        self.launching = False

    def launch(self, grid, source, metadata, asm, values) -> None:  # type: ignore[no-untyped-def]
        self.launching = True
        try:
            super().launch(grid, source, metadata, asm, values)
        finally:
            self.launching = False
        self.parts.append(Kernel(self.launches[-1], extent(flat(values))))

    def __enter__(self) -> Mill:
        super().__enter__()
        self._operations = _Operations(self)
        self._operations.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._operations.__exit__(*error)
        super().__exit__(*error)


class _Operations(TorchDispatchMode):
    """Notes what moves bytes: no views and no allocations."""

    def __init__(self, mill: Mill):
        super().__init__()
        self.mill = mill

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if self.mill.launching or "empty" in name or not isinstance(out, Tensor):
            return out
        reads = list(flat(args))
        mutates = func._schema.is_mutable
        storage = out.untyped_storage()._cdata
        if not mutates and storage in {t.untyped_storage()._cdata for t in reads}:
            return out  # a view
        moved = extent(iter(reads)) + extent(iter([out]))  # in place: read and written
        flops = 2 * out.numel() * reads[0].shape[-1] if name in ("mm", "bmm") else 0
        self.mill.parts.append(Operation(name, moved, flops))
        return out
