"""What ``compress`` and ``plan`` cannot take, and what to pass instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Wrappers by their class's name: most are of packages that may be absent and take long to import.
# A class of one's own may have the same name, so the package is looked at, too.
_PACKAGES = ("peft", "torch", "transformers", "deepspeed", "optimum")
_WRAPPERS = {
    "PeftModel": "it has adapters; pass model.merge_and_unload(), or compress the base model first "
    "and adapt the student with kroneckerbert.lora_config",
    "PeftMixedModel": "it has adapters; pass model.merge_and_unload()",
    "DataParallel": "it is a wrapper; pass model.module and wrap the student",
    "DistributedDataParallel": "it is a wrapper; pass model.module and wrap the student",
    "DeepSpeedEngine": "it is a wrapper; pass model.module and wrap the student",
    "FullyShardedDataParallel": "its weights are sharded; compress the model before you shard it",
    "FSDPModule": "its weights are sharded; compress the model before fully_shard",
    "OptimizedModule": "it is what torch.compile makes; pass model._orig_mod and compile the "
    "student",
    "ScriptModule": "it is a TorchScript program, whose layers cannot be replaced; pass the model "
    "that it was made of",
    "Pipeline": "it is a pipeline; pass pipeline.model, and make a new pipeline of the student",
    "OptimizedModel": "it runs an exported program; pass the PyTorch model that was exported",
}
# Packages, by the beginning of a module's or a tensor's class, whose layers stand for dense ones.
_INSIDE = {
    "peft.": "has adapters in it; merge them with peft's merge_and_unload() first",
    "bitsandbytes.": "is quantised; load it without quantization_config",
    "torchao.": "is quantised; load it without quantisation, and quantise the student",
    "torch.ao.nn.": "is quantised; pass the model of floating-point weights",
    "torch.distributed.": "is sharded; compress the model before you shard it",
}


def why_not(model: Any) -> str | None:
    """Why this is no plain module of dense weights, with the remedy; None if it is one."""
    for cls in type(model).__mro__:
        if cls.__name__ in _WRAPPERS and _package(cls) in _PACKAGES:
            return _WRAPPERS[cls.__name__]
    if isinstance(model, type):
        return "it is a class; pass a model, such as one from its from_pretrained"
    if not isinstance(model, nn.Module):
        return "it is no model; pass a loaded one, such as AutoModel.from_pretrained(name)"
    if not isinstance(model, PreTrainedModel):
        return None  # its layers are looked at one by one
    if getattr(model, "hf_quantizer", None) is not None:
        return "it is quantised; load it without quantization_config"
    parts = [(name, type(m)) for name, m in model.named_modules()]
    parts += [(name, type(p.data)) for name, p in model.named_parameters()]
    for name, cls in parts:
        for package, reason in _INSIDE.items():
            if cls.__module__.startswith(package):
                return f"{name or 'it'} ({cls.__name__}) {reason}"
    return None


def is_sentence_transformer(model: Any) -> bool:
    """Whether it is a model of sentence-transformers with a transformer in it."""
    # By name: an import would take seconds, and the package may be absent.
    kinds = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")
    return (
        any(
            c.__name__ in kinds and _package(c) == "sentence_transformers"
            for c in type(model).__mro__
        )
        and isinstance(model, nn.Sequential)
        and len(model) > 0
        and hasattr(model[0], "auto_model")
    )


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
