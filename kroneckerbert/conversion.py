"""From a dense BERT to a KroneckerBERT that starts near it, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
)
from transformers.utils import logging

from kron_kernels import KroneckerEmbedding, nearest_kronecker
from kroneckerbert.configuration_kroneckerbert import WORD_EMBEDDINGS, KroneckerBertConfig
from kroneckerbert.modeling_kroneckerbert import (
    KroneckerBertForMaskedLM,
    KroneckerBertForQuestionAnswering,
    KroneckerBertForSequenceClassification,
    KroneckerBertForTokenClassification,
    KroneckerBertModel,
    KroneckerBertPreTrainedModel,
)

_STUDENTS = {
    BertModel: KroneckerBertModel,
    BertForMaskedLM: KroneckerBertForMaskedLM,
    BertForQuestionAnswering: KroneckerBertForQuestionAnswering,
    BertForSequenceClassification: KroneckerBertForSequenceClassification,
    BertForTokenClassification: KroneckerBertForTokenClassification,
}
_TEACHERS = {student: teacher for teacher, student in _STUDENTS.items()}
# One way only: without the pooler and the next-sentence head.
_STUDENTS[BertForPreTraining] = KroneckerBertForMaskedLM

# What the teacher's tensors and the function they compute depend on.
_STRUCTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "tie_word_embeddings",
    "is_decoder",
    "add_cross_attention",
)


@torch.no_grad()
def compress(
    model: BertPreTrainedModel | str | os.PathLike,
    config: str | KroneckerBertConfig = "kronecker-bert-8",
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    rescale: bool = False,
    progress: bool = False,
) -> KroneckerBertPreTrainedModel:
    """A KroneckerBERT whose factorised weights are the nearest to the model's own.

    A new model on the same device, in the same dtype and mode, with the same head and labels;
    ``model`` is left as it is. What is not factorised is copied exactly. Expect to train the
    result: of a random weight's energy, the attention shapes at BERT_BASE's width hold a quarter
    at 8x and 3 % at 21x.

    Args:
        model: A ``BertModel`` or ``BertFor{MaskedLM, QuestionAnswering, SequenceClassification,
            TokenClassification}``, or the name or folder of one. A ``BertForPreTraining`` becomes a
            masked language model.
        config: A preset's name, scaled to the model's widths, or a configuration whose sizes are
            the model's, see :meth:`KroneckerBertConfig.from_bert`. The labels are the model's.
        calibration: Batches of model inputs (``input_ids``, ``attention_mask``, …). The linear
            layers then start nearest in their outputs on these inputs, see
            :func:`second_moments`; word embeddings, which are looked up, do not.
        rescale: Give each product its weight's norm, see :func:`kron_kernels.nearest_kronecker`.
        progress: Show a bar over the factorised modules.

    Raises:
        TypeError: If the model is of none of these classes.
        ValueError: If the configuration does not fit the model, or a weight is not finite.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(model)
    student_class = _STUDENTS.get(type(model))
    if student_class is None:
        raise TypeError(_unsupported(type(model).__name__))
    config = _student_config(config, model)
    shapes = config.kronecker_shapes()
    encoder = model.base_model
    linears = [path for path in shapes if path != WORD_EMBEDDINGS]
    moments = {} if calibration is None else second_moments(encoder, calibration, linears)

    state = model.state_dict()
    if model is not encoder and WORD_EMBEDDINGS in shapes and config.tie_word_embeddings:
        state.pop("cls.predictions.decoder.weight", None)  # tied to the factors instead
    if isinstance(model, BertForPreTraining):
        dropped = ("bert.pooler.", "cls.seq_relationship.")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    prefix = "" if model is encoder else "bert."
    for path, s in tqdm(shapes.items(), desc="factorising", disable=not progress):
        state[f"{prefix}{path}.a"], state[f"{prefix}{path}.b"] = nearest_kronecker(
            state.pop(f"{prefix}{path}.weight"),
            (s.m1, s.n1),
            s.rank,
            second_moment=moments.get(path),
            rescale=rescale,
        )
    return _rebuild(student_class, config, state, like=model)


@torch.no_grad()
def decompress(model: KroneckerBertPreTrainedModel) -> BertPreTrainedModel:
    """The stock dense BERT of the same function: the way out, for tools that know only that.

    Raises:
        TypeError: If ``model`` is not a KroneckerBERT.
    """
    teacher_class = _TEACHERS.get(type(model))
    if teacher_class is None:
        names = ", ".join(c.__name__ for c in _TEACHERS)
        raise TypeError(f"cannot decompress a {type(model).__name__}; it must be one of {names}.")
    fields = model.config.to_dict()
    for name in ("kronecker_factors", "model_type", "architectures", "_name_or_path"):
        fields.pop(name, None)
    config = BertConfig(**fields, attn_implementation=model.config._attn_implementation)

    state = model.state_dict()
    prefix = "" if model is model.base_model else "bert."
    for path in model.config.kronecker_shapes():
        module = model.get_submodule(prefix + path)
        is_table = isinstance(module, KroneckerEmbedding)
        dense = module.to_embedding() if is_table else module.to_linear()
        state[f"{prefix}{path}.weight"] = dense.weight
        del state[f"{prefix}{path}.a"], state[f"{prefix}{path}.b"]
    for name in ("cls.predictions.decoder.a", "cls.predictions.decoder.b"):
        state.pop(name, None)  # the dense decoder is tied to the dense table
    return _rebuild(teacher_class, config, state, like=model)


