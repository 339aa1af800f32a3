"""The encoders of transformers that ``kron_kernels.encoder`` computes, read from their modules.

An architecture here normalises after each block. Its modules must be those that its stock classes
make, with factorised layers in the places of dense ones: whatever else may be among them computes
something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
)
from kron_kernels.encoder import Embedding, Layer, Linear, Norm, Part
from kroneckerbert.fusion import ACTIVATIONS, KroneckerProjection, stock_of

# What stands at the leaves of the trees below.
_LINEAR = (
    nn.Linear,
    KroneckerLinear,
    KroneckerProjection,
    KroneckerSum,
    QuantizedLinear,
    QuantizedSum,
)
_TABLE = (nn.Embedding, KroneckerEmbedding, QuantizedEmbedding)
_NORM = (nn.LayerNorm,)
_DROPOUT = (nn.Dropout,)
_ACTIVATION = tuple(ACTIVATIONS)

_DISTANCES = "relative_attention_bias"  # MPNet's table


class Unserved(Exception):
    """Why an encoder cannot be computed in one call, as the end of a sentence."""


class Node(NamedTuple):
    """A stock module: the end of its class's name, and its children."""

    name: str
    children: dict[str, Any]  # to a Node or the classes of a leaf


class Parts(NamedTuple):
    """The arguments of ``kron_kernels.encoder.Encoder``."""

    embedding: Embedding
    layers: list[Layer]
    heads: int
    scale: float


class Inputs(NamedTuple):
    """The arguments of a base model's forward that choose rows of its tables."""

    input_ids: Tensor | None  # (sequences, length)
    embeddings: Tensor | None  # (sequences, length, width), if there are no ids
    position_ids: Tensor | None  # (sequences, length) or (1, length)
    token_type_ids: Tensor | None  # likewise

    @property
    def shape(self) -> tuple[int, int]:
        given = self.embeddings if self.input_ids is None else self.input_ids
        return given.shape[0], given.shape[1]


