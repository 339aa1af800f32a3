"""Factorised layers in place of a module's dense ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kron_kernels.factors import (
    Entry,
    Shapes,
    Term,
    check_ranks,
    no_such_layer,
    parse,
    shapes_of,
)
from kron_kernels.modules import Dense, dense_layers, is_conv1d, linear_weight, obstacles
from kron_kernels.nn import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KroneckerSum,
    as_trainable,
    filled,
)
from kron_kernels.shapes import check_mapping, naming


def factorise_(
    module: nn.Module,
    factors: Mapping[str, Entry | Term | None],
    *,
    second_moments: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace dense layers of a module by the nearest factorised ones, in place.

    ``nn.Linear`` and transformers' ``Conv1D`` become ``KroneckerLinear``, or ``KroneckerSum`` for
    several terms; ``nn.Embedding`` becomes ``KroneckerEmbedding``. A layer that occurs in several
    places is replaced in all of them. Factors are frozen where the weight was, and the bias where
    the bias was. Hooks on a replaced layer are lost.

    Args:
        module: Any module, or a single such layer.
        factors: From a layer's path, ``""`` for ``module`` itself, to its terms
            ``[{"a_shape": [m1, n1], "rank": r}, …]`` (a single one needs no list), or to None,
            which leaves it dense; for example ``kron_kernels.plan.Plan.factors``.
        second_moments: ``E[x xᵀ]`` of a layer's inputs by its path; the layer is then nearest in
            its outputs.

    Returns:
        ``module``, or the layer in its place.

    Raises:
        TypeError: If ``factors`` or ``second_moments`` is not a mapping from strings, or a second
            moment is not a dense tensor.
        ValueError: If a path is not that of a replaceable layer, its terms do not fit, or its
            weight or second moment is not finite. Nothing is replaced then.
    """
    moments = {} if second_moments is None else second_moments
    check_mapping("second_moments", moments, '{"0": x.T @ x / len(x)}')
    layers = dense_layers(module)
    for path in moments:
        if path not in layers:
            raise ValueError(f"second_moments has {path!r}, {no_such_layer(path, layers, module)}")
        if isinstance(layers[path], nn.Embedding):
            raise ValueError(
                f"second_moments has {path!r}, an nn.Embedding, which looks rows up and multiplies "
                "no inputs; leave it out."
            )

    def nearest(path: str, layer: Dense, shapes: Shapes) -> nn.Module:
        with naming(path or "the module"):
            return _nearest_layer(layer, shapes, moments.get(path))

    return swap_(module, factors, nearest)


def swap_(
    module: nn.Module,
    factors: Mapping[str, Entry | Term | None],
    make: Callable[[str, Dense, Shapes], nn.Module],
) -> nn.Module:
    """``factorise_`` with layers from ``make(path, layer, shapes)``."""
    check_mapping("factors", factors, '{"0": {"a_shape": [16, 2], "rank": 1}}')
    layers, reasons, new = dense_layers(module), obstacles(module), {}
    for path, entry in factors.items():
        parts = parse(entry, f"factors[{path!r}]")
        if path not in layers:
            raise ValueError(f"factors has {path!r}, {no_such_layer(path, layers, module)}")
        if not parts:
            continue
        if path in reasons:
            raise ValueError(f"{path!r} cannot be factorised: {reasons[path]}; leave it out.")
        layer = layers[path]
        rows, columns = linear_weight(layer).shape
        is_table = isinstance(layer, nn.Embedding)
        shapes = shapes_of(parts, (rows, columns), is_table, f"factors[{path!r}]")
        check_ranks(shapes, f"factors[{path!r}]")
        new[layer] = make(path, layer, shapes)
    return replaced(module, new)


def densify_(module: nn.Module) -> nn.Module:
    """Replace factorised layers of a module by equivalent dense layers, in place.

    A weight is frozen if all its factors are, and a bias if its bias is.

    Args:
        module: Any module, or a single such layer.

    Returns:
        ``module``, or the dense layer in its place.

    Raises:
        ValueError: If it has a ``KroneckerFeedForward``, which needs its layers' factors, or a
            layer with its own ``forward``. Nothing is replaced then.
    """
    dense: dict[nn.Module, nn.Module] = {}

    def visit(path: str, m: nn.Module) -> None:
        if isinstance(m, KroneckerLinear | KroneckerSum | KroneckerEmbedding):
            if m not in dense:
                dense[m] = dense_layer(path, m)
            return
        if isinstance(m, KroneckerFeedForward):
            raise ValueError(
                f"{path or 'the module'} is a KroneckerFeedForward, which reads the factors of its "
                "layers; replace it by its up, activation and down first."
            )
        for name, child in m.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", module)
    return replaced(module, dense)


def dense_layer(
    path: str, layer: KroneckerLinear | KroneckerSum | KroneckerEmbedding
) -> nn.Linear | nn.Embedding:
    """The equivalent dense layer; errors name the path."""
    with naming(path or "the module"):
        return layer.to_embedding() if isinstance(layer, KroneckerEmbedding) else layer.to_linear()


def _nearest_layer(layer: Any, shapes: Shapes, second_moment: Tensor | None) -> nn.Module:
    s, *others = shapes
    if isinstance(layer, nn.Embedding):
        return KroneckerEmbedding.from_embedding(layer, s.n2, s.rank)
    if is_conv1d(layer):
        layer = _as_linear(layer)
    if others:
        parts = [s.part for s in shapes]
        return KroneckerSum.from_linear(layer, parts, second_moment=second_moment)
    return KroneckerLinear.from_linear(layer, *s.part, second_moment=second_moment)


def _as_linear(conv: nn.Linear) -> nn.Linear:
    weight, bias = linear_weight(conv), conv.bias
    rows, columns = weight.shape
    new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    linear = nn.utils.skip_init(nn.Linear, columns, rows, bias is not None, **new)
    return filled(linear, like=conv, weight=as_trainable(weight, conv.weight), bias=bias)


def replaced(module: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """Put ``new[layer]`` in every place of a layer."""
    for parent, name, layer in list(_children(module)):
        if layer in new:
            parent._modules[name] = new[layer]
    return new.get(module, module)


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child
