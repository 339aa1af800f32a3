"""Measures of a model's cost: parameters, bytes, FLOPs, and time on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from kron_kernels.plan.forward import evaluating
from kron_kernels.shapes import check_integer
from kron_kernels.timing import Timing, interleaved
from kroneckerbert.modeling_kroneckerbert import positions


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def bytes_on_disk(folder: Path) -> int:
    """Size of the weights in a saved model's folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@torch.no_grad()
def flops(model: PreTrainedModel, batch: int = 1, tokens: int = 128) -> int:
    """Floating-point operations of one forward pass of a ``(batch, tokens)`` input.

    Two per multiply-add, of matrix products and attention. Counted on the meta device, without the
    computation.

    Raises:
        ValueError: If a size is not a positive integer, or the model has fewer positions.
    """
    shape = _shape(model, batch, tokens)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = type(model)(model.config).eval()
        meta(input_ids=torch.zeros(shape, dtype=torch.long))
    return counter.get_total_flops()


def random_ids(model: PreTrainedModel, batch: int, tokens: int, name: str | None = None) -> Tensor:
    """Random token ids of shape ``(batch, tokens)``, on the model's device.

    Args:
        model: Gives the size of the vocabulary.
        batch: Sequences.
        tokens: Tokens in each sequence.
        name: The model's name in errors.

    Raises:
        ValueError: If a size is not a positive integer, or the model has fewer positions.
    """
    shape = _shape(model, batch, tokens, name)
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def _shape(
    model: PreTrainedModel, batch: int, tokens: int, name: str | None = None
) -> tuple[int, int]:
    shape = check_integer("batch", batch), check_integer("tokens", tokens)
    # Models with only relative positions have no limit.
    limited = getattr(model.config, "max_position_embeddings", None) is not None
    if limited and tokens > (longest := positions(model)):
        name = name or f"this {type(model).__name__}"
        raise ValueError(f"tokens = {tokens} exceeds the {longest} positions of {name}.")
    return shape


@torch.inference_mode()
def latency(
    models: Mapping[str, PreTrainedModel], batch: int, tokens: int = 128, seconds: float = 5.0
) -> dict[str, Timing]:
    """Time of a forward pass of each model on random ids, on its device, in evaluation mode.

    Args:
        models: By name; their passes alternate.
        batch: Sequences per pass.
        tokens: Tokens per sequence, none of them padding.
        seconds: Approximate duration of the measurement, for all models together.

    Raises:
        ValueError: If a size is not a positive integer, a model has fewer positions, or ``seconds``
            is not a finite number.
    """
    calls = {}
    for name, model in models.items():
        ids = random_ids(model, batch, tokens, name)
        calls[name] = lambda model=model, ids=ids: model(input_ids=ids)
    with evaluating(*models.values()):
        return interleaved(calls, seconds)
