"""Layers with int8 weights, for inference, in place of a module's layers, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kron_kernels.decompose import check_finite
from kron_kernels.factorise import replaced
from kron_kernels.factors import ends_of, names_layer, no_such_layer
from kron_kernels.functional import kron_matmul
from kron_kernels.int8 import Factor, Int8Factor, are_large, rounded_factors
from kron_kernels.modules import obstacles
from kron_kernels.nn import KroneckerEmbedding, KroneckerLinear, KroneckerSum, has_own_forward
from kron_kernels.shapes import naming

# The layers of Kronecker products, and the method that knows their forward.
_DENSIFIED: dict[type[nn.Module], str] = {
    KroneckerLinear: "to_linear",
    KroneckerSum: "to_linear",
    KroneckerEmbedding: "to_embedding",
}


class _Quantized(nn.Module):
    """``weight``, or ``a`` and ``b``: frozen parameters, or in int8 buffers.

    An int8 one has a second buffer of the same name and ``_scale``, which is float32 in every
    model. Buffers, because many programs take the dtype of the first parameter for the model's.
    """

    like: Tensor

    def _set(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        self.factor_names = tuple(names)
        for name, f in zip(names, rounded_factors(weights), strict=True):
            values, scale = f if isinstance(f, Int8Factor) else (f.detach(), None)
            if name == "weight":  # a matrix in a checkpoint, a single term in a product
                values, scale = values[0], scale if scale is None else scale[0]
            if scale is None:
                setattr(self, name, nn.Parameter(values, requires_grad=False))
            else:
                self.register_buffer(name, values)
                self.register_buffer(f"{name}_scale", scale)
        # Empty: it has the dtype that the floating-point form would have.
        self.register_buffer("like", weights[0].detach().new_empty(0), persistent=False)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """``(r, m, n)`` each; one for a dense weight."""
        found: list[Factor] = []
        for name in self.factor_names:
            values, scale = getattr(self, name), self._buffers.get(f"{name}_scale")
            if name == "weight":
                values, scale = values[None], scale if scale is None else scale[None]
            found.append(values if scale is None else Int8Factor(values, scale))
        return tuple(found)

    def _floating(self) -> dict[str, Tensor]:
        """The parameters in floating point, by name, in the dtype of the others."""
        dtype = self.like.dtype
        found = {
            name: f.dequantized(dtype) if isinstance(f, Int8Factor) else f.detach().clone()
            for name, f in zip(self.factor_names, self.factors, strict=True)
        }
        return {name: t[0] if name == "weight" else t for name, t in found.items()}

    def reset_parameters(self) -> None:
        """Zero everything: int8 weights are made from trained ones."""
        # By torch.nn.init, which transformers guards: loaded tensors are left alone.
        for t in (*self._parameters.values(), *self._buffers.values()):
            if t is not None:
                nn.init.zeros_(t)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # A scale moves with the module and keeps its dtype: in 16 bits a row would be off by 0.2 %.
        scales = [n for n, b in self._buffers.items() if n.endswith("_scale") and b is not None]
        for name in scales:
            self._buffers[name] = getattr(self, name).view(torch.int32)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in scales:
                self._buffers[name] = getattr(self, name).view(torch.float32)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        # The numbers of another dtype would be copied, and mean something else.
        wrong = [
            f"{prefix}{name} is {given.dtype}, but must be {own.dtype}; load it into the "
            "floating-point module, and quantise that."
            for name, own in (*self._parameters.items(), *self._buffers.items())
            if own is not None
            and name != "bias"
            and (given := state_dict.get(prefix + name)) is not None
            and given.dtype != own.dtype
            and not (own.is_floating_point() and given.is_floating_point() and "scale" not in name)
        ]
        if wrong:
            errors += wrong
        else:
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )

    def _text(self) -> str:
        texts = []
        for name, f in zip(self.factor_names, self.factors, strict=True):
            sizes = "x".join(str(size) for size in f.shape[(f.shape[0] == 1) :])
            texts.append(f"{name}={sizes}{' int8' * isinstance(f, Int8Factor)}")
        return ", ".join(texts)


class QuantizedLinear(_Quantized):
    """An ``nn.Linear`` or a ``KroneckerLinear`` with its large factors in int8.

    ``y = x Wᵀ + bias``, without a gradient. Make one by ``of``.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @classmethod
    def of(cls, layer: nn.Linear | KroneckerLinear) -> Self:
        """The layer in int8, on its device and in its mode; it is left as it is."""
        new = cls()
        new.in_features, new.out_features = layer.in_features, layer.out_features
        if isinstance(layer, KroneckerLinear):
            new._set("ab", (layer.a, layer.b))
        else:
            new._set(["weight"], (layer.weight[None],))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        new.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return new.train(layer.training)

    def dequantized(self) -> nn.Linear | KroneckerLinear:
        """The layer of the same rounded weights in floating point, which can be trained."""
        floating, new = self._floating(), None
        options: Any = {"device": floating[self.factor_names[0]].device, "dtype": self.like.dtype}
        sizes = self.in_features, self.out_features
        if "weight" in floating:
            new = nn.utils.skip_init(nn.Linear, *sizes, self.bias is not None, **options)
        else:
            rank, *shape = floating["a"].shape
            new = nn.utils.skip_init(
                KroneckerLinear, *sizes, tuple(shape), rank, self.bias is not None, **options
            )
        return _filled(new, floating, self)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, in_features)`` to ``y (…, out_features)``."""
        return kron_matmul(x, *self.factors, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{self._text()}, bias={self.bias is not None}"


class QuantizedSum(nn.Module):
    """A ``KroneckerSum`` whose parts are ``QuantizedLinear``."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    parts: Any

    @classmethod
    def of(cls, layer: KroneckerSum) -> Self:
        """The layer in int8, on its device and in its mode; it is left as it is."""
        new = cls()
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.parts = nn.ModuleList(QuantizedLinear.of(part) for part in layer.parts)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        new.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return new.train(layer.training)

    def dequantized(self) -> KroneckerSum:
        """The layer of the same rounded weights in floating point, which can be trained."""
        parts = [part.dequantized() for part in self.parts]
        shapes = [((part.a.shape[1], part.a.shape[2]), part.a.shape[0]) for part in parts]
        options: Any = {"device": parts[0].a.device, "dtype": parts[0].a.dtype}
        new = nn.utils.skip_init(
            KroneckerSum,
            self.in_features,
            self.out_features,
            shapes,
            self.bias is not None,
            **options,
        )
        new.parts = nn.ModuleList(parts)
        return _filled(new, {}, self)

    def reset_parameters(self) -> None:
        """Zero the bias; the parts zero theirs."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, in_features)`` to ``y (…, out_features)``."""
        y = self.parts[0](x)
        for part in self.parts[1:]:
            y = kron_matmul(x, *part.factors, bias=part.bias, residual=y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedEmbedding(_Quantized):
    """An ``nn.Embedding`` or a ``KroneckerEmbedding`` with its large factors in int8.

    Make one by ``of``.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @classmethod
    def of(cls, table: nn.Embedding | KroneckerEmbedding) -> Self:
        """The table in int8, on its device and in its mode; it is left as it is."""
        new = cls()
        new.num_embeddings, new.embedding_dim = table.num_embeddings, table.embedding_dim
        new.padding_idx = table.padding_idx
        if isinstance(table, KroneckerEmbedding):
            new._set("ab", (table.a, table.b))
        else:
            new._set(["weight"], (table.weight[None],))
        return new.train(table.training)

    def dequantized(self) -> nn.Embedding | KroneckerEmbedding:
        """The table of the same rounded weights in floating point, which can be trained."""
        floating, new = self._floating(), None
        options: Any = {"device": floating[self.factor_names[0]].device, "dtype": self.like.dtype}
        sizes = self.num_embeddings, self.embedding_dim
        if "weight" in floating:
            new = nn.utils.skip_init(nn.Embedding, *sizes, self.padding_idx, **options)
        else:
            rank, _, size = floating["b"].shape
            new = nn.utils.skip_init(
                KroneckerEmbedding, *sizes, size, rank, self.padding_idx, **options
            )
        return _filled(new, floating, self)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows: ids ``(…)`` to ``(…, embedding_dim)``."""
        rows = [_rows_of(f, ids if i == 0 else None) for i, f in enumerate(self.factors)]
        if len(rows) == 1:
            y = rows[0][0]
        else:  # (r, …, d / n) and (r, n)
            wide = torch.promote_types(self.like.dtype, torch.float32)
            y = torch.einsum("r...i,rj->...ij", *(t.to(wide) for t in rows)).flatten(-2)
        return y.to(self.like.dtype)

    def extra_repr(self) -> str:
        return self._text()


def _rows_of(f: Factor, ids: Tensor | None) -> Tensor:
    """Rows ``(r, …, n)`` of a factor, or without ids its only one ``(r, n)``."""
    if isinstance(f, Int8Factor):
        return _rows_of_tensor(f.values, ids) * _rows_of_tensor(f.scale, ids)
    return _rows_of_tensor(f, ids)


def _rows_of_tensor(t: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None:
        return t[:, 0]
    # Not t[:, ids], which takes negative ids, and a mask.
    return torch.stack([F.embedding(ids, table) for table in t])


def _filled(layer: Any, values: Mapping[str, Tensor], like: nn.Module) -> Any:
    """The layer with these values, and the bias and the mode of ``like``."""
    bias = like._parameters.get("bias")
    with torch.no_grad():
        for name, value in (*values.items(), *([("bias", bias)] if bias is not None else [])):
            getattr(layer, name).copy_(value)
    return layer.train(like.training)


# --- a module's layers


def quantize_(module: nn.Module, keep: Iterable[str] = ()) -> nn.Module:
    """Replace layers of a module by their int8 forms, in place, for inference.

    ``nn.Linear``, ``nn.Embedding`` and the Kronecker layers become ``QuantizedLinear``,
    ``QuantizedSum`` and ``QuantizedEmbedding`` where a factor has at least 1024 entries and 8
    columns that a product sums over; other factors, biases and all else stay as they are. Layers
    that cannot be replaced stay: those whose weight another module reads or shares, and those with
    their own ``forward``. All parameters of a replaced layer are frozen, and its hooks are lost.

    Args:
        module: Any module, or a single such layer.
        keep: Names of layers to leave in floating point: the ends of their paths, cut at a dot.

    Returns:
        ``module``, or the layer in its place.

    Raises:
        ValueError: If a name is not that of a layer, or a weight is not finite. Nothing is replaced
            then.
    """
    found = quantizable(module, keep)
    for path, layer in found.items():
        for name, p in layer.named_parameters():
            if not p.is_meta:
                check_finite(f"{path}.{name}".lstrip("."), p)
    new = {}
    for path, layer in found.items():
        with naming(path):
            new[layer] = quantized(layer)
    return replaced(module, new)


def dequantize_(module: nn.Module) -> nn.Module:
    """Replace int8 layers of a module by floating-point ones of the same rounded weights, in place.

    Their parameters require gradients.

    Returns:
        ``module``, or the layer in its place.
    """
    new: dict[Any, nn.Module] = {}
    inside: set[nn.Module] = set()
    for m in module.modules():
        if isinstance(m, QuantizedSum):
            inside |= set(m.parts)
        if m not in inside and isinstance(m, QuantizedLinear | QuantizedSum | QuantizedEmbedding):
            new[m] = m.dequantized()
    return replaced(module, new)


def quantized(layer: Any) -> QuantizedLinear | QuantizedSum | QuantizedEmbedding:
    """The int8 form of a layer that ``quantizable`` names."""
    if isinstance(layer, nn.Embedding | KroneckerEmbedding):
        return QuantizedEmbedding.of(layer)
    return QuantizedSum.of(layer) if isinstance(layer, KroneckerSum) else QuantizedLinear.of(layer)


def densified(layer: Any) -> Tensor:
    """The weight ``(m, n)`` of a floating-point layer."""
    by = next((by for k, by in _DENSIFIED.items() if isinstance(layer, k)), None)
    return layer.weight if by is None else getattr(layer, by)().weight


def quantizable(module: nn.Module, keep: Iterable[str] = ()) -> dict[str, Any]:
    """The layers that ``quantize_`` replaces, by path.

    Raises:
        ValueError: If a name to keep is not that of a layer.
    """
    kinds = (nn.Linear, nn.Embedding, KroneckerLinear, KroneckerSum, KroneckerEmbedding)
    layers: dict[str, Any] = {p: m for p, m in module.named_modules() if isinstance(m, kinds)}

    keep = list(keep)
    for name in keep:
        if not any(names_layer(name, path) for path in layers):
            raise ValueError(f"keep has {name!r}, {no_such_layer(name, ends_of(layers))}")
    named = [path for path in layers if any(names_layer(name, path) for name in keep)]
    reasons = obstacles(module)
    parameters = (m._parameters.values() for m in module.modules())
    owners = Counter(id(p) for values in parameters for p in values)
    parts = tuple(
        f"{path}.parts.".lstrip(".") for path, m in layers.items() if isinstance(m, KroneckerSum)
    )
    return {
        path: m
        for path, m in layers.items()
        if path not in reasons
        and not path.startswith(parts)  # a sum's parts go with it, or stay with it
        and not any(name == path or name.startswith(f"{path}.parts.") for name in named)
        and all(owners[id(p)] == 1 for p in m.parameters())
        and _is_known(m)
        and any(any(are_large(shapes)) for shapes in _products(m))
    }


def _is_known(layer: nn.Module) -> bool:
    """Whether the forward of a Kronecker layer, and of a sum's parts, is the known one."""
    if isinstance(layer, KroneckerSum) and not all(
        isinstance(part, KroneckerLinear) and _is_known(part) for part in layer.parts
    ):
        return False
    return not any(
        has_own_forward(layer, by) for k, by in _DENSIFIED.items() if isinstance(layer, k)
    )


def _products(layer: Any) -> list[list[Sequence[int]]]:
    """Shapes ``(r, m, n)`` of the factors of each product in a layer."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        return [[(1, *layer.weight.shape)]]
    return [[part.a.shape, part.b.shape] for part in getattr(layer, "parts", [layer])]
