"""Factorised layers in place of a module's dense ones, and back."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.nn import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KroneckerSum,
    as_trainable,
    filled,
)
from kron_kernels.readers import reader
from kron_kernels.shapes import KronShape, check_integer, check_mapping, check_rank, sides_of

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

    ``nn.Linear`` and transformers' ``Conv1D`` become ``KroneckerLinear``, or ``KroneckerSum`` of
    several terms, ``nn.Embedding`` becomes ``KroneckerEmbedding``. A layer that stands in several
    places is replaced in all of them. The factors of a frozen weight are frozen, and so is the bias
    in the place of a frozen one. Hooks on a layer are lost.

    Args:
        module: Any module, or such a layer itself.
        factors: From a layer's path, ``""`` for ``module`` itself, to its terms,
            ``[{"a_shape": [m1, n1], "rank": r}, …]`` (a single one needs no list), or to None,
            which leaves it dense; such as ``kron_kernels.plan.Plan.factors``.
        second_moments: ``E[x xᵀ]`` of a layer's inputs by its path: nearest in its outputs.

    Returns:
        ``module``, or the layer that stands for it.

    Raises:
        TypeError: If ``factors`` or ``second_moments`` is not a mapping from strings, or a second
            moment not a dense tensor.
        ValueError: If a path leads to no layer that can be replaced, its terms do not fit, or its
            weight or second moment is not finite.
    """
    moments = {} if second_moments is None else second_moments
    check_mapping("second_moments", moments, '{"0": x.T @ x / len(x)}')
    layers = factorisable(module)
    for path in moments:
        if path not in layers:
            raise ValueError(f"second_moments has {path!r}, {no_such_layer(path, layers)}")
        if isinstance(layers[path][0], nn.Embedding):
            raise ValueError(
                f"second_moments has {path!r}, an nn.Embedding, which looks rows up and multiplies "
                "no inputs; leave it out."
            )

    def nearest(path: str, layer: Dense, terms: Terms) -> nn.Module:
        with _naming(path):
            return _nearest_layer(layer, terms, moments.get(path))

    return swap_(module, factors, nearest)


def densify_(module: nn.Module) -> nn.Module:
    """Replace factorised layers of a module by the dense ones of the same function, in place.

    A weight is frozen if all its factors are, and a bias if its bias is.

    Args:
        module: Any module, or such a layer itself.

    Returns:
        ``module``, or the dense layer that stands for it.

    Raises:
        ValueError: If it has a ``KroneckerFeedForward``, which needs its layers' factors, or a
            layer with a ``forward`` of its own. Nothing is replaced then.
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
    for old, new in dense.items():
        module = _replaced(module, old, new)
    return module


def dense_layer(
    path: str, layer: KroneckerLinear | KroneckerSum | KroneckerEmbedding
) -> nn.Linear | nn.Embedding:
    """The dense layer of the same function; an error names the path."""
    with _naming(path):
        return layer.to_embedding() if isinstance(layer, KroneckerEmbedding) else layer.to_linear()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Within, errors about a layer begin with its path."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path or 'the module'}: {error}") from error


def factorisable(
    module: nn.Module, allow_tied: bool = False
) -> dict[str, tuple[Dense, str | None]]:
    """The dense layers by their first path, and why one cannot be replaced, or None if it can."""
    owners, places = defaultdict(list), defaultdict(list)
    for path, m in module.named_modules():
        for p in m._parameters.values():
            owners[id(p)].append(path)
    for path, m in module.named_modules(remove_duplicate=False):
        places[m].append(path)
    layers = {}
    for path, m in module.named_modules():
        if isinstance(m, nn.Linear | nn.Embedding) or is_conv1d(m):
            others = [o for o in owners[id(m._parameters.get("weight"))] if o != path]
            readers = [r for place in places[m] if (r := reader(module, place))]
            layers[path] = m, _why_not(m, readers, [] if allow_tied else others)
    return layers


def _why_not(m: Dense, readers: list[str], tied: list[str]) -> str | None:
    options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(m, o, None)]
    plain = (
        next((c for c in (nn.Linear, nn.Embedding) if isinstance(m, c)), type(m)).forward
        is type(m).forward
    )
    if readers:
        return f"{readers[0]} reads its weight, which a factorised layer does not have"
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
    example = '{"a_shape": [16, 2], "rank": 1}, be a list of such, or None for a dense layer'
    terms = []
    for term in entry if isinstance(entry, list | tuple) else [entry]:
        if not isinstance(term, Mapping) or not {"a_shape"} <= term.keys() <= {"a_shape", "rank"}:
            raise ValueError(f"{what} = {entry!r} must look like {example}.")
        try:
            rank = check_integer("rank", term.get("rank", 1), None)
            terms.append((sides_of(term["a_shape"]), rank))
        except ValueError as error:
            raise ValueError(f"{what} = {entry!r} must look like {example}: {error}") from error
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
        for s in shapes:
            check_rank(s)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
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
    check_mapping("factors", factors, '{"0": {"a_shape": [16, 2], "rank": 1}}')
    layers, new = factorisable(module), {}
    for path, entry in factors.items():
        terms = terms_of(entry, f"factors[{path!r}]")
        if path not in layers:
            raise ValueError(f"factors has {path!r}, {no_such_layer(path, layers)}")
        if not terms:
            continue
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
    new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
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


def _as_linear(conv: nn.Linear) -> nn.Linear:
    weight, bias = dense_of(conv), conv.bias
    rows, columns = weight.shape
    new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    linear = nn.utils.skip_init(nn.Linear, columns, rows, bias is not None, **new)
    return filled(linear, like=conv, weight=as_trainable(weight, conv.weight), bias=bias)


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
