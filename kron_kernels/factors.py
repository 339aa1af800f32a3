"""The grammar of factors: terms of a layer's weight, and names of layers.

A term is ``{"a_shape": [m1, n1], "rank": r}``, with ``rank`` 1 if left out. The weight of a layer
is the sum of a list of terms; None means a dense layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kron_kernels.modules import Dense, linear_weight, not_dense
from kron_kernels.nn import KroneckerEmbedding, KroneckerLinear, KroneckerSum
from kron_kernels.shapes import KronShape, check_integer, check_rank, naming, sides_of

Term = dict[str, Any]
Entry = list[Term]
Parts = list[tuple[tuple[int, int], int]]  # ((m1, n1), rank) of each term; [] is a dense layer
Shapes = tuple[KronShape, ...]  # the same for a weight of known size

_EXAMPLE = '{"a_shape": [16, 2], "rank": 1}, be a list of such terms, or None for a dense layer'


def parse(entry: Entry | Mapping[str, Any] | None, label: str = "an entry") -> Parts:
    """The ``(a_shape, rank)`` pairs of an entry, ``[]`` for a dense layer.

    Args:
        entry: A list of terms, a single term, or None.
        label: Name of the entry in errors, such as ``factors['up']``.

    Raises:
        ValueError: If the entry is malformed.
    """
    if entry is None:
        return []
    parts = []
    for term in entry if isinstance(entry, list | tuple) else [entry]:
        if not isinstance(term, Mapping) or not {"a_shape"} <= term.keys() <= {"a_shape", "rank"}:
            raise ValueError(f"{label} = {entry!r} must look like {_EXAMPLE}.")
        with naming(f"{label} = {entry!r} must look like {_EXAMPLE}"):
            rank = check_integer("rank", term.get("rank", 1), None)
            parts.append((sides_of(term["a_shape"]), rank))
    if not parts:
        raise ValueError(f"{label} is an empty list; write None for a dense layer.")
    return parts


def term_of(a_shape: tuple[int, int], rank: int) -> Term:
    """A term in JSON's types."""
    return {"a_shape": list(a_shape), "rank": rank}


def entry_of(shapes: Iterable[KronShape]) -> Entry | None:
    """The list of terms of these shapes, which ``parse`` reads; None without shapes."""
    return [term_of(*s.part) for s in shapes] or None


def shapes_of(parts: Parts, size: tuple[int, int], is_table: bool, label: str) -> Shapes:
    """The shapes of these terms for a weight of ``size (rows, columns)``.

    Args:
        parts: From ``parse``.
        size: Rows and columns of the weight.
        is_table: Whether it is an embedding's weight.
        label: Beginning of the errors.

    Raises:
        ValueError: If a term does not divide the weight, or a table gets anything but one
            ``A ⊗ b`` with a row of A per word.
    """
    rows, columns = size
    with naming(label):
        shapes = tuple(KronShape.split(rows, columns, *part) for part in parts)
        if is_table and shapes and (len(shapes) > 1 or shapes[0].m1 != rows):
            raise ValueError(
                "an embedding is a single term A ⊗ b with a row of A for each of its "
                f"{rows} rows; use a_shape = [{rows}, {shapes[0].n1}], with a second side that "
                f"divides {columns}."
            )
    return shapes


def check_ranks(shapes: Shapes, what: str) -> None:
    """Raise if fewer terms of a shape already represent every weight; ``what`` begins the error."""
    with naming(what):
        for s in shapes:
            check_rank(s)


def shapes_in(layer: nn.Module) -> Shapes:
    """The shapes of the terms of a factorised layer."""
    return tuple(KronShape.of(part.a, part.b) for part in getattr(layer, "parts", [layer]))


def terms_text(shapes: Iterable[KronShape]) -> str:
    """``"4x2 ⊗ 12x24 + rank 8"``, or ``"dense"`` without shapes."""
    texts = []
    for s in shapes:
        product = f"{s.m1}x{s.n1} ⊗ {s.m2}x{s.n2}"
        terms = product if s.rank == 1 else f"{s.rank} of {product}"
        texts.append(f"rank {s.rank}" if s.is_low_rank else terms)
    return " + ".join(texts) or "dense"


def random_layer(layer: Dense, shapes: Sequence[KronShape]) -> nn.Module:
    """A factorised layer of the sizes, dtype and device of ``layer``, with random factors."""
    new: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    s, *others = shapes
    if isinstance(layer, nn.Embedding):
        return KroneckerEmbedding(
            s.out_features, s.in_features, s.n2, s.rank, layer.padding_idx, **new
        )
    (rows, columns), bias = linear_weight(layer).shape, layer.bias is not None
    if others:
        return KroneckerSum(columns, rows, [s.part for s in shapes], bias, **new)
    return KroneckerLinear(columns, rows, s.a_shape, s.rank, bias, **new)


def names_layer(name: str, path: str) -> bool:
    """Whether ``name`` is the end of ``path``, cut at a dot."""
    return f".{path}".endswith(f".{name}")


def deciding_name(names: Iterable[str], path: str) -> str | None:
    """The longest of the names of the layer at ``path``."""
    return max((name for name in names if names_layer(name, path)), key=len, default=None)


def ends_of(paths: Iterable[str]) -> list[str]:
    """All names of the layers at these paths."""
    ends = (".".join(p.split(".")[i:]) for p in paths for i in range(p.count(".") + 1))
    return list(dict.fromkeys(ends))


def no_such_layer(name: str, names: Iterable[str], module: nn.Module | None = None) -> str:
    """The end of an error message about a name that is not among these, with the nearest ones.

    ``module`` may have a layer or a parameter of this name, which cannot be factorised.
    """
    names = list(names)
    for path, m in [] if module is None else module.named_modules():
        owner, _, last = name.rpartition(".")
        named = names_layer(name, path) or (last in m._parameters and names_layer(owner, path))
        if named and (reason := not_dense(m)):
            return f"which cannot be factorised: {reason}; leave it out."
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return (
        "which is not a layer that can be factorised; "
        f"the nearest are {', '.join(nearest) or 'none: it has no nn.Linear or nn.Embedding'}."
    )
