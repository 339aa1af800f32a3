"""KroneckerBERT's published shapes, scaled to the widths of a model, and forms with low rank.

``kronecker-bert-8`` is the paper's. A suffix gives a part of the model low rank instead, of as many
parameters as the products that it replaces: ``kronecker-bert-8+low-rank-words``. Several may follow
each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kron_kernels.factors import deciding_name, term_of

if TYPE_CHECKING:
    from kroneckerbert.configuration_kroneckerbert import Layout


class _Roles(NamedTuple):
    """Ends of the paths of a transformer layer's modules."""

    attention: tuple[str, ...]
    up: tuple[str, ...]  # into the feed-forward block's width
    down: tuple[str, ...]  # and back


_BERT = _Roles(
    (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        *(f"crossattention.self.{name}" for name in ("query", "key", "value")),
        "crossattention.output.dense",
    ),
    ("intermediate.dense",),
    ("output.dense",),
)
# By the dense model's model_type. Other architectures have no presets, and are planned.
_ROLES = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "mpnet": _BERT._replace(attention=tuple(f"attention.attn.{name}" for name in "qkvo")),
    "deberta-v2": _BERT._replace(
        attention=(
            *(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
            "attention.output.dense",
        )
    ),
    "distilbert": _Roles(
        tuple(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
        ("ffn.lin1",),
        ("ffn.lin2",),
    ),
    "modernbert": _Roles(("attn.Wqkv", "attn.Wo"), ("mlp.Wi",), ("mlp.Wo",)),
    "gpt2": _Roles(("attn.c_attn", "attn.c_proj"), ("mlp.c_fc",), ("mlp.c_proj",)),
    "llama": _Roles(
        tuple(f"self_attn.{name}_proj" for name in "qkvo"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
}


class _Small(NamedTuple):
    """The small factor of a product; the other factor takes the rest of the weight."""

    side: Literal["A", "B"]
    rows: int
    columns: int

    @property
    def transposed(self) -> _Small:
        return _Small(self.side, self.columns, self.rows)


class _Preset(NamedTuple):
    attention: _Small
    up: _Small  # down has the transposed shapes
    b_size: int  # length of the embedding's row vector
    rank: int = 1  # attention's and feed-forward's


RECOMMENDED = "kronecker-bert-8+low-rank-words"  # by docs/study.md; the default of compress

# KroneckerBERT (NAACL 2022), see KroneckerConfig.preset.
PRESETS = {
    "kronecker-bert-8": _Preset(_Small("B", 2, 2), _Small("A", 8, 2), b_size=8),
    "kronecker-bert-21": _Preset(_Small("B", 2, 16), _Small("A", 16, 2), b_size=16),
    "kronecker-bert-5": _Preset(_Small("B", 2, 16), _Small("B", 8, 2), b_size=12, rank=4),
    "kronecker-bert-19": _Preset(_Small("B", 2, 16), _Small("A", 8, 2), b_size=32),
}


# The parts that a suffix gives low rank.
_WORDS, _ATTENTION, _FEED_FORWARD = "words", "attention", "feed_forward"
SUFFIXES = {
    "low-rank-words": {_WORDS},
    "low-rank-attention": {_ATTENTION},
    "low-rank-feed-forward": {_FEED_FORWARD},
    "low-rank": {_WORDS, _ATTENTION, _FEED_FORWARD},
}


def preset_factors(name: str, model_type: str, layout: Layout) -> dict[str, Any]:
    """``kronecker_factors`` of a preset for a dense model.

    Args:
        name: A key of ``PRESETS``, and any of ``SUFFIXES`` after plus signs.
        model_type: The dense model's.
        layout: The dense model's layers.

    Raises:
        ValueError: If the preset or a suffix is unknown, its small factors do not divide the
            widths, or the architecture has no presets.
    """
    base, *suffixes = name.split("+")
    if base not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}.")
    if unknown := [suffix for suffix in suffixes if suffix not in SUFFIXES]:
        raise ValueError(
            f"{name!r} ends in +{unknown[0]}; there are {', '.join(f'+{s}' for s in SUFFIXES)}."
        )
    low_rank = {part for suffix in suffixes for part in SUFFIXES[suffix]}
    if model_type not in _ROLES:
        raise ValueError(
            f"presets are for {', '.join(_ROLES)}, not for {model_type}; choose shapes with "
            "kroneckerbert.plan(model, {'parameters': '8x'})."
        )
    preset, roles = PRESETS[base], _ROLES[model_type]
    small = (
        dict.fromkeys(roles.attention, preset.attention)
        | dict.fromkeys(roles.up, preset.up)
        | dict.fromkeys(roles.down, preset.up.transposed)
    )
    factors: dict[str, Any] = {}
    for path, (rows, columns) in layout.sizes.items():
        if path == layout.table:
            _check_width(name, path, "columns", columns, preset.b_size)
            term = term_of((rows, columns // preset.b_size), 1)
            factors[path] = _low_rank(term, rows, columns) if _WORDS in low_rank else term
            continue
        role = deciding_name(small, path)
        if role is None:
            continue
        side, m, n = small[role]
        _check_width(name, path, "rows", rows, m)
        _check_width(name, path, "columns", columns, n)
        a_shape = (m, n) if side == "A" else (rows // m, columns // n)
        term = term_of(a_shape, preset.rank)
        if (_ATTENTION if role in roles.attention else _FEED_FORWARD) in low_rank:
            term = _low_rank(term, rows, columns)
        if factors.setdefault(role, term) != term:  # a layer of other widths
            factors[path] = term
    return factors


def _low_rank(term: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """The largest rank that has at most the parameters of a product."""
    (m1, n1), rank = term["a_shape"], term["rank"]
    parameters = rank * (m1 * n1 + (rows // m1) * (columns // n1))
    return term_of((rows, 1), max(parameters // (rows + columns), 1))


def _check_width(preset: str, path: str, side: str, width: int, divisor: int) -> None:
    if width % divisor:
        raise ValueError(
            f"the weight of {path} has {width} {side}, not divisible by {divisor}, a side of a "
            f"small factor of {preset}; choose another preset, or shapes that divide with "
            "kroneckerbert.plan."
        )
