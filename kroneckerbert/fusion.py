"""Feed-forward blocks, and an attention's query, key and value, each computed in one call.

The module that calls the layers decides at every call, from its present children: adapters may have
replaced one, and hooks must be called. No child refers to another; copies, replicas and blocks with
half of another block are therefore correct without further code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from kron_kernels import KroneckerLinear, kron_feed_forward, kron_qkv
from kron_kernels.calls import unobserved
from kron_kernels.checks import Activation
from kron_kernels.nn import readable

# Activation modules of transformers: the name for kron_feed_forward, and the forward that the name
# replaces, which may be patched.
ACTIVATIONS: dict[type, tuple[Activation, Callable]] = {
    GELUActivation: ("gelu", GELUActivation.forward),
    GELUTanh: ("gelu_tanh", GELUTanh.forward),
    NewGELUActivation: ("gelu_tanh", NewGELUActivation.forward),
    nn.ReLU: ("relu", nn.ReLU.forward),
    nn.SiLU: ("silu", nn.SiLU.forward),
    SiLUActivation: ("silu", SiLUActivation.forward),
}
_dropout_forward = nn.Dropout.forward
# Blocks in one module: the names of its two layers and of the activation between them.
_WHOLE_BLOCKS = (
    ("lin1", "activation", "lin2"),  # DistilBERT
    ("c_fc", "act", "c_proj"),  # GPT-2
)
# Query, key and value of a self-attention. Not DeBERTa's: it projects relative positions as well.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
)


def fuse(model: nn.Module) -> None:
    """Make a model's blocks call ``kron_feed_forward`` and ``kron_qkv``, in place.

    Names of modules and classes, keys and results stay. Gated blocks (ModernBERT, Llama) are left
    alone, and so are blocks whose forward does not combine its parts as BERT's does.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        for mixin in (_Attention, _Layer, _Block):
            stock: Any = type(module)
            if not issubclass(stock, _Fused) and mixin.prepare(module):
                module.__class__ = _subclass_of(mixin, stock)


class _Fused(nn.Module):
    """Base of mixins: ``_subclass_of`` makes a class of one and a stock class, with its name.

    The class is made on demand, which pickle must be able to repeat.
    """

    stock: ClassVar[type[nn.Module]]
    followed: ClassVar[tuple[Callable | None, ...]]  # the stock functions that were checked

    @staticmethod
    def prepare(module: Any) -> bool:
        """Whether a module can be fused; if so, set the attributes that its fused forward needs."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        if "stock" not in cls.__dict__:  # derived from a fused class, as FSDP2 does
            return super().__reduce_ex__(protocol)
        return _blank, cls.__bases__, self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        cls: Any = type(self)
        if "stock" in cls.__dict__:  # checked again: transformers may be of another version
            self.__class__ = cls.stock
            if cls.prepare(self):
                self.__class__ = cls


def stock_of(cls: type) -> type:
    """The stock class of a fused one; any other class itself."""
    return vars(cls).get("stock", cls)


@cache
def _subclass_of(mixin: Any, stock: Any) -> Any:
    namespace = {
        # Other tools find classes by name: layers to wrap, to keep on one device, to record.
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "stock": stock,
        "followed": _functions(stock),
    }
    return type(stock.__name__, (mixin, stock), namespace)


def _blank(mixin: Any, stock: Any) -> nn.Module:
    cls = _subclass_of(mixin, stock)
    return cls.__new__(cls)


# --- an attention's three products


# Of the attention that is running in this thread.
_ahead: ContextVar[_Ahead | None] = ContextVar("ahead", default=None)


class _Attention(_Fused):
    """In inference the first of query, key and value computes all three."""

    projections: tuple[str, str, str]
    shares_input: bool  # True until a call shows otherwise

    @staticmethod
    def prepare(module: Any) -> bool:
        for names in _PROJECTIONS:
            layers = [module._modules.get(name) for name in names]
            if all(type(layer) in (KroneckerLinear, KroneckerProjection) for layer in layers):
                for layer in layers:
                    layer.__class__ = KroneckerProjection
                module.projections, module.shares_input = names, True
                return True
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or is_recorded or not self.shares_input:
            return super().forward(*args, **kwargs)
        layers: list[Any] = [self._modules.get(name) for name in self.projections]
        if not _of_one_call(layers):
            return super().forward(*args, **kwargs)
        ahead = _Ahead(layers)
        outer = _ahead.set(ahead)
        try:
            y = super().forward(*args, **kwargs)
        finally:
            _ahead.reset(outer)
        if ahead.ready:  # computed but not used, as in a cross-attention
            self.shares_input = False
        return y


class KroneckerProjection(KroneckerLinear):
    """A query, key or value layer; returns the output that is ready for this input, if any."""

    to_linear = KroneckerLinear.to_linear  # valid because forward is not overridden

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (ahead := _ahead.get()) is not None:
            y = ahead.take(self, x)
            if y is not None:
                return y
        return super().forward(x)


_projection_forward = KroneckerProjection.forward


def _of_one_call(layers: Sequence[Any]) -> bool:
    return (
        all(type(layer) is KroneckerProjection and unobserved(layer) for layer in layers)
        and KroneckerProjection.forward is _projection_forward
        and layers[0].in_features == layers[1].in_features == layers[2].in_features
        and layers[0].backend == layers[1].backend == layers[2].backend
    )


class _Ahead:
    """Outputs of three layers for one input, during one call of their attention.

    Only the attention's own forward runs between the three calls: with hooks, ``_of_one_call`` is
    false.
    """

    def __init__(self, layers: Sequence[KroneckerProjection]):
        self.layers = layers
        self.ready: dict[int, Tensor] | None = None

    def take(self, layer: KroneckerProjection, x: Tensor) -> Tensor | None:
        """The layer's output if it is one of the three and x is their common input, else None."""
        if torch.is_grad_enabled() or not any(layer is known for known in self.layers):
            return None
        # Inference tensors have no version. An attention that writes to its input between the
        # projections could not be trained, and is not expected.
        version = None if x.is_inference() else x._version
        if self.ready is None:
            ys = kron_qkv(
                x, *((m.a, m.b, m.bias) for m in self.layers), backend=self.layers[0].backend
            )
            self.x, self.version = x, version
            self.ready = dict(zip(map(id, self.layers), ys, strict=True))
        if x is not self.x or version != self.version:
            return None
        return self.ready.pop(id(layer), None)


