"""Which layers of a BERT are Kronecker products, and of which shapes."""

# No `from __future__ import annotations`: @strict validates by the annotations' values.
import difflib
from dataclasses import field
from typing import Any, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from kron_kernels import KronShape

WORD_EMBEDDINGS = "embeddings.word_embeddings"
# Module of one encoder layer -> the config's sizes of its weight's (rows, columns).
_LINEARS = {
    "attention.self.query": ("hidden_size", "hidden_size"),
    "attention.self.key": ("hidden_size", "hidden_size"),
    "attention.self.value": ("hidden_size", "hidden_size"),
    "attention.output.dense": ("hidden_size", "hidden_size"),
    "intermediate.dense": ("intermediate_size", "hidden_size"),
    "output.dense": ("hidden_size", "intermediate_size"),
}


class _Small(NamedTuple):
    """The small factor of a product; the other one takes what is left of the weight."""

    side: Literal["A", "B"]
    rows: int
    columns: int


class _Preset(NamedTuple):
    attention: _Small
    intermediate: _Small  # of W1; W2 has the transposed shapes
    b_size: int  # the embedding's row vector
    rank: int = 1  # of attention and feed-forward


PRESETS = {
    "kronecker-bert-8": _Preset(_Small("B", 2, 2), _Small("A", 8, 2), b_size=8),
    "kronecker-bert-21": _Preset(_Small("B", 2, 16), _Small("A", 16, 2), b_size=16),
    "kronecker-bert-5": _Preset(_Small("B", 2, 16), _Small("B", 8, 2), b_size=12, rank=4),
    "kronecker-bert-19": _Preset(_Small("B", 2, 16), _Small("A", 8, 2), b_size=32),
}


