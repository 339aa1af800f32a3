"""Train a compressed transformer to compute what its teacher computes, layer by layer.

The student has its teacher's widths: layers are compared one to one, without projections. Stage 1
trains a bare model, or one with the heads of pre-training, on unlabelled text; stage 2 trains on
the task, with the fine-tuned teacher. One trainer does both and leaves out each loss term that
model or batch cannot give.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kroneckerbert.distillation.config import DistillationConfig as DistillationConfig
    from kroneckerbert.distillation.scores import attention_scores as attention_scores
    from kroneckerbert.distillation.terms import TERMS as TERMS
    from kroneckerbert.distillation.terms import distillation_terms as distillation_terms
    from kroneckerbert.distillation.trainer import DistillationTrainer as DistillationTrainer

_MODULES = {  # imported on first use: the command line needs signals.py without torch
    "TERMS": "terms",
    "DistillationConfig": "config",
    "DistillationTrainer": "trainer",
    "attention_scores": "scores",
    "distillation_terms": "terms",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
