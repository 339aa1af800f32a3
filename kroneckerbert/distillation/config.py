"""What a distillation is told: ``TrainingArguments``, the weights of the terms, the teacher."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from kron_kernels.shapes import check_number
from kroneckerbert.distillation.terms import TERMS, check_temperature


@dataclass
class DistillationConfig(TrainingArguments):
    """``TrainingArguments`` with the weights of the loss; defaults are the paper's stage 1.

    The paper's own stage 1 has no logits term: set ``logits_weight=0`` to follow it to the letter
    with a language-modelling head (which also saves two softmaxes over the vocabulary).

    Raises:
        ValueError: If a weight is negative or all are 0, temperature or max_minutes is not
            positive, a number is not finite, a dtype is unknown, or there are no labels to anneal
            to.
    """

    embedding_weight: float = field(
        default=1.0, metadata={"help": "Weight of the embeddings' MSE."}
    )
    attention_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pre-softmax attention scores' MSE."}
    )
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the layers' MSE."})
    logits_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the logits' divergence. Unset: 1 where both have logits."},
    )
    labels_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the supervised loss. Unset: 1 where there are labels."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits; their divergence is scaled by its square."},
    )
    layer_map: str = field(
        default="uniform",
        metadata={
            "help": "Which of the teacher's layers teach the student's: uniform, first, last, or "
            "a number for each, counted from 1: 3,6. At equal depth, uniform is one to one."
        },
    )
    teacher_annealing: bool = field(
        default=False,
        metadata={
            "help": "Let the weight of the teacher's terms fall from 1 to 0 over the steps while "
            "that of labels rises from 0 to 1 (Clark et al. 2019; Qin et al. 2022)."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16: what the teacher computes in."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what the teacher says of the training data, computed once, in "
            "float16, and read afterwards, by later runs too. For data that is padded on the right "
            "and not masked anew; other processes wait for it, at most ddp_timeout."
        },
    )
    student_dropout: bool = field(
        default=False,
        metadata={
            "help": "Train with the student's dropout. Off, because the teacher has none: to match "
            "its features through dropout leaves a floor of noise that short runs never pass."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this long, if steps last, counted from each start or resumption: "
            "such a run is not reproducible. The learning rate follows the share of time or of "
            "steps, whichever is ahead, so it still decays to zero."
        },
    )

    learning_rate: float = field(
        default=1e-3, metadata={"help": "1e-3 in stage 1; 1e-5 to 5e-4 later."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of warm-up, or a share of all steps if below 1."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory; on where there is a GPU to copy to."},
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between reports, or a share of all steps if below 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer_map, str) and self.layer_map[:1].isdigit():
            # A field of two types would be none for transformers' HfArgumentParser.
            self.layer_map = [int(layer) for layer in self.layer_map.split(",")]  # type: ignore[assignment]
        for name, weight in self.weights.items():
            if weight is not None:
                check_number(f"{name}_weight", weight)
        if all(weight == 0 for weight in self.weights.values()):
            raise ValueError("All weights are 0: nothing would be learnt. Set one of them.")
        check_temperature(self.temperature)
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(
                f"max_minutes must be > 0 and finite, got {self.max_minutes}; leave it unset for "
                "no limit."
            )

        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                "teacher_dtype must be float32, bfloat16 or float16, or unset to leave the teacher "
                f"as it is; got {self.teacher_dtype!r}."
            )
        if self.teacher_annealing and self.labels_weight == 0:
            raise ValueError(
                "teacher_annealing hands over from the teacher to the labels, but labels_weight "
                "is 0: nothing would be left at the end. Set labels_weight, or do not anneal."
            )

    @property
    def weights(self) -> dict[str, float | None]:
        """Weight of every term; None is 1 where the term applies."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}
