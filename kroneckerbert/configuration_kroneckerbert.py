"""Configurations of Kronecker models: the dense model's fields, and factors of its layers."""

# No `from __future__ import annotations`: @strict validates by the annotations' values.
import difflib
import json
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from kron_kernels import KronShape
from kron_kernels.factors import (
    deciding_name,
    ends_of,
    names_layer,
    no_such_layer,
    parse,
    shapes_of,
    term_of,
)
from kron_kernels.modules import dense_layers, linear_weight, obstacles
from kron_kernels.plan import Plan
from kroneckerbert import model_type
from kroneckerbert.presets import preset_factors

_OF_THE_FILE = ("model_type", "transformers_version", "architectures", "_name_or_path", "auto_map")
_OURS = ("kronecker_factors", "kronecker_plan", "kronecker_int8")
_NO_STRUCTURE = (*_OF_THE_FILE, *_OURS, "id2label", "label2id", "dtype")

# Every subclass has a dense configuration class among its bases, which provides the other fields.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Base
else:
    _Base = object


class KroneckerConfig(_Base):
    """Fields and methods that every configuration of a Kronecker model adds to the dense one's.

    Its subclasses are made by ``kronecker_config``: ``KroneckerBertConfig``,
    ``KroneckerRobertaConfig``, …

    Attributes:
        kronecker_factors: From a module's name to ``{"a_shape": [m1, n1], "rank": r}`` (``rank`` is
            1 if left out), to a list of such terms, whose sum is the weight, or to None, which
            keeps the module dense. A name is the end of the module's path, cut at a dot:
            ``"intermediate.dense"`` is that module in every layer,
            ``"layer.3.intermediate.dense"`` in one. The longest name that fits decides. Modules
            without a name are dense: the default, an empty dict, is an ordinary dense model. The
            linear layers of the model without its head and pooler can be factorised, and the word
            embeddings, with ``m1`` the size of the vocabulary; but not layers whose weight another
            module reads. ``"output.dense"`` also fits ``"attention.output.dense"`` unless
            that has its own entry.

        kronecker_plan: The plan that chose the factors, if any, see ``plan``.

        kronecker_int8: Paths, in the model without its head, of the layers whose large factors are
            int8, see ``kroneckerbert.quantize``.

    Raises:
        ValueError: If an entry is malformed, fits no module or does not divide its weight. This is
            checked here, and again when a model is built.
    """

    dense_class: type[PreTrainedConfig]  # the configuration that this one extends
    kronecker_factors: dict[str, Any]
    kronecker_plan: dict[str, Any] | None
    kronecker_int8: list[str]

    def __post_init__(self, **kwargs: Any):
        found = kwargs.get("model_type", self.model_type)
        if found != self.model_type:
            raise ValueError(
                f"model_type = {found!r} in a configuration that must be {self.model_type!r}: this "
                "is a dense model, which has no factors. Load it with its own class and factorise "
                "it with kroneckerbert.compress(model, 'kronecker-bert-8')."
            )
        super().__post_init__(**kwargs)
        # A copy in JSON's types: equal before and after saving.
        self.kronecker_factors = {
            name: _normalised(name, entry) for name, entry in self.kronecker_factors.items()
        }
        self.kronecker_shapes()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Our classes are made on demand, and a new process has none yet.
        cls = type(self)
        if _classes.get(cls.dense_class) is not cls:  # a user's subclass
            return super().__reduce_ex__(protocol)
        return _blank, (cls.dense_class,), self.__getstate__()

    @property
    def plan(self) -> Plan | None:
        """The plan that chose the factors, with the reasons and the measured costs."""
        made = self.kronecker_plan
        return None if made is None else Plan.from_json(json.dumps(made))

    def kronecker_shapes(self) -> dict[str, list[KronShape]]:
        """Shapes of the terms of the factorised modules, by path in the model without its head.

        Raises:
            ValueError: If an entry is malformed, fits no module or does not divide its weight.
        """
        if not self.kronecker_factors:
            return {}
        layout = self.layout()
        for name, entry in self.kronecker_factors.items():
            if any(layout.fits(name, path) for path in layout.sizes):
                continue
            reasons = {p: why for p, why in layout.obstacles.items() if layout.fits(name, p)}
            if not reasons:
                nearest = no_such_layer(name, ends_of(layout.sizes))
                raise ValueError(f"kronecker_factors has {name!r}, {nearest}")
            if entry is not None:
                path, reason = next(iter(reasons.items()))
                raise ValueError(
                    f"kronecker_factors has {name!r}, but {path} cannot be factorised: {reason}; "
                    "leave it out."
                )
        shapes = {}
        for path, size in layout.sizes.items():
            key = deciding_name(self.kronecker_factors, f"{layout.prefix}.{path}")
            if key is None or self.kronecker_factors[key] is None:
                continue
            label = f"kronecker_factors[{key!r}]"
            parts = parse(self.kronecker_factors[key], label)
            is_table = path == layout.table
            shapes[path] = list(shapes_of(parts, size, is_table, f"{label}, for {path}"))
        return shapes

    def entry_of(self, path: str) -> str | None:
        """The name in ``kronecker_factors`` that decides about the module at ``path``, if any."""
        return deciding_name(self.kronecker_factors, f"{self.layout().prefix}.{path}")

    @classmethod
    def from_dense(
        cls, base: PreTrainedConfig, kronecker_factors: dict[str, Any], **overrides: Any
    ) -> "KroneckerConfig":
        """``base`` with these factors; all other fields, including the labels, carry over.

        Args:
            base: A dense (or another Kronecker) model's configuration; left as it is.
            kronecker_factors: See ``KroneckerConfig``.
            **overrides: Fields that differ from ``base``.

        Raises:
            TypeError: If an override is not a field of the configuration.
        """
        fields = base.to_dict()
        # transformers would silently keep a misspelt field.
        if unknown := [n for n in overrides if not hasattr(base, n) and n not in _OURS]:
            nearest = difflib.get_close_matches(unknown[0], fields, n=3)
            raise TypeError(
                f"{unknown[0]!r} is not a field of {cls.__name__}; the nearest are {nearest}."
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

        (¹) a sum of four. Parameters do not include the pooler, which has 590,592 more.
        W2 has W1's shapes transposed. 8 and 21 are KroneckerBERT (NAACL 2022), table 1, as printed.
        5 is table 1 corrected: the attention shape printed there, 384x384, would give 45.5 M
        parameters instead of the stated 20 M; with 384x48 the stated size and FLOPs come out.
        19 is inferred: the version of the paper that has it was not available, and these are
        natural shapes that give its 19.3x. Other architectures than BERT get the same small
        factors in the modules of the same roles.

        A suffix replaces products by low rank of at most as many parameters: ``+low-rank-words``,
        ``+low-rank-attention``, ``+low-rank-feed-forward``, several of them, or ``+low-rank`` for
        all three.

        Args:
            name: One of the names above, with suffixes or without.
            base: Configuration with all other fields; the dense model's defaults if None.
            **overrides: Fields that differ from ``base``, including widths.

        Raises:
            ValueError: If the preset or a suffix is unknown, its small factors do not divide the
                widths, or the architecture has no presets.
        """
        dense = cls.from_dense(cls.dense_class() if base is None else base, {}, **overrides)
        factors = preset_factors(name, cls.dense_class.model_type, dense.layout())
        return cls.from_dense(dense, factors)

    def layout(self) -> "Layout":
        """The layers of the dense model."""
        fields = {k: v for k, v in self.to_dict().items() if k not in _NO_STRUCTURE}
        # mypy considers classes unhashable.
        return _layout(self.dense_class, json.dumps(fields, sort_keys=True))  # type: ignore[arg-type]


class Layout(NamedTuple):
    """The linear layers and word embeddings of a model without its head."""

    prefix: str  # before their paths in the classes with a head
    sizes: dict[str, tuple[int, int]]  # rows and columns of the weights that can be factorised
    table: str | None  # the path of the word embeddings in `sizes`
    obstacles: dict[str, str]  # why the others cannot, by path

    def fits(self, name: str, path: str) -> bool:
        return names_layer(name, f"{self.prefix}.{path}")


def layout_of(model: PreTrainedModel) -> Layout:
    """The layers of a model without its head.

    The pooler is not among them: it is small, runs once per sequence, and belongs to the task.
    """
    words = model.get_input_embeddings()
    layers = {
        path: layer
        for path, layer in dense_layers(model).items()
        if (layer is words if isinstance(layer, nn.Embedding) else "pooler" not in path.split("."))
    }
    reasons = obstacles(model, allow_tied=True)
    sizes = {}
    for path, layer in layers.items():
        if path not in reasons:
            rows, columns = linear_weight(layer).shape
            sizes[path] = rows, columns
    return Layout(
        model.base_model_prefix,
        sizes,
        next((path for path in sizes if layers[path] is words), None),
        {path: reasons[path] for path in layers if path in reasons},
    )


# A model on the meta device takes 20 ms for 12 layers, and a configuration needs several.
@lru_cache(maxsize=32)
def _layout(dense_class: type[PreTrainedConfig], fields: str) -> Layout:
    with torch.device("meta"):
        return layout_of(AutoModel.from_config(dense_class(**json.loads(fields))))


_classes: dict[type, type[KroneckerConfig]] = {}  # of dense configurations to ours


def kronecker_config(dense_class: type[PreTrainedConfig]) -> type[KroneckerConfig]:
    """The class ``Kronecker<X>Config`` that adds our fields to ``<X>Config``."""
    if dense_class in _classes:
        return _classes[dense_class]
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"``{dense_class.__name__}`` and three fields, see ``KroneckerConfig``.",
        "__annotations__": {
            "kronecker_factors": dict[str, Any],
            "kronecker_plan": dict[str, Any] | None,
            "kronecker_int8": list[str],
        },
        "kronecker_factors": field(default_factory=dict),
        "kronecker_plan": None,
        "kronecker_int8": field(default_factory=list),
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


def _normalised(name: str, entry: Any) -> dict | list[dict] | None:
    """The entry with its ranks filled in, in JSON's types."""
    terms = [term_of(*part) for part in parse(entry, f"kronecker_factors[{name!r}]")]
    return terms if isinstance(entry, list | tuple) else next(iter(terms), None)
