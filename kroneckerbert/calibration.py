"""Second moments of layer inputs on text, and a start that uses them, without training."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    moments,
    nearest_kronecker_sum,
)
from kron_kernels.decompose import SHRINKAGE
from kron_kernels.factors import no_such_layer, shapes_in
from kron_kernels.modules import evaluating, is_conv1d, linear_weight, watching
from kron_kernels.shapes import naming

Batch = Mapping[str, Tensor]


def second_moments(
    model: PreTrainedModel, batches: Iterable[Batch], names: Iterable[str]
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs x of linear layers, over all tokens that are not padding.

    Args:
        model: Any transformer; it runs in evaluation mode, without its head.
        batches: Model inputs; those that the model without its head does not take, such as labels,
            are ignored.
        names: Paths of linear layers within the model without its head, such as
            ``"encoder.layer.0.intermediate.dense"``.

    Returns:
        By name, shape ``(in_features, in_features)``, float32, on the model's device. Layers that
        read the same input, such as a query, a key and a value, share one tensor. All layers of
        BERT_BASE take 0.5 GB, of which the 3072-wide ``output.dense`` are five sixths.

    Raises:
        TypeError: If ``batches`` is one batch.
        ValueError: If there is no token to average over, a name is not a linear layer's, a layer is
            never called, or an input is not finite.
    """
    encoder, batches = model.base_model, checked_batches(batches)
    kinds = nn.Linear | KroneckerLinear | KroneckerSum
    linears = {
        path: m for path, m in encoder.named_modules() if isinstance(m, kinds) or is_conv1d(m)
    }
    layers = {}
    for name in names:
        if name not in linears:
            raise ValueError(f"names has {name!r}, {no_such_layer(name, linears)}")
        layers[name] = linears[name]
    found = moments.second_moments(encoder, (_known(encoder, b) for b in batches), layers)
    for name in layers:
        if name not in found:
            raise ValueError(_never_called(name, encoder))
    return found


@torch.no_grad()
def input_groups(encoder: PreTrainedModel, names: Iterable[str], batch: Batch) -> list[list[str]]:
    """Group layers by the tensor that they read, in the order of the calls.

    Raises:
        ValueError: If a layer is never called.
    """
    seen: dict[str, list[int]] = {name: [] for name in names}
    kept = []  # alive, to keep their ids unique

    def record(name: str, x: Tensor) -> None:
        kept.append(x)
        seen[name].append(id(x))

    with evaluating(encoder), _reading(encoder, seen, record):
        encoder(**_known(encoder, batch))
    if silent := [name for name, ids in seen.items() if not ids]:
        raise ValueError(_never_called(silent[0], encoder))
    position = {key: i for i, key in reversed(list(enumerate(map(id, kept))))}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, ids in seen.items():
        groups.setdefault(tuple(ids), []).append(name)
    return [groups[ids] for ids in sorted(groups, key=lambda ids: position[ids[0]])]


