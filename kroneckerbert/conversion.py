"""Conversion of a dense transformer to a Kronecker one near it, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    factorise_,
    nearest_kronecker_sum,
)
from kron_kernels.decompose import check_finite
from kron_kernels.factorise import dense_layer
from kron_kernels.modules import is_conv1d, linear_weight
from kron_kernels.nn import as_trainable
from kron_kernels.plan import Plan
from kron_kernels.shapes import naming
from kroneckerbert.calibration import checked_batches, refit, second_moments
from kroneckerbert.configuration_kroneckerbert import KroneckerConfig
from kroneckerbert.loading import is_sentence_transformer, load, read_config, why_not
from kroneckerbert.modeling_kroneckerbert import (
    ELSEWHERE,
    FACTORISED,
    KroneckerPreTrainedModel,
    is_tied,
    kronecker_class,
)
from kroneckerbert.presets import RECOMMENDED
from kroneckerbert.quantization import dequantize
from kroneckerbert.rebuilding import pooler_as, rebuilt


@torch.no_grad()
def compress(
    model: PreTrainedModel | nn.Module | str | os.PathLike,
    config: str | KroneckerConfig | Plan | Mapping[str, Any] = RECOMMENDED,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    sequential: bool = False,
    progress: bool = False,
) -> KroneckerPreTrainedModel | nn.Module:
    """Replace weights of a model by the nearest factorised ones.

    A transformers model gives a new model of the Kronecker class, on the same device, in the same
    dtype and modes, with the same head and labels; ``model`` is left as it is. A
    ``SentenceTransformer`` or ``CrossEncoder`` gives a copy with such a model in it. Any other
    module is changed in place and returned; it needs a plan or a mapping. Other weights are copied
    exactly, and frozen parameters (``requires_grad``) give frozen factors. Expect to train the
    result: the attention shapes at BERT_BASE's width hold a quarter of a random weight's energy at
    8x, and 3 % at 21x.

    Args:
        model: The dense model, or the name or folder of a transformers model.
        config: A preset's name, scaled to the model's widths (by default products of the paper's
            shapes with low-rank words); a plan from ``kroneckerbert.plan``; a
            mapping like ``KroneckerConfig.kronecker_factors``; or a configuration with the model's
            sizes. The labels are always the model's.
        calibration: Batches of model inputs (``input_ids``, ``attention_mask``, …). The linear
            layers then start nearest in their outputs on these inputs, see ``second_moments``;
            word embeddings have no inputs to multiply, and do not.
        sequential: Whether to refit layer by layer, biases included, on the calibration inputs as
            the student's earlier layers return them, see ``kroneckerbert.calibration.refit``.
        progress: Whether to show a bar over the factorised modules.

    Raises:
        TypeError: If the model cannot be compressed.
        ValueError: If the configuration does not fit the model, a weight is not finite, or
            ``sequential`` has no calibration inputs.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(model)
    if sequential and calibration is None:
        raise ValueError("sequential=True refits on inputs: pass calibration=batches as well.")
    if is_sentence_transformer(model):
        return _compress_sentence_transformer(
            model,
            config,
            calibration=calibration,
            sequential=sequential,
            progress=progress,
        )
    if reason := why_not(model):
        raise TypeError(f"cannot compress an object of class {type(model).__name__}; {reason}.")
    if not isinstance(model, PreTrainedModel):
        return _compress_module(model, config, calibration)
    student_class = kronecker_class(model)
    config = _student_config(config, student_class, model)
    factorised = config.kronecker_shapes()
    _check_class(student_class, config)
    encoder = model.base_model
    table = model.get_input_embeddings()
    linears = [path for path in factorised if encoder.get_submodule(path) is not table]
    batches = None if calibration is None else checked_batches(calibration)
    for path in factorised:  # before calibration, whose error would name a later layer
        check_finite(f"the weight of {path}", encoder.get_submodule(path).weight)
    # The refitting takes its own moments, and nothing of a layer's earlier factors.
    refitted = set(linears) if sequential else set()
    moments = {}
    if batches is not None and not sequential:
        moments = second_moments(encoder, batches, linears)

    state = model.state_dict(keep_vars=True)
    prefix = "" if model is encoder else f"{model.base_model_prefix}."
    for path, shapes in tqdm(factorised.items(), desc="factorising", disable=not progress):
        name = f"{prefix}{path}"
        if encoder.get_submodule(path) is table and is_tied(config):
            for decoder in _tied_to(model, f"{name}.weight"):
                state.pop(decoder, None)  # tied to the factors instead
        source = state.pop(f"{name}.weight")
        weight = linear_weight(encoder.get_submodule(path))
        with naming(path):
            if path in refitted:
                sizes = [((s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2)) for s in shapes]
                fitted = [(weight.new_zeros(a), weight.new_zeros(b)) for a, b in sizes]
            else:
                parts = [s.part for s in shapes]
                fitted = nearest_kronecker_sum(weight, parts, second_moment=moments.get(path))
        for i, (a, b) in enumerate(fitted):
            part = f"{name}.parts.{i}" if len(fitted) > 1 else name
            state[f"{part}.a"], state[f"{part}.b"] = (as_trainable(t, source) for t in (a, b))
    student = rebuilt(student_class, config, state, like=model)
    if sequential and batches is not None:
        refit(student, model, batches, progress)
    return student


