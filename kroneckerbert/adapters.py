"""LoRA on Kronecker layers with peft; merging forms no dense weight."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kron_kernels import KroneckerEmbedding, KroneckerLinear, KroneckerSum
from kron_kernels.factors import entry_of, shapes_in
from kron_kernels.modules import is_conv1d
from kroneckerbert.configuration_kroneckerbert import KroneckerConfig

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
except ImportError as error:
    raise ImportError(
        f"adapters need peft ({error}): pip install 'kron-kernels[peft]'", name="peft"
    ) from error


def lora_config(model: PreTrainedModel | None = None, **options: Any) -> LoraConfig:
    """A ``peft.LoraConfig`` that supports Kronecker layers, for ``peft.get_peft_model``.

    Args:
        model: The model to adapt; required for ``"all-linear"``.
        **options: Passed to ``LoraConfig``. ``target_modules`` defaults to ``"all-linear"``: every
            linear layer of the model without its head, factorised or dense.

    Raises:
        ValueError: If ``"all-linear"`` has no model, or the model has no linear layer.
    """
    if options.setdefault("target_modules", "all-linear") == "all-linear":
        if model is None:
            raise ValueError(
                "target_modules = 'all-linear' needs the model: write lora_config(model), or name "
                "the layers, such as target_modules=['query', 'value']."
            )
        options["target_modules"] = _linears(model)
    return _informed(LoraConfig(**options))


def load_adapter(
    model: PreTrainedModel, path: str | os.PathLike, *, is_trainable: bool = False, **options: Any
) -> PeftModel:
    """``PeftModel.from_pretrained`` for adapters of Kronecker layers, which peft does not support.

    Args:
        model: The model that the adapter was trained on.
        path: Folder written by ``PeftModel.save_pretrained``, or a name on the hub.
        is_trainable: Whether to continue training; otherwise all weights are frozen.
        **options: Passed to ``PeftModel.from_pretrained``.
    """
    config = _informed(LoraConfig.from_pretrained(path))
    return PeftModel.from_pretrained(
        model, path, config=config, is_trainable=is_trainable, **options
    )


def merge_and_unload(model: PeftModel, **options: Any) -> PreTrainedModel:
    """The adapted model without peft: Kronecker layers with adapters become ``KroneckerSum``.

    Like ``model.merge_and_unload()``, but adds the new layers to the configuration, which
    ``save_pretrained`` and ``from_pretrained`` need. The model inside ``model`` is changed.

    Args:
        model: Result of ``peft.get_peft_model`` or ``load_adapter``.
        **options: Passed to ``PeftModel.merge_and_unload``.
    """
    merged = model.merge_and_unload(**options)
    if isinstance(merged.config, KroneckerConfig):
        # The longest name decides, and none is longer than the layer's full path.
        prefix = merged.config.layout().prefix
        merged.config.kronecker_factors = merged.config.kronecker_factors | {
            f"{prefix}.{path}": entry_of(module.shapes)
            for path, module in merged.base_model.named_modules()
            if isinstance(module, KroneckerSum)
        }
    return merged


class LoraKroneckerLinear(LoraLinear):
    """peft's LoRA layer around a ``KroneckerLinear`` or ``KroneckerSum``.

    Merging is exact: the layer's products plus the adapters' low-rank parts. ``s B A`` of rank r is
    r Kronecker terms, each a column of B times a row of A. Unmerging restores the original layer
    object. Variants that read the dense weight (DoRA, PiSSA, …) are refused: there is none.
    """

    base_layer: KroneckerLinear | KroneckerSum
    merged_adapters: list[str]
    _unmerged: tuple[KroneckerLinear | KroneckerSum]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights = {config.init_lora_weights!r} starts from the dense weight, "
                "which a Kronecker layer does not form; use True, False or 'gaussian'."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base layer.

        Args:
            safe_merge: Whether to refuse adapters with NaN or infinite entries.
            adapter_names: By default the active ones.

        Raises:
            ValueError: If ``safe_merge`` and an entry is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [*self.merged_adapters, *(name for name in names if name in self.lora_A)]
        if names == self.merged_adapters:
            return
        (layer,) = self._unmerged if self.merged else (self.base_layer,)
        new = self._sum(layer, names)
        if safe_merge and not all(p.isfinite().all() for p in new.parameters()):
            raise ValueError(
                f"an adapter of {', '.join(names)} has NaN or infinite entries; train it again "
                "with a lower learning rate, or use an earlier checkpoint."
            )
        self._unmerged = (layer,)  # a tuple: a bare module would be registered as a child
        self.base_layer, self.merged_adapters = new, names

    def unmerge(self) -> None:
        """Restore the original base layer."""
        if self.merged:
            (self.base_layer,) = self._unmerged
            self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B A`` as a dense weight ``(out_features, in_features)``, for inspection."""
        return self.scaling[adapter] * self.lora_B[adapter].weight @ self.lora_A[adapter].weight

    def _sum(self, layer: KroneckerLinear | KroneckerSum, names: list[str]) -> KroneckerSum:
        """The layer plus one low-rank part for all adapters; shares the layer's factors."""
        old: list[Any] = list(getattr(layer, "parts", [layer]))
        like: dict[str, Any] = {"device": old[0].a.device, "dtype": old[0].a.dtype}
        columns = [self.scaling[n] * self.lora_B[n].weight.mT for n in names]  # (r, out)
        rows = [self.lora_A[n].weight for n in names]  # (r, in)
        a = torch.cat(columns)[:, :, None].to(**like)
        b = torch.cat(rows)[:, None, :].to(**like)
        bias = layer.bias
        for n in names:
            if self.lora_bias[n]:
                added = (self.scaling[n] * self.lora_B[n].bias).to(**like)
                bias = _like(layer.bias, added if bias is None else bias + added)

        new = KroneckerSum(
            layer.in_features,
            layer.out_features,
            [*(s.part for s in shapes_in(layer)), ((layer.out_features, 1), len(a))],
            bias is not None,
            backend=old[0].backend,
            device="meta",  # draws nothing; the factors follow
        )
        factors = [*((p.a, p.b) for p in old), (_like(old[0].a, a), _like(old[0].b, b))]
        for part, (left, right) in zip(new.parts, factors, strict=True):
            part.a, part.b = left, right
        new.bias = bias
        return new.train(layer.training)

    # peft's own versions look at the layer's class or its `weight`, which Kronecker layers lack.
    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype


