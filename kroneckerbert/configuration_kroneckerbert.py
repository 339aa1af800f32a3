"""Which layers of a transformer are Kronecker products, and of which shapes."""

# No `from __future__ import annotations`: @strict validates by the annotations' values.
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from kron_kernels import KronShape
from kron_kernels.factorise import terms_of
from kron_kernels.plan import Plan
from kron_kernels.readers import reader
from kroneckerbert import model_type


class _Roles(NamedTuple):
    """Names of a layer's modules, as the presets tell them apart."""

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
# By the dense model's model_type. Presets are for these; other architectures are planned.
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
    """The small factor of a product; the other one takes what is left of the weight."""

    side: Literal["A", "B"]
    rows: int
    columns: int


class _Preset(NamedTuple):
    attention: _Small
    up: _Small  # down has the transposed shapes
    b_size: int  # the embedding's row vector
    rank: int = 1  # of attention and feed-forward


PRESETS = {
    "kronecker-bert-8": _Preset(_Small("B", 2, 2), _Small("A", 8, 2), b_size=8),
    "kronecker-bert-21": _Preset(_Small("B", 2, 16), _Small("A", 16, 2), b_size=16),
    "kronecker-bert-5": _Preset(_Small("B", 2, 16), _Small("B", 8, 2), b_size=12, rank=4),
    "kronecker-bert-19": _Preset(_Small("B", 2, 16), _Small("A", 8, 2), b_size=32),
}


# A dense class follows in the bases of every subclass, and brings what a configuration has.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Base
else:
    _Base = object


