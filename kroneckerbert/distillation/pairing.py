"""Whether student and teacher can be compared: their layers, inputs and configurations."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from kroneckerbert.modeling_kroneckerbert import check_trainable

if TYPE_CHECKING:
    from kroneckerbert.distillation.config import DistillationConfig

DETECTOR = "ElectraForPreTraining"  # one logit per token: whether it was replaced


def layer_pairs(layers: str | Sequence[int], student: int, teacher: int) -> list[int]:
    """The teacher layer for each student layer, both counted from 1.

    Args:
        layers: ``"uniform"`` spaces the teacher's layers evenly up to the last (TinyBERT's g(l) = l
            times the ratio of depths); ``"first"`` and ``"last"`` take them from that end; or a
            number for each student layer.
        student: Number of student layers.
        teacher: Number of teacher layers.

    Raises:
        ValueError: If the name is unknown, a list does not fit, or a name is given for a student
            deeper than its teacher.
    """
    if not isinstance(layers, str):
        if len(layers) != student or not all(1 <= layer <= teacher for layer in layers):
            raise ValueError(
                f"layer_map = {list(layers)} must name a layer of the teacher, 1 to {teacher}, for "
                f"each of the student's {student}."
            )
        return list(layers)
    if student > teacher:
        raise ValueError(
            f"the student has {student} layers and the teacher {teacher}: layer_map = {layers!r} "
            "needs a student at most as deep; give a list with a teacher layer for each."
        )
    named = {
        # In integers: float rounding must not decide the layer.
        "uniform": [(2 * layer * teacher + student) // (2 * student) for layer in _up_to(student)],
        "first": list(_up_to(student)),
        "last": [teacher - student + layer for layer in _up_to(student)],
    }
    if layers not in named:
        raise ValueError(f"layer_map must be a list or one of {list(named)}, got {layers!r}.")
    return named[layers]


def _up_to(n: int) -> range:
    return range(1, n + 1)


def taken_inputs(model: PreTrainedModel) -> set[str]:
    """The parameters of a model's forward; for a PEFT model, those of its base model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def foreign_inputs(model: PreTrainedModel, other: PreTrainedModel) -> set[str]:
    """The inputs in a batch for both models that must not be passed to this one.

    These are parameters of the other model only, such as BERT's segments for DistilBERT, and
    segments if the model has a single segment embedding: RoBERTa's forward accepts them, but its
    table has no second row. Inputs that neither names are passed on: a collator adds them for
    ``**kwargs``.
    """
    taken = taken_inputs(model)
    foreign = taken_inputs(other) - taken if "input_ids" in taken else set()
    segments = getattr(model.config, "type_vocab_size", None)
    return foreign | ({"token_type_ids"} if segments is not None and segments < 2 else set())


def check_pair(
    student: PreTrainedModel, teacher: PreTrainedModel, args: DistillationConfig
) -> None:
    """Check that all requested terms can be computed and that training cannot change the teacher.

    Raises:
        ValueError: If the models share parameters, or their outputs cannot be compared, or the
            student has int8 weights.
    """
    check_trainable(student)
    if student is teacher:
        raise ValueError("student and teacher are the same object; pass a copy.deepcopy of one.")
    owned = {id(p): name for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        if id(p) in owned:
            raise ValueError(
                f"The student's {name} is the teacher's {owned[id(p)]}: training would change the "
                "teacher. Build the student from copy.deepcopy(teacher)."
            )
    weights = args.weights
    if type(student).__name__.endswith(DETECTOR) and weights["logits"] != 0:
        raise ValueError(
            f"the logits of a {type(student).__name__} are not a distribution: set "
            "logits_weight=0, or distil the model without its head."
        )
    compared = {
        "vocab_size": "their tokens must be the same",
        "pad_token_id": "their tokens must be the same",
    }
    if weights["embedding"] != 0 or weights["hidden"] != 0:
        compared["hidden_size"] = "hidden states are compared without projections"
    if weights["sentence"] != 0 or weights["relation"] != 0:
        compared["hidden_size"] = "sentence vectors are compared without projections"
    if weights["attention"] != 0:
        compared["num_attention_heads"] = "scores are compared head by head"
    for name, why in compared.items():
        s, t = getattr(student.config, name), getattr(teacher.config, name)
        if s != t:
            raise ValueError(
                f"student and teacher must agree on {name}, got {s} and {t}: {why}. Compress this "
                "teacher, use the student's own teacher, or set the weights of these terms to 0."
            )
    if weights["hidden"] != 0 or weights["attention"] != 0:
        depths = (model.config.num_hidden_layers for model in (student, teacher))
        layer_pairs(args.layer_map, *depths)
    # Only classes with a classifier have this attribute; every config has num_labels.
    s, t = getattr(student, "num_labels", None), getattr(teacher, "num_labels", None)
    if s is None or t is None:
        return
    if s != t:
        raise ValueError(
            f"student and teacher must agree on num_labels, got {s} and {t}: load both with the "
            "task's num_labels."
        )
    s, t = ([*model.config.id2label.values()] for model in (student, teacher))
    named = not any(name.startswith("LABEL_") for name in (*s, *t))
    if named and [name.lower() for name in s] != [name.lower() for name in t]:
        raise ValueError(
            f"student and teacher must agree on the order of labels, got {s} and {t}: load both "
            "with the same id2label."
        )
