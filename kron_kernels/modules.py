"""A module's forward pass: what its layers are given, what it costs, where it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kron_kernels.factorise import Entry, random_layer, swap_
from kron_kernels.plan.layers import Target


def call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within, modules are in evaluation mode; then each of their parts in the mode in which it was.

    Not ``train(was_training)``, which would give all parts the mode of the whole: a frozen part is
    often in evaluation mode within a module that is trained.
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
def hooked(targets: Sequence[Target], hook: Callable[[Target, Tensor], None]):
    def of(target):
        return lambda _, args, kwargs: hook(
            target, args[0] if args else next(iter(kwargs.values()))
        )

    handles = [t.layer.register_forward_pre_hook(of(t), with_kwargs=True) for t in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_shapes(module: nn.Module, inputs: Any, targets: Sequence[Target]) -> None:
    with hooked(targets, lambda target, x: target.inputs.append((x.shape, x.dtype))):
        call(module, inputs)


# PyTorch counts the FLOPs of every form of attention but this one.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    )
}


# Of a tensor in a safetensors file: its name, dtype, shape and place, some 100 to 150 bytes.
_HEADER = 160


def totals_of(module: nn.Module, inputs: Any) -> dict[str, float]:
    """Parameters, the bytes of a file of them, and FLOPs of a forward pass of the whole module."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call(module, inputs)
    parameters = list(module.parameters())  # tied ones once
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() + _HEADER for p in parameters),
        "flops": counter.get_total_flops(),
    }


def with_random_factors(module: nn.Module, factors: Mapping[str, Entry]) -> nn.Module:
    return swap_(copy.deepcopy(module), factors, random_layer)


def setting_of(module: nn.Module, inputs: Any) -> dict[str, Any]:
    first = next(module.parameters())
    device = first.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or str(device),
        "dtype": str(first.dtype)[6:],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "inputs": _described(inputs),
    }


def _described(inputs: Any) -> list[str]:
    if isinstance(inputs, Mapping):
        return [f"{key} {_described((value,))[0]}" for key, value in inputs.items()]
    told = []
    for value in inputs if isinstance(inputs, tuple) else (inputs,):
        if isinstance(value, Tensor):
            told.append(f"{str(value.dtype)[6:]} {tuple(value.shape)}")
        else:
            told.append(type(value).__name__)
    return told
