"""Which layers of a transformer, in which shapes: what is chosen, and what came of it.

``plan`` decides before, ``report`` measures after.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

import kron_kernels.plan as engine
from kron_kernels import KroneckerEmbedding, KronShape
from kron_kernels.files import write_file
from kron_kernels.plan import Plan
from kron_kernels.plan.forward import evaluating
from kron_kernels.timing import interleaved
from kroneckerbert import measure
from kroneckerbert.calibration import Batch, checked_batches, layer_inputs, tokens_of
from kroneckerbert.configuration_kroneckerbert import factorisable, linear_weight
from kroneckerbert.loading import is_sentence_transformer, why_not
from kroneckerbert.modeling_kroneckerbert import KroneckerPreTrainedModel, kronecker_class

_LAYER_SECONDS, _MODEL_SECONDS = 0.2, 5.0  # of timing a kind of layer, and the whole, both forms


def plan(
    model: PreTrainedModel | nn.Module,
    budget: Mapping[str, float | str],
    *,
    objective: Literal["error", "size", "latency"] = "error",
    batch: int = 1,
    tokens: int = 128,
    calibration: Iterable[Batch] | None = None,
    layers: Mapping[str, Any] | None = None,
    words: bool = True,
    mix: bool = True,
    keep_dense_if_slower: bool = True,
    progress: bool = False,
) -> Plan:
    """Choose the factors of a transformer's layers for a budget, by measuring on this machine.

    Args:
        model: A dense transformer or SentenceTransformer, on the device, in the dtype and with the
            threads that it will run with; it is left as it is. For other modules there is
            ``kron_kernels.plan.plan``.
        budget: What the compressed model may take: ``"parameters"``, ``"bytes"``, ``"flops"``,
            ``"latency"`` (milliseconds), ``"error"`` (the layers' mean relative squared error); as
            a number, or ``"8x"`` less than the dense model, or ``"50%"`` of it. All are met
            together, and the first four are those of a model so built, measured at the end.
        objective: What is minimised within the budget; ``"size"`` is parameters.
        batch: Sequences in the pass whose latency and FLOPs count.
        tokens: Tokens in each of them.
        calibration: Batches of model inputs: errors are those of the layers' outputs on them,
            instead of the weights'.
        layers: Decisions already made, like ``KroneckerConfig.kronecker_factors``.
        words: Whether the word embeddings may be factorised.
        mix: Whether a layer may be a Kronecker product plus a low-rank part.
        keep_dense_if_slower: Keep a layer dense where its factors take longer here, if the budget
            allows.
        progress: Tell what is being done on the standard error.

    Returns:
        What ``kroneckerbert.compress`` takes in place of a preset. It prints as a table.

    Raises:
        TypeError: If the model is no dense transformer, or calibration one batch.
        ValueError: If the budget cannot be met, or an argument does not fit.
    """
    if is_sentence_transformer(model):
        model = model[0].auto_model
    if reason := why_not(model):
        raise TypeError(f"cannot plan an object of class {type(model).__name__}; {reason}.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"cannot plan an object of class {type(model).__name__}; it must be a dense "
            "transformer. For other modules there is kron_kernels.plan.plan(module, budget, "
            "inputs)."
        )
    student_class = kronecker_class(model, "plan")
    encoder: Any = model.base_model
    prefix = "" if encoder is model else f"{model.base_model_prefix}."
    table = encoder.get_input_embeddings()
    names = [f"{prefix}{path}" for path, m in factorisable(encoder) if words or m is not table]

    def build(factors: dict[str, Any]) -> PreTrainedModel:
        config = student_class.config_class.from_dense(model.config, factors)
        return student_class(config).to(encoder.device, encoder.dtype).eval()

    ids = measure.random_ids(model, batch, tokens)
    if calibration is not None:
        known = ("input_ids", "attention_mask", "token_type_ids")
        calibration = [
            {name: b[name].to(encoder.device) for name in known if name in b}
            for b in checked_batches(calibration)
        ]
    return engine.plan(
        model,
        budget,
        {"input_ids": ids},
        objective=objective,
        layers=layers,
        names=names,
        calibration=calibration,
        mix=mix,
        keep_dense_if_slower=keep_dense_if_slower,
        build=build,
        progress=progress,
    )


@dataclass(frozen=True)
class LayerReport:
    """One factorised layer; FLOPs and milliseconds are those of one forward pass of the model.

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
    ms: float
    weight_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class Report:
    """What compressing each layer, and the whole, costs and gains here."""

    layers: list[LayerReport]
    totals: dict[str, dict[str, float]]  # "parameters", "flops" and "ms" of "dense", "compressed"
    setting: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, at once or not at all."""
        write_file(path, self.to_json() + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw what each layer saves in time and parameters, and its errors; PNG, SVG or PDF."""
        _draw(self, Path(path))

    def __str__(self) -> str:
        console = Console(width=150, no_color=True, highlight=False)
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
    """Measure each factorised layer of a model against the dense one, here and now.

    Args:
        model: What ``kroneckerbert.compress`` or training made.
        teacher: The dense model that it is from, of the same architecture; errors need it, and the
            whole dense model's latency.
        batch: Sequences in the timed passes.
        tokens: Tokens in each of them.
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
    encoder = model.base_model
    dense = None if teacher is None else dict(factorisable(teacher.base_model))
    shapes = model.config.kronecker_shapes()
    paths = list(shapes)
    for path, (s, *_) in shapes.items() if dense is not None else ():
        size = tuple(linear_weight(dense[path]).shape) if path in dense else None
        if size != (s.out_features, s.in_features):
            raise ValueError(
                f"teacher, a {type(teacher).__name__}, has no dense {path} of "
                f"{s.out_features}x{s.in_features}; give the model that this "
                f"{type(model).__name__} was compressed from."
            )
    models: dict[str, PreTrainedModel] = {} if teacher is None else {"dense": teacher}
    models["compressed"] = model
    ids = measure.random_ids(model, batch, tokens)
    linears = [p for p in paths if not isinstance(encoder.get_submodule(p), KroneckerEmbedding)]
    with evaluating(*models.values()):
        output_errors = {}
        if calibration is not None and teacher is not None:
            output_errors = _output_errors(encoder, teacher.base_model, linears, calibration)
        counts = tokens_of(encoder, {"input_ids": ids}, linears)
        clock: dict[tuple, tuple[float, float]] = {}
        rows = []
        for path in paths:
            layer = encoder.get_submodule(path)
            source = None if dense is None else dense[path]
            rows.append(_layer(path, layer, source, counts.get(path, 0), ids, clock, output_errors))
        calls = {name: partial(m, input_ids=ids) for name, m in models.items()}
        times = interleaved(calls, _MODEL_SECONDS)
    totals: dict[str, dict[str, float]] = {
        "parameters": {name: measure.parameters(m) for name, m in models.items()},
        "flops": {name: measure.flops(m, batch, tokens) for name, m in models.items()},
        "ms": {name: times[name].median for name in models},
    }
    setting = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "batch": batch,
        "tokens": tokens,
    }
    return Report(rows, totals, setting)


def _layer(
    path: str,
    layer: nn.Module,
    source: nn.Module | None,
    tokens: int,
    ids: Tensor,
    clock: dict[tuple, tuple[float, float]],
    output_errors: Mapping[str, float],
) -> LayerReport:
    shapes = [KronShape.of(p.a, p.b) for p in getattr(layer, "parts", [layer])]
    rows, columns = shapes[0].out_features, shapes[0].in_features
    is_table = isinstance(layer, KroneckerEmbedding)
    stock = layer.to_embedding() if is_table else layer.to_linear()
    key = (type(layer), rows, columns, tuple(shapes), tokens)
    if key not in clock:  # layers alike are timed once
        x = ids if is_table else torch.randn(tokens, columns).to(stock.weight)
        times = interleaved({"dense": lambda: stock(x), "ours": lambda: layer(x)}, _LAYER_SECONDS)
        clock[key] = times["dense"].median, times["ours"].median
    weight = None if source is None else linear_weight(source)
    error = None
    if weight is not None:
        error = ((weight - stock.weight).square().sum() / weight.square().sum()).item()
    flops = 0 if is_table else sum(s.flops for s in shapes) * tokens
    return LayerReport(
        path,
        rows,
        columns,
        " + ".join(map(_told, shapes)),
        rows * columns,
        sum(s.parameters for s in shapes),
        0 if is_table else 2 * rows * columns * tokens,
        flops,
        *clock[key],
        error,
        output_errors.get(path),
    )


def _output_errors(
    encoder: nn.Module, dense: PreTrainedModel, paths: list[str], calibration: Iterable[Batch]
) -> dict[str, float]:
    """Relative squared errors of the layers' outputs on the dense model's own inputs of them."""
    wrong, whole = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)
    for batch in checked_batches(calibration):
        for path, inputs in layer_inputs(dense, batch, paths).items():
            for x in inputs:
                target = dense.get_submodule(path)(x)
                wrong[path] += (encoder.get_submodule(path)(x) - target).square().sum().item()
                whole[path] += target.square().sum().item()
    return {path: wrong[path] / whole[path] for path in paths}


def _told(s: KronShape) -> str:
    if s.n1 == s.m2 == 1 or s.m1 == s.n2 == 1:
        return f"rank {s.rank}"
    product = f"{s.m1}x{s.n1} ⊗ {s.m2}x{s.n2}"
    return product if s.rank == 1 else f"{s.rank} of {product}"


def _table(report: Report) -> Table:
    """Layers that are alike but for their place share a row, with their mean errors."""
    s = report.setting
    table = Table(
        title=f"{s['batch']} x {s['tokens']} tokens, {s['threads']} threads, {s['device']}, "
        f"{s['dtype']}, torch {s['torch']}"
    )
    table.add_column("layers", overflow="fold")
    table.add_column("terms")
    for heading in ("parameters", "MFLOPs", "ms dense", "ms here", "times faster"):
        table.add_column(heading, justify="right")
    for heading in ("weight error", "output error"):
        table.add_column(heading, justify="right")
    groups: dict[tuple, list[LayerReport]] = {}
    for row in report.layers:
        name = ".".join(part for part in row.path.split(".") if not part.isdigit())
        groups.setdefault((name, row.terms), []).append(row)

    for (name, terms), rows in groups.items():
        n = len(rows)

        dense, here = sum(r.ms_dense for r in rows), sum(r.ms for r in rows)
        table.add_row(
            name if n == 1 else f"{name} ({n})",
            terms,
            _less(
                sum(r.parameters_dense for r in rows), sum(r.parameters for r in rows), "{:,.0f}"
            ),
            _less(
                sum(r.flops_dense for r in rows) / 1e6, sum(r.flops for r in rows) / 1e6, "{:,.1f}"
            ),
            f"{dense:.2f}",
            f"{here:.2f}",
            f"{dense / here:.1f}" if dense >= here else f"{dense / here:.2f} slower here",
            _mean([r.weight_error for r in rows]),
            _mean([r.output_error for r in rows]),
        )
    table.add_section()
    totals = [report.totals[key] for key in ("parameters", "flops", "ms")]
    (p0, p1), (f0, f1), (t0, t1) = ((t.get("dense"), t["compressed"]) for t in totals)
    table.add_row(
        "the whole model",
        "",
        _less(p0, p1, "{:,.0f}"),
        _less(f0 and f0 / 1e6, f1 / 1e6, "{:,.1f}"),
        "" if t0 is None else f"{t0:.2f}",
        f"{t1:.2f}",
        "" if t0 is None else f"{t0 / t1:.1f}",
        "",
        "",
    )
    return table


def _mean(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.3f}" if len(known) == len(errors) else ""


def _less(dense: float | None, here: float, form: str) -> str:
    return form.format(here) + (f" ({dense / here:.1f}x)" if dense and here else "")


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure  # no window system, whatever the machine's default

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
