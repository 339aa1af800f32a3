"""A model's costs: parameters, bytes, FLOPs and time here, and a report of them layer by layer."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from kron_kernels import (
    KroneckerEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
)
from kron_kernels.factors import Shapes, shapes_in, terms_text
from kron_kernels.files import write_file
from kron_kernels.modules import (
    dense_layers,
    evaluating,
    flops_of,
    linear_weight,
    one_name,
    setting_of,
)
from kron_kernels.shapes import check_integer
from kron_kernels.timing import Timing, interleaved
from kroneckerbert.calibration import Batch, checked_batches, layer_inputs, tokens_of
from kroneckerbert.modeling_kroneckerbert import KroneckerPreTrainedModel, positions
from kroneckerbert.serving import explain

_LAYER_SECONDS, _MODEL_SECONDS = 0.2, 5.0  # to time a kind of layer, and the model, in both forms


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, int8 weights among them; tied ones count once."""
    int8 = sum(b.numel() for b in model.buffers() if b.dtype == torch.int8)
    return int8 + sum(p.numel() for p in model.parameters())


def model_bytes(model: PreTrainedModel) -> int:
    """Size of the tensors that a model saves; tied ones count once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
    with torch.device("meta"):
        meta = type(model)(model.config).eval()
        return flops_of(meta, {"input_ids": torch.zeros(shape, dtype=torch.long)})


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


# --- the report


@dataclass(frozen=True)
class LayerReport:
    """One factorised layer; FLOPs and milliseconds are those of one forward pass of the model.

    A layer is timed alone, even if it shares a call in the model: medians, and with ``_low`` and
    ``_high`` quartiles.

    Errors are squared and relative, ``‖W − Ŵ‖² / ‖W‖²`` and ``E‖W x + b − Ŵ x − b̂‖² / E‖W x + b‖²``
    on the dense model's own inputs; None without the dense model or calibration text.
    """

    path: str
    rows: int
    columns: int
    terms: str
    parameters_dense: int
    parameters: int
    flops_dense: int
    flops: int
    ms_dense: float
    ms_dense_low: float
    ms_dense_high: float
    ms: float
    ms_low: float
    ms_high: float
    weight_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class Report:
    """Costs and errors of each factorised layer, and totals of the whole model."""

    layers: list[LayerReport]
    # "parameters", "bytes", "flops", "ms", "ms_low" and "ms_high" of "dense" and "compressed".
    totals: dict[str, dict[str, float]]
    setting: dict[str, Any]
    encoder: str  # how the layers are called, see ``kroneckerbert.explain``

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_file(path, self.to_json() + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw each layer's time and errors as PNG, SVG or PDF."""
        _draw(self, Path(path))

    def __str__(self) -> str:
        console = Console(width=180, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(_table(self))
        return captured.get()


@torch.no_grad()
def report(
    model: KroneckerPreTrainedModel,
    teacher: PreTrainedModel | None = None,
    *,
    batch: int = 1,
    tokens: int = 128,
    calibration: Iterable[Batch] | None = None,
) -> Report:
    """Measure each factorised layer of a model against the dense one on this machine.

    Args:
        model: Result of ``kroneckerbert.compress`` or of training.
        teacher: Its dense model, of the same architecture; required for errors and for the whole
            dense model's latency.
        batch: Sequences in the timed passes.
        tokens: Tokens per sequence.
        calibration: Batches of model inputs, for the errors of the layers' outputs.

    Raises:
        TypeError: If ``model`` is not a Kronecker model.
        ValueError: If ``teacher`` has other layers, or calibration has no teacher.
    """
    if not isinstance(model, KroneckerPreTrainedModel):
        raise TypeError(
            f"a {type(model).__name__} has no Kronecker layers to report on; compress it first."
        )
    if calibration is not None and teacher is None:
        raise ValueError("output errors compare with the dense model's: pass teacher as well.")
    encoder: Any = model.base_model
    paths = [*model.config.kronecker_shapes(), *model.config.kronecker_int8]
    layers = {path: encoder.get_submodule(path) for path in dict.fromkeys(paths)}
    dense = {} if teacher is None else _dense_layers(teacher, layers, type(model).__name__)
    models: dict[str, PreTrainedModel] = {} if teacher is None else {"dense": teacher}
    models["compressed"] = model
    ids = random_ids(model, batch, tokens)
    tables = nn.Embedding | KroneckerEmbedding | QuantizedEmbedding
    linears = [path for path, m in layers.items() if not isinstance(m, tables)]
    with evaluating(*models.values()):
        errors: dict[str, float] = {}
        if calibration is not None and teacher is not None:
            errors = _output_errors(layers, teacher.base_model, linears, calibration)
        counts = tokens_of(encoder, {"input_ids": ids}, linears)
        times: dict[tuple, dict[str, Timing]] = {}  # shared by layers that are alike
        rows = []
        for path, layer in layers.items():
            is_table = path not in linears
            stock: Any = _stock(layer)
            terms, count = _terms(layer), counts.get(path, 0)
            # Everything that its time depends on.
            key = type(layer), stock.weight.shape, terms, count
            if key not in times:
                rows_of = ids % stock.weight.shape[0]  # of other tables than the words'
                x = rows_of if is_table else torch.randn(count, stock.in_features)
                times[key] = _milliseconds(layer, stock, x if is_table else x.to(stock.weight))
            error = _weight_error(dense[path], stock) if path in dense else None
            rows.append(_row(path, layer, stock, count, times[key], error, errors.get(path)))
        calls = {name: partial(m, input_ids=ids) for name, m in models.items()}
        whole = interleaved(calls, _MODEL_SECONDS)
        called = explain(model, input_ids=ids)
    totals: dict[str, dict[str, float]] = {
        "parameters": {name: parameters(m) for name, m in models.items()},
        "bytes": {name: model_bytes(m) for name, m in models.items()},
        "flops": {name: flops(m, batch, tokens) for name, m in models.items()},
        **{
            f"ms{end}": {name: getattr(whole[name], part) for name in models}
            for end, part in (("", "median"), ("_low", "low"), ("_high", "high"))
        },
    }
    setting = setting_of(model) | {"batch": batch, "tokens": tokens}
    return Report(rows, totals, setting, called)


def _dense_layers(
    teacher: PreTrainedModel, layers: dict[str, nn.Module], student: str
) -> dict[str, nn.Module]:
    """The teacher's layers that these replace."""
    sizes = {
        path: tuple(linear_weight(m).shape) for path, m in dense_layers(teacher.base_model).items()
    }
    for path, layer in layers.items():
        rows, columns = _stock(layer).weight.shape
        if sizes.get(path) != (rows, columns):
            raise ValueError(
                f"teacher, a {type(teacher).__name__}, has no dense {path} of "
                f"{rows}x{columns}; give the model that this {student} was "
                "compressed from."
            )
    return {path: teacher.base_model.get_submodule(path) for path in layers}


def _milliseconds(layer: nn.Module, stock: nn.Module, x: Tensor) -> dict[str, Timing]:
    """Times of the dense layer and of ours."""
    return interleaved({"dense": lambda: stock(x), "ours": lambda: layer(x)}, _LAYER_SECONDS)


def _weight_error(dense: nn.Module, stock: nn.Module) -> float:
    weight = linear_weight(dense)
    return ((weight - stock.weight).square().sum() / weight.square().sum()).item()


def _stock(layer: Any) -> nn.Linear | nn.Embedding:
    """The dense layer of the same weight."""
    if isinstance(layer, QuantizedLinear | QuantizedSum | QuantizedEmbedding):
        layer = layer.dequantized()
    if isinstance(layer, nn.Linear | nn.Embedding):
        return layer
    return layer.to_embedding() if isinstance(layer, KroneckerEmbedding) else layer.to_linear()


def _terms(layer: Any) -> str:
    """``"8x2 ⊗ 384x384"``; with ``int8`` at the end where factors are."""
    is_int8 = isinstance(layer, QuantizedLinear | QuantizedSum | QuantizedEmbedding)
    return terms_text(_shapes(layer)) + " int8" * is_int8


def _shapes(layer: Any) -> Shapes:
    """Of the terms; empty for a dense weight."""
    return () if hasattr(layer, "weight") else shapes_in(layer)


def _row(
    path: str,
    layer: nn.Module,
    stock: nn.Linear | nn.Embedding,
    tokens: int,
    times: Mapping[str, Timing],
    weight_error: float | None,
    output_error: float | None,
) -> LayerReport:
    """``tokens`` is the number of rows that the layer multiplies, 0 for embeddings."""
    (rows, columns), shapes = stock.weight.shape, _shapes(layer)
    dense = 2 * rows * columns
    return LayerReport(
        path=path,
        rows=rows,
        columns=columns,
        terms=_terms(layer),
        parameters_dense=rows * columns,
        parameters=sum(s.parameters for s in shapes) or rows * columns,
        flops_dense=dense * tokens,
        flops=(sum(s.flops for s in shapes) or dense) * tokens,
        ms_dense=times["dense"].median,
        ms_dense_low=times["dense"].low,
        ms_dense_high=times["dense"].high,
        ms=times["ours"].median,
        ms_low=times["ours"].low,
        ms_high=times["ours"].high,
        weight_error=weight_error,
        output_error=output_error,
    )


def _output_errors(
    layers: dict[str, nn.Module],
    dense: PreTrainedModel,
    paths: list[str],
    calibration: Iterable[Batch],
) -> dict[str, float]:
    """Relative squared errors of the layers' outputs on their inputs in the dense model."""
    wrong, whole = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)
    for batch in checked_batches(calibration):
        for path, inputs in layer_inputs(dense, batch, paths).items():
            for x in inputs:
                target = dense.get_submodule(path)(x)
                wrong[path] += (layers[path](x) - target).square().sum().item()
                whole[path] += target.square().sum().item()
    return {path: wrong[path] / whole[path] for path in paths}