class Architecture(NamedTuple):
    """What tells one architecture's base model from another's."""

    embeddings: Node
    encoder: str  # the child with the layers
    layer: Node
    read: Callable[[Any], Layer]  # of a layer's modules
    attention: Callable[[Any], tuple[Any, int, int]]  # of a layer: module, heads, size of a head
    positions: Callable[[Any, Inputs], Tensor]  # of the embeddings, if no position_ids are given
    output: type[Any]
    # MPNet: attention has relative positions, and the model's forward is of the older kind, which
    # takes None for the configuration's value and keeps a pooler's None in a tuple.
    distances: bool = False
    older: bool = False

    def classes(self, dense: type) -> list[Any]:
        """``dense`` and the stock classes of its modules, None for one that is not there."""
        names = [self.encoder.capitalize(), *_names(self.embeddings), *_names(self.layer)]
        return [dense, *(_class(dense, name) for name in names)]

    def modules(self, model: Any) -> list[nn.Module]:
        """All modules of a model's encoder, without the model itself and its pooler.

        Raises:
            Unserved: If one is missing, or of another class than expected.
        """
        dense, children, name = type(model).dense_class, model._modules, self.encoder
        found = [*_walk(dense, "embeddings", children.get("embeddings"), self.embeddings)]
        if project := children.get("embeddings_project"):  # ELECTRA, if the widths differ
            found += _walk(dense, "embeddings_project", project, _LINEAR)
        encoder: Any = children.get(name)
        _expect(name, encoder, (_class(dense, name.capitalize()),))
        _expect_children(name, encoder, {"layer", *([_DISTANCES] if self.distances else [])})
        layers = encoder._modules["layer"]
        _expect(f"{name}.layer", layers, (nn.ModuleList,))
        found += [encoder, layers]
        for i, layer in layers._modules.items():
            found += _walk(dense, f"{name}.layer.{i}", layer, self.layer)
        if self.distances:
            table = encoder._modules[_DISTANCES]
            found += _walk(dense, f"{name}.{_DISTANCES}", table, _TABLE)
        return found

    def parts(self, model: Any) -> Parts:
        """The tensors of a model whose modules were checked.

        Raises:
            Unserved: If a module computes something else than its tensors say.
        """
        m = model.embeddings
        names = (n for n in m._modules if n.endswith("_embeddings"))
        order = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        tables = [_table(f"embeddings.{n}", m._modules[n]) for n in sorted(names, key=order.index)]
        project = model._modules.get("embeddings_project")
        embedding = Embedding(
            tables,
            _norm("embeddings.LayerNorm", m.LayerNorm),
            None if project is None else _linear("embeddings_project", project),
        )
        layers, kinds = [], set()
        for i, layer in enumerate(getattr(model, self.encoder).layer):
            attention, heads, size = self.attention(layer)
            scale = getattr(attention, "scaling", size**-0.5)
            kinds.add((heads, size, scale))
            try:
                layers.append(self.read(layer))
            except Unserved as reason:
                raise Unserved(f"{self.encoder}.layer.{i}.{reason}") from None
            rows = {_rows(linear) for linear in layers[-1][:3]}
            if rows != {heads * size}:
                raise Unserved(f"{self.encoder}.layer.{i} has heads of other sizes than {size}")
        if len(kinds) != 1:
            raise Unserved("its layers have different heads" if kinds else "it has no layers")
        heads, _, scale = kinds.pop()
        return Parts(embedding, layers, heads, scale)

    def ids(
        self, model: Any, inputs: Inputs, known: dict[int, list[Tensor]] | None = None
    ) -> list[Tensor | None]:
        """The rows of each table, int64, as the stock embeddings choose them.

        Args:
            model: A base model.
            inputs: The arguments of its call.
            known: Keeps the rows that depend on nothing but the length, which take 15 µs to 40 µs.
                A change of the embeddings' buffers must empty it.
        """
        embeddings, (rows, length) = model.embeddings, inputs.shape
        words, _, positions, types = inputs
        if words is not None:
            words = words.long()
        known = {} if known is None else known
        chosen = positions is not None or types is not None or self.positions is not _from_zero
        if chosen or length not in known:
            if positions is None:
                positions = self.positions(embeddings, inputs)
            others = [positions.long()]
            if "token_type_embeddings" in embeddings._modules:
                if types is None:  # zeros, unless someone has changed them
                    table = _buffer(embeddings, "token_type_ids").expand(len(positions), -1)
                    types = torch.gather(table, 1, others[0])
                others.append(types.long())
            if not chosen:
                known[length] = others
        else:
            others = known[length]
        return [words, *(t if len(t) == rows else t.expand(rows, length) for t in others)]

    def distance_bias(self, model: Any, length: int) -> Tensor | None:
        """Added to the scores, ``(heads, 2 * length - 1)``, by query's place minus key's."""
        if not self.distances:
            return None
        encoder = model.encoder
        bias = encoder.relative_attention_bias(_buckets(encoder.relative_position_bucket, length))
        return bias.t().contiguous()


def architecture_of(dense: type) -> Architecture | None:
    """The architecture of a base model's stock class, if the encoder can compute it."""
    name = dense.__name__
    return _ARCHITECTURES.get(name) if getattr(transformers, name, None) is dense else None


# --- checks


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, Node):
        yield tree.name
        for child in tree.children.values():
            yield from _names(child)


def _class(dense: type, name: str) -> Any:
    """A stock class of the base model's file: ``Layer`` is ``BertLayer`` for a ``BertModel``."""
    module = sys.modules[dense.__module__]
    full = dense.__name__.removesuffix("Model") + name
    return getattr(module, full, None) or getattr(module, name, None)


def _walk(dense: type, path: str, module: Any, tree: Any) -> Iterator[nn.Module]:
    if isinstance(tree, Node):
        _expect(path, module, (_class(dense, tree.name),))
        _expect_children(path, module, tree.children.keys())
        yield module
        for name, child in tree.children.items():
            yield from _walk(dense, f"{path}.{name}", module._modules[name], child)
        return
    _expect(path, module, tree)
    yield module
    if type(module) in (KroneckerSum, QuantizedSum):
        parts: Any = module._modules.get("parts")
        _expect(f"{path}.parts", parts, (nn.ModuleList,))
        yield parts
        kind = KroneckerLinear if type(module) is KroneckerSum else QuantizedLinear
        for i, part in parts._modules.items():
            yield from _walk(dense, f"{path}.parts.{i}", part, (kind,))


