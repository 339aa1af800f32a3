"""Statistics of a model's inputs on text, and a start that makes use of them, without training."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    nearest_kronecker,
    nearest_kronecker_sum,
)
from kron_kernels.factorise import no_such_layer
from kron_kernels.modules import evaluating
from kron_kernels.moments import check_moment
from kroneckerbert.configuration_kroneckerbert import linear_weight

Batch = Mapping[str, Tensor]


@torch.no_grad()
def second_moments(
    model: PreTrainedModel, batches: Iterable[Batch], names: Iterable[str]
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs x of linear layers, over all tokens that are not padding.

    Args:
        model: Any transformer; it runs in evaluation mode, without its head.
        batches: Model inputs; what the model without its head does not take (labels) is ignored.
        names: Paths of linear layers within the model without its head, such as
            ``"encoder.layer.0.intermediate.dense"``.

    Returns:
        By name, shape ``(in_features, in_features)``, float32, on the model's device. Layers that
        read the same input, such as a query, a key and a value, share one tensor. All layers of
        BERT_BASE take 0.5 GB, of which the 3072-wide ``output.dense`` are five sixths.

    Raises:
        TypeError: If ``batches`` is one batch.
        ValueError: If there is no token to average over, a name is no linear layer's, a layer is
            never called, or an input is not finite.
    """
    encoder, batches, names = model.base_model, checked_batches(batches), list(names)
    kinds = nn.Linear | Conv1D | KroneckerLinear | KroneckerSum
    linears = {path: m for path, m in encoder.named_modules() if isinstance(m, kinds)}
    for name in names:
        if name not in linears:
            raise ValueError(f"names has {name!r}, {no_such_layer(name, linears)}")
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    groups = input_groups(encoder, names, batches[0])
    sources = [group[0] for group in groups]
    with evaluating(encoder):
        for batch in batches:
            for source, inputs in layer_inputs(encoder, batch, sources).items():
                for x in (x.float() for x in inputs):
                    tokens[source] = tokens.get(source, 0) + len(x)
                    if source in sums:
                        sums[source].addmm_(x.mT, x)
                    else:
                        sums[source] = x.mT @ x
    means = {source: total / tokens[source] for source, total in sums.items()}
    for source, mean in means.items():
        check_moment(source, mean)
    return {name: means[group[0]] for group in groups for name in group}


@torch.no_grad()
def input_groups(encoder: PreTrainedModel, names: Iterable[str], batch: Batch) -> list[list[str]]:
    """Layers by the tensor that they read, in the order in which they are called.

    Raises:
        ValueError: If a layer is never called.
    """
    seen: dict[str, list[int]] = {name: [] for name in names}
    kept = []  # or another tensor might get the same id

    def record(name: str):
        def hook(_, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            seen[name].append(id(args[0]))

        return hook

    with evaluating(encoder), _hooks(encoder, {name: record(name) for name in seen}):
        encoder(**_known(encoder, batch))
    if silent := [name for name, ids in seen.items() if not ids]:
        raise ValueError(
            f"{silent[0]} is not called by {type(encoder).__name__}, so its inputs are unknown; "
            "keep it dense."
        )
    position = {key: i for i, key in reversed(list(enumerate(map(id, kept))))}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, ids in seen.items():
        groups.setdefault(tuple(ids), []).append(name)
    return [groups[ids] for ids in sorted(groups, key=lambda ids: position[ids[0]])]


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    progress: bool = False,
) -> None:
    """Refit a student's factors and biases layer by layer, on the inputs that it has itself.

    In the order of the calculation, each layer becomes the nearest, on average over the tokens, in
    ``‖W x_t + b − Ŵ x_s − b̂‖²``, x_t the teacher's input of the layer and x_s the student's, whose
    earlier layers are refitted: it makes good for some of their errors. That is the data-aware
    nearest product to ``W E[x_t x_sᵀ] E[x_s x_sᵀ]⁻¹``, both centred if there is a bias, which takes
    the means. The student runs up to each layer in turn: half a forward pass for each group of
    layers that read the same tensor, four in a BERT layer, and for each batch.

    Args:
        student: Of ``kroneckerbert.compress``; changed in place.
        teacher: The dense model that it is from.
        batches: Model inputs, kept in memory.
        progress: Show a bar over the groups of layers.
    """
    batches = checked_batches(batches)
    student, teacher = student.base_model, teacher.base_model
    names = [
        path
        for path in student.config.kronecker_shapes()
        if not isinstance(student.get_submodule(path), KroneckerEmbedding)
    ]
    with evaluating(student, teacher):
        groups = input_groups(student, names, batches[0])
        widths = [linear_weight(teacher.get_submodule(group[0])).shape[1] for group in groups]
        bar = tqdm(total=len(groups), desc="refitting", disable=not progress)
        for part in _parts_that_fit(groups, widths, batches):
            sources = [group[0] for group in part]
            seen = [layer_inputs(teacher, batch, sources, stop=True) for batch in batches]
            for group in part:
                source = group[0]
                moments = _Moments(linear_weight(teacher.get_submodule(source)).shape[1])
                for batch, by_teacher in zip(batches, seen, strict=True):
                    by_student = layer_inputs(student, batch, [source], stop=True)
                    # Of several calls, as in DeBERTa, the first, which is the text's.
                    moments.add(by_student[source][0], by_teacher.pop(source)[0])
                check_moment(source, moments.ss + moments.ts)
                for name in group:
                    _refit_layer(student.get_submodule(name), teacher.get_submodule(name), moments)
                bar.update()
        bar.close()