@torch.no_grad()
def second_moments(
    model: BertPreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs x of linear layers, over all tokens that are not padding.

    Args:
        model: Any BERT; it runs in evaluation mode, without its head.
        batches: Model inputs; tensors that the encoder does not take (labels) are ignored.
        names: Paths of linear layers within the encoder, such as
            ``"encoder.layer.0.intermediate.dense"``.

    Returns:
        By name, shape ``(in_features, in_features)``, float32, on the model's device. The query,
        key and value of a layer read the same input and share one tensor. All layers of BERT_BASE
        take 0.5 GB, of which the 3072-wide ``output.dense`` are five sixths.

    Raises:
        ValueError: If there is no token to average over.
    """
    encoder = model.base_model
    names = list(names)
    # The first name of each input; one hook on it serves the others.
    first = {_input_of(name): name for name in reversed(names)}
    sums: dict[str, Tensor] = {}
    tokens = 0
    mask: Tensor | None = None

    def accumulate(source: str):
        def hook(_, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2) if mask is None else args[0][mask]  # (tokens, n)
            x = x.float()
            if source in sums:
                sums[source].addmm_(x.mT, x)
            else:
                sums[source] = x.mT @ x

        return hook

    was_training = encoder.training
    hooks = [
        encoder.get_submodule(name).register_forward_pre_hook(accumulate(source))
        for source, name in first.items()
    ]
    encoder.eval()
    try:
        for batch in batches:
            known = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
            inputs = {name: batch[name].to(encoder.device) for name in known if name in batch}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            encoder(**inputs)
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError(
            "calibration has no batch with a token that is not padding; pass some tens of batches "
            "of tokenised text (a generator that was read once is empty)."
        )
    means = {source: total / tokens for source, total in sums.items()}
    return {name: means[_input_of(name)] for name in names}


def _input_of(name: str) -> str:
    """One name for modules that read the same tensor: a layer's query, key and value."""
    is_projection = name.endswith((".query", ".key", ".value"))
    return name.rpartition(".")[0] if is_projection else name


def _load(source: str | os.PathLike) -> BertPreTrainedModel:
    """The model in the class that its configuration names."""
    config = AutoConfig.from_pretrained(source)
    # Checkpoints of bare encoders may name no class.
    name = (config.architectures or ["BertModel"])[0]
    classes = {teacher.__name__: teacher for teacher in _STUDENTS}
    if config.model_type != "bert" or name not in classes:
        raise TypeError(f"{source}: {_unsupported(f'{name} ({config.model_type})')}")
    try:
        return classes[name].from_pretrained(source)
    except SafetensorError as error:
        raise OSError(f"the weights of {source} are damaged ({error}); copy them again.") from error


def _student_config(
    config: str | KroneckerBertConfig, model: BertPreTrainedModel
) -> KroneckerBertConfig:
    teacher = model.config
    if isinstance(config, str):
        return KroneckerBertConfig.preset(config, teacher)
    if not isinstance(config, KroneckerBertConfig):
        raise TypeError(
            f"config must be a preset's name or a KroneckerBertConfig, got a "
            f"{type(config).__name__}; write KroneckerBertConfig.from_bert(model.config, factors)."
        )
    differences = [
        f"{name} = {getattr(config, name)!r} instead of {getattr(teacher, name)!r}"
        for name in _STRUCTURE
        if getattr(config, name) != getattr(teacher, name)
    ]
    if differences:
        raise ValueError(
            f"config does not fit the {type(model).__name__}: {', '.join(differences)}; "
            "use KroneckerBertConfig.from_bert(model.config, config.kronecker_factors)."
        )
    config = copy.deepcopy(config)
    config.id2label, config.label2id = dict(teacher.id2label), dict(teacher.label2id)
    config.problem_type = config.problem_type or teacher.problem_type
    if config._attn_implementation is None:
        config._attn_implementation = teacher._attn_implementation
    return config


def _rebuild(
    cls: type[BertPreTrainedModel],
    config: BertConfig,
    state: dict[str, Tensor],
    like: BertPreTrainedModel,
) -> BertPreTrainedModel:
    """A ``cls`` with a copy of ``state``, and the device, dtype, mode and pooler of ``like``."""
    bare = {} if like is not like.base_model else {"add_pooling_layer": like.pooler is not None}
    # Through the loader: on the meta device, so that no weight is drawn in vain, with its checks.
    state = {name: tensor.clone() for name, tensor in state.items()}
    show_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        new = cls.from_pretrained(None, config=config, state_dict=state, dtype=like.dtype, **bare)
    finally:
        if show_bars:
            logging.enable_progress_bar()
    new.name_or_path = new.config.name_or_path = ""  # where None came from
    return new.to(like.device).train(like.training)


def _unsupported(name: str) -> str:
    names = ", ".join(teacher.__name__ for teacher in _STUDENTS)
    already = "Kronecker" in name
    remedy = "it is factorised already" if already else "load the model in one of these classes"
    return f"cannot compress a {name}, only {names}; {remedy}."
