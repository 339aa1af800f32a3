"""What the backends for GPUs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def constant(function: Function) -> Function:
    """Compilers take its result for given: of a device and of the shapes of parameters.

    What torch.compiler.assume_constant_result does, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def precision(dtype: torch.dtype) -> str:
    """What PyTorch's own products do with float32, by Triton's names: ``"ieee"`` or ``"tf32"``."""
    if dtype != torch.float32:
        return "tf32"  # of no effect
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")  # torch 2.9
    if setting in ("ieee", "tf32"):
        return setting
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
