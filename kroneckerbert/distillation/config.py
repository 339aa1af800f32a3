"""Settings of a distillation: ``TrainingArguments``, weights of the terms, the teacher."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from kron_kernels.shapes import check_number
from kroneckerbert.distillation.terms import TERMS, check_temperature

# Peak learning rates. Layers: after 220 steps of 16 x 64 tokens an 8x student of all-MiniLM-L6-v2
# scored 0.525 at 1e-3 and 0.532 at 2e-3 (STS-B, one seed). Sentences: the best of the study's rates
# for starts that are fitted to outputs are 4e-4 and 8e-4, and 1.6e-3 loses some; after 200 steps at
# 1e-3 a student was worse than its start.
_RATES = {"layers": 1e-3, "task": 1e-4, "sentences": 4e-4}
# The terms and batches of a sentence encoder: what its user sees is the vectors. The warm-up is in
# steps, up to half of a run, since a start that is fitted to data bears no high rate at first:
# with a twentieth of the run as warm-up 38 steps took an 8x student's ranking of pairs from 0.36 to
# 0.04. With these 200 steps, the four minutes of `kroneckerbert demo` take it from 0.45 to 0.58.
SENTENCES: dict[str, Any] = {
    "embedding_weight": 0.0,
    "attention_weight": 0.0,
    "hidden_weight": 0.0,
    "sentence_weight": 1.0,
    "relation_weight": 10.0,
    "warmup_steps": 200,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
}


@dataclass
class DistillationConfig(TrainingArguments):
    """``TrainingArguments`` with the weights of the loss; defaults are for stage 1.

    The paper's stage 1 has no logits term: with a language-modelling head, ``logits_weight=0``
    leaves it out, and saves two softmaxes over the vocabulary. Unlike the paper's, the terms of
    layers are divided by the teacher's variances.

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
        metadata={"help": "Weight of the logits' divergence. Unset: 1 if both models have logits."},
    )
    labels_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the supervised loss. Unset: 1 if there are labels."},
    )
    sentence_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the sentence vectors' error, of models without heads."},
    )
    relation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the MSE of the cosines of a batch's pairs of sentence vectors. The "
            "pairs are those of a device's batch."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits; the divergence is multiplied by its square."},
    )
    layer_map: str = field(
        default="uniform",
        metadata={
            "help": "The teacher layer for each student layer: uniform, first, last, or a number "
            "for each, counted from 1: 3,6. At equal depth, uniform is one to one."
        },
    )
    teacher_annealing: bool = field(
        default=False,
        metadata={
            "help": "Over the steps, lower the weight of the teacher's terms from 1 to 0 and raise "
            "that of the labels from 0 to 1 (Clark et al. 2019; Qin et al. 2022)."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "The teacher's dtype: float32, bfloat16 or float16."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the teacher's outputs on the training data, computed once, kept in "
            "float16, and read by later epochs and runs. For data padded on the right and without "
            "random masks. Other processes wait for it, at most ddp_timeout."
        },
    )
    student_dropout: bool = field(
        default=False,
        metadata={
            "help": "Train with the student's dropout. Off by default: the teacher has none, and "
            "matching its features through dropout leaves a noise floor."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this time, counted from each start or resumption, so that the run "
            "is not reproducible. The learning rate follows the share of time or of steps, "
            "whichever is larger, and still decays to zero; warm-up steps remain steps."
        },
    )

    learning_rate: float = field(
        default=1e-3, metadata={"help": "1e-3 for stage 1; 1e-5 to 5e-4 for stage 2."}
    )
    warmup_steps: float = field(
        default=0.05,
        metadata={
            "help": "Warm-up steps, or a share of all steps if below 1; at most half of the steps."
        },
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory; by default if there is a GPU."},
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between reports, or a share of all steps if below 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer_map, str) and self.layer_map[:1].isdigit():
            # transformers' HfArgumentParser supports no field of two types.
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
                "teacher_dtype must be float32, bfloat16 or float16, or unset to keep the "
                f"teacher's own, got {self.teacher_dtype!r}."
            )
        if self.teacher_annealing and self.labels_weight == 0:
            raise ValueError(
                "teacher_annealing moves the loss from the teacher to the labels, but "
                "labels_weight is 0: nothing would be left at the end. Set it, or do not anneal."
            )

    @classmethod
    def until(
        cls,
        output_dir: str,
        *,
        minutes: float | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        stage: str = "layers",
        **arguments: Any,
    ) -> "DistillationConfig":
        """Settings of a run without checkpoints that ends by time, steps or epochs.

        Batches are made of texts of similar length.

        Args:
            output_dir: Where the trainer writes.
            minutes: Training time. Without ``steps`` or ``epochs`` it alone ends the run.
            steps: Number of steps; takes precedence over ``epochs``.
            epochs: Passes over the data.
            stage: ``"layers"`` (stage 1: a learning rate of 1e-3), ``"task"`` (stage 2, on labelled
                data: 1e-4) or ``"sentences"`` (a sentence encoder: 4e-4 after 200 steps of
                warm-up, batches of 64, and the terms of the vectors instead of the layers').
            **arguments: Any field; these override the defaults above.

        Raises:
            ValueError: If none of the three limits is given, the stage is unknown, or as the class.
        """
        if stage not in _RATES:
            raise ValueError(f"stage must be one of {', '.join(_RATES)}, got {stage!r}.")
        if minutes is None and steps is None and epochs is None:
            raise ValueError("give minutes, steps or epochs: the run would never end.")
        defaults = {
            "max_minutes": minutes,
            "max_steps": steps or (10**9 if epochs is None else -1),
            "num_train_epochs": 1 if epochs is None else epochs,
            "learning_rate": _RATES[stage],
            "train_sampling_strategy": "group_by_length",
            "save_strategy": "no",
        }
        if stage == "sentences":
            defaults |= SENTENCES
        return cls(output_dir, **defaults | arguments)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """``Trainer``'s question; a run that only warms up ends at its highest rate."""
        return min(super().get_warmup_steps(num_training_steps), num_training_steps // 2)

    @property
    def weights(self) -> dict[str, float | None]:
        """The weight of every term; None means 1 where the term applies."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}