# --- feed-forward blocks


class _Layer(_Fused):
    """A layer whose block is in two children, as in BERT and its descendants.

    Its stock forward runs with stand-ins for both: the first returns its input, the second computes
    the block, ``LayerNorm(dropout(down(act(up(x)))) + residual)``.
    """

    @staticmethod
    def prepare(module: Any) -> bool:
        intermediate, output = (module._modules.get(name) for name in ("intermediate", "output"))
        if intermediate is None or output is None:
            return False
        x, residual = ("x",), ("residual",)
        dropped = ("dropout", ("dense", x))
        if _expression(intermediate, x) != ("intermediate_act_fn", ("dense", x)):
            return False
        if _expression(output, x, residual) != ("LayerNorm", dropped + residual):
            return False
        if not _calls_one_after_the_other(module):
            return False
        _halves[type(intermediate).forward] = "intermediate"
        _halves[type(output).forward] = "output"
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if _as_followed(self):
            block = _block_of(self._modules.get("intermediate"), self._modules.get("output"))
            if block is not None:
                module = _StandIn(self, intermediate=lambda x: x, output=block)
        return type(self).stock.forward(module, *args, **kwargs)


class _Block(_Fused):
    """A block in one module: ``dropout(down(act(up(x))))``."""

    parts: tuple[str, str, str]

    @staticmethod
    def prepare(module: Any) -> bool:
        x = ("x",)
        for up, act, down in _WHOLE_BLOCKS:
            if {up, act, down, "dropout"} <= module._modules.keys():
                module.parts = up, act, down
                return _expression(module, x) == ("dropout", (down, (act, (up, x))))
        return False

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, act, down = map(self._modules.get, self.parts)
        activation = _fused_activation(up, act, down)
        if activation is None or not _as_followed(self) or "ff_chunk" in self.__dict__:
            return super().forward(hidden_states)
        return self.dropout(_feed_forward(hidden_states, up, down, activation))


# Checked forward functions of halves. By function: a half may be replaced by another module, and a
# class may be patched.
_halves: dict[Callable | None, str] = {}


