"""Train a compressed transformer to reproduce its teacher's outputs, layer by layer.

The student has its teacher's widths, so layers are compared without projections. Stage 1 uses
a bare model, or one with pre-training heads, on unlabelled text; stage 2 uses the task's data and
the fine-tuned teacher. Both use the same trainer: a term applies if model and batch provide it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kroneckerbert.distillation.config import SENTENCES as SENTENCES
    from kroneckerbert.distillation.config import DistillationConfig as DistillationConfig
    from kroneckerbert.distillation.heads import with_head_of as with_head_of
    from kroneckerbert.distillation.scores import attention_scores as attention_scores
    from kroneckerbert.distillation.terms import TERMS as TERMS
    from kroneckerbert.distillation.terms import distillation_terms as distillation_terms
    from kroneckerbert.distillation.trainer import DistillationTrainer as DistillationTrainer

_MODULES = {  # imported on first use: the command line needs signals.py without torch
    "SENTENCES": "config",
    "TERMS": "terms",
    "DistillationConfig": "config",
    "DistillationTrainer": "trainer",
    "attention_scores": "scores",
    "distillation_terms": "terms",
    "with_head_of": "heads",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name.isidentifier() and not name.startswith("__") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
