"""What the GPU backends share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(x: Tensor) -> bool:
    """Whether x is in a GPU's memory."""
    return x.is_cuda


@lru_cache(maxsize=64)
def capability(index: int) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(index)


def dtype_why_not(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for this dtype, as the end of a sentence, or None."""
    if dtype in DTYPES:
        return None
    return f"it has kernels for {', '.join(str(d)[6:] for d in DTYPES)}, and x is {dtype}"


def constant(function: Function) -> Function:
    """Let torch.compile treat the result as a constant of the device and the parameters' shapes.

    The same as torch.compiler.assume_constant_result, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def precision(dtype: torch.dtype) -> str:
    """How PyTorch multiplies float32 matrices, in Triton's terms: ``"ieee"`` or ``"tf32"``."""
    if dtype != torch.float32:
        return "tf32"  # has no effect
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting in ("ieee", "tf32"):
        return setting
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
