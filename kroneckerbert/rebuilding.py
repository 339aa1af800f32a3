"""Another model of the same architecture, from the tensors of a given one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' bars of loading."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pooler_as(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that gives a model without a head a pooler exactly if ``model`` has one."""
    is_encoder = model is model.base_model
    takes_it = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    return {"add_pooling_layer": model.pooler is not None} if is_encoder and takes_it else {}


def rebuilt(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    like: PreTrainedModel,
) -> PreTrainedModel:
    """A ``cls`` with a copy of ``state``, and the device, dtype, modes and pooler of ``like``.

    Each parameter has the ``requires_grad`` of the tensor that it is copied from. A model with int8
    weights is frozen and in evaluation mode.
    """
    # The loader makes the model on the meta device, which draws no weights, and checks the names.
    trainable = {name: tensor.requires_grad for name, tensor in state.items()}
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    with without_bars():
        new = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=like.dtype, **pooler_as(like)
        )
    new.name_or_path = new.config.name_or_path = ""  # the loader writes None
    new.to(like.device)
    if getattr(config, "kronecker_int8", None):
        return new
    new.train(like.training)
    parts = dict(new.named_modules())
    for path, module in like.named_modules():  # root first: a part may differ from the whole
        if path in parts:  # parts of a sum have no counterpart in a dense model
            parts[path].train(module.training)
    for name, p in new.named_parameters():
        p.requires_grad_(trainable.get(name, p.requires_grad))
    return new