class _Refused:
    """In place of the adapter layer, for modules that cannot have adapters."""

    def __init__(self, target: nn.Module, *args: Any, target_name: str = "", **kwargs: Any):
        raise ValueError(
            f"{target_name or 'a target'} is a KroneckerEmbedding; with a low-rank part it would "
            "not be a Kronecker product any more, which a tied decoder relies on; leave it out of "
            "target_modules."
        )


def _informed(config: LoraConfig) -> LoraConfig:
    if not hasattr(config, "_register_custom_module"):
        raise ImportError(
            "this version of peft cannot register custom layers for LoRA: "
            "pip install 'peft>=0.21,<0.22'"
        )
    config._register_custom_module(
        {
            KroneckerLinear: LoraKroneckerLinear,
            KroneckerSum: LoraKroneckerLinear,
            KroneckerEmbedding: _Refused,
        }
    )
    return config


def _linears(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers of the model without its head, adapted or not."""
    encoder = model.base_model
    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    inside = {id(m) for m in encoder.modules()}
    sums = [name for name, m in model.named_modules() if isinstance(m, KroneckerSum)]
    within = tuple(f"{name}." for name in (*adapted, *sums))  # their own parts
    kinds = KroneckerLinear | KroneckerSum | nn.Linear | BaseTunerLayer
    names = [
        name
        for name, m in model.named_modules()
        if (isinstance(m, kinds) or is_conv1d(m))
        and id(m) in inside
        and not name.startswith(within)
    ]
    if not names:
        raise ValueError(
            f"the {type(model).__name__} has no linear layer outside its head; name the modules to "
            "adapt in target_modules."
        )
    return names


def _like(base: Tensor | None, t: Tensor) -> nn.Parameter:
    """A parameter that is frozen like the base layer's, which peft freezes by default."""
    return nn.Parameter(t, base is not None and base.requires_grad)
