"""Feed-forward blocks, and an attention's three products of one input, each in one pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from kron_kernels import KroneckerLinear, kron_feed_forward, kron_qkv
from kron_kernels.checks import Activation

# What transformers calls by name in hidden_act, as kron_feed_forward knows it.
_ACTIVATIONS: dict[type, Activation] = {
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
# Attributes of a block that is one module: its layers and the activation between them.
_WHOLE_BLOCKS = {
    "FFN": ("lin1", "activation", "lin2"),  # DistilBERT
    "GPT2MLP": ("c_fc", "act", "c_proj"),
}
# Attributes of a self-attention that reads one input three times. Not DeBERTa's, which projects its
# relative positions as well.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
)


def fuse(model: nn.Module) -> None:
    """Let ``kron_kernels.kron_feed_forward`` and ``kron_qkv`` compute a model, in place.

    They decide at every call: adapters may have replaced a layer, and hooks expect to be called.
    Modules, names and results stay as they are. Gated blocks (ModernBERT, Llama) are not fused.
    """
    modules: list[Any] = list(model.modules())  # which are told apart by what they have
    for module in modules:
        for names in _PROJECTIONS:
            layers = [getattr(module, name, None) for name in names]
            is_cross = "Cross" in type(module).__name__
            if all(type(layer) is KroneckerLinear for layer in layers) and not is_cross:
                _share_input(module, names)
        if type(module).__name__ in _WHOLE_BLOCKS:
            module.parts = _WHOLE_BLOCKS[type(module).__name__]
            module.__class__ = _subclass_of(_Block, module.__class__)
        elif _is_split(module):
            for half, mixin in ((module.intermediate, _Intermediate), (module.output, _Output)):
                half.__class__ = _subclass_of(mixin, half.__class__)
            # Of the two halves either must know whether both are as they were. A tuple: a module
            # would be registered as a child.
            module.intermediate.halves = module.output.halves = module.intermediate, module.output


def _share_input(attention: nn.Module, names: tuple[str, ...]) -> None:
    first, *others = (getattr(attention, name) for name in names)
    first.__class__ = KroneckerQuery
    first.siblings = (attention,), names  # in a tuple, or it would be a child of its child
    for other in others:
        other.__class__ = KroneckerKeyOrValue
        other.ahead = None


class KroneckerQuery(KroneckerLinear):
    """The first of three layers of one input: in inference it computes the others', too."""

    siblings: tuple[tuple[nn.Module], tuple[str, ...]]  # what has all three, and their names there

    def forward(self, x: Tensor) -> Tensor:
        (attention,), names = self.siblings
        layers = [getattr(attention, name) for name in names]
        untouched = layers[0] is self and all(type(m) is KroneckerKeyOrValue for m in layers[1:])
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not untouched:
            return super().forward(x)
        y, *others = kron_qkv(x, *((m.a, m.b, m.bias) for m in layers))
        for layer, other in zip(layers[1:], others, strict=True):
            layer.ahead = x, other
        return y


class KroneckerKeyOrValue(KroneckerLinear):
    """One of the others, which hands out what is ready for this very input."""

    ahead: tuple[Tensor, Tensor] | None  # the input, and the output for it

    def forward(self, x: Tensor) -> Tensor:
        ahead, self.ahead = self.ahead, None
        return ahead[1] if ahead is not None and ahead[0] is x else super().forward(x)


def _is_split(module: nn.Module) -> bool:
    """Whether it has its block in two children, as BERT and its descendants."""
    intermediate, output = (getattr(module, name, None) for name in ("intermediate", "output"))
    return all(hasattr(intermediate, name) for name in ("dense", "intermediate_act_fn")) and all(
        hasattr(output, name) for name in ("dense", "dropout", "LayerNorm")
    )


class _Intermediate(nn.Module):
    """The first half, which hands its input on if the second half does the work of both."""

    halves: tuple[Any, Any]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if _fused_activation(self) else super().forward(hidden_states)


class _Output(nn.Module):
    """The second half: ``LayerNorm(dropout(down(act(up(x)))) + residual)``."""

    halves: tuple[Any, Any]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        activation = _fused_activation(self)
        if activation is None:
            return super().forward(hidden_states, input_tensor)
        up, down = (half.dense for half in self.halves)
        if self.training and self.dropout.p:
            y = _feed_forward(hidden_states, up, down, activation)
            return self.LayerNorm(self.dropout(y) + input_tensor)
        return self.LayerNorm(_feed_forward(hidden_states, up, down, activation, input_tensor))


class _Block(nn.Module):
    """A block that is one module: ``dropout(down(act(up(x))))``."""

    parts: tuple[str, str, str]

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, act, down = (getattr(self, name) for name in self.parts)
        activation = _activation(up, act, down)
        if activation is None:
            return super().forward(hidden_states)
        return self.dropout(_feed_forward(hidden_states, up, down, activation))


@lru_cache
def _subclass_of(mixin: type, base: type) -> type:
    return type(f"Kronecker{base.__name__}", (mixin, base), {"__module__": __name__})


def _fused_activation(half: _Intermediate | _Output) -> Activation | None:
    intermediate, output = half.halves
    if intermediate._forward_hooks or intermediate._forward_pre_hooks:
        return None
    if output._forward_hooks or output._forward_pre_hooks:
        return None
    return _activation(intermediate.dense, intermediate.intermediate_act_fn, output.dense)


def _activation(up: nn.Module, act: nn.Module, down: nn.Module) -> Activation | None:
    """The activation's name if the block can be fused, else None."""
    stock = type(up) is type(down) is KroneckerLinear and not any(
        part._forward_hooks or part._forward_pre_hooks for part in (up, act, down)
    )
    return _ACTIVATIONS.get(type(act)) if stock else None


def _feed_forward(
    x: Tensor,
    up: KroneckerLinear,
    down: KroneckerLinear,
    activation: Activation,
    residual: Tensor | None = None,
) -> Tensor:
    layers = (up.a, up.b, up.bias), (down.a, down.b, down.bias)
    return kron_feed_forward(x, *layers, activation=activation, residual=residual)
