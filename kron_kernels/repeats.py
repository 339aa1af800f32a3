"""Calls that were made before: their checks and their route are found by one look-up.

What ``checks`` and ``dispatch`` decide depends on the operands' sizes, strides and dtypes, on the
options, and on what is active in PyTorch. A call during which nothing is active, and whose operands
are plain CPU tensors, has a signature. If one of the same signature and options went straight to
the compiled kernels, this one may as well. For few tokens that is most of a call's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kron_kernels import dispatch
from kron_kernels.backends import abi

Key = tuple[bytes, str | None, str]  # signature, activation, backend

_MOST = 4096  # entries of 2 KB


class Repeats:
    """Of one function: how the compiled kernels repeat a call, by its key."""

    def __init__(self) -> None:
        self._again: dict[Key, Callable[..., Any]] = {}
        self.get, self.clear = self._again.get, self._again.clear

    def add(self, key: Key, again: Callable[..., Any] | None) -> None:
        """Remember how to repeat a call, if it can be repeated."""
        if again is not None:
            if len(self._again) >= _MOST:
                self.clear()
            self._again[key] = again


def call_key(operands: Sequence[Tensor | None], activation: str | None, backend: str) -> Key | None:
    """All that the checks and the route of a call depend on; None if they depend on more.

    That is whatever ``dispatch`` asks PyTorch for, and an operand that is not plain, is not on the
    CPU or has no memory.
    """
    if dispatch.is_watched() or dispatch.is_active():
        return None
    if (signature := _signature(*operands)) is None:
        return None
    with_grads = torch.is_grad_enabled()
    for t in operands:
        if t is not None and (t.is_neg() or (with_grads and t.requires_grad)):
            return None
    return signature, activation, backend


def _compiled_signature() -> Callable[..., bytes | None]:
    """That of the compiled module; if it cannot read this torch's tensors, none has a signature."""
    read = getattr(abi.module, "set_tensors", None)
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if read is None or exchange is None:
        return lambda *operands: None
    read(exchange, Tensor, torch.nn.Parameter)
    return abi.module.signature


_signature = _compiled_signature()
