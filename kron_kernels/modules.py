"""Questions about any ``nn.Module``: its dense layers, its forward pass, its cost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from kron_kernels.readers import reader

Dense = nn.Linear | nn.Embedding  # or transformers' Conv1D

# What a user of PyTorch's own modules can do instead, by class name.
_FAST_PATH = (
    "unless its fast path is off: set activation_relu_or_gelu = 0 on each TransformerEncoderLayer, "
    "and use_nested_tensor = False on the TransformerEncoder"
)
_ATTENTION = "four nn.Linear and F.scaled_dot_product_attention compute the same"
_WAYS_OUT = {
    "TransformerEncoderLayer": _FAST_PATH,
    "TransformerEncoder": _FAST_PATH,
    "MultiheadAttention": _ATTENTION,
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer with a weight ``(in, out)``.

    By name: this package does not depend on transformers.
    """
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2


def linear_weight(layer: Any) -> Tensor:
    """The weight as ``(out_features, in_features)`` or ``(num_embeddings, embedding_dim)``."""
    return layer.weight.mT if is_conv1d(layer) else layer.weight


def dense_layers(module: nn.Module) -> dict[str, Dense]:
    """Linear layers and embeddings by path; a layer in several places has the first path only."""
    return {
        path: m
        for path, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding) or is_conv1d(m)
    }


def obstacles(module: nn.Module, allow_tied: bool = False) -> dict[str, str]:
    """Reasons why dense layers cannot be factorised, by path; other layers can.

    Args:
        module: Any module.
        allow_tied: Ignore that a weight is tied to another layer's.
    """
    owners, places = defaultdict(list), defaultdict(list)
    for path, m in module.named_modules():
        for p in m._parameters.values():
            owners[id(p)].append(path)
    for path, m in module.named_modules(remove_duplicate=False):
        places[m].append(path)
    reasons = {}
    for path, layer in dense_layers(module).items():
        tied = [o for o in owners[id(layer._parameters.get("weight"))] if o != path]
        read_by = next(filter(None, (reader(module, place) for place in places[layer])), None)
        if reason := _obstacle(layer, read_by, [] if allow_tied else tied):
            reasons[path] = reason
    return reasons


def not_dense(module: nn.Module) -> str | None:
    """Why a layer of another kind cannot be factorised, and the way out; None for containers."""
    kind = f"it is of class {type(module).__name__}"
    if isinstance(module, nn.MultiheadAttention):
        return f"{kind}, and multiplies by its own in_proj_weight ({_ATTENTION})"
    if not any(True for _ in module.parameters(recurse=False)) or any(
        True for _ in module.children()
    ):
        return None
    if isinstance(module, _Convolution):
        sides = "x".join(map(str, module.kernel_size))
        kind += f", with a kernel of {sides}"
        one = {1} >= {*module.kernel_size, *module.stride, module.groups} and not module.transposed
        if one and not any(module.padding):
            return (
                f"{kind}, and can be replaced by nn.Linear({module.in_channels}, "
                f"{module.out_channels}) with its weight.flatten(1), called on x.movedim(1, -1)"
            )
    return f"{kind}, and only nn.Linear and nn.Embedding are factorised"


def refused(module: nn.Module, allow_tied: bool = False) -> dict[str, str]:
    """Why layers cannot be factorised, by path: dense ones, and those of other kinds."""
    dense, reasons = dense_layers(module), obstacles(module, allow_tied)
    others = {
        path: reason
        for path, m in module.named_modules()
        if path not in dense and not _is_norm(m) and (reason := not_dense(m))
    }
    return reasons | others


def one_name(paths: Sequence[str]) -> str:
    """Paths that differ in numbers only as one, ``encoder.layer.0-3,5.dense``."""
    numbers = zip(*(map(int, re.findall(r"\d+", path)) for path in paths), strict=True)
    first, *parts = re.split(r"\d+", paths[0])
    return first + "".join(
        _ranges(sorted({*own})) + part for own, part in zip(numbers, parts, strict=True)
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,5``"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _is_norm(module: nn.Module) -> bool:
    """Whether its parameters are vectors only."""
    return all(p.ndim < 2 for p in module.parameters())


def _obstacle(layer: Dense, read_by: str | None, tied: list[str]) -> str | None:
    options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, o, None)]
    stock = next((c for c in (nn.Linear, nn.Embedding) if isinstance(layer, c)), type(layer))
    if read_by:
        way = f" ({_WAYS_OUT[read_by]})" if read_by in _WAYS_OUT else ""
        return f"{read_by} reads its weight, which a factorised layer does not have{way}"
    if type(layer).forward is not stock.forward:
        return f"its class, {type(layer).__name__}, has its own forward"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization"
    if not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}, not floating point"
    if tied:
        return f"its weight is tied to that of {', '.join(tied)}"
    if options:
        return f"it has {options[0]}, which a Kronecker embedding does not support"
    return None


def call(module: nn.Module, inputs: Any) -> Any:
    """Call with a mapping as keywords, a tuple as arguments, or anything else as the argument."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Set modules to evaluation mode; restore the mode of each of their parts afterwards.

    ``train(was_training)`` would give all parts the mode of the whole, but a frozen part is often
    in evaluation mode within a module that is trained.
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in before:
            part.training = mode


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], read: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``read(path, x)`` with the first argument of each call of these layers."""

    def hook_of(path: str) -> Callable:
        return lambda _, args, kwargs: read(path, args[0] if args else next(iter(kwargs.values())))

    handles = [
        layer.register_forward_pre_hook(hook_of(path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flops_of(module: nn.Module, inputs: Any) -> int:
    """FLOPs of a forward pass: two per multiply-add of matrix products and attention."""
    # Importing it imports Triton, too, where that is installed.
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # FlopCounterMode has formulas for all forms of attention except this one.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {attention: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call(module, inputs)
    return counter.get_total_flops()


def setting_of(module: nn.Module) -> dict[str, Any]:
    """Device, dtype, threads and versions that a module's times depend on."""
    first = next(p for p in module.parameters() if p.is_floating_point())
    device = first.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or str(device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