def _block_of(intermediate: Any, output: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A function that computes both halves; None if that could differ from their calls."""
    if not (
        _halves.get(getattr(type(intermediate), "forward", None)) == "intermediate"
        and _halves.get(getattr(type(output), "forward", None)) == "output"
        and unobserved(intermediate)
        and unobserved(output)
    ):
        return None
    # Not as attributes: nn.Module.__getattr__ takes longer than everything else here.
    up: Any = intermediate._modules.get("dense")
    act = intermediate._modules.get("intermediate_act_fn")
    down: Any = output._modules.get("dense")
    activation = _fused_activation(up, act, down)
    if activation is None:
        return None

    def block(x: Tensor, residual: Tensor) -> Tensor:
        if _does_nothing(output.dropout):
            return output.LayerNorm(_feed_forward(x, up, down, activation, residual))
        return output.LayerNorm(output.dropout(_feed_forward(x, up, down, activation)) + residual)

    return block


def _fused_activation(up: Any, act: Any, down: Any) -> Activation | None:
    """The activation's name if the three modules can be computed in one call, else None."""
    if not (readable(up) and readable(down) and up.backend == down.backend):
        return None
    known = ACTIVATIONS.get(type(act))
    if known is None or type(act).forward is not known[1] or not unobserved(act):
        return None
    return known[0]


def _does_nothing(dropout: nn.Module) -> bool:
    return (
        type(dropout) is nn.Dropout
        and nn.Dropout.forward is _dropout_forward
        and unobserved(dropout)
        and not (dropout.training and dropout.p)
    )


def _feed_forward(
    x: Tensor,
    up: Any,
    down: Any,
    activation: Activation,
    residual: Tensor | None = None,
) -> Tensor:
    layers = (up.a, up.b, up.bias), (down.a, down.b, down.bias)
    return kron_feed_forward(
        x, *layers, activation=activation, residual=residual, backend=up.backend
    )


# --- whether a stock forward combines the parts as expected


def _functions(stock: type) -> tuple[Callable | None, ...]:
    """The present functions of a class that combine the parts of a block."""
    names = "forward", "feed_forward_chunk", "ff_chunk"
    return tuple(getattr(stock, name, None) for name in names)


def _as_followed(module: _Fused) -> bool:
    return _functions(type(module).stock) == type(module).followed


class _StandIn:
    """A module with other values for some attributes, for one call of its class's forward."""

    # GradientCheckpointingLayer compares forward with its class's, to checkpoint only once.
    forward = None

    def __init__(self, module: nn.Module, **given: Any):
        self.__dict__.update(given, _module=module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        is_own = isinstance(value, MethodType) and value.__self__ is self._module
        # A method set on the instance is bound to the module itself.
        return (
            value.__func__.__get__(self) if is_own and name not in self._module.__dict__ else value
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a forward with stand-ins must not set attributes")


def _expression(module: nn.Module, *inputs: tuple) -> Any:
    """The expression that a module's forward computes, or None if it cannot be followed.

    The forward is called with tuples for tensors: the result of a child is ``(its name, *its
    inputs)``, and the only operation is ``+``, which joins tuples. It has methods and children but
    no other attributes of the module, so the expression holds for the whole class.
    """

    def child(name: str) -> Callable[..., tuple]:
        return lambda *given: (name, *given)

    cls = type(module)
    return _result(cls.__new__(cls), {name: child(name) for name in module._modules}, *inputs)


def _calls_one_after_the_other(layer: nn.Module) -> bool:
    """Whether a layer calls ``output(intermediate(x), x)`` once, and uses ``hidden`` only there.

    Found by a call of its forward with tuples for tensors.
    """
    hidden = ("hidden",)
    given: list[Any] = []

    def other(*args: Any, **kwargs: Any) -> tuple:
        if any(value is hidden for value in (*args, *kwargs.values())):
            raise ValueError
        return ("attended",), ()  # the output and the weights of an attention

    def intermediate(x: Any) -> tuple:
        given.append(x)
        return hidden

    def output(x: Any, residual: Any) -> tuple:
        given.extend((x, residual))
        return ("output",)

    children: dict[str, Any] = dict.fromkeys(layer._modules, other)
    children |= {"intermediate": intermediate, "output": output}
    required = [
        p
        for p in list(inspect.signature(type(layer).forward).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    result = _result(layer, children, *[("x",) for _ in required])
    results = result if isinstance(result, tuple) else (result,)
    if result is None or len(given) != 3 or any(value is hidden for value in results):
        return False
    return given[1] is hidden and given[0] is given[2]


def _result(module: Any, children: dict[str, Any], *inputs: tuple) -> Any:
    """The result of a module's stock forward with these children; None if it fails."""
    stand_in: Any = _StandIn(module, **children, chunk_size_feed_forward=0, seq_len_dim=1)
    try:
        return type(module).forward(stand_in, *inputs)
    except Exception:  # it uses its inputs in another way
        return None