@torch.no_grad()
def decompress(model: KroneckerPreTrainedModel) -> PreTrainedModel:
    """The equivalent stock dense model, for tools that do not support Kronecker layers.

    A weight is frozen if all its factors are; other parameters keep their ``requires_grad``.

    Raises:
        TypeError: If ``model`` is not a Kronecker model.
        ValueError: If a factorised layer has its own ``forward``.
    """
    if not isinstance(model, KroneckerPreTrainedModel):
        raise TypeError(
            f"cannot decompress a {type(model).__name__}; it must be one of the Kronecker classes, "
            "which compress returns."
        )
    if model.config.kronecker_int8:
        model = dequantize(model)
        if not isinstance(model, KroneckerPreTrainedModel):
            return model
    config = model.config.to_dense()
    with torch.device("meta"):
        stock = model.dense_class(config, **pooler_as(model))
    prefix = "" if model is model.base_model else f"{model.base_model_prefix}."
    factorised = {f"{prefix}{path}" for path in model.config.kronecker_shapes()}

    state = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if not isinstance(module, KroneckerLinear | KroneckerSum | KroneckerEmbedding):
            continue
        for key in module.state_dict():
            if key != "bias":
                state.pop(f"{name}.{key}", None)  # the parts of a sum are modules, too
        if name in factorised:  # the dense decoder is tied to the dense table, others to each other
            weight = dense_layer(name, module).weight
            is_transposed = is_conv1d(stock.get_submodule(name))
            state[f"{name}.weight"] = as_trainable(weight.mT if is_transposed else weight, weight)
    return rebuilt(model.dense_class, config, state, like=model)


def _compress_module(module: nn.Module, config: Any, calibration: Iterable | None) -> nn.Module:
    """Any other module, in place."""
    if isinstance(config, str | KroneckerConfig):
        raise TypeError(
            f"a {type(module).__name__} is not a transformers model and has no preset or "
            "configuration; pass kron_kernels.plan.plan(module, budget, inputs), or a mapping from "
            "paths of its layers to terms."
        )
    if calibration is not None:
        raise TypeError(
            "calibration is for transformers; for other modules pass second_moments to "
            "kron_kernels.factorise_."
        )
    return factorise_(module, config.factors if isinstance(config, Plan) else config)


def _compress_sentence_transformer(model: Any, config: Any, **options: Any) -> Any:
    dense = model[0].auto_model
    # A copy in which the student replaces the dense model.
    return copy.deepcopy(model, {id(dense): compress(dense, config, **options)})


def _load(source: str | os.PathLike) -> PreTrainedModel:
    """Load a model in the class that its configuration names."""
    config = read_config(source)
    if isinstance(config, KroneckerConfig):
        name = (config.architectures or [type(config).__name__])[0]
        raise TypeError(f"{source}: cannot compress a {name}; {FACTORISED}.")
    return load(source)


def _check_class(cls: type[KroneckerPreTrainedModel], config: KroneckerConfig) -> None:
    """Raise if the model cannot be made: on the meta device, before the expensive part."""
    try:
        with torch.device("meta"):
            cls(config)
    except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
        raise TypeError(
            f"cannot compress a {cls.dense_class.__name__}; factors do not fit into its class "
            f"({error}): {ELSEWHERE}."
        ) from error


def _student_config(
    config: str | KroneckerConfig | Plan | Mapping[str, Any],
    student_class: type[KroneckerPreTrainedModel],
    model: PreTrainedModel,
) -> KroneckerConfig:
    teacher = model.config
    config_class: type[KroneckerConfig] = student_class.config_class
    if isinstance(config, str):
        return config_class.preset(config, teacher)
    if isinstance(config, Plan):
        return config_class.from_dense(teacher, config.factors, kronecker_plan=asdict(config))
    if isinstance(config, Mapping):
        return config_class.from_dense(teacher, dict(config))
    if not isinstance(config, config_class):
        raise TypeError(
            f"config must be a preset's name, a plan, a mapping from module names to shapes or a "
            f"{config_class.__name__}, got an object of class "
            f"{type(config).__name__}; write "
            f"{config_class.__name__}.from_dense(model.config, factors)."
        )
    differences = [
        f"{name} = {getattr(config, name, None)!r} instead of {getattr(teacher, name, None)!r}"
        for name in _structure(type(teacher))
        if getattr(config, name, None) != getattr(teacher, name, None)
    ]
    if differences:
        raise ValueError(
            f"config does not fit the {type(model).__name__}: {', '.join(differences)}; use "
            f"{config_class.__name__}.from_dense(model.config, config.kronecker_factors)."
        )
    config = copy.deepcopy(config)
    config.id2label, config.label2id = dict(teacher.id2label), dict(teacher.label2id)
    config.problem_type = config.problem_type or teacher.problem_type
    if config._attn_implementation is None:
        config._attn_implementation = teacher._attn_implementation
    return config


def _structure(dense_config: type[PreTrainedConfig]) -> list[str]:
    """Names of the fields that a model's tensors and function depend on."""
    common = {field.name for field in fields(PreTrainedConfig)}
    own = (field.name for field in fields(dense_config) if field.name not in common)
    free = ("drop", "initializer", "use_cache", "token_id", "chunk")
    return [n for n in own if not any(part in n for part in free)] + ["tie_word_embeddings"]


def _tied_to(model: PreTrainedModel, name: str) -> list[str]:
    return [key for key, source in (model._tied_weights_keys or {}).items() if source == name]