def _expect(path: str, module: Any, classes: tuple[type, ...]) -> None:
    if stock_of(type(module)) not in classes:
        names = " or ".join(cls.__name__ for cls in classes[:2])
        raise Unserved(f"{path} is a {type(module).__name__}, and must be a {names}")


def _expect_children(path: str, module: nn.Module, names: Any) -> None:
    if differing := module._modules.keys() ^ names:
        raise Unserved(f"{path} has other parts than usual: {', '.join(sorted(differing))}")


# --- tensors


def _parameter(path: str, module: nn.Module, name: str) -> Tensor:
    found = module._parameters.get(name)
    if found is None:
        raise Unserved(f"{path}.{name} is not a parameter")
    return found.detach()


def _optional(path: str, module: nn.Module, name: str) -> Tensor | None:
    """A parameter that may be None."""
    absent = name in module._parameters and module._parameters[name] is None
    return None if absent else _parameter(path, module, name)


def _buffer(embeddings: Any, name: str) -> Tensor:
    found = embeddings._buffers.get(name)
    if found is None:
        raise Unserved(f"embeddings.{name} is not a buffer")
    return found


def _linear(path: str, module: Any) -> Linear:
    parts = list(module.parts) if type(module) in (KroneckerSum, QuantizedSum) else [module]
    weights: list[Part] = []
    for part in parts:
        if part is not module and part._parameters.get("bias") is not None:
            raise Unserved(f"{path} has a bias in one of its parts")
        if (backend := getattr(part, "backend", "auto")) not in ("auto", "native"):
            raise Unserved(f"{path} asks for backend={backend!r}")
        weights.append(_factors(path, part))
    return Linear(weights, _optional(path, module, "bias"))


def _factors(path: str, module: Any) -> Part:
    """The factors of a product or a table."""
    if type(module) in (QuantizedLinear, QuantizedEmbedding):
        return module.factors
    if type(module) in (nn.Linear, nn.Embedding):
        return (_parameter(path, module, "weight"),)
    return tuple(_parameter(path, module, name) for name in ("a", "b"))


def _rows(linear: Linear) -> int:
    return prod(f.shape[-2] for f in linear.parts[0])


def _table(path: str, module: Any) -> Part:
    if getattr(module, "max_norm", None) is not None:
        raise Unserved(f"{path} has max_norm")
    return _factors(path, module)


def _norm(path: str, module: Any) -> Norm:
    if len(module.normalized_shape) != 1:
        raise Unserved(f"{path} normalises {module.normalized_shape}, not the last dimension")
    names = ("weight", "bias")
    weight, bias = (_optional(path, module, name) for name in names)
    return Norm(weight, bias, module.eps)


# --- architectures


def _after_padding(embeddings: Any, inputs: Inputs) -> Tensor:
    """RoBERTa numbers tokens from ``padding_idx + 1`` on; padding has ``padding_idx``."""
    padding, ids = embeddings.padding_idx, inputs.input_ids
    if ids is None:
        return torch.arange(padding + 1, padding + 1 + inputs.shape[1])[None]
    is_token = ids.ne(padding)
    return is_token.cumsum(1).mul_(is_token).add_(padding)


def _from_zero(embeddings: Any, inputs: Inputs) -> Tensor:
    positions, length = _buffer(embeddings, "position_ids"), inputs.shape[1]
    if length > positions.shape[1]:
        raise Unserved(f"{length} tokens are more than its {positions.shape[1]} positions")
    return positions[:, :length]


@lru_cache(maxsize=64)
def _buckets(bucket: Callable[[Tensor], Tensor], length: int) -> Tensor:
    """Rows of MPNet's table of relative positions, by ``length - 1 + query - key``."""
    with torch.inference_mode(False):
        return bucket(torch.arange(length - 1, -length, -1))


def _read_bert(m: Any) -> Layer:
    q, k, v = (
        _linear(f"attention.self.{name}", getattr(m.attention.self, name))
        for name in ("query", "key", "value")
    )
    return Layer(
        q,
        k,
        v,
        _linear("attention.output.dense", m.attention.output.dense),
        _norm("attention.output.LayerNorm", m.attention.output.LayerNorm),
        *_read_block(m),
    )