def _table(report: Report) -> Table:
    """Layers that differ only in their place share a row, with their mean errors."""
    s = report.setting
    size = ", ".join(
        f"{name} {count / 1e6:.1f} MB" for name, count in report.totals["bytes"].items()
    )
    table = Table(
        caption=f"computed {report.encoder}; {size}",
        title=f"{s['batch']} x {s['tokens']} tokens, {s['threads']} threads, {s['device']}, "
        f"{s['dtype']}, torch {s['torch']}",
    )
    table.add_column("layers", no_wrap=True)
    table.add_column("terms")
    for heading in ("parameters", "MFLOPs", "ms dense", "ms here", "times faster"):
        table.add_column(heading, justify="right")
    for heading in ("weight error", "output error"):
        table.add_column(heading, justify="right")
    groups: dict[tuple, list[LayerReport]] = defaultdict(list)
    for row in report.layers:
        groups[re.sub(r"\d+", "*", row.path), row.terms].append(row)
    for (_, terms), rows in groups.items():
        sums = {
            field.name: sum(getattr(r, field.name) for r in rows)
            for field in fields(LayerReport)
            if field.name.startswith(("parameters", "flops", "ms"))
        }
        table.add_row(
            one_name([r.path for r in rows]),
            terms,
            *_costs(
                [(sums[f"{key}_dense"], sums[key]) for key in _SHOWN],
                [(sums[f"ms{of}_low"], sums[f"ms{of}_high"]) for of in ("_dense", "")],
            ),
            _mean([r.weight_error for r in rows]),
            _mean([r.output_error for r in rows]),
        )
    table.add_section()
    totals = report.totals
    costs = _costs(
        [(totals[key].get("dense"), totals[key]["compressed"]) for key in _SHOWN],
        [(totals["ms_low"].get(of), totals["ms_high"].get(of)) for of in ("dense", "compressed")],
    )
    table.add_row("the whole model", "", *costs)
    return table


