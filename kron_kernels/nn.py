"""Modules whose weight is a sum of Kronecker products, and the way to them from dense ones."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.checks import Activation
from kron_kernels.decompose import dense_weight, nearest_kronecker, nearest_kronecker_sum
from kron_kernels.embedding import kron_cross_entropy, kron_embedding
from kron_kernels.functional import Backend, kron_matmul
from kron_kernels.fused import kron_feed_forward
from kron_kernels.shapes import KronShape


class KroneckerLinear(nn.Module):
    """``y = x (Σ_k A_k ⊗ B_k)ᵀ + bias``, a drop-in for ``nn.Linear(in_features, out_features)``.

    The factors are the parameters ``a (rank, m1, n1)`` and ``b (rank, m2, n2)``.

    Args:
        in_features: Size of x's last dimension, ``n1 * n2``.
        out_features: Size of y's last dimension, ``m1 * m2``.
        a_shape: ``(m1, n1)``, the shape of the left factor; the right one follows.
        rank: Kronecker rank, the number of terms in the sum.
        bias: Whether to learn an additive bias of shape ``(out_features,)``.
        backend: Passed to :func:`kron_kernels.kron_matmul`.

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
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        s = KronShape.split(out_features, in_features, a_shape, rank)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.backend = backend
        new = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(rank, s.m1, s.n1, **new))
        self.b = nn.Parameter(torch.empty(rank, s.m2, s.n2, **new))
        self.bias = nn.Parameter(torch.empty(out_features, **new)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors so that the entries of W have this standard deviation; zero the bias.

        The default, ``1 / sqrt(3 * in_features)``, is that of ``nn.Linear``.
        """
        std = 1 / math.sqrt(3 * self.in_features) if std is None else std
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
        rescale: bool = False,
        backend: Backend = "auto",
    ) -> KroneckerLinear:
        """The layer nearest to ``linear``, on its device and in its dtype, with its bias.

        Args:
            linear: The dense layer; left as it is.
            a_shape: ``(m1, n1)``, the shape of the left factor.
            rank: Kronecker rank.
            second_moment: ``E[x xᵀ]`` of the layer's inputs, ``(in_features, in_features)``: the
                layer nearest in its outputs instead of in its weights.
            rescale: Keep the weight's norm, see :func:`kron_kernels.nearest_kronecker`.
            backend: Passed to :func:`kron_kernels.kron_matmul`.
        """
        weight = linear.weight
        a, b = nearest_kronecker(
            weight, a_shape, rank, second_moment=second_moment, rescale=rescale
        )
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
        return _filled(layer, like=linear, a=a, b=b, bias=linear.bias)

    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function: an escape hatch for export and merging."""
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.a.device,
            dtype=self.a.dtype,
        )
        return _filled(linear, like=self, weight=dense_weight(self.a, self.b), bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return kron_matmul(x, self.a, self.b, bias=self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"in_features={s.n1}*{s.n2}, out_features={s.m1}*{s.m2}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class KroneckerSum(nn.Module):
    """``y = x (Σ_p W_p)ᵀ + bias``, W_p the weight of a :class:`KroneckerLinear` of its own shape.

    Such as one Kronecker product and a low-rank part, ``a_shape = (out_features, 1)``.

    Args:
        in_features: Size of x's last dimension.
        out_features: Size of y's last dimension.
        parts: ``(a_shape, rank)`` of each part, as for :class:`KroneckerLinear`; one or more.
        bias: Whether to learn an additive bias of shape ``(out_features,)``.
        backend: Passed to :func:`kron_kernels.kron_matmul`.

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
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not parts:
            raise ValueError("parts is empty, but a sum needs at least one (a_shape, rank).")
        self.in_features, self.out_features = in_features, out_features
        new = {"device": device, "dtype": dtype}
        self.parts = nn.ModuleList(
            KroneckerLinear(in_features, out_features, shape, rank, False, backend=backend, **new)
            for shape, rank in parts
        )
        self.bias = nn.Parameter(torch.empty(out_features, **new)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors so that the entries of W have this standard deviation; zero the bias.

        The default, ``1 / sqrt(3 * in_features)``, is that of ``nn.Linear``. Each part has an
        equal share of the variance.
        """
        std = 1 / math.sqrt(3 * self.in_features) if std is None else std
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
        rescale: bool = False,
        backend: Backend = "auto",
    ) -> KroneckerSum:
        """The sum near ``linear``, on its device and in its dtype, with its bias.

        Args:
            linear: The dense layer; left as it is.
            parts: ``(a_shape, rank)`` of each part, fitted in this order.
            second_moment: ``E[x xᵀ]`` of the layer's inputs, ``(in_features, in_features)``: near
                in its outputs instead of in its weights.
            rescale: Keep the weight's norm, see :func:`kron_kernels.nearest_kronecker_sum`.
            backend: Passed to :func:`kron_kernels.kron_matmul`.
        """
        weight = linear.weight
        fitted = nearest_kronecker_sum(weight, parts, second_moment=second_moment, rescale=rescale)
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
        for part, (a, b) in zip(layer.parts, fitted, strict=True):
            _filled(part, like=linear, a=a, b=b)
        return _filled(layer, like=linear, bias=linear.bias)

    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function: an escape hatch for export and merging."""
        first, *others = self.parts
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=first.a.device,
            dtype=first.a.dtype,
        )
        weight = sum((dense_weight(p.a, p.b) for p in others), dense_weight(first.a, first.b))
        return _filled(linear, like=self, weight=weight, bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Each part adds the sum of those before it. A compiled kernel does so while it holds y, the
        # two GEMMs of a low-rank part in a pass of its own: those come first.
        *first, last = sorted(self.parts, key=lambda part: not part.shape.is_low_rank)
        y = None
        for part in first:
            y = kron_matmul(x, part.a, part.b, residual=y, backend=part.backend)
        return kron_matmul(x, last.a, last.b, bias=self.bias, residual=y, backend=last.backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class KroneckerFeedForward(nn.Module):
    """``down(act(up(x)))`` without storing the hidden vector, see :func:`kron_feed_forward`.

    Args:
        up: From the model's width to the hidden one.
        down: And back; its ``in_features`` are up's ``out_features``.
        activation: Between the two, as for :func:`kron_kernels.kron_matmul`.
        backend: Passed to :func:`kron_kernels.kron_feed_forward`.

    Raises:
        ValueError: If the layers do not fit one another.
    """

    def __init__(
        self,
        up: KroneckerLinear,
        down: KroneckerLinear,
        activation: Activation = "gelu",
        *,
        backend: Backend = "auto",
    ):
        super().__init__()
        if up.out_features != down.in_features:
            raise ValueError(
                f"down takes {down.in_features} features, but up gives {up.out_features}; "
                "they must be equal."
            )
        self.up, self.down, self.activation, self.backend = up, down, activation, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return kron_feed_forward(
            x,
            (self.up.a, self.up.b, self.up.bias),
            (self.down.a, self.down.b, self.down.bias),
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class KroneckerEmbedding(nn.Module):
    """Row i of ``E = Σ_k A_k ⊗ b_k`` is ``Σ_k A_k[i] ⊗ b_k``: a lookup that never forms E.

    The factors are the parameters ``a (rank, num_embeddings, embedding_dim / b_size)`` and
    ``b (rank, 1, b_size)``, the shapes of a :class:`KroneckerLinear` of weight E, so that a tied
    decoder shares them (KroneckerBERT section 3.3; :meth:`decode`).

    Args:
        num_embeddings: Rows of E.
        embedding_dim: Columns of E.
        b_size: Length of the row vector b; E has ``b_size`` times fewer parameters.
        rank: Kronecker rank.
        padding_idx: This row of A starts at zero and receives no gradient from the lookup. (If it
            is not zero, as in BERT, b still does.)

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
        if b_size < 1 or embedding_dim % b_size:
            divisors = [d for d in range(1, embedding_dim + 1) if embedding_dim % d == 0]
            raise ValueError(
                f"embedding_dim = {embedding_dim} is not divisible by b_size = {b_size}; "
                f"use one of {divisors}."
            )
        KronShape.split(
            num_embeddings, embedding_dim, (num_embeddings, embedding_dim // b_size), rank
        )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx = {padding_idx} is not one of the {num_embeddings} rows; "
                f"use 0 to {num_embeddings - 1}, or None."
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rank, self.padding_idx = rank, padding_idx
        new = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(rank, num_embeddings, embedding_dim // b_size, **new))
        self.b = nn.Parameter(torch.empty(rank, 1, b_size, **new))
        self.reset_parameters()

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw the factors so that the entries of E have this standard deviation."""
        factor_std = math.sqrt(std) / self.rank**0.25
        nn.init.normal_(self.a, std=factor_std)
        nn.init.normal_(self.b, std=factor_std)
        if self.padding_idx is not None:
            nn.init.zeros_(self.a[:, self.padding_idx])

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, b_size: int, rank: int = 1, *, rescale: bool = False
    ) -> KroneckerEmbedding:
        """The table nearest to ``embedding`` in the Frobenius norm, on its device, in its dtype.

        Raises:
            ValueError: If the lookup does more than ``nn.Embedding``'s defaults (``max_norm``,
                ``scale_grad_by_freq``, ``sparse``), or ``b_size`` does not divide its width.
        """
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option):
                raise ValueError(
                    f"the embedding has {option} = {getattr(embedding, option)}, which a Kronecker "
                    "embedding does not do; set it to its default first."
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
        a, b = nearest_kronecker(weight, (rows, dim // b_size), rank, rescale=rescale)
        return _filled(table, like=embedding, a=a, b=b)

    def to_embedding(self) -> nn.Embedding:
        """The dense table of the same rows."""
        embedding = nn.utils.skip_init(
            nn.Embedding,
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.a.device,
            dtype=self.a.dtype,
        )
        return _filled(embedding, like=self, weight=dense_weight(self.a, self.b))

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
        """``F.cross_entropy(decode(h, bias), labels)`` without all logits at once.

        See :func:`kron_kernels.embedding.kron_cross_entropy`.
        """
        return kron_cross_entropy(h, self.a, self.b, labels, bias=bias)

    def extra_repr(self) -> str:
        _, rows, columns = self.a.shape
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{rows}, {columns}*{self.b.shape[-1]}, rank={self.rank}{padding}"


# --- layers of other people's modules

# The terms of a layer's weight, {"a_shape": [m1, n1], "rank": r} each; None is a dense layer.
Entry = list[dict[str, Any]]
Terms = tuple[tuple[tuple[int, int], int], ...]  # the same, ((m1, n1), rank) each; () is dense
Dense = nn.Linear | nn.Embedding  # or transformers' Conv1D


def factorise_(
    module: nn.Module,
    factors: Mapping[str, Entry | dict[str, Any] | None],
    *,
    second_moments: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace dense layers of a module by the nearest factorised ones, in place.

    ``nn.Linear`` and transformers' ``Conv1D`` become :class:`KroneckerLinear`, or
    :class:`KroneckerSum` of several terms, ``nn.Embedding`` becomes :class:`KroneckerEmbedding`. A
    layer that stands in several places is replaced in all of them. Hooks on a layer are lost.

    Args:
        module: Any module, or such a layer itself.
        factors: From a layer's path, ``""`` for ``module`` itself, to its terms,
            ``[{"a_shape": [m1, n1], "rank": r}, …]`` (a single one needs no list), or to None,
            which leaves it dense; such as :attr:`kron_kernels.plan.Plan.factors`.
        second_moments: ``E[x xᵀ]`` of a layer's inputs by its path: nearest in its outputs.

    Returns:
        ``module``, or the layer that stands for it.

    Raises:
        ValueError: If a path leads to no layer that can be replaced, or its terms do not fit.
    """
    moments = second_moments or {}
    return swap_(module, factors, lambda path, *what: _nearest_layer(*what, moments.get(path)))


def densify_(module: nn.Module) -> nn.Module:
    """Replace factorised layers of a module by the dense ones of the same function, in place.

    Args:
        module: Any module, or such a layer itself.

    Returns:
        ``module``, or the dense layer that stands for it.

    Raises:
        ValueError: If it has a :class:`KroneckerFeedForward`, which needs its layers' factors.
    """
    found = {}

    def visit(path: str, m: nn.Module) -> None:
        if isinstance(m, KroneckerLinear | KroneckerSum | KroneckerEmbedding):
            found[path] = m
            return
        if isinstance(m, KroneckerFeedForward):
            raise ValueError(
                f"{path or 'the module'} is a KroneckerFeedForward, which reads the factors of its "
                "layers; replace it by its up, activation and down first."
            )
        for name, child in m.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", module)
    for m in found.values():
        table = isinstance(m, KroneckerEmbedding)
        module = _replaced(module, m, m.to_embedding() if table else m.to_linear())
    return module


def factorisable(
    module: nn.Module, allow_tied: bool = False
) -> dict[str, tuple[Dense, str | None]]:
    """The dense layers by their first path, and why one cannot be replaced, or None if it can."""
    owners = defaultdict(list)
    for path, m in module.named_modules():
        for p in m._parameters.values():
            owners[id(p)].append(path)
    layers = {}
    for path, m in module.named_modules():
        if isinstance(m, nn.Linear | nn.Embedding) or is_conv1d(m):
            parent = module.get_submodule(path.rpartition(".")[0]) if path else None
            others = [o for o in owners[id(m._parameters.get("weight"))] if o != path]
            layers[path] = m, _why_not(m, parent, [] if allow_tied else others)
    return layers


def _why_not(m: Dense, parent: nn.Module | None, tied: list[str]) -> str | None:
    options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(m, o, None)]
    plain = (
        next((c for c in (nn.Linear, nn.Embedding) if isinstance(m, c)), type(m)).forward
        is type(m).forward
    )
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"nn.{type(parent).__name__} takes its weight without calling it"
    if not plain:
        return f"its class, {type(m).__name__}, has a forward of its own"
    if not isinstance(m._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization"
    if not m.weight.is_floating_point():
        return f"its weight is {m.weight.dtype}, not floating point"
    if tied:
        return f"its weight is tied to that of {', '.join(tied)}"
    if options:
        return f"it has {options[0]}, which a Kronecker embedding does not do"
    return None


def is_conv1d(m: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer whose weight is ``(in, out)``."""
    return type(m).__name__ == "Conv1D" and getattr(m, "weight", torch.empty(0)).ndim == 2


def dense_of(layer: Dense) -> Tensor:
    """The weight as ``(out_features, in_features)`` or ``(num_embeddings, embedding_dim)``."""
    return layer.weight.mT if is_conv1d(layer) else layer.weight


def terms_of(entry: Entry | Mapping[str, Any] | None, what: str = "an entry") -> Terms:
    """An entry's terms, ``()`` for a dense layer.

    Raises:
        ValueError: If it is no such entry.
    """
    if entry is None:
        return ()
    terms = []
    for term in [entry] if isinstance(entry, Mapping) else entry:
        shape = term.get("a_shape") if isinstance(term, Mapping) else None
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != 2
            or not term.keys() <= {"a_shape", "rank"}
            or any(type(value) is not int for value in (*shape, term.get("rank", 1)))
        ):
            raise ValueError(
                f'{what} = {entry!r} must look like {{"a_shape": [16, 2], "rank": 1}}, be a list '
                "of such, or None for a dense layer."
            )
        terms.append(((shape[0], shape[1]), term.get("rank", 1)))
    if not terms:
        raise ValueError(f"{what} is an empty list; write None for a dense layer.")
    return tuple(terms)


def shapes_of(layer: Dense, terms: Terms, what: str) -> list[KronShape]:
    """The shapes of the terms of this layer's weight.

    Raises:
        ValueError: If they do not fit it; ``what`` begins the message.
    """
    rows, columns = dense_of(layer).shape
    try:
        shapes = [KronShape.split(rows, columns, a_shape, rank) for a_shape, rank in terms]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    for s in shapes:
        most = min(s.m1 * s.n1, s.m2 * s.n2)
        if s.rank > most:
            raise ValueError(
                f"{what}: rank = {s.rank}, but A {s.m1}x{s.n1} and B {s.m2}x{s.n2} already "
                f"represent every weight with {most} terms; use rank <= {most}."
            )
    if isinstance(layer, nn.Embedding) and (len(shapes) > 1 or shapes[0].m2 != 1):
        raise ValueError(
            f"{what}: an embedding is one A ⊗ b with a row of A for each of its {rows} rows; use "
            f"a_shape = [{rows}, {columns} / b_size]."
        )
    return shapes


def swap_(
    module: nn.Module,
    factors: Mapping[str, Entry | dict[str, Any] | None],
    make: Callable[[str, Dense, Terms], nn.Module],
) -> nn.Module:
    """``factorise_`` with layers from ``make(path, layer, terms)``."""
    layers, new = factorisable(module), {}
    for path, entry in factors.items():
        terms = terms_of(entry, f"factors[{path!r}]")
        if not terms:
            continue
        if path not in layers:
            raise ValueError(f"factors has {path!r}, {no_such_layer(path, layers)}")
        layer, reason = layers[path]
        if reason:
            raise ValueError(f"{path!r} cannot be factorised: {reason}; leave it out.")
        shapes_of(layer, terms, f"factors[{path!r}]")
        new[path] = layer, make(path, layer, terms)
    for layer, other in new.values():
        module = _replaced(module, layer, other)
    return module


def no_such_layer(name: str, paths: Mapping[str, Any]) -> str:
    """The end of a sentence about a name that fits no layer."""
    nearest = difflib.get_close_matches(name, [*paths], n=3, cutoff=0.3) or [*paths][:3]
    return (
        "which is no layer that could be factorised; "
        f"the nearest are {', '.join(nearest) or 'none: it has no nn.Linear or nn.Embedding'}."
    )


def random_layer(path: str, layer: Dense, terms: Terms) -> nn.Module:
    """A factorised layer of the sizes, dtype and device of ``layer``, with random factors."""
    weight = layer.weight
    new = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Embedding):
        ((_, columns), rank), *_ = terms
        rows, dim = weight.shape
        return KroneckerEmbedding(rows, dim, dim // columns, rank, layer.padding_idx, **new)
    (rows, columns), bias = dense_of(layer).shape, layer.bias is not None
    if len(terms) == 1:
        return KroneckerLinear(columns, rows, *terms[0], bias, **new)
    return KroneckerSum(columns, rows, terms, bias, **new)


def _nearest_layer(layer: Dense, terms: Terms, second_moment: Tensor | None) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        ((_, columns), rank), *_ = terms
        return KroneckerEmbedding.from_embedding(layer, layer.embedding_dim // columns, rank)
    if is_conv1d(layer):
        layer = _as_linear(layer)
    if len(terms) == 1:
        return KroneckerLinear.from_linear(layer, *terms[0], second_moment=second_moment)
    return KroneckerSum.from_linear(layer, terms, second_moment=second_moment)


def _as_linear(conv: nn.Module) -> nn.Linear:
    weight, bias = dense_of(conv), conv.bias
    rows, columns = weight.shape
    new = {"device": weight.device, "dtype": weight.dtype}
    linear = nn.utils.skip_init(nn.Linear, columns, rows, bias is not None, **new)
    return _filled(linear, like=conv, weight=weight, bias=bias)


def _replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The module with ``new`` wherever ``old`` was."""
    for parent, name in [*_places(module, old)]:
        parent._modules[name] = new
    return new if module is old else module


def _places(module: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in module.modules():
        for name, m in parent._modules.items():
            if m is child:
                yield parent, name


@torch.no_grad()
def _filled(module: nn.Module, like: nn.Module, **values: Tensor | None) -> nn.Module:
    """The module with these parameters, in the mode and as trainable as ``like``."""
    for name, value in values.items():
        if value is not None:
            getattr(module, name).copy_(value)
    trainable = any(p.requires_grad for p in like.parameters())
    return module.requires_grad_(trainable).train(like.training)
