"""Which teacher for which student, which of its layers for which of the student's, and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from kroneckerbert.distillation.config import DistillationConfig

DETECTOR = "ElectraForPreTraining"  # whose logits are one for each token: replaced or not


def layer_pairs(layers: str | Sequence[int], student: int, teacher: int) -> list[int]:
    """The teacher's layer for each of the student's, both counted from 1.

    Args:
        layers: ``"uniform"`` spreads them and ends with the teacher's last (TinyBERT's g(l) = l
            times the ratio of depths); ``"first"`` and ``"last"`` take as many from that end; or a
            number for each layer of the student.
        student: Number of its layers.
        teacher: Number of its layers.

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
            "is for one at most as deep; give a list with a layer of the teacher for each."
        )
    named = {
        # Integers: a float's rounding must not decide which layer teaches.
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
    """The inputs that a model's forward names; of one with adapters, those of the model within."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def foreign_inputs(model: PreTrainedModel, other: PreTrainedModel) -> set[str]:
    """The inputs of a batch for both models that this one must not be given.

    What only the other one names, such as BERT's segments beside DistilBERT. What neither names a
    collator has added for their ``**kwargs``. And segments where there is but one: RoBERTa names
    them, but has no row for the second.
    """
    taken = taken_inputs(model)
    foreign = taken_inputs(other) - taken if "input_ids" in taken else set()
    segments = getattr(model.config, "type_vocab_size", None)
    return foreign | ({"token_type_ids"} if segments is not None and segments < 2 else set())


def check_pair(
    student: PreTrainedModel, teacher: PreTrainedModel, args: DistillationConfig
) -> None:
    """That the terms asked for can be computed, and training leaves the teacher alone.

    Raises:
        ValueError: If they share parameters, or disagree on what the terms compare.
    """
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
            f"the logits of a {type(student).__name__} are no distribution to compare: set "
            "logits_weight=0, or distil the model without its head."
        )
    compared = {
        "vocab_size": "their tokens must be the same",
        "pad_token_id": "their tokens must be the same",
    }
    if weights["embedding"] != 0 or weights["hidden"] != 0:
        compared["hidden_size"] = "hidden states are compared without projections"
    if weights["attention"] != 0:
        compared["num_attention_heads"] = "scores are compared head by head"
    for name, why in compared.items():
        s, t = getattr(student.config, name), getattr(teacher.config, name)
        if s != t:
            raise ValueError(
                f"student and teacher must agree on {name}, got {s} and {t}: {why}. Compress this "
                "teacher, choose the student's own, or set the weights of such terms to 0."
            )
    if weights["hidden"] != 0 or weights["attention"] != 0:
        depths = (model.config.num_hidden_layers for model in (student, teacher))
        layer_pairs(args.layer_map, *depths)
    # Only classes with a classifier have the attribute; a config has num_labels in any case.
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