def _read_mpnet(m: Any) -> Layer:
    q, k, v, o = (_linear(f"attention.attn.{n}", getattr(m.attention.attn, n)) for n in "qkvo")
    return Layer(q, k, v, o, _norm("attention.LayerNorm", m.attention.LayerNorm), *_read_block(m))


def _read_block(m: Any) -> Sequence[Any]:
    act, _ = ACTIVATIONS[type(m.intermediate.intermediate_act_fn)]
    up = _linear("intermediate.dense", m.intermediate.dense)
    return (
        up,
        act,
        _linear("output.dense", m.output.dense),
        _norm("output.LayerNorm", m.output.LayerNorm),
    )


def _read_distilbert(m: Any) -> Layer:
    q, k, v, o = (
        _linear(f"attention.{name}", getattr(m.attention, name))
        for name in ("q_lin", "k_lin", "v_lin", "out_lin")
    )
    up, down = (_linear(f"ffn.{name}", getattr(m.ffn, name)) for name in ("lin1", "lin2"))
    act, _ = ACTIVATIONS[type(m.ffn.activation)]
    return Layer(
        q,
        k,
        v,
        o,
        _norm("sa_layer_norm", m.sa_layer_norm),
        up,
        act,
        down,
        _norm("output_layer_norm", m.output_layer_norm),
    )


def _heads(module: Any) -> tuple[Any, int, int]:
    return module, module.num_attention_heads, module.attention_head_size


_DROPPED = {"dropout": _DROPOUT}
_NORMED = {"LayerNorm": _NORM, **_DROPPED}
_EMBEDDINGS = {"word_embeddings": _TABLE, "position_embeddings": _TABLE, **_NORMED}
_TYPED = {**_EMBEDDINGS, "token_type_embeddings": _TABLE}
_OUTPUT = {"dense": _LINEAR, **_NORMED}
_BLOCK = {
    "intermediate": Node("Intermediate", {"dense": _LINEAR, "intermediate_act_fn": _ACTIVATION}),
    "output": Node("Output", _OUTPUT),
}
_SELF = {"query": _LINEAR, "key": _LINEAR, "value": _LINEAR, **_DROPPED}
_BERT = Architecture(
    Node("Embeddings", _TYPED),
    "encoder",
    Node(
        "Layer",
        {
            "attention": Node(
                "Attention",
                {"self": Node("SelfAttention", _SELF), "output": Node("SelfOutput", _OUTPUT)},
            ),
            **_BLOCK,
        },
    ),
    _read_bert,
    lambda layer: _heads(layer.attention.self),
    _from_zero,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
_ROBERTA = _BERT._replace(positions=_after_padding)
_DISTILBERT = Architecture(
    Node("Embeddings", _EMBEDDINGS),
    "transformer",
    Node(
        "TransformerBlock",
        {
            "attention": Node(
                "SelfAttention",
                {**dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin"), _LINEAR), **_DROPPED},
            ),
            "sa_layer_norm": _NORM,
            "ffn": Node(
                "FFN", {"lin1": _LINEAR, "lin2": _LINEAR, "activation": _ACTIVATION, **_DROPPED}
            ),
            "output_layer_norm": _NORM,
        },
    ),
    _read_distilbert,
    lambda layer: (layer.attention, layer.attention.n_heads, layer.attention.attention_head_size),
    _from_zero,
    BaseModelOutput,
)
_MPNET = Architecture(
    Node("Embeddings", _EMBEDDINGS),
    "encoder",
    Node(
        "Layer",
        {
            "attention": Node(
                "Attention",
                {
                    "attn": Node("SelfAttention", {**dict.fromkeys("qkvo", _LINEAR), **_DROPPED}),
                    **_NORMED,
                },
            ),
            **_BLOCK,
        },
    ),
    _read_mpnet,
    lambda layer: _heads(layer.attention.attn),
    _after_padding,
    BaseModelOutputWithPooling,
    distances=True,
    older=True,
)
_ARCHITECTURES = {
    "BertModel": _BERT,
    "ElectraModel": _BERT._replace(output=BaseModelOutputWithPastAndCrossAttentions),
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "DistilBertModel": _DISTILBERT,
    "MPNetModel": _MPNET,
}
