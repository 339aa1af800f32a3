"""The compiled module, and its arguments in the order of ``csrc/binding.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kron_kernels.checks import Activation
from kron_kernels.int8 import Factor, Int8Factor
from kron_kernels.shapes import contraction_order

ABI = 4  # KRON_ABI in csrc/kron.h


def _load() -> tuple[Any, str]:
    """The compiled module, or None with the reason and the remedy."""
    try:
        import kron_kernels._native as found
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); {_remedy()}"
    if (number := getattr(found, "abi", 0)) != ABI:
        return None, (
            f"{found.__file__} was built for ABI {number}, but this kron_kernels needs ABI {ABI}; "
            "reinstall kron_kernels"
        )
    return found, ""


def _remedy() -> str:
    from importlib.metadata import distributions

    # In a clone, Python finds the source folder before the installed package.
    here = Path(__file__).resolve().parents[1]
    for distribution in distributions(name="kron_kernels"):
        installed = Path(str(distribution.locate_file("kron_kernels"))).resolve()
        if installed != here and any(installed.glob("_native.*")):
            return (
                f"this is the source folder {here}, and the installed package is {installed}: "
                "start Python in another folder"
            )
    return f"with a C++17 compiler on the PATH, reinstall kron_kernels ({here})"


module, missing = _load()

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


def address(t: Tensor | None) -> int:
    """The address of a tensor's first entry; 0 for None and for a tensor without entries.

    Raises:
        ValueError: If a tensor has entries and no memory.
    """
    if t is None:
        return 0
    start = t.data_ptr()
    # Without a storage, the address is the offset into it.
    if start < 2**40 and t.numel() and start == t.storage_offset() * t.element_size():
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} has no memory: its storage was freed, as FSDP "
            "frees sharded tensors. Call the module instead of using its parameters, or gather "
            "them first."
        )
    return start


def layouts(tensors: list[Tensor]) -> Any:
    """Addresses, sizes, strides and dtypes of tensors, to compare with those of another moment."""
    read = getattr(module, "layouts", None)
    found = read(tensors) if read else None
    if found is None:  # the module cannot read this torch's tensors
        found = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return found


def product(
    factors: Sequence[Factor],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
    y: Tensor | None,
) -> list[int]:
    """A ``kron_product`` of ``csrc/kron.h``, as a list of numbers."""
    shapes = tuple([f.shape for f in factors])
    arguments = [
        shapes[0][0],
        len(factors),
        address(bias),
        address(residual),
        ACTIVATIONS[activation],
        address(y),
    ]
    turns = _turns(shapes)
    for i, f in enumerate(factors):
        _, rows, cols = shapes[i]
        if isinstance(f, Int8Factor):
            values, scale = f
            step = scale.stride(0) if len(scale) > 1 else 0
            arguments += (address(values), rows, cols, *f.stride(), turns[i], address(scale), step)
        else:
            arguments += (address(f), rows, cols, *f.stride(), turns[i], 0, 0)
    return arguments


def product_of_shapes(shapes: Sequence[tuple[int, int, int]]) -> list[int]:
    """A ``kron_product`` of contiguous factors without data, to ask whether it is supported."""
    arguments = [shapes[0][0], len(shapes), 0, 0, 0, 0]
    turns = _turns(tuple(shapes))
    for i, (_, rows, cols) in enumerate(shapes):
        arguments += (0, rows, cols, rows * cols, cols, 1, turns[i], 0, 0)
    return arguments


@lru_cache(maxsize=4096)
def _turns(shapes: tuple[tuple[int, int, int], ...]) -> list[int]:
    return contraction_order([(m, n) for _, m, n in shapes])
