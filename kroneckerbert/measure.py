"""What a model costs: parameters, bytes, FLOPs, and time here and now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


class Timing(NamedTuple):
    """Milliseconds of one forward pass: the median of the repeats, and their quartiles."""

    median: float
    low: float
    high: float


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def bytes_on_disk(folder: Path) -> int:
    """Size of the weights in a saved model's folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@torch.no_grad()
def flops(model: PreTrainedModel, batch: int = 1, tokens: int = 128) -> int:
    """Floating-point operations of one forward pass of a ``(batch, tokens)`` input.

    Two per multiply-add, of matrix products and attention; on the meta device, so in no time.
    """
    shape = (batch, tokens)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = type(model)(model.config).eval()
        meta(input_ids=torch.zeros(shape, dtype=torch.long))
    return counter.get_total_flops()


@torch.inference_mode()
def latency(
    models: Mapping[str, PreTrainedModel],
    batch: int,
    tokens: int = 128,
    seconds: float = 5.0,
    at_least: int = 5,
) -> dict[str, Timing]:
    """Time of a forward pass of each model on random ids, on its device, in evaluation mode.

    The models take turns, so that whatever else slows the machine slows all alike.

    Args:
        models: By name.
        batch: Sequences per pass.
        tokens: Tokens per sequence, all real.
        seconds: Measure for about this long, all models together ...
        at_least: ... but every model this often.
    """
    calls = {}
    for name, model in models.items():
        model.eval()
        ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
        calls[name] = lambda model=model, ids=ids: model(input_ids=ids)
        calls[name]()  # the first pass allocates
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < at_least:
        for name, call in calls.items():
            device = models[name].device
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, t in times.items():
        low, median, high = statistics.quantiles(t, n=4)
        result[name] = Timing(median, low, high)
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