_SHOWN = ("parameters", "flops", "ms")  # in a table's row
Pair = tuple[float | None, float]  # the dense form's value, if known, and ours


def _costs(pairs: Sequence[Pair], quartiles: Sequence[tuple]) -> list[str]:
    """The cells about costs in a row: pairs of ``_SHOWN``, and quartiles of both times."""
    parameters, flops, (dense, ours) = pairs
    cells = []
    for (before, after), unit, form in ((parameters, 1, ",.0f"), (flops, 1e6, ",.1f")):
        cells.append(
            f"{after / unit:{form}}" + (f" ({before / after:.1f}x)" if before and after else "")
        )
    theirs, own = quartiles
    if dense is None:
        return [*cells, "", _spread(ours, own), ""]
    faster = f"{dense / ours:.1f}" if dense >= ours else f"{dense / ours:.2f} slower here"
    return [*cells, _spread(dense, theirs), _spread(ours, own), faster]


def _spread(median: float, quartiles: tuple[float, float]) -> str:
    return f"{median:.2f}\n{quartiles[0]:.2f}-{quartiles[1]:.2f}"


def _mean(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.3f}" if len(known) == len(errors) else ""


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure  # needs no window system, unlike pyplot

    rows = [r for r in report.layers if r.flops]
    names = [r.path.removeprefix("encoder.").replace("layer.", "") for r in rows]
    with_errors = any(r.weight_error is not None for r in rows)
    figure = Figure(
        figsize=(11 if with_errors else 6.5, 1.2 + 0.16 * len(rows)), layout="constrained"
    )
    panels = figure.subplots(1, 2 if with_errors else 1, sharey=True, squeeze=False)[0]
    y = range(len(rows))
    panels[0].barh(y, [r.ms_dense for r in rows], color="0.85", label="dense")
    panels[0].barh(y, [r.ms for r in rows], height=0.5, color="tab:blue", label="compressed")
    panels[0].set(xlabel="ms per forward pass", yticks=list(y))
    panels[0].set_yticklabels(names, fontsize=6)
    panels[0].invert_yaxis()
    panels[0].legend()
    if with_errors:
        panels[1].plot([r.weight_error for r in rows], y, "o", ms=3, label="of the weight")
        if all(r.output_error is not None for r in rows):
            panels[1].plot([r.output_error for r in rows], y, "s", ms=3, label="of the output")
        panels[1].set(xlabel="relative squared error", xlim=(0, 1.05))
        panels[1].legend()
    for panel in panels:
        panel.grid(alpha=0.3, axis="x")
    s = report.setting
    figure.suptitle(f"{s['batch']} x {s['tokens']} tokens, {s['threads']} threads, {s['device']}")
    figure.savefig(path, dpi=150)
