"""Teach a compressed transformer to compute what its teacher computes, layer by layer.

The student has its teacher's widths, so that a layer of the one answers to a layer of the other
without projections. Stage 1 is a bare model, or one with the heads of pre-training, on unlabelled
text; stage 2 is the task, with the fine-tuned teacher. Both are the same trainer: a term that
model or batch cannot give does not apply.
"""

from kroneckerbert.distillation.config import DistillationConfig
from kroneckerbert.distillation.scores import attention_scores
from kroneckerbert.distillation.terms import TERMS, distillation_terms
from kroneckerbert.distillation.trainer import DistillationTrainer

__all__ = [
    "TERMS",
    "DistillationConfig",
    "DistillationTrainer",
    "attention_scores",
    "distillation_terms",
]
