"""What a model costs: parameters, bytes, FLOPs, and time here and now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kron_kernels.modules import evaluating, flops_of
from kron_kernels.shapes import check_integer
from kron_kernels.timing import Timing, interleaved
from kroneckerbert.modeling_kroneckerbert import positions


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

    Raises:
        ValueError: If a size is no positive integer, or the model has fewer positions.
    """
    shape = _shape(model, batch, tokens)
    with torch.device("meta"):
        meta = type(model)(model.config).eval()
        return flops_of(meta, {"input_ids": torch.zeros(shape, dtype=torch.long)})


def random_ids(model: PreTrainedModel, batch: int, tokens: int, name: str | None = None) -> Tensor:
    """Ids ``(batch, tokens)`` to time a model on.

    Args:
        model: Whose words are drawn.
        batch: Sequences.
        tokens: Tokens in each of them.
        name: The model's, for errors.

    Raises:
        ValueError: If a size is no positive integer, or the model has fewer positions.
    """
    shape = _shape(model, batch, tokens, name)
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def _shape(
    model: PreTrainedModel, batch: int, tokens: int, name: str | None = None
) -> tuple[int, int]:
    shape = check_integer("batch", batch), check_integer("tokens", tokens)
    # Models with relative positions alone tell no limit.
    limited = getattr(model.config, "max_position_embeddings", None) is not None
    if limited and tokens > (longest := positions(model)):
        what = name or f"this {type(model).__name__}"
        raise ValueError(f"tokens = {tokens} exceeds the {longest} positions of {what}.")
    return shape


@torch.inference_mode()
def latency(
    models: Mapping[str, PreTrainedModel], batch: int, tokens: int = 128, seconds: float = 5.0
) -> dict[str, Timing]:
    """Time of a forward pass of each model on random ids, on its device, in evaluation mode.

    Args:
        models: By name; they take turns.
        batch: Sequences per pass.
        tokens: Tokens per sequence, all real.
        seconds: Measure for about this long, all models together.

    Raises:
        ValueError: If a size is no positive integer, a model has fewer positions, or ``seconds`` is
            no finite number.
    """
    calls = {}
    for name, model in models.items():
        ids = random_ids(model, batch, tokens, name)
        calls[name] = lambda model=model, ids=ids: model(input_ids=ids)
    with evaluating(*models.values()):
        return interleaved(calls, seconds)