# Bytes of the teacher's layer inputs to keep at a time: a teacher's pass costs several of the
# student's, and with all of them kept one would do (258 kB a token for BERT_BASE).
_MEMORY = 2 << 30


def _parts_that_fit(
    groups: Sequence[list[str]], widths: Sequence[int], batches: Sequence[Batch]
) -> Iterator[list[list[str]]]:
    tokens = sum(_tokens(batch) for batch in batches)
    part: list[list[str]] = []
    size = 0
    for group, width in zip(groups, widths, strict=True):
        if part and size + 4 * width * tokens > _MEMORY:
            yield part
            part, size = [], 0
        part.append(group)
        size += 4 * width * tokens
    yield part


class _Moments:
    """Sums over tokens of the student's and the teacher's inputs of a layer, in float64."""

    def __init__(self, width: int):
        self.tokens = 0
        self.sum_s, self.sum_t = torch.zeros(2, width, dtype=torch.float64)
        self.ss, self.ts = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, x_s: Tensor, x_t: Tensor) -> None:
        x_s, x_t = x_s.float().cpu(), x_t.float().cpu()
        self.tokens += len(x_s)
        self.sum_s += x_s.sum(0)
        self.sum_t += x_t.sum(0)
        # In float32 within a batch, which is as exact as the activations are.
        self.ss += x_s.mT @ x_s
        self.ts += x_t.mT @ x_s

    def means(self) -> tuple[Tensor, Tensor]:
        return self.sum_s / self.tokens, self.sum_t / self.tokens


# Added to the diagonal of the student's second moment, of its mean: an estimate from few tokens is
# singular. As in kron_kernels.nearest_kronecker.
_SHRINKAGE = 0.01


def _refit_layer(layer: Any, dense: Any, moments: _Moments) -> None:
    weight = linear_weight(dense).double().cpu()
    mean_s, mean_t = moments.means()
    ss, ts = moments.ss / moments.tokens, moments.ts / moments.tokens
    if layer.bias is not None:
        ss, ts = ss - torch.outer(mean_s, mean_s), ts - torch.outer(mean_t, mean_s)
        # The variance of an input that is all but constant may come out below 0 by rounding.
        ss.diagonal().clamp_(min=0)
    ridge = _SHRINKAGE * ss.diagonal().mean()
    shrunk = ss + ridge * torch.eye(len(ss), dtype=ss.dtype)
    # Shrunk alike: where student and teacher agree, the target is W itself.
    ts = ts + ridge * torch.eye(len(ss), dtype=ss.dtype)
    target = torch.linalg.solve(shrunk, weight @ ts, left=False)
    parts = layer.parts if isinstance(layer, KroneckerSum) else [layer]
    shapes = [((p.shape.m1, p.shape.n1), p.rank) for p in parts]
    if len(parts) == 1:
        fitted = [nearest_kronecker(target, *shapes[0], second_moment=ss)]
    else:
        fitted = nearest_kronecker_sum(target, shapes, second_moment=ss)
    for part, (a, b) in zip(parts, fitted, strict=True):
        part.a.copy_(a)
        part.b.copy_(b)
    if layer.bias is not None:
        image = layer.to_linear().weight.double().cpu() @ mean_s
        layer.bias.copy_(dense.bias.double().cpu() + weight @ mean_t - image)


def layer_inputs(
    encoder: PreTrainedModel, batch: Batch, names: Sequence[str], stop: bool = False
) -> dict[str, list[Tensor]]:
    """What these layers read in a forward pass: rows that are not padding, ``(tokens, n)`` a call.

    With ``stop`` the pass ends where the last of them would begin.
    """
    known = _known(encoder, batch)
    mask = known["attention_mask"].bool() if "attention_mask" in known else None
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def read(name: str):
        def hook(_, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            # Not what is no sequence, such as DeBERTa's relative positions.
            is_text = mask is not None and x.shape[:-1] == mask.shape
            found[name].append(x[mask] if is_text else x.flatten(0, -2))
            if stop and all(found.values()):
                raise _Stop

        return hook

    with _hooks(encoder, {name: read(name) for name in names}), suppress(_Stop):
        encoder(**known)
    return found


@torch.no_grad()
def tokens_of(encoder: PreTrainedModel, batch: Batch, names: Iterable[str]) -> dict[str, int]:
    """How many rows each layer multiplies in a forward pass of this batch."""
    with evaluating(encoder):
        found = layer_inputs(encoder, batch, list(names))
    return {name: sum(map(len, inputs)) for name, inputs in found.items()}


class _Stop(Exception):
    pass


@contextmanager
def _hooks(encoder: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [
        encoder.get_submodule(name).register_forward_pre_hook(h) for name, h in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _known(encoder: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that the model without its head takes, on its device."""
    taken = inspect.signature(encoder.forward).parameters
    return {k: v.to(encoder.device) for k, v in batch.items() if k in taken and v is not None}


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """All batches.

    Raises:
        TypeError: If it is one batch.
        ValueError: If they have nothing to average over.
    """
    if isinstance(batches, Mapping):
        raise TypeError("calibration is one batch, a mapping; pass a list of such, [batch].")
    batches = list(batches)
    if not any(map(_tokens, batches)):
        raise ValueError(
            "calibration has no batch with a token that is not padding; pass some tens of batches "
            "of tokenised text (a generator that was read once is empty)."
        )
    return batches


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
