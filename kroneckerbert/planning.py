"""Choose the factors of a transformer for a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from kron_kernels.plan import Plan
from kron_kernels.plan import plan as plan_module
from kroneckerbert import measure
from kroneckerbert.calibration import Batch, checked_batches
from kroneckerbert.configuration_kroneckerbert import layout_of
from kroneckerbert.loading import is_sentence_transformer, why_not
from kroneckerbert.modeling_kroneckerbert import kronecker_class


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
        model: A dense transformer or SentenceTransformer, on its final device, in its final dtype
            and with its final number of threads; it is left as it is. For other modules use
            ``kron_kernels.plan.plan``.
        budget: Limits for the compressed model: ``"parameters"``, ``"bytes"``, ``"flops"``,
            ``"latency"`` (milliseconds), ``"error"`` (the layers' mean relative squared error,
            each weighed by what an error in it does to the model's output); as a number, as
            ``"8x"`` less than the dense model, or as ``"50%"`` of it. All hold together, and the
            first four are measured at the end on a model built from the plan.
        objective: What to minimise within the budget; ``"size"`` is parameters.
        batch: Sequences in the pass whose latency and FLOPs count.
        tokens: Tokens per sequence.
        calibration: Batches of model inputs: errors are then those of the layers' outputs instead
            of the weights.
        layers: Decisions made beforehand, like ``KroneckerConfig.kronecker_factors``.
        words: Whether the word embeddings may be factorised.
        mix: Whether a layer may be a Kronecker product plus a low-rank part.
        keep_dense_if_slower: Keep layers dense where factors are slower on this machine, if the
            budget allows.
        progress: Print progress on standard error.

    Returns:
        A plan, which ``kroneckerbert.compress`` takes in place of a preset. It prints as a table.

    Raises:
        TypeError: If the model is not a dense transformer, or calibration is one batch.
        ValueError: If the budget cannot be met, or an argument does not fit.
    """
    if is_sentence_transformer(model):
        model = model[0].auto_model
    if reason := why_not(model):
        raise TypeError(f"cannot plan an object of class {type(model).__name__}; {reason}.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"cannot plan an object of class {type(model).__name__}; it must be a dense "
            "transformer. For other modules use kron_kernels.plan.plan(module, budget, inputs)."
        )
    student_class = kronecker_class(model, "plan")
    encoder: Any = model.base_model
    prefix = "" if encoder is model else f"{model.base_model_prefix}."
    layout = layout_of(encoder)
    names = [f"{prefix}{path}" for path in layout.sizes if words or path != layout.table]

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
    return plan_module(
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