@strict
class KroneckerBertConfig(BertConfig):
    """A BERT some of whose weights are ``Σ_k A_k ⊗ B_k``; :class:`BertConfig` plus one field.

    Args:
        kronecker_factors: From a module's name to ``{"a_shape": [m1, n1], "rank": r}`` (``rank`` is
            1 when left out), or to None, which keeps the module dense. A name is the end of the
            module's path, cut at a dot: ``"intermediate.dense"`` means it in every layer,
            ``"layer.3.intermediate.dense"`` in one. The longest name that fits decides; a module
            that none fits is dense, so that the default, an empty dict, is an ordinary BERT.
            Factorisable are ``attention.self.{query,key,value}``, ``attention.output.dense``,
            ``intermediate.dense``, ``output.dense`` and ``embeddings.word_embeddings``, whose
            ``m1`` is the vocabulary's size. Mind that ``"output.dense"`` also fits
            ``"attention.output.dense"`` unless that has an entry of its own.

    Raises:
        ValueError: If an entry is malformed, fits no module or does not divide its weight. It is
            checked here, and again when a model is built.
    """

    model_type = "kronecker_bert"

    kronecker_factors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any):
        found = kwargs.get("model_type", self.model_type)
        if found != self.model_type:
            raise ValueError(
                f"model_type = {found!r} in a configuration that must be {self.model_type!r}: this "
                "is a dense model, which has no factors. Load it with its own class and factorise "
                "it with kroneckerbert.compress(model, 'kronecker-bert-8')."
            )
        super().__post_init__(**kwargs)
        # A copy, and lists for tuples: equal before and after a trip through JSON.
        self.kronecker_factors = {
            name: _checked_entry(name, entry) for name, entry in self.kronecker_factors.items()
        }
        self.kronecker_shapes()

    def kronecker_shapes(self) -> dict[str, KronShape]:
        """Shapes of the factorised modules by their path within :class:`KroneckerBertModel`.

        Raises:
            ValueError: If an entry is malformed, fits no module or does not divide its weight.
        """
        sizes = {WORD_EMBEDDINGS: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            for name, (rows, columns) in _LINEARS.items():
                size = getattr(self, rows), getattr(self, columns)
                sizes[f"encoder.layer.{layer}.{name}"] = size

        for name in self.kronecker_factors:
            if not any(_fits(name, path) for path in sizes):
                raise ValueError(_no_such_module(name, self.num_hidden_layers))
        shapes = {}
        for path, (rows, columns) in sizes.items():
            name = self.entry_of(path)
            if name is None or self.kronecker_factors[name] is None:
                continue
            entry = _checked_entry(name, self.kronecker_factors[name])
            a_shape = tuple(entry["a_shape"])
            try:
                shapes[path] = KronShape.split(rows, columns, a_shape, entry["rank"])
            except ValueError as error:
                raise ValueError(f"kronecker_factors[{name!r}], for {path}: {error}") from error
            if path == WORD_EMBEDDINGS and a_shape[0] != rows:
                raise ValueError(
                    f"kronecker_factors[{name!r}] has a_shape[0] = {a_shape[0]}, but each of the "
                    f"{rows} words needs its own row of A; use a_shape = [{rows}, {a_shape[1]}]."
                )
        return shapes

    def entry_of(self, path: str) -> str | None:
        """The name in ``kronecker_factors`` that decides about the module at ``path``, if any."""
        return max((n for n in self.kronecker_factors if _fits(n, path)), key=len, default=None)

    @classmethod
    def from_bert(
        cls, base: BertConfig, kronecker_factors: dict[str, dict | None], **overrides: Any
    ) -> "KroneckerBertConfig":
        """``base`` with these factors: every other field, the labels included, carries over.

        Args:
            base: A dense (or another Kronecker) BERT's configuration; left as it is.
            kronecker_factors: See :class:`KroneckerBertConfig`.
            **overrides: Fields that shall differ from ``base``.

        Raises:
            TypeError: If an override is no field of a BERT configuration.
        """
        fields = base.to_dict()
        # transformers would keep a misspelt field without a word.
        if unknown := [name for name in overrides if not hasattr(base, name)]:
            nearest = difflib.get_close_matches(unknown[0], fields, n=3)
            raise TypeError(
                f"{unknown[0]!r} is no field of {cls.__name__}; the nearest are {nearest}."
            )
        # These describe the class and the folder that `base` came from.
        for name in ("model_type", "transformers_version", "architectures", "_name_or_path"):
            fields.pop(name, None)
        if "num_labels" in overrides:  # the label names would win over it
            fields.pop("id2label", None)
            fields.pop("label2id", None)
        fields |= {"attn_implementation": base._attn_implementation} | overrides
        return cls(**fields | {"kronecker_factors": kronecker_factors})

    @classmethod
    def preset(
        cls, name: str, base: BertConfig | None = None, **overrides: Any
    ) -> "KroneckerBertConfig":
        """A published configuration, scaled to the widths of ``base``.

        The small factor keeps its shape and the large one takes the rest. At BERT_BASE's widths:

        ================= ================= ===================== =========== ==========
        name              attention (A, B)  W1 (A, B)             embedding B parameters
        ================= ================= ===================== =========== ==========
        kronecker-bert-8  384x384, 2x2      8x2, 384x384          1x8         14,063,624
        kronecker-bert-21 384x48, 2x16      16x2, 192x384         1x16        4,637,680
        kronecker-bert-5  384x48, 2x16 (*)  384x384, 8x2 (*)      1x12        20,171,916
        kronecker-bert-19 384x48, 2x16      8x2, 384x384          1x32        5,674,256
        ================= ================= ===================== =========== ==========

        (*) a sum of four. Parameters are those without the pooler, which has 590,592 more.
        W2 has W1's shapes transposed. 8 and 21 are KroneckerBERT (NAACL 2022), table 1, as printed.
        5 is table 1 corrected: the attention shape printed there, 384x384, would give 45.5 M
        parameters instead of the stated 20 M; with 384x48 the stated size and FLOPs come out.
        19 is inferred: the version of the paper that has it was not available, and these are
        natural shapes that give its 19.3x.

        Args:
            name: One of the names above.
            base: Where all other fields come from; ``BertConfig()``, BERT_BASE, if None.
            **overrides: Fields that shall differ from ``base``, widths included.

        Raises:
            ValueError: If there is no such preset, or its small factors do not divide the widths.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        base = BertConfig() if base is None else base

        def width(size: str) -> int:
            return overrides.get(size, getattr(base, size))

        def a_shape(small: _Small, rows: str, columns: str) -> list[int]:
            for size, divisor in ((rows, small.rows), (columns, small.columns)):
                _check_width(name, size, width(size), divisor)
            if small.side == "A":
                return [small.rows, small.columns]
            return [width(rows) // small.rows, width(columns) // small.columns]

        _check_width(name, "hidden_size", width("hidden_size"), preset.b_size)
        factors = {
            module: {"a_shape": a_shape(preset.attention, *sizes), "rank": preset.rank}
            for module, sizes in _LINEARS.items()
            if module.startswith("attention.")
        }
        w1 = a_shape(preset.intermediate, "intermediate_size", "hidden_size")
        factors["intermediate.dense"] = {"a_shape": w1, "rank": preset.rank}
        factors["output.dense"] = {"a_shape": w1[::-1], "rank": preset.rank}
        table = [width("vocab_size"), width("hidden_size") // preset.b_size]
        factors[WORD_EMBEDDINGS] = {"a_shape": table, "rank": 1}
        return cls.from_bert(base, factors, **overrides)


def _fits(name: str, path: str) -> bool:
    # With the prefix that modules have in the classes with a head.
    return f".bert.{path}".endswith(f".{name}")


def _checked_entry(name: str, entry: dict | None) -> dict | None:
    """The entry with its rank filled in and in JSON's types."""
    if entry is None:
        return None
    example = '{"a_shape": [16, 2], "rank": 1}, or None for a dense layer'
    if not isinstance(entry, dict) or not {"a_shape"} <= entry.keys() <= {"a_shape", "rank"}:
        raise ValueError(f"kronecker_factors[{name!r}] = {entry!r} must look like {example}.")
    a_shape, rank = entry["a_shape"], entry.get("rank", 1)
    if not isinstance(a_shape, list | tuple) or len(a_shape) != 2:
        raise ValueError(
            f"kronecker_factors[{name!r}] has a_shape = {a_shape!r}, but A has two sides; "
            f"write {example}."
        )
    for value in (*a_shape, rank):
        if type(value) is not int or value < 1:  # a bool is an int, too
            raise ValueError(
                f"kronecker_factors[{name!r}] has {value!r} in {entry!r}, but a_shape and rank are "
                f"positive integers; write {example}."
            )
    return {"a_shape": list(a_shape), "rank": rank}


def _no_such_module(name: str, layers: int) -> str:
    in_layers = [f"layer.{layer}.{linear}" for layer in range(layers) for linear in _LINEARS]
    nearest = difflib.get_close_matches(name, [WORD_EMBEDDINGS, *_LINEARS, *in_layers], n=3)
    nearest = nearest or [WORD_EMBEDDINGS, *_LINEARS]
    return (
        f"kronecker_factors has {name!r}, which ends the name of no factorisable module of this "
        f"{layers}-layer model; the nearest names are {', '.join(nearest)}."
    )


def _check_width(preset: str, size: str, width: int, divisor: int) -> None:
    if width % divisor:
        raise ValueError(
            f"{size} = {width} is not divisible by {divisor}, a side of a small factor of "
            f"{preset}; choose another preset, or write kronecker_factors yourself with "
            "KroneckerBertConfig.from_bert."
        )
