"""A file of the tensors that the compiled encoder reads, for programs without Python and PyTorch.

``csrc/example/encode.cpp`` reads it. It is a safetensors file. Its tensors have the names of the
fields of ``kron_kernels.encoder``, such as ``layers.0.query.0.a``, and its metadata has the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kron_kernels import Int8Factor
from kron_kernels.encoder import Layer, Linear, Norm, Part
from kron_kernels.modules import evaluating
from kroneckerbert.architectures import Inputs, Parts, architecture_of
from kroneckerbert.files import replace_folder, write_checksums
from kroneckerbert.serving import why_not

ENCODER = "encoder.safetensors"


def save_encoder(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a compressed model's encoder, without its head, for the C++ program ``encode``.

    Tensors are written in float32, but for those in int8. A file has what depends on the
    architecture as well: for each place in a text the rows of the other tables (``ids.1``,
    ``ids.2``), and MPNet's bias of the scores.

    Args:
        model: A compressed model that the compiled encoder serves, on the CPU.
        path: New folder, or one from an earlier call.
        tokenizer: Saved in the same folder.

    Returns:
        The file, ``encoder.safetensors``.

    Raises:
        ValueError: If the compiled encoder does not serve the model, with the reason.
        FileExistsError: If ``path`` is not empty and was not written by this project.
    """
    with evaluating(model), torch.inference_mode():
        if reason := why_not(model):
            raise ValueError(
                f"a {type(model).__name__} cannot be written for the compiled encoder: {reason}; "
                "kroneckerbert.export writes programs of any model."
            )
        tensors, metadata = _contents(model.base_model)
    # Copies, for tensors that share memory would be refused.
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replace_folder(Path(path)) as folder:
        save_file(tensors, folder / ENCODER, {key: str(value) for key, value in metadata.items()})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_checksums(folder)
    return Path(path) / ENCODER


def _contents(base: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors, and the numbers and words beside them, by name."""
    architecture = architecture_of(type(base).dense_class)  # type: ignore[attr-defined]
    assert architecture is not None  # it is served
    parts = architecture.parts(base)
    tensors = {n: t if t.dtype == torch.int8 else t.float() for n, t in _tensors(parts)}

    def rows(length: int) -> list[Any]:
        """Rows of positions and types for a text of this many tokens, ``(1, length)`` each."""
        token = 1 if base.config.pad_token_id == 0 else 0
        ids = torch.full((1, length), token)
        return architecture.ids(base, Inputs(ids, None, None, None), {})[1:]

    # RoBERTa's first token has a later row than 0.
    positions = parts.embedding.tables[1][0].shape[-2] - int(rows(1)[0])
    for i, others in enumerate(rows(positions), 1):
        tensors[f"ids.{i}"] = others[0].long()
    if (bias := architecture.distance_bias(base, positions)) is not None:
        tensors["distance_bias"] = bias.float()

    metadata: dict[str, object] = {
        "heads": parts.heads,
        "scale": parts.scale,
        "positions": positions,
    }
    for i, layer in enumerate(parts.layers):
        metadata[f"layers.{i}.activation"] = layer.activation
    metadata |= {f"{name}.epsilon": norm.epsilon for name, norm in _norms(parts)}
    return tensors, metadata


def _linears(parts: Parts) -> Iterator[tuple[str, Linear]]:
    if parts.embedding.projection is not None:
        yield "projection", parts.embedding.projection
    yield from _of_layers(parts, Linear)


def _norms(parts: Parts) -> Iterator[tuple[str, Norm]]:
    yield "norm", parts.embedding.norm
    yield from _of_layers(parts, Norm)


def _of_layers(parts: Parts, kind: type) -> Iterator[tuple[str, Any]]:
    for i, layer in enumerate(parts.layers):
        for field, value in zip(Layer._fields, layer, strict=True):
            if isinstance(value, kind):
                yield f"layers.{i}.{field}", value


def _tensors(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    for i, table in enumerate(parts.embedding.tables):
        yield from _factors(f"tables.{i}", table)
    for name, linear in _linears(parts):
        for i, part in enumerate(linear.parts):
            yield from _factors(f"{name}.{i}", part)
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias
    for name, norm in _norms(parts):
        for field, t in (("weight", norm.weight), ("bias", norm.bias)):
            if t is not None:
                yield f"{name}.{field}", t


def _factors(name: str, part: Part) -> Iterator[tuple[str, Tensor]]:
    for field, f in zip(("weight",) if len(part) == 1 else ("a", "b"), part, strict=True):
        if isinstance(f, Int8Factor):
            yield f"{name}.{field}_scale", f.scale
        values = f.values if isinstance(f, Int8Factor) else f
        yield f"{name}.{field}", values.flatten(0, -2) if field == "weight" else values
