"""A GPU backend with a net: what its kernels cannot do here, PyTorch's operators do.

``"auto"`` uses the GPU backends through this. If a kernel fails to compile or to launch, and the
GPU is still in order, the call and all that are like it go to eager, with one warning. With
KRON_KERNELS_CHECK=1 the first call of every function, dtype and shape is compared with eager, also
for a backend asked for by name: "auto" replaces a wrong result, and by name it is an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels.backends import eager
from kron_kernels.backends.gpu import precision
from kron_kernels.checks import Activation, Layer
from kron_kernels.testing import assert_close

CHECK = os.environ.get("KRON_KERNELS_CHECK", "0") not in ("", "0")
REPORT = (
    "Please report this: open an issue with this text and the output of "
    "`python -m kron_kernels.doctor`, or of `python -m benchmarks.gpu --minutes 10`."
)
FEW, SOME = 16, 1024  # tokens up to which the kernels and their tiles differ most

Key = tuple[Any, ...]


class Guarded:
    """The functions of a backend; see ``Backend``.

    Args:
        name: The backend's name, for messages.
        kernels: Its module.
        replace: Whether eager takes over. Otherwise a failure is raised.
    """

    def __init__(self, name: str, kernels: ModuleType, replace: bool):
        self.name, self.kernels, self.replace = name, kernels, replace
        self.failed: set[Key] = set()
        self.checked: set[Key] = set()
        self.warned: set[str] = set()

    def why_not(self, x: Tensor, *factors: Tensor) -> str | None:
        return self.kernels.why_not(x, *factors)

    def describe(self, x: Tensor, *factors: Tensor) -> str:
        return self.kernels.describe(x, *factors)

    def fuses(self, up: Layer, down: Layer) -> bool:
        return self.kernels.fuses(up, down)

    def kron_matmul(
        self,
        x: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self._call("kron_matmul", factors, x, factors, bias, activation, residual)

    def kron_matmul_backward(
        self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        return self._call("kron_matmul_backward", (a, b), dy, x, a, b, needed)

    def kron_qkv(self, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        return self._call("kron_qkv", _factors(layers), x, layers)

    def kron_feed_forward(
        self,
        x: Tensor,
        up: Layer,
        activation: Activation,
        down: Layer,
        residual: Tensor | None,
    ) -> Tensor:
        factors = _factors((up, down))
        return self._call("kron_feed_forward", factors, x, up, activation, down, residual)

    def kron_feed_forward_norm(
        self,
        x: Tensor,
        up: Layer,
        activation: Activation,
        down: Layer,
        residual: Tensor | None,
        norm: tuple[Tensor, Tensor | None, float],
    ) -> Tensor:
        """``LayerNorm(down(act(up(x))) + residual)``, of Triton only and layers that it fuses."""
        factors, function = _factors((up, down)), "kron_feed_forward_norm"
        return self._call(function, factors, x, up, activation, down, residual, norm)

    def kron_feed_forward_backward(
        self,
        dy: Tensor,
        x: Tensor,
        up: Layer,
        activation: Activation,
        down: Layer,
        needed: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        factors = _factors((up, down))
        function = "kron_feed_forward_backward"
        return self._call(function, factors, dy, x, up, activation, down, needed)

    def kron_embedding(self, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self._call("kron_embedding", (a, b), ids, a, b)

    def _call(self, function: str, factors: Sequence[Tensor], *args: Any) -> Any:
        run = getattr(self.kernels, function)
        if not (CHECK or self.failed):  # as nearly always
            try:
                return run(*args)
            except Exception as error:
                return self._after(error, function, factors, args)
        key = _key(function, factors, args[0])
        if key in self.failed:
            return _by_eager(function)(*args)
        try:
            results = run(*args)
        except Exception as error:
            return self._after(error, function, factors, args)
        if CHECK and key not in self.checked and not _capturing(args[0]):
            self.checked.add(key)
            try:
                compare(function, factors, args, results)
            except AssertionError as error:
                text = f"{self._what(function, factors, args[0])} is wrong here: {error}"
                if not self.replace:
                    raise RuntimeError(f"{text}. {REPORT}") from None
                self._give_up(key, text)
                return _by_eager(function)(*args)
        return results

    def _after(
        self, error: Exception, function: str, factors: Sequence[Tensor], args: tuple[Any, ...]
    ) -> Any:
        """Eager's result after a failure, unless that must be seen."""
        x = args[0]
        if not self.replace or isinstance(error, torch.OutOfMemoryError) or not _in_order(x):
            raise error
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        text = f"{self._what(function, factors, x)} failed here: {first}"
        self._give_up(_key(function, factors, x), text)
        return _by_eager(function)(*args)

    def _give_up(self, key: Key, text: str) -> None:
        self.failed.add(key)
        if text.split(",")[0] not in self.warned:  # once for each function
            self.warned.add(text.split(",")[0])
            message = f"{text}. PyTorch's operators are used instead, slower. {REPORT}"
            # Attributed to this module: in the tests it is an error.
            warnings.warn(message, UserWarning, stacklevel=2)

    def _what(self, function: str, factors: Sequence[Tensor], x: Tensor) -> str:
        shapes = " and ".join("x".join(map(str, f.shape)) for f in factors)
        tokens = x.numel() // max(x.shape[-1], 1)
        return (
            f"{function} of backend {self.name!r}, with factors {shapes} and {tokens} tokens in "
            f"{x.dtype},"
        )


