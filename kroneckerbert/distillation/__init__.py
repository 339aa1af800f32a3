"""Train a compressed transformer to reproduce its teacher's outputs, layer by layer.

The student has its teacher's widths, so that layers are compared without projections. Stage 1 uses
a bare model, or one with pre-training heads, on unlabelled text; stage 2 uses the task's data and
the fine-tuned teacher. Both use the same trainer: a term applies if model and batch provide it.
"""

from kroneckerbert.distillation.config import SHORT_RUN, DistillationConfig
from kroneckerbert.distillation.scores import attention_scores
from kroneckerbert.distillation.terms import TERMS, distillation_terms
from kroneckerbert.distillation.trainer import DistillationTrainer

__all__ = [
    "SHORT_RUN",
    "TERMS",
    "DistillationConfig",
    "DistillationTrainer",
    "attention_scores",
    "distillation_terms",
]
