"""Modules whose weight is a sum of Kronecker products; conversion from and to dense ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from kron_kernels.backends import eager
from kron_kernels.calls import unobserved
from kron_kernels.checks import Activation, check_activation, check_tensor
from kron_kernels.decompose import dense_weight, nearest_kronecker, nearest_kronecker_sum
from kron_kernels.dispatch import BackendName
from kron_kernels.functional import (
    kron_cross_entropy,
    kron_embedding,
    kron_feed_forward,
    kron_matmul,
)
from kron_kernels.shapes import (
    KronShape,
    check_integer,
    check_number,
    naming,
    nearest_divisors,
    parts_of,
)

Module = TypeVar("Module", bound=nn.Module)


class KroneckerLinear(nn.Module):
    """``y = x (Σ_k A_k ⊗ B_k)ᵀ + bias``, a drop-in for ``nn.Linear(in_features, out_features)``.

    The factors are the parameters ``a (rank, m1, n1)`` and ``b (rank, m2, n2)``.

    Args:
        in_features: Size of x's last dimension, ``n1 * n2``.
        out_features: Size of y's last dimension, ``m1 * m2``.
        a_shape: ``(m1, n1)``, the shape of the left factor; the right one follows.
        rank: Kronecker rank, the number of terms in the sum.
        bias: Whether to learn an additive bias of shape ``(out_features,)``.
        backend: Passed to ``kron_matmul``.

    Raises:
        ValueError: If ``a_shape`` does not divide ``(out_features, in_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        a_shape: tuple[int, int],
        rank: int = 1,
        bias: bool = True,
        *,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        s = KronShape.split(out_features, in_features, a_shape, rank)
        self.in_features, self.out_features, self.rank = s.in_features, s.out_features, s.rank
        self.backend = backend
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(s.rank, s.m1, s.n1, **new))
        self.b = nn.Parameter(torch.empty(s.rank, s.m2, s.n2, **new))
        self.bias = nn.Parameter(torch.empty(s.out_features, **new)) if bias else None
        if not self.a.is_meta:  # where drawing takes PyTorch 5 ms, and draws nothing
            self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors for a standard deviation ``std`` of W's entries; zero the bias.

        The default, ``1 / sqrt(3 * in_features)``, is that of ``nn.Linear``.
        """
        std = 1 / math.sqrt(3 * self.in_features) if std is None else check_number("std", std)
        # An entry of W is a sum of `rank` products of two independent normals.
        factor_std = math.sqrt(std) / self.rank**0.25
        nn.init.normal_(self.a, std=factor_std)
        nn.init.normal_(self.b, std=factor_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def shape(self) -> KronShape:
        """Sizes and costs of the factors."""
        return KronShape.of(self.a, self.b)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        a_shape: tuple[int, int],
        rank: int = 1,
        *,
        second_moment: Tensor | None = None,
        backend: BackendName = "auto",
    ) -> Self:
        """The layer nearest to ``linear``, on its device and in its dtype, with its bias.

        Factors and bias have the ``requires_grad`` of its weight and bias.

        Args:
            linear: The dense layer; left as it is.
            a_shape: ``(m1, n1)``, the shape of the left factor.
            rank: Kronecker rank.
            second_moment: ``E[x xᵀ]`` of the layer's inputs, ``(in_features, in_features)``; the
                layer is then nearest in its outputs instead of in its weight.
            backend: Passed to ``kron_matmul``.
        """
        weight = linear.weight
        a, b = nearest_kronecker(weight, a_shape, rank, second_moment=second_moment)
        layer = nn.utils.skip_init(
            cls,
            linear.in_features,
            linear.out_features,
            a_shape,
            rank,
            linear.bias is not None,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        a, b = (as_trainable(t, weight) for t in (a, b))
        return filled(layer, like=linear, a=a, b=b, bias=linear.bias)

    def to_linear(self) -> nn.Linear:
        """The equivalent dense layer, for export and merging.

        Its weight is frozen if all factors are, and its bias if the layer's is.

        Raises:
            ValueError: If the layer has its own ``forward``. A subclass with one may override
                this method as well.
        """
        _check_forward(self, "to_linear")
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.a.device,
            dtype=self.a.dtype,
        )
        weight = as_trainable(dense_weight(self.a, self.b), self.a, self.b)
        return filled(linear, like=self, weight=weight, bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, in_features)`` to ``y (…, out_features)``."""
        return kron_matmul(x, self.a, self.b, bias=self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"in_features={s.n1}*{s.n2}, out_features={s.m1}*{s.m2}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


_linear_forward = KroneckerLinear.forward


def readable(layer: nn.Module) -> TypeGuard[KroneckerLinear]:
    """Whether a layer's factors may be read instead of calling it.

    A subclass may compute something else, and so may a patched class.
    """
    return (
        type(layer) is KroneckerLinear
        and KroneckerLinear.forward is _linear_forward
        and unobserved(layer)
    )


def has_own_forward(layer: nn.Module, method: str) -> bool:
    """Whether ``method`` does not know the layer's ``forward``.

    It may be set on the layer itself, or by a subclass that does not override ``method``.
    """
    classes = type(layer).__mro__
    forward, dense = (
        next(i for i, c in enumerate(classes) if name in vars(c)) for name in ("forward", method)
    )
    return forward < dense or "forward" in vars(layer)


def _check_forward(layer: nn.Module, method: str) -> None:
    if has_own_forward(layer, method):
        raise ValueError(
            f"{type(layer).__name__} has its own forward, so its dense layer is unknown; "
            f"remove it, or override {method} in its class."
        )


class KroneckerSum(nn.Module):
    """``y = x (Σ_p W_p)ᵀ + bias``, each W_p the weight of a ``KroneckerLinear`` of its own shape.

    For example one Kronecker product and a low-rank part, ``a_shape = (out_features, 1)``.

    Args:
        in_features: Size of x's last dimension.
        out_features: Size of y's last dimension.
        parts: ``(a_shape, rank)`` of each part, as for ``KroneckerLinear``; one or more.
        bias: Whether to learn an additive bias of shape ``(out_features,)``.
        backend: Passed to ``kron_matmul``.

    Raises:
        ValueError: If there is no part, or an ``a_shape`` does not divide the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Sequence[tuple[tuple[int, int], int]],
        bias: bool = True,
        *,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.parts: Sequence[KroneckerLinear] = nn.ModuleList(  # type: ignore[assignment]
            KroneckerLinear(in_features, out_features, shape, rank, False, backend=backend, **new)
            for shape, rank in parts_of(parts)
        )
        first = self.parts[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.bias = nn.Parameter(torch.empty(self.out_features, **new)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors for a standard deviation ``std`` of W's entries; zero the bias.

        The default, ``1 / sqrt(3 * in_features)``, is that of ``nn.Linear``. Each part has an
        equal share of the variance.
        """
        std = 1 / math.sqrt(3 * self.in_features) if std is None else check_number("std", std)
        for part in self.parts:
            part.reset_parameters(std / math.sqrt(len(self.parts)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def shapes(self) -> tuple[KronShape, ...]:
        """Sizes and costs of each part's factors."""
        return tuple(part.shape for part in self.parts)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        parts: Sequence[tuple[tuple[int, int], int]],
        *,
        second_moment: Tensor | None = None,
        backend: BackendName = "auto",
    ) -> Self:
        """A sum near ``linear``, on its device and in its dtype, with its bias.

        Factors and bias have the ``requires_grad`` of its weight and bias.

        Args:
            linear: The dense layer; left as it is.
            parts: ``(a_shape, rank)`` of each part, fitted in this order.
            second_moment: ``E[x xᵀ]`` of the layer's inputs, ``(in_features, in_features)``; the
                sum is then near in its outputs instead of in its weight.
            backend: Passed to ``kron_matmul``.
        """
        weight, parts = linear.weight, parts_of(parts)
        fitted = nearest_kronecker_sum(weight, parts, second_moment=second_moment)
        layer = nn.utils.skip_init(
            cls,
            linear.in_features,
            linear.out_features,
            parts,
            linear.bias is not None,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        for part, factors in zip(layer.parts, fitted, strict=True):
            a, b = (as_trainable(t, weight) for t in factors)
            filled(part, like=linear, a=a, b=b)
        return filled(layer, like=linear, bias=linear.bias)

    def to_linear(self) -> nn.Linear:
        """The equivalent dense layer, for export and merging.

        Its weight is frozen if all factors are, and its bias if all biases are.

        Raises:
            ValueError: If the layer or a part has its own ``forward``, see
                ``KroneckerLinear.to_linear``, or a part is no longer a ``KroneckerLinear``.
        """
        _check_forward(self, "to_linear")
        dense = []
        for i, part in enumerate(self.parts):
            if not isinstance(part, KroneckerLinear):
                raise ValueError(
                    f"parts.{i} is a {type(part).__name__}, but must be a KroneckerLinear for the "
                    "sum to be made dense; put one in its place."
                )
            with naming(f"parts.{i}"):
                dense.append(part.to_linear())
        weights = [layer.weight for layer in dense]
        # Users may have given a part a bias.
        biases = [t for t in (self.bias, *(layer.bias for layer in dense)) if t is not None]
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bool(biases),
            device=weights[0].device,
            dtype=weights[0].dtype,
        )
        weight = as_trainable(sum(weights[1:], weights[0]), *weights)
        bias = as_trainable(sum(biases[1:], biases[0]), *biases) if biases else None
        return filled(linear, like=self, weight=weight, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, in_features)`` to ``y (…, out_features)``."""
        # Each part adds the sum of those before it. Parts that must be called come first, then
        # low-rank ones (two GEMMs and a pass for the sum), then those whose kernel adds the sum
        # before it stores y.
        read: list[KroneckerLinear] = []
        y: Any = None
        for part in self.parts:
            if readable(part) and part.bias is None:
                read.append(part)
            else:
                y = part(x) if y is None else y + part(x)
        if not read:
            return y if self.bias is None else y + self.bias.to(y.dtype)
        *first, last = sorted(read, key=lambda part: not part.shape.is_low_rank)
        for part in first:
            y = kron_matmul(x, part.a, part.b, residual=y, backend=part.backend)
        return kron_matmul(x, last.a, last.b, bias=self.bias, residual=y, backend=last.backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class KroneckerFeedForward(nn.Module):
    """``down(act(up(x)))`` without storing the hidden vector, see ``kron_feed_forward``.

    The layers are computed one by one if they have different backends, and called if one has a hook
    or is not a plain ``KroneckerLinear`` any more, as with adapters.

    Args:
        up: From the model's width to the hidden one.
        down: From the hidden width back; ``down.in_features == up.out_features``.
        activation: Between the two, as for ``kron_matmul``.
        backend: Passed to ``kron_feed_forward``. A layer keeps its own backend if that is not
            ``"auto"``, or if the layer is called.

    Raises:
        ValueError: If the layers' sizes do not match, or the activation is unknown.
    """

    def __init__(
        self,
        up: KroneckerLinear,
        down: KroneckerLinear,
        activation: Activation | None = "gelu",
        *,
        backend: BackendName = "auto",
    ):
        super().__init__()
        check_activation(activation)
        if up.out_features != down.in_features:
            raise ValueError(
                f"down takes {down.in_features} features, but up gives {up.out_features}; "
                "they must be equal."
            )
        self.up, self.down, self.activation, self.backend = up, down, activation, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x (…, up.in_features)`` to ``y (…, down.out_features)``; the residual has y's shape."""
        up, down = self.up, self.down
        if not (readable(up) and readable(down)):
            y = down(eager.epilogue(up(x), self.activation, None))
            if residual is not None:
                check_tensor("residual", residual)
                if residual.shape != y.shape:
                    raise ValueError(
                        f"residual must have y's shape {tuple(y.shape)}, "
                        f"got {tuple(residual.shape)}."
                    )
            return eager.epilogue(y, None, residual)
        first, second = (
            self.backend if layer.backend == "auto" else layer.backend for layer in (up, down)
        )
        if first != second:
            hidden = kron_matmul(
                x, up.a, up.b, bias=up.bias, activation=self.activation, backend=first
            )
            return kron_matmul(
                hidden, down.a, down.b, bias=down.bias, residual=residual, backend=second
            )
        return kron_feed_forward(
            x,
            (up.a, up.b, up.bias),
            (down.a, down.b, down.bias),
            activation=self.activation,
            residual=residual,
            backend=first,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class KroneckerEmbedding(nn.Module):
    """Lookup in ``E = Σ_k A_k ⊗ b_k`` without forming E: row i is ``Σ_k A_k[i] ⊗ b_k``.

    The factors are the parameters ``a (rank, num_embeddings, embedding_dim / b_size)`` and
    ``b (rank, 1, b_size)``. They have the shapes of a ``KroneckerLinear`` of weight E, and a tied
    decoder can share them (KroneckerBERT section 3.3; ``decode``).

    Args:
        num_embeddings: Rows of E.
        embedding_dim: Columns of E.
        b_size: Length of the row vector b; E has ``b_size`` times fewer parameters.
        rank: Kronecker rank.
        padding_idx: This row of A starts at zero and gets no gradient from the lookup. (b still
            does if the row is not zero, as in BERT.)

    Raises:
        ValueError: If ``b_size`` does not divide ``embedding_dim``, or an argument is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        b_size: int,
        rank: int = 1,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_embeddings = check_integer("num_embeddings", num_embeddings)
        embedding_dim = check_integer("embedding_dim", embedding_dim)
        b_size = check_integer("b_size", b_size, None)
        if b_size < 1 or embedding_dim % b_size:
            raise ValueError(
                f"embedding_dim = {embedding_dim} is not divisible by b_size = {b_size}; "
                f"{nearest_divisors(embedding_dim, b_size)}."
            )
        columns = embedding_dim // b_size
        s = KronShape.split(num_embeddings, embedding_dim, (num_embeddings, columns), rank)
        if padding_idx is not None:
            padding_idx = check_integer("padding_idx", padding_idx, None)
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"padding_idx = {padding_idx} is not one of the {num_embeddings} rows; "
                    f"use 0 to {num_embeddings - 1}, or None."
                )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rank, self.padding_idx = s.rank, padding_idx
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(s.rank, num_embeddings, columns, **new))
        self.b = nn.Parameter(torch.empty(s.rank, 1, b_size, **new))
        self.reset_parameters()

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw the factors for a standard deviation ``std`` of E's entries."""
        factor_std = math.sqrt(check_number("std", std)) / self.rank**0.25
        nn.init.normal_(self.a, std=factor_std)
        nn.init.normal_(self.b, std=factor_std)
        if self.padding_idx is not None:
            nn.init.zeros_(self.a[:, self.padding_idx])

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, b_size: int, rank: int = 1) -> Self:
        """The table nearest to ``embedding`` in the Frobenius norm, on its device, in its dtype.

        The factors have the ``requires_grad`` of its weight.

        Raises:
            ValueError: If the lookup does more than ``nn.Embedding``'s defaults (``max_norm``,
                ``scale_grad_by_freq``, ``sparse``), or ``b_size`` does not divide its width.
        """
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option):
                raise ValueError(
                    f"the embedding has {option} = {getattr(embedding, option)}, which a Kronecker "
                    "embedding does not support; set it to its default first."
                )
        weight = embedding.weight
        rows, dim = weight.shape
        table = nn.utils.skip_init(
            cls,
            rows,
            dim,
            b_size,
            rank,
            embedding.padding_idx,
            device=weight.device,
            dtype=weight.dtype,
        )
        fitted = nearest_kronecker(weight, (rows, dim // b_size), rank)
        a, b = (as_trainable(t, weight) for t in fitted)
        return filled(table, like=embedding, a=a, b=b)

    def to_embedding(self) -> nn.Embedding:
        """The dense table with the same rows, frozen if both factors are.

        Raises:
            ValueError: If the table has its own ``forward``. A subclass with one may override
                this method as well.
        """
        _check_forward(self, "to_embedding")
        embedding = nn.utils.skip_init(
            nn.Embedding,
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.a.device,
            dtype=self.a.dtype,
        )
        weight = as_trainable(dense_weight(self.a, self.b), self.a, self.b)
        return filled(embedding, like=self, weight=weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of E: ids ``(…)`` to ``(…, embedding_dim)``."""
        return kron_embedding(ids, self.a, self.b, self.padding_idx)

    def decode(self, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """Exact tied decoder ``h Eᵀ + bias``, ``b_size`` times cheaper than with E formed.

        Args:
            h: Hidden states of shape ``(…, embedding_dim)``.
            bias: Shape ``(num_embeddings,)``.

        Returns:
            Logits of shape ``(…, num_embeddings)``.
        """
        return kron_matmul(h, self.a, self.b, bias=bias)

    def cross_entropy(self, h: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.cross_entropy(decode(h, bias), labels)`` without storing all logits.

        See ``kron_kernels.functional.kron_cross_entropy``.
        """
        return kron_cross_entropy(h, self.a, self.b, labels, bias=bias)

    def extra_repr(self) -> str:
        _, rows, columns = self.a.shape
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{rows}, {columns}*{self.b.shape[-1]}, rank={self.rank}{padding}"


def as_trainable(t: Tensor, *sources: Tensor) -> Tensor:
    """``t``, detached; it requires a gradient if one of the sources does."""
    return t.detach().requires_grad_(any(source.requires_grad for source in sources))


@torch.no_grad()
def filled(module: Module, like: nn.Module, **values: Tensor | None) -> Module:
    """Copy these values, and their ``requires_grad``, to a module in the mode of ``like``."""
    for name, value in values.items():
        if value is not None:
            getattr(module, name).copy_(value).requires_grad_(value.requires_grad)
    return module.train(like.training)