def _never_called(name: str, encoder: nn.Module) -> str:
    return (
        f"{name} is not called by {type(encoder).__name__}, so its inputs are unknown; keep it "
        "dense."
    )


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    progress: bool = False,
) -> None:
    """Refit a student's factors and biases layer by layer, on the student's own inputs.

    Layer by layer in the order of the forward pass, minimise ``‖W x_t + b − Ŵ x_s − b̂‖²`` averaged
    over tokens, where x_t is the teacher's input of the layer and x_s the student's. The earlier
    layers of the student are already refitted, and the layer compensates for some of their errors.
    The solution is the data-aware nearest product to ``W E[x_t x_sᵀ] E[x_s x_sᵀ]⁻¹``; with a bias,
    which takes the means, both moments are centred. The student runs block by block, from states
    that are kept between the blocks: within a block once up to each group of layers that read the
    same tensor, four groups in a BERT layer, and once through.

    Args:
        student: Result of ``kroneckerbert.compress``; changed in place. The factors and biases of
            its linear layers do not matter.
        teacher: Its dense model.
        batches: Model inputs, kept in memory.
        progress: Whether to show a bar over the groups of layers.
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
        blocks = _Blocks(student, batches)
        bar = tqdm(total=len(groups), desc="refitting", disable=not progress)
        for part in _parts_that_fit(groups, widths, batches):
            sources = [group[0] for group in part]
            seen = [layer_inputs(teacher, batch, sources, stop=True) for batch in batches]
            for group in part:
                fit = _Fit(group, student, teacher)
                for by_student, by_teacher in zip(blocks.inputs(group[0]), seen, strict=True):
                    # The first of several calls, as in DeBERTa, is for the text.
                    fit.add(by_student, by_teacher.pop(group[0])[0])
                fit.refit()
                bar.update()
        bar.close()


# Bytes of the teacher's layer inputs kept at a time (258 kB per token for BERT_BASE). Each part
# needs another pass of the teacher, which costs several of the student's.
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


class _Fit:
    """Layers that read the same tensor, and sums over its tokens, in float64.

    The sums are of products of the student's input with itself and with the teacher's. A layer
    with fewer outputs than inputs is multiplied by the teacher's weight first: fewer products.
    """

    def __init__(self, group: Sequence[str], student: PreTrainedModel, teacher: PreTrainedModel):
        self.layers: dict[str, tuple[Any, Any]] = {
            name: (student.get_submodule(name), teacher.get_submodule(name)) for name in group
        }
        self.source = group[0]
        self.weight = linear_weight(teacher.get_submodule(self.source))
        rows, columns = self.weight.shape
        self.multiplied = len(group) == 1 and rows < columns
        self.tokens = 0
        of_teacher = rows if self.multiplied else columns
        self.sum_s = torch.zeros(columns, dtype=torch.float64)
        self.sum_t = torch.zeros(of_teacher, dtype=torch.float64)
        self.ss = torch.zeros(columns, columns, dtype=torch.float64)
        self.ts = torch.zeros(of_teacher, columns, dtype=torch.float64)

    def add(self, x_s: Tensor, x_t: Tensor) -> None:
        """Add a batch's inputs of the student and of the teacher, ``(tokens, columns)``."""
        if self.multiplied:
            x_t = x_t.float() @ self.weight.float().mT
        x_s, x_t = x_s.float().cpu(), x_t.float().cpu()
        self.tokens += len(x_s)
        self.sum_s += x_s.sum(0)
        self.sum_t += x_t.sum(0)
        # In float32 within a batch: the activations are not more exact than that. Of the symmetric
        # product three quarters; `refit` mirrors the last.
        half = x_s.shape[1] // 2
        self.ss[:half] += x_s[:, :half].mT @ x_s
        self.ss[half:, half:] += x_s[:, half:].mT @ x_s[:, half:]
        self.ts += x_t.mT @ x_s

    def refit(self) -> None:
        half = len(self.ss) // 2
        self.ss[half:, :half] = self.ss[:half, half:].mT
        moments.check_moment(self.source, self.ss)
        moments.check_moment(self.source, self.ts)
        for name, (layer, dense) in self.layers.items():
            with naming(name):
                self._refit(layer, dense)

    def _refit(self, layer: Any, dense: Any) -> None:
        weight = linear_weight(dense).double().cpu()
        mean_s, mean_t = self.sum_s / self.tokens, self.sum_t / self.tokens
        ss, ts = self.ss / self.tokens, self.ts / self.tokens
        if not self.multiplied:
            ts, mean_t = weight @ ts, weight @ mean_t
        if layer.bias is not None:
            ss, ts = ss - torch.outer(mean_s, mean_s), ts - torch.outer(mean_t, mean_s)
            # Rounding may make the variance of a nearly constant input negative.
            ss.diagonal().clamp_(min=0)
        # An estimate from few tokens is singular: as in nearest_kronecker.
        ridge = SHRINKAGE * ss.diagonal().mean()
        shrunk = ss + ridge * torch.eye(len(ss), dtype=ss.dtype)
        # The same shrinkage for both: where student and teacher agree, the target is W itself.
        target = torch.linalg.solve(shrunk, ts + ridge * weight, left=False)
        fitted = nearest_kronecker_sum(target, [s.part for s in shapes_in(layer)], second_moment=ss)
        for part, (a, b) in zip(getattr(layer, "parts", [layer]), fitted, strict=True):
            part.a.copy_(a)
            part.b.copy_(b)
        if layer.bias is not None:
            image = layer.to_linear().weight.double().cpu() @ mean_s
            layer.bias.copy_(dense.bias.double().cpu() + mean_t - image)


