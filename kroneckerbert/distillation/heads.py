"""Give a student the head of its fine-tuned teacher."""

from __future__ import annotations

import os

import transformers
from transformers import PreTrainedModel

from kroneckerbert.loading import load, read_config


def with_head_of(teacher: PreTrainedModel, source: str | os.PathLike) -> PreTrainedModel:
    """Load a student with the teacher's kind of head.

    Args:
        teacher: A fine-tuned model with a head.
        source: Name or folder of the student.

    Returns:
        The student with its own head if that has the same kind, else with a copy of the teacher's
        head and pooler (fine-tuning changes both).

    Raises:
        TypeError: If the teacher has no head that an Auto class of transformers loads.
        ValueError: If the student's weights do not fit its configuration.
    """
    _, found, head = type(teacher).__name__.partition("For")
    auto_class = f"AutoModelFor{head}"
    if not found or not hasattr(transformers, auto_class):
        raise TypeError(
            f"a {type(teacher).__name__} has no head to copy; give a teacher that was fine-tuned "
            "on the task, such as a BertForSequenceClassification."
        )
    student_config = read_config(source)
    names = student_config.architectures or []
    if any(name.endswith(f"For{head}") for name in names):
        return load(source, auto_class)
    for name in ("id2label", "label2id", "problem_type"):
        setattr(student_config, name, getattr(teacher.config, name))
    student = load(
        source, auto_class, new_head=True, config=student_config, ignore_mismatched_sizes=True
    )
    prefix = f"{teacher.base_model_prefix}."
    words = teacher.get_input_embeddings().weight.data_ptr()  # tied decoders are not the head's
    state = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if (not name.startswith(prefix) or name.startswith(f"{prefix}pooler."))
        and tensor.data_ptr() != words
    }
    student.load_state_dict(state, strict=False)
    return student
