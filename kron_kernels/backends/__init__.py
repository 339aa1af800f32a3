"""The backends by name, and the functions of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from kron_kernels.backends import cuda, eager, native
from kron_kernels.backends.guarded import CHECK, Guarded
from kron_kernels.backends.triton import launch
from kron_kernels.checks import Activation, Layer


class Backend(Protocol):
    """The functions of a backend's module.

    x is ``(…, n)`` with any number T of tokens, including 0, and ``(T, n)`` for gradients; factors
    are ``(r, m_i, n_i)``. All may have any strides.
    """

    def why_not(self, x: Tensor, *factors: Tensor) -> str | None:
        """Why it cannot serve a product of checked operands, as the end of a sentence, or None."""

    def describe(self, x: Tensor, *factors: Tensor) -> str:
        """How it computes a product that it can serve, in words."""

    def kron_matmul(
        self,
        x: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``act(x Wᵀ + bias) + residual``: ``(…, m)``."""

    def kron_matmul_backward(
        self, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """Gradients of x, a and b; an empty tensor for one that is not needed."""

    def kron_qkv(self, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """``x Wᵀ + bias`` of each of one to four layers."""

    def fuses(self, up: Layer, down: Layer) -> bool:
        """Whether it has a fused backward of a feed-forward block of these layers."""

    def kron_feed_forward(
        self,
        x: Tensor,
        up: Layer,
        activation: Activation,
        down: Layer,
        residual: Tensor | None,
    ) -> Tensor:
        """``down(act(up(x))) + residual``: ``(…, m)``, of any layers that it can serve."""

    def kron_feed_forward_backward(
        self,
        dy: Tensor,
        x: Tensor,
        up: Layer,
        activation: Activation,
        down: Layer,
        needed: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Gradients of x, up's a, b and bias, down's a and b, for layers that it fuses.

        An empty tensor for one that is not needed, or that is of no bias.
        """


BACKENDS: dict[str, Backend] = {
    "eager": eager,
    "native": native,
    "triton": launch,
    "cuda": cuda,
}
ON_GPU: dict[str, Any] = {"triton": launch, "cuda": cuda}


def or_eager(name: str) -> Any:
    """The name by which "auto" calls a backend; if kernels fail, eager takes over."""
    return f"{name} or eager" if name in ON_GPU else name


class _Computing(dict[str, Backend]):
    """What computes a call: a backend by its name, or by one that "auto" uses."""

    def __missing__(self, name: str) -> Backend:
        return BACKENDS[name]


COMPUTING = _Computing({or_eager(name): Guarded(name, ON_GPU[name], True) for name in ON_GPU})
EMBEDDING: Any = COMPUTING[or_eager("triton")]  # always chosen by itself, never by name
if CHECK:
    COMPUTING |= {name: Guarded(name, ON_GPU[name], False) for name in ON_GPU}
