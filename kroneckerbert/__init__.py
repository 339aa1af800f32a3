"""Transformers with Kronecker-factorised layers, in the idiom of transformers.

Importing this package registers its model types: ``AutoModel.from_pretrained`` and pipelines then
load what ``save_pretrained`` wrote. Classes are named after the dense ones:
``KroneckerBertModel``, ``KroneckerRobertaForMaskedLM``, ``KroneckerGPT2LMHeadModel``, …

The import itself loads neither torch nor a model: each public name is imported on first use.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if find_spec("transformers") is None:
    raise ImportError("kroneckerbert needs transformers: pip install 'kron-kernels[bert]'")

if TYPE_CHECKING:
    from kroneckerbert.adapters import load_adapter as load_adapter
    from kroneckerbert.adapters import lora_config as lora_config
    from kroneckerbert.adapters import merge_and_unload as merge_and_unload
    from kroneckerbert.calibration import second_moments as second_moments
    from kroneckerbert.captured import capture as capture
    from kroneckerbert.configuration_kroneckerbert import KroneckerConfig as KroneckerConfig
    from kroneckerbert.conversion import compress as compress
    from kroneckerbert.conversion import decompress as decompress
    from kroneckerbert.distillation import DistillationConfig as DistillationConfig
    from kroneckerbert.distillation import DistillationTrainer as DistillationTrainer
    from kroneckerbert.encoder_file import save_encoder as save_encoder
    from kroneckerbert.exporting import export as export
    from kroneckerbert.exporting import load_exported as load_exported
    from kroneckerbert.measure import report as report
    from kroneckerbert.modeling_kroneckerbert import (
        KroneckerPreTrainedModel as KroneckerPreTrainedModel,
    )
    from kroneckerbert.modeling_kroneckerbert import embed as embed
    from kroneckerbert.modeling_kroneckerbert import mean_pooling as mean_pooling
    from kroneckerbert.modeling_kroneckerbert import register as register
    from kroneckerbert.planning import plan as plan
    from kroneckerbert.quantization import dequantize as dequantize
    from kroneckerbert.quantization import quantize as quantize
    from kroneckerbert.quantization import rounding_errors as rounding_errors
    from kroneckerbert.serving import explain as explain
    from kroneckerbert.students import load as load

_NAMES = {
    "adapters": ["load_adapter", "lora_config", "merge_and_unload"],
    "calibration": ["second_moments"],
    "captured": ["capture"],
    "configuration_kroneckerbert": ["KroneckerConfig"],
    "conversion": ["compress", "decompress"],
    "distillation": ["DistillationConfig", "DistillationTrainer"],
    "encoder_file": ["save_encoder"],
    "exporting": ["export", "load_exported"],
    "modeling_kroneckerbert": ["KroneckerPreTrainedModel", "embed", "mean_pooling", "register"],
    "planning": ["plan"],
    "measure": ["report"],
    "quantization": ["dequantize", "quantize", "rounding_errors"],
    "serving": ["explain"],
    "students": ["load"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name.startswith("Kronecker"):  # KroneckerBertModel, …: made on demand
        return getattr(import_module(f"{__name__}.modeling_kroneckerbert"), name)
    if name.isidentifier() and not name.startswith("__") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


# --- registration with transformers

PREFIX = "kronecker_"  # begins our model types
_AUTO = "transformers.models.auto.configuration_auto"


def model_type(dense: str) -> str:
    """The ``model_type`` in a Kronecker model's ``config.json``, from the dense model's."""
    return PREFIX + dense.replace("-", "_")


class _OnDemand(type):
    """Metaclass of the stand-ins for configuration classes, which are made on first use.

    Making a class imports its architecture, and transformers has hundreds.
    """

    dense: str  # the model type

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._made(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._made()(*args, **kwargs)

    def _made(cls) -> Any:
        modeling = import_module(f"{__name__}.modeling_kroneckerbert")
        return modeling.register(sys.modules[_AUTO].CONFIG_MAPPING[cls.dense])


def _announce(auto: ModuleType) -> None:
    """Give transformers' ``AutoConfig`` a stand-in for the Kronecker form of each model type."""
    for dense in list(auto.CONFIG_MAPPING):
        if not dense.startswith(PREFIX):  # ours, from an earlier import
            stand_in = _OnDemand(dense, (), {"dense": dense})
            auto.AutoConfig.register(model_type(dense), stand_in, exist_ok=True)


class _Announcer(MetaPathFinder):
    """Announces the model types as soon as transformers' ``AutoConfig`` is imported.

    Importing it here would take torch's 1.5 s, and so would ``kron_kernels.arrivals``, which does
    the same for any module.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        if spec := next(filter(None, found), None):
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == _AUTO:  # a loader may serve others, too
                    _announce(module)

            loader.exec_module = exec_module
        return spec


sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != __name__]  # on a reload
sys.meta_path.insert(0, _Announcer())
if _AUTO in sys.modules:  # perhaps another thread is still importing it: import waits
    _announce(import_module(_AUTO))
