"""KroneckerBERT: BERT with Kronecker-factorised layers, in the idiom of transformers.

Importing this package registers its classes, so that ``AutoModel.from_pretrained`` and pipelines
load what ``save_pretrained`` wrote.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("transformers") is None:
    raise ImportError("kroneckerbert needs transformers: pip install 'kron-kernels[bert]'")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kroneckerbert.configuration_kroneckerbert import KroneckerBertConfig
from kroneckerbert.conversion import compress, decompress, second_moments
from kroneckerbert.modeling_kroneckerbert import (
    KroneckerBertForMaskedLM,
    KroneckerBertForQuestionAnswering,
    KroneckerBertForSequenceClassification,
    KroneckerBertForTokenClassification,
    KroneckerBertModel,
    KroneckerBertPreTrainedModel,
    embed,
    mean_pooling,
)

if TYPE_CHECKING:
    from kroneckerbert.distillation import DistillationArguments, DistillationTrainer

AutoConfig.register(KroneckerBertConfig.model_type, KroneckerBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, KroneckerBertModel),
    (AutoModelForMaskedLM, KroneckerBertForMaskedLM),
    (AutoModelForQuestionAnswering, KroneckerBertForQuestionAnswering),
    (AutoModelForSequenceClassification, KroneckerBertForSequenceClassification),
    (AutoModelForTokenClassification, KroneckerBertForTokenClassification),
):
    _auto.register(KroneckerBertConfig, _model, exist_ok=True)


def __getattr__(name: str) -> Any:
    """What needs accelerate, imported when it is asked for."""
    if name in ("DistillationArguments", "DistillationTrainer"):
        from kroneckerbert import distillation

        return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "KroneckerBertConfig",
    "KroneckerBertForMaskedLM",
    "KroneckerBertForQuestionAnswering",
    "KroneckerBertForSequenceClassification",
    "KroneckerBertForTokenClassification",
    "KroneckerBertModel",
    "KroneckerBertPreTrainedModel",
    "compress",
    "decompress",
    "embed",
    "mean_pooling",
    "second_moments",
]
