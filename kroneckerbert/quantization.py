"""Models with int8 weights, for inference, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from kron_kernels import QuantizedEmbedding
from kron_kernels.decompose import check_finite
from kron_kernels.modules import evaluating
from kron_kernels.quantization import densified, quantizable, quantized
from kron_kernels.shapes import check_number
from kroneckerbert.calibration import Batch, checked_batches, layer_inputs
from kroneckerbert.loading import is_sentence_transformer, why_not
from kroneckerbert.modeling_kroneckerbert import KroneckerPreTrainedModel, kronecker_class
from kroneckerbert.rebuilding import rebuilt


@torch.no_grad()
def quantize(
    model: Any,
    dtype: Literal["int8"] = "int8",
    *,
    keep: Iterable[str] = (),
    max_error: float | None = None,
    calibration: Iterable[Batch] | None = None,
) -> Any:
    """A copy of a model with int8 weights, for inference: a quarter of the size, faster on CPUs.

    Linear layers and embeddings of the model without its head get int8 weights with a scale for
    each row; of a Kronecker product the large factor, see ``kron_kernels.quantize_``. Activations
    are rounded as they are multiplied, each token by itself, so nothing needs to be calibrated.
    Word embeddings that a head shares stay in floating point, and so does the head.

    Args:
        model: A compressed model, a dense one, or a ``SentenceTransformer`` or ``CrossEncoder`` of
            one. It is left as it is.
        dtype: ``"int8"``, the only one so far.
        keep: Names of layers to leave in floating point: the ends of their paths, cut at a dot,
            such as ``"output.dense"``. ``rounding_errors`` names those with large errors.
        max_error: Layers with a larger error stay in floating point, too: with calibration their
            ``output_error``, otherwise their ``weight_error``, see ``rounding_errors``.
        calibration: Batches of model inputs to measure the errors on; only with ``max_error``.

    Returns:
        A model of the Kronecker class, in evaluation mode, which ``save_pretrained`` saves and
        ``AutoModel.from_pretrained`` loads. It cannot be trained.

    Raises:
        TypeError: If the model cannot be quantised, with the reason.
        ValueError: If a name is not that of a layer, a weight is not finite, or the model has int8
            weights already.
    """
    if dtype != "int8":
        raise ValueError(f"dtype must be 'int8', got {dtype!r}.")
    if calibration is not None and max_error is None:
        raise ValueError("calibration measures errors: pass max_error as well.")
    keep = list(keep)
    if is_sentence_transformer(model):
        inner = model[0].auto_model
        options: Any = {"keep": keep, "max_error": max_error, "calibration": calibration}
        return copy.deepcopy(model, {id(inner): quantize(inner, **options)}).eval()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"cannot quantise an object of class {type(model).__name__}; it must be a model of "
            "transformers. kron_kernels.quantize_(module) quantises layers of any module in place."
        )
    if getattr(model.config, "kronecker_int8", None):
        raise ValueError(
            "the model has int8 weights already; quantise the one that it was made of."
        )
    cls: Any = type(model)
    if isinstance(model, KroneckerPreTrainedModel):
        config = copy.deepcopy(model.config)
    elif reason := why_not(model):
        raise TypeError(f"cannot quantise a {cls.__name__}; {reason}.")
    else:
        cls = kronecker_class(model, "quantise")
        config = cls.config_class.from_dense(model.config, {})
    layers = _layers(model, keep)
    if max_error is not None:
        limit = check_number("max_error", max_error)
        errors = rounding_errors(model, calibration)
        layers = {e.path: layers[e.path] for e in errors if e.path in layers and e.error <= limit}
    if not layers:
        raise ValueError(f"no layer of this {type(model).__name__} is left for int8.")
    config.kronecker_int8 = list(layers)
    prefix, state = _prefix(model), model.state_dict(keep_vars=True)
    for path, layer in layers.items():
        for name in layer.state_dict():
            check_finite(f"{path}.{name}", state.pop(f"{prefix}{path}.{name}"))
        int8 = quantized(layer).state_dict()
        state |= {f"{prefix}{path}.{name}": t for name, t in int8.items()}
    return rebuilt(cls, config, state, like=model)


@torch.no_grad()
def dequantize(model: Any) -> Any:
    """The model of the same rounded weights in floating point, which can be trained.

    Args:
        model: Returned by ``quantize``; it is left as it is.

    Returns:
        A model of the Kronecker class, or the stock dense one if no layer is factorised; in
        evaluation mode.

    Raises:
        TypeError: If ``model`` has no int8 weights.
    """
    if is_sentence_transformer(model):
        inner = model[0].auto_model
        return copy.deepcopy(model, {id(inner): dequantize(inner)})
    paths = getattr(getattr(model, "config", None), "kronecker_int8", None)
    if not paths:
        raise TypeError(f"this {type(model).__name__} has no int8 weights; quantize makes them.")
    config = copy.deepcopy(model.config)
    config.kronecker_int8 = []
    cls = type(model)
    if not config.kronecker_factors:
        cls, config = model.dense_class, config.to_dense()
    prefix, state = _prefix(model), model.state_dict(keep_vars=True)
    for path in paths:
        layer = model.base_model.get_submodule(path)
        for name in layer.state_dict():
            del state[f"{prefix}{path}.{name}"]
        floating = layer.dequantized().state_dict()
        state |= {f"{prefix}{path}.{name}": t for name, t in floating.items()}
    return rebuilt(cls, config, state, like=model).requires_grad_()


@dataclass(frozen=True)
class RoundingError:
    """What int8 changes in a layer; squared and relative, ``‖W − Ŵ‖² / ‖W‖²``.

    Attributes:
        path: In the model without its head.
        weight_error: Of the weight.
        row: The row with the largest error.
        row_error: Of that row.
        output_error: ``E‖y − ŷ‖² / E‖y‖²`` on the calibration text, with rounded activations; None
            without text, and for embeddings.
    """

    path: str
    weight_error: float
    row: int
    row_error: float
    output_error: float | None

    @property
    def error(self) -> float:
        """``output_error`` if it is known, otherwise ``weight_error``."""
        return self.weight_error if self.output_error is None else self.output_error


@torch.no_grad()
def rounding_errors(
    model: PreTrainedModel, calibration: Iterable[Batch] | None = None
) -> list[RoundingError]:
    """The error that ``quantize`` would cause in each layer, the largest first.

    Args:
        model: A compressed or dense model in floating point.
        calibration: Batches of model inputs, for the errors of outputs.

    Raises:
        ValueError: If a weight is not finite.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        for name, p in layer.named_parameters():
            check_finite(f"{path}.{name}", p)
    int8 = {path: quantized(layer) for path, layer in layers.items()}
    outputs: dict[str, float] = {}
    if calibration is not None:
        paths = [path for path, q in int8.items() if not isinstance(q, QuantizedEmbedding)]
        outputs = _output_errors(model.base_model, layers, int8, paths, calibration)
    errors = []
    for path, layer in layers.items():
        weight = densified(layer)  # (m, n)
        wrong = (densified(int8[path].dequantized()) - weight).square().sum(1)  # (m,)
        whole = weight.square().sum(1)
        rows = torch.where(whole > 0, wrong / whole, 0.0)
        row = int(rows.argmax())
        total = (wrong.sum() / whole.sum().clamp_min(1e-30)).item()
        errors.append(RoundingError(path, total, row, rows[row].item(), outputs.get(path)))
    return sorted(errors, key=lambda e: -e.error)


def _output_errors(
    encoder: PreTrainedModel,
    layers: dict[str, Any],
    int8: dict[str, Any],
    paths: list[str],
    calibration: Iterable[Batch],
) -> dict[str, float]:
    wrong, whole = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)
    with evaluating(encoder):
        for batch in checked_batches(calibration):
            for path, inputs in layer_inputs(encoder, batch, paths).items():
                for x in inputs:
                    target = layers[path](x)
                    wrong[path] += (int8[path](x) - target).square().sum().item()
                    whole[path] += target.square().sum().item()
    return {path: wrong[path] / whole[path] for path in paths if whole[path]}


def _layers(model: PreTrainedModel, keep: Iterable[str] = ()) -> dict[str, Any]:
    """The layers for int8, by path in the model without its head."""
    prefix = _prefix(model)
    found = quantizable(model, keep)
    return {p.removeprefix(prefix): layer for p, layer in found.items() if p.startswith(prefix)}


def _prefix(model: PreTrainedModel) -> str:
    """Before the paths of the model without its head."""
    return "" if model is model.base_model else f"{model.base_model_prefix}."