class KroneckerConfig(_Base):
    """What every configuration of a Kronecker model has beside its dense model's fields.

    Its subclasses are made by ``kronecker_config``: ``KroneckerBertConfig``,
    ``KroneckerRobertaConfig``, …

    Attributes:
        kronecker_factors: From a module's name to ``{"a_shape": [m1, n1], "rank": r}`` (``rank`` is
            1 when left out), to a list of such terms of different shapes, which are summed, or to
            None, which keeps the module dense. A name is the end of the module's path, cut at a
            dot: ``"intermediate.dense"`` means it in every layer, ``"layer.3.intermediate.dense"``
            in one. The longest name that fits decides; a module that none fits is dense, so that
            the default, an empty dict, is an ordinary dense model. Factorisable are the linear
            layers of the model without its head and pooler, and the word embeddings, whose ``m1``
            is the vocabulary's size; not layers whose weight another module reads. Mind that
            ``"output.dense"`` also fits ``"attention.output.dense"`` unless that has an entry of
            its own.

        kronecker_plan: The plan that chose the factors, if one did, see ``plan``.

    Raises:
        ValueError: If an entry is malformed, fits no module or does not divide its weight. It is
            checked here, and again when a model is built.
    """

    dense_class: type[PreTrainedConfig]  # the configuration that this one extends
    kronecker_factors: dict[str, Any]
    kronecker_plan: dict[str, Any] | None

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, and a new process has none yet.
        cls = type(self)
        if _classes.get(cls.dense_class) is not cls:  # a subclass of somebody's own
            return super().__reduce_ex__(protocol)
        return _blank, (cls.dense_class,), self.__getstate__()

    @property
    def plan(self) -> Plan | None:
        """What was chosen for each layer, why, and what it was measured to cost."""
        return (
            None if self.kronecker_plan is None else Plan.from_json(json.dumps(self.kronecker_plan))
        )

    def kronecker_shapes(self) -> dict[str, list[KronShape]]:
        """Shapes of the terms of the factorised modules, by path in the model without its head.

        Raises:
            ValueError: If an entry is malformed, fits no module or does not divide its weight.
        """
        if not self.kronecker_factors:
            return {}
        layout = self.layout()
        for name in self.kronecker_factors:
            if any(layout.fits(name, path) for path in layout.sizes):
                continue
            read = next((path for path in layout.readers if layout.fits(name, path)), None)
            if read is None:
                raise ValueError(_no_such_module(name, list(layout.sizes)))
            if self.kronecker_factors[name] is not None:
                raise ValueError(
                    f"kronecker_factors has {name!r}, but {layout.readers[read]} reads the weight "
                    f"of {read}, which a factorised layer does not have; leave it out."
                )
        shapes = {}
        for path, (rows, columns) in layout.sizes.items():
            key = layout.longest(self.kronecker_factors, path)
            if key is None or (entry := _checked_entry(key, self.kronecker_factors[key])) is None:
                continue
            try:
                shapes[path] = [
                    KronShape.split(rows, columns, tuple(term["a_shape"]), term["rank"])
                    for term in (entry if isinstance(entry, list) else [entry])
                ]
            except ValueError as error:
                raise ValueError(f"kronecker_factors[{key!r}], for {path}: {error}") from error
            if path == layout.table:
                _check_table(key, shapes[path], rows)
        return shapes

    def entry_of(self, path: str) -> str | None:
        """The name in ``kronecker_factors`` that decides about the module at ``path``, if any."""
        return self.layout().longest(self.kronecker_factors, path)

    @classmethod
    def from_dense(
        cls, base: PreTrainedConfig, kronecker_factors: dict[str, Any], **overrides: Any
    ) -> "KroneckerConfig":
        """``base`` with these factors: every other field, the labels included, carries over.

        Args:
            base: A dense (or another Kronecker) model's configuration; left as it is.
            kronecker_factors: See ``KroneckerConfig``.
            **overrides: Fields that shall differ from ``base``.

        Raises:
            TypeError: If an override is no field of the configuration.
        """
        fields = base.to_dict()
        # transformers would keep a misspelt field without a word.
        if unknown := [n for n in overrides if not hasattr(base, n) and n not in _OURS]:
            nearest = difflib.get_close_matches(unknown[0], fields, n=3)
            raise TypeError(
                f"{unknown[0]!r} is no field of {cls.__name__}; the nearest are {nearest}."
            )
        # These describe the class and the folder that `base` came from.
        for name in _OF_THE_FILE:
            fields.pop(name, None)
        if "num_labels" in overrides:  # the label names would win over it
            fields.pop("id2label", None)
            fields.pop("label2id", None)
        fields |= {"attn_implementation": base._attn_implementation} | overrides
        return cls(**fields | {"kronecker_factors": kronecker_factors})

    def to_dense(self) -> PreTrainedConfig:
        """The dense model's configuration."""
        fields = self.to_dict()
        for name in (*_OF_THE_FILE, *_OURS):
            fields.pop(name, None)
        return self.dense_class(**fields, attn_implementation=self._attn_implementation)

    @classmethod
    def preset(
        cls, name: str, base: PreTrainedConfig | None = None, **overrides: Any
    ) -> "KroneckerConfig":
        """A published configuration, scaled to the widths of ``base``.

        The small factor keeps its shape and the large one takes the rest. At BERT_BASE's widths:

        | name              | attention (A, B) | W1 (A, B)        | embedding B | parameters |
        | ----------------- | ---------------- | ---------------- | ----------- | ---------- |
        | kronecker-bert-8  | 384x384, 2x2     | 8x2, 384x384     | 1x8         | 14,063,624 |
        | kronecker-bert-21 | 384x48, 2x16     | 16x2, 192x384    | 1x16        | 4,637,680  |
        | kronecker-bert-5  | 384x48, 2x16 (¹) | 384x384, 8x2 (¹) | 1x12        | 20,171,916 |
        | kronecker-bert-19 | 384x48, 2x16     | 8x2, 384x384     | 1x32        | 5,674,256  |

        (¹) a sum of four. Parameters are those without the pooler, which has 590,592 more.
        W2 has W1's shapes transposed. 8 and 21 are KroneckerBERT (NAACL 2022), table 1, as printed.
        5 is table 1 corrected: the attention shape printed there, 384x384, would give 45.5 M
        parameters instead of the stated 20 M; with 384x48 the stated size and FLOPs come out.
        19 is inferred: the version of the paper that has it was not available, and these are
        natural shapes that give its 19.3x. On other architectures than BERT it is the same small
        factors, by the modules' roles: attention, into the feed-forward block, out of it, words.

        Args:
            name: One of the names above.
            base: Where all other fields come from; the dense model's defaults if None.
            **overrides: Fields that shall differ from ``base``, widths included.

        Raises:
            ValueError: If there is no such preset, its small factors do not divide the widths, or
                the architecture's modules are not known by role.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}.")
        roles = _ROLES.get(cls.dense_class.model_type)
        if roles is None:
            raise ValueError(
                f"presets are for {', '.join(_ROLES)}, not for {cls.dense_class.model_type}; "
                "choose shapes with kroneckerbert.plan(model, {'parameters': '8x'})."
            )
        preset = PRESETS[name]
        dense = cls.from_dense(cls.dense_class() if base is None else base, {}, **overrides)
        down = _Small(preset.up.side, preset.up.columns, preset.up.rows)
        small = (
            dict.fromkeys(roles.attention, preset.attention)
            | dict.fromkeys(roles.up, preset.up)
            | dict.fromkeys(roles.down, down)
        )
        layout, factors = dense.layout(), {}
        for path, (rows, columns) in layout.sizes.items():
            if path == layout.table:
                _check_width(name, path, "columns", columns, preset.b_size)
                factors[path] = {"a_shape": [rows, columns // preset.b_size], "rank": 1}
                continue
            role = layout.longest(small, path)
            if role is None:
                continue
            side, m, n = small[role]
            _check_width(name, path, "rows", rows, m)
            _check_width(name, path, "columns", columns, n)
            a_shape = [m, n] if side == "A" else [rows // m, columns // n]
            entry = {"a_shape": a_shape, "rank": preset.rank}
            if factors.setdefault(role, entry) != entry:
                factors[path] = entry
        return cls.from_dense(dense, factors)

    def layout(self) -> "Layout":
        """The layers of the dense model that may be factorised, and those that may not."""
        fields = {k: v for k, v in self.to_dict().items() if k not in _NO_STRUCTURE}
        # mypy has it that a class is not hashable.
        return _layout(self.dense_class, json.dumps(fields, sort_keys=True))  # type: ignore[arg-type]


_OF_THE_FILE = ("model_type", "transformers_version", "architectures", "_name_or_path", "auto_map")
_OURS = ("kronecker_factors", "kronecker_plan")
_NO_STRUCTURE = (*_OF_THE_FILE, *_OURS, "id2label", "label2id", "dtype")


class Layout(NamedTuple):
    """The modules of a dense model without its head that may be factorised."""

    prefix: str  # of their paths in the classes with a head
    sizes: dict[str, tuple[int, int]]  # rows and columns of the weight, by path
    table: str | None  # the path of the word embeddings
    readers: dict[str, str]  # by path, the class that reads the weight of a layer not in `sizes`

    def fits(self, name: str, path: str) -> bool:
        return f".{self.prefix}.{path}".endswith(f".{name}")

    def longest(self, names: Iterable[str], path: str) -> str | None:
        return max((name for name in names if self.fits(name, path)), key=len, default=None)


# A model on the meta device takes 20 ms for 12 layers, and a configuration asks several times.
@lru_cache(maxsize=32)
def _layout(dense_class: type[PreTrainedConfig], fields: str) -> Layout:
    with torch.device("meta"):
        model = AutoModel.from_config(dense_class(**json.loads(fields)))
    dense = dict(_dense(model))
    readers = {path: name for path in dense if (name := reader(model, path))}
    modules = {path: module for path, module in dense.items() if path not in readers}
    table = next((path for path, m in modules.items() if isinstance(m, nn.Embedding)), None)
    weights = {path: linear_weight(module) for path, module in modules.items()}
    sizes = {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}
    return Layout(model.base_model_prefix, sizes, table, readers)


def factorisable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of the linear layers and the word embeddings of a model without its head.

    The pooler is not among them: it is small, runs once a sequence, and belongs to the task. Nor
    are layers whose weight another module reads, see ``kron_kernels.readers``.
    """
    return ((path, module) for path, module in _dense(model) if not reader(model, path))


