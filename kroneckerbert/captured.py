"""Encoders on a GPU as CUDA graphs, one for each bucket of shapes.

At small batches a GPU waits for Python and for launches: a replayed graph has neither. ``capture``
makes a graph for each bucket; a call takes the smallest bucket that holds its tokens, and pads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kron_kernels import gpu_encoder
from kroneckerbert.architectures import Inputs, Unserved, architecture_of
from kroneckerbert.fusion import stock_of

Shape = tuple[int, int]  # sequences, length


def capture(model: Any, shapes: Sequence[Shape]) -> Captured:
    """Capture a base model's encoder for these shapes.

    Args:
        model: A base model of BERT's kind, as ``KroneckerBertModel``, in evaluation mode and on a
            GPU: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT; not MPNet, whose attention
            depends on distances.
        shapes: ``(sequences, length)`` of each bucket. Each keeps memory for its activations.

    Returns:
        A function of ids and a mask, see ``Captured.__call__``. It reads the model's parameters in
        place; after a change of their memory or of the model's modules, capture again.

    Raises:
        ValueError: If this model cannot be captured, or there are no shapes.
    """
    return Captured(model, shapes)


class Captured:
    """See ``capture``."""

    def __init__(self, model: Any, shapes: Sequence[Shape]):
        dense = getattr(type(model), "dense_class", stock_of(type(model)))
        architecture = architecture_of(dense)
        if architecture is None or architecture.distances:
            raise ValueError(f"a {type(model).__name__} cannot be captured.")
        if model.training:
            raise ValueError("the model is in training mode; call .eval() first.")
        if not shapes:
            raise ValueError("shapes must have one (sequences, length) or more, got none.")
        try:
            architecture.modules(model)  # checks that they are the usual ones
            parts = architecture.parts(model)
        except Unserved as reason:
            raise ValueError(f"this model cannot be captured: {reason}.") from None
        self.model, self.architecture, self.parts = model, architecture, parts
        self.padding = getattr(model.config, "pad_token_id", None) or 0
        ordered = sorted(set(shapes), key=lambda shape: (shape[0] * shape[1], shape))
        # The largest first: later graphs then reuse its memory.
        self.buckets = {shape: _Bucket(self, shape) for shape in reversed(ordered)}
        self.shapes = ordered

    @torch.inference_mode()
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden states ``(B, T, d)`` of ids ``(B, T)``.

        Args:
            ids: On any device.
            mask: ``(B, T)``, 0 at padding, where the states have no meaning.

        Raises:
            ValueError: If no bucket holds ids of this shape.
        """
        batch, length = ids.shape
        fitting = (s for s in self.shapes if s[0] >= batch and s[1] >= length)
        shape = next(fitting, None)
        if shape is None:
            raise ValueError(
                f"ids of shape {(batch, length)} fit none of the captured shapes {self.shapes}; "
                "capture a larger one, or divide the batch."
            )
        return self.buckets[shape](ids, mask)

    def states(self, ids: Tensor, bias: Tensor) -> Tensor:
        """What a graph computes."""
        rows = self.architecture.ids(self.model, Inputs(ids, None, None, None))
        x = gpu_encoder.embed(self.parts.embedding, rows)
        return gpu_encoder.encode(x, self.parts.layers, self.parts.heads, self.parts.scale, bias)


class _Bucket:
    """The memory and the graph of one shape."""

    def __init__(self, captured: Captured, shape: Shape):
        first = next(captured.model.parameters())
        new = {"device": first.device}
        batch, length = shape
        self.padding = captured.padding
        self.ids = torch.full(shape, self.padding, **new)
        self.bias = torch.zeros(batch, 1, 1, length, dtype=first.dtype, **new)
        # A row for each query, as PyTorch's fast attentions want it; not copied.
        bias = self.bias.expand(batch, captured.parts.heads, length, length)
        with torch.inference_mode():
            self.replay = recorded(lambda: captured.states(self.ids, bias), first.device)

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        batch, length = ids.shape
        self.ids.fill_(self.padding)[:batch, :length].copy_(ids)
        self.bias.fill_(torch.finfo(self.bias.dtype).min)
        # A sequence without tokens attends to its first place: no row of scores is empty.
        self.bias[..., 0] = 0
        seen = self.bias[:batch, 0, 0, :length]
        if mask is None:
            seen.zero_()
        else:
            seen.copy_((1 - mask.to(seen)) * torch.finfo(seen.dtype).min)
        return self.replay()[:batch, :length].clone()


def recorded(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A call as a CUDA graph that gives its result; on other devices the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and lets libraries allocate
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
