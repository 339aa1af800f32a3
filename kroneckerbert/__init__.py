"""Transformers with Kronecker-factorised layers, in the idiom of transformers.

Importing this package registers its model types, so that ``AutoModel.from_pretrained`` and
pipelines load what ``save_pretrained`` wrote. Classes are named after the dense ones:
``KroneckerBertModel``, ``KroneckerRobertaForMaskedLM``, ``KroneckerGPT2LMHeadModel``, …
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("transformers") is None:
    raise ImportError("kroneckerbert needs transformers: pip install 'kron-kernels[bert]'")

from kroneckerbert import modeling_kroneckerbert
from kroneckerbert.configuration_kroneckerbert import KroneckerConfig
from kroneckerbert.conversion import compress, decompress, second_moments
from kroneckerbert.modeling_kroneckerbert import (
    KroneckerPreTrainedModel,
    embed,
    mean_pooling,
    register,
)
from kroneckerbert.planning import plan
from kroneckerbert.reporting import report

# What needs more than transformers, imported when it is asked for.
_LAZY = {
    "DistillationConfig": "distillation",
    "DistillationTrainer": "distillation",
    "export": "exporting",
    "load_exported": "exporting",
    "load_adapter": "adapters",
    "lora_config": "adapters",
    "merge_and_unload": "adapters",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"kroneckerbert.{_LAZY[name]}"), name)
    if name.startswith("Kronecker"):  # made by register, or when it is asked for
        return getattr(modeling_kroneckerbert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "KroneckerConfig",
    "KroneckerPreTrainedModel",
    "compress",
    "decompress",
    "embed",
    "export",
    "load_adapter",
    "load_exported",
    "lora_config",
    "mean_pooling",
    "merge_and_unload",
    "plan",
    "register",
    "report",
    "second_moments",
]