def _dense(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    table = model.get_input_embeddings()
    for path, module in model.named_modules():
        # Not their subclasses, which may do other things.
        is_linear = type(module) in (nn.Linear, Conv1D) and "pooler" not in path.split(".")
        if is_linear or (module is table and type(table) is nn.Embedding):
            yield path, module


def linear_weight(module: Any) -> Tensor:
    """The weight as ``nn.Linear`` has it, ``(rows, columns)``; ``Conv1D`` has the transpose."""
    return module.weight.mT if isinstance(module, Conv1D) else module.weight


_classes: dict[type, type[KroneckerConfig]] = {}  # of dense configurations to ours


def kronecker_config(dense_class: type[PreTrainedConfig]) -> type[KroneckerConfig]:
    """The class ``Kronecker<X>Config`` that adds our fields to ``<X>Config``."""
    if dense_class in _classes:
        return _classes[dense_class]
    namespace = {
        "__module__": __name__,
        "__doc__": f"``{dense_class.__name__}`` and two fields, see ``KroneckerConfig``.",
        "__annotations__": {
            "kronecker_factors": dict[str, Any],
            "kronecker_plan": dict[str, Any] | None,
        },
        "kronecker_factors": field(default_factory=dict),
        "kronecker_plan": None,
        "model_type": model_type(dense_class.model_type),
        "dense_class": dense_class,
    }
    name = f"Kronecker{dense_class.__name__}"
    _classes[dense_class] = strict(type(name, (KroneckerConfig, dense_class), namespace))
    return _classes[dense_class]


def _blank(dense_class: type[PreTrainedConfig]) -> KroneckerConfig:
    from kroneckerbert.modeling_kroneckerbert import register  # AutoModel must know the class

    cls = register(dense_class)
    return cls.__new__(cls)


def _checked_entry(name: str, entry: Any) -> dict | list[dict] | None:
    """The entry with its ranks filled in and in JSON's types."""
    terms = [
        {"a_shape": list(a_shape), "rank": rank}
        for a_shape, rank in terms_of(entry, f"kronecker_factors[{name!r}]")
    ]
    return terms if isinstance(entry, list | tuple) else next(iter(terms), None)


def _check_table(name: str, terms: list[KronShape], rows: int) -> None:
    if len(terms) > 1:
        raise ValueError(
            f"kronecker_factors[{name!r}] has {len(terms)} terms of their own shapes, but a table "
            "of words is looked up in one; give one term, of a higher rank."
        )
    if terms[0].m1 != rows:
        raise ValueError(
            f"kronecker_factors[{name!r}] has a_shape[0] = {terms[0].m1}, but each of the {rows} "
            f"words needs its own row of A; use a_shape = [{rows}, {terms[0].n1}]."
        )


def _no_such_module(name: str, paths: list[str]) -> str:
    # The ends of paths, of which the first layer's stand for all.
    ends = {".".join(p.split(".")[i:]): None for p in paths for i in range(p.count(".") + 1)}
    nearest = difflib.get_close_matches(name, ends, n=3) or list(ends)[:8]
    return (
        f"kronecker_factors has {name!r}, which ends the name of no factorisable module of this "
        f"model; the nearest names are {', '.join(nearest)}."
    )


def _check_width(preset: str, path: str, side: str, width: int, divisor: int) -> None:
    if width % divisor:
        raise ValueError(
            f"the weight of {path} has {width} {side}, not divisible by {divisor}, a side of a "
            f"small factor of {preset}; choose another preset, or shapes that divide with "
            "kroneckerbert.plan."
        )