def _factors(layers: Sequence[Layer]) -> list[Tensor]:
    return [factor for layer in layers for factor in layer[:2]]


def _key(function: str, factors: Sequence[Tensor], x: Tensor) -> Key:
    tokens = x.numel() // max(x.shape[-1], 1)
    size = 0 if tokens <= FEW else 1 if tokens <= SOME else 2
    return function, x.dtype, x.device, size, tuple([f.shape for f in factors])


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _in_order(x: Tensor) -> bool:
    """Whether the GPU still works: after an illegal address every call of the process fails."""
    if not x.is_cuda:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False  # the capture is lost with the call
    try:
        torch.cuda.synchronize(x.device)
    except RuntimeError:
        return False
    return True


def _by_eager(function: str) -> Callable[..., Any]:
    if function == "kron_feed_forward_backward":
        return _block_backward
    if function == "kron_feed_forward_norm":
        return _block_norm
    return _embedding if function == "kron_embedding" else getattr(eager, function)


def _block_norm(
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    residual: Tensor | None,
    norm: Sequence[Any],
) -> Tensor:
    weight, bias, epsilon = norm
    y = eager.kron_feed_forward(x, up, activation, down, residual)
    return F.layer_norm(y, y.shape[-1:], weight, bias, epsilon)


def _embedding(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of the table; NaN for an id outside it, as by the kernel."""
    inside = (ids >= 0) & (ids < a.shape[1])
    rows = a[:, ids.where(inside, 0)]  # (r, T, d / n)
    y = torch.einsum("rtj,rn->tjn", rows, b[:, 0]).flatten(1)
    return y.where(inside[:, None], torch.nan)


def _block_backward(
    dy: Tensor,
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of a block's two products, by autograd."""
    leaves: list[Any] = [t if t is None else t.detach() for t in (x, *up, *down[:2])]
    wanted = [i for i, n in enumerate(needed) if n and leaves[i] is not None]
    found = [x.new_empty(0) for _ in leaves]
    with torch.enable_grad():
        for i in wanted:
            leaves[i] = leaves[i].requires_grad_()
        x, a1, b1, bias1, a2, b2 = leaves
        hidden = eager.plain_matmul(x, (a1, b1), bias1, activation)
        y = eager.plain_matmul(hidden, (a2, b2))
        grads = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = grad
    return tuple(found)


def compare(function: str, factors: Sequence[Tensor], args: tuple[Any, ...], results: Any) -> None:
    """Require that results are eager's in float64, within the error that rounding explains.

    Raises:
        AssertionError: With the result's number, the largest error and where it is.
    """
    x = args[0]
    expected = _by_eager(function)(*_wide(args))
    pairs = zip(_listed(results), _listed(expected), strict=True)
    terms = sum(f.shape[0] * f.shape[-1] for f in factors)
    tokens = x.numel() // max(x.shape[-1], 1)
    exact = x.dtype != torch.float32 or precision(x.dtype) == "ieee"
    for i, (got, other) in enumerate(pairs):
        # A parameter's gradient is a sum over all tokens, one of x over the factors' rows.
        n = terms
        if function.endswith("backward"):
            n = sum(f.shape[0] * sum(f.shape[1:]) for f in factors) * (1 if i == 0 else 4 * tokens)
        n = max(n, 1)
        slack = 4 if exact else 4 * 2.0**13 / n**0.5  # tf32 rounds every term to 10 bits
        # Few entries may be small by chance: then the scale is that of their terms.
        scale = max(other.square().mean().sqrt().item(), 1.0) if other.numel() < 64 else None
        assert_close(f"result {i}", got.detach(), other, n, scale=scale, slack=slack)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return list(map(_wide, value))
    return value


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