class _Blocks:
    """The student's blocks, run from kept states: the rest of the model is not run again.

    Where a model does more between two blocks than to pass a state on, such as DeBERTa's
    convolution, it is run from its inputs up to the wanted layer.

    Args:
        encoder: The student without its head.
        batches: Model inputs.
    """

    def __init__(self, encoder: PreTrainedModel, batches: Sequence[Batch]):
        self.encoder, self.batches = encoder, batches
        self.paths = _blocks(encoder)
        self.calls: list[dict[str, _Call]] = []  # by batch, then by block, from the present one on

    def inputs(self, source: str) -> Iterator[Tensor]:
        """A layer's inputs, without padding, of each batch in turn: ``(tokens, columns)``."""
        block = _block_of(source)
        if block is None or not self._advance(block):
            for batch in self.batches:
                yield layer_inputs(self.encoder, batch, [source], stop=True)[source][0]
            return
        for batch, calls in zip(self.batches, self.calls, strict=True):
            mask = _known(self.encoder, batch).get("attention_mask")
            yield _read(self.encoder, [source], mask, True, calls[block].run)[source][0]

    def _advance(self, block: str) -> bool:
        """Compute the states up to this block; False if the model cannot be run so."""
        if not self.calls:
            self.calls = [self._record(batch) for batch in self.batches]
        if block not in self.calls[0] or not all(c[block].follows for c in self.calls):
            return False
        order = list(self.calls[0])
        for now, following in pairwise(order[: order.index(block) + 1]):
            for calls in self.calls:
                calls[following].state = calls.pop(now).run()
        return True

    def _record(self, batch: Batch) -> dict[str, _Call]:
        """How the model calls its blocks; only of the first is the state kept."""
        calls: dict[str, _Call] = {}
        latest: list[Any] = []  # the output of the block before

        def before(path: str, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            name = None if args else next(iter(kwargs))
            state = args[0] if args else kwargs[name]
            others = {key: value for key, value in kwargs.items() if key != name}
            follows = not calls or (list(calls.values())[-1].follows and latest[-1] is state)
            again = path in calls
            calls[path] = _Call(block, None if calls else state, args[1:], others)
            calls[path].follows = follows and not again

        def after(block: nn.Module, args: tuple, output: Any) -> None:
            latest[:] = [_state_of(output)]

        handles = []
        for path in self.paths:
            block = self.encoder.get_submodule(path)
            handles.append(block.register_forward_hook(after))
            handles.append(block.register_forward_pre_hook(partial(before, path), with_kwargs=True))
        try:
            self.encoder(**_known(self.encoder, batch))
        finally:
            for handle in handles:
                handle.remove()
        return calls


@dataclass
class _Call:
    """A call of a block.

    Attributes:
        state: Its input, ``(sequences, length, width)``.
        follows: Whether the state is the output of the block before, and so on to the first.
    """

    block: nn.Module
    state: Tensor | None
    args: tuple
    kwargs: dict[str, Any]
    follows: bool = True

    def run(self) -> Tensor:
        return _state_of(self.block(self.state, *self.args, **self.kwargs))


def _state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _blocks(encoder: nn.Module) -> list[str]:
    """The outermost numbered modules of the lists that have factorised layers in them."""
    inside = {_block_of(path) for path in encoder.config.kronecker_shapes()} - {None}
    lists = {path.rpartition(".")[0] for path in inside if path}
    return [
        path
        for path, _ in encoder.named_modules()
        if path.rpartition(".")[0] in lists and path.rpartition(".")[2].isdigit()
    ]


def _block_of(path: str) -> str | None:
    """The path of the outermost numbered module that a layer is in, such as encoder.layer.3."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.)", path)
    return found and found[0]


def layer_inputs(
    encoder: PreTrainedModel, batch: Batch, names: Sequence[str], stop: bool = False
) -> dict[str, list[Tensor]]:
    """Inputs of these layers in a forward pass, without padding: ``(tokens, n)`` per call.

    With ``stop`` the pass ends before the last of them is computed.
    """
    known = _known(encoder, batch)
    return _read(encoder, names, known.get("attention_mask"), stop, lambda: encoder(**known))


def _read(
    encoder: nn.Module,
    names: Sequence[str],
    mask: Tensor | None,
    stop: bool,
    run: Callable[[], Any],
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def read(name: str, x: Tensor) -> None:
        found[name].append(moments.real_rows(x, mask))
        if stop and all(found.values()):
            raise _Stop

    with _reading(encoder, names, read), suppress(_Stop):
        run()
    return found


@torch.no_grad()
def tokens_of(encoder: PreTrainedModel, batch: Batch, names: Iterable[str]) -> dict[str, int]:
    """Rows that each layer multiplies in a forward pass of this batch."""
    with evaluating(encoder):
        found = layer_inputs(encoder, batch, list(names))
    return {name: sum(map(len, inputs)) for name, inputs in found.items()}


class _Stop(Exception):
    pass


def _reading(encoder: nn.Module, names: Iterable[str], read: Callable[[str, Tensor], None]) -> Any:
    return watching({name: encoder.get_submodule(name) for name in names}, read)


def _known(encoder: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The inputs that the model without its head takes, on its device."""
    taken = inspect.signature(encoder.forward).parameters
    known = {k: v.to(encoder.device) for k, v in batch.items() if k in taken and v is not None}
    # A cache would grow with each run of a block.
    return known | ({"use_cache": False} if "use_cache" in taken else {})


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises:
        TypeError: If it is one batch.
        ValueError: If no batch has a token that is not padding.
    """
    moments.check_batches(batches)
    batches = list(batches)
    if not any(map(_tokens, batches)):
        raise ValueError(
            "calibration has no batch with a token that is not padding; pass a few dozen batches "
            "of tokenised text (a generator that was read once is empty)."
        )
    return batches


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
