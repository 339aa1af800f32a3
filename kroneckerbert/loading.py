"""Loading saved models and checking given ones, with errors that name the file and the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import (
    HFValidationError,
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import kroneckerbert
from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kroneckerbert.files import read_json

_INDEX = "model.safetensors.index.json"
# Files of sentence-transformers.
_MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FACTOR = re.compile(r"(\.parts\.\d+)?\.[ab]$")
# Raised by transformers for values in a config.json that it cannot use.
_INVALID = (StrictDataclassClassValidationError, StrictDataclassFieldValidationError)


# --- load


def read_config(source: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a saved model, dense or factorised.

    Raises:
        OSError: If there is none, or it is damaged.
        ValueError: If this version of transformers lacks the architecture, or a value is invalid.
    """
    check_source(source)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} has no config.json, so it is not a model; give a folder that "
            "save_pretrained wrote."
        )
    with _naming_source(source):
        fields, _ = PreTrainedConfig.get_config_dict(source)
        found = fields.get("model_type")
        if not isinstance(found, str) or not found:
            raise ValueError(
                f"{source} has model_type {found!r} in its config.json, which must be a name such "
                "as 'bert'; correct it, or save the model again."
            )
        if found not in CONFIG_MAPPING:
            raise ValueError(
                f"{source} is a {found}, and transformers {transformers.__version__} has no "
                f"{found.removeprefix(kroneckerbert.PREFIX)}: another version may have it; an "
                "architecture of your own must be registered first, see kroneckerbert.register."
            )
        try:
            # False: never run code from the folder, and do not ask whether to.
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, MemoryError, ImportError):
            raise
        except Exception as error:
            raise _invalid_config(source, error) from error
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"architectures in {source}'s config.json must be a list of names of classes, got "
                f"{names!r}; correct it."
            )
    return config


def load(
    source: str | os.PathLike,
    auto_class: str | None = None,
    *,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A saved model, dense or factorised, in evaluation mode; every weight is from the file.

    Args:
        source: Its folder, or its name on the Hub.
        auto_class: Such as ``"AutoModelForMaskedLM"``; None loads the class that the model's
            ``config.json`` names.
        new_head: Draw the head's tensors if the checkpoint lacks them.
        **options: For ``from_pretrained``. With ``ignore_mismatched_sizes=True`` a head of another
            shape than the checkpoint's is drawn too.

    Raises:
        OSError: If there is no model, or a file is damaged.
        TypeError: If it is an encoder-decoder, or of a class that transformers lacks.
        ValueError: If a tensor is missing, or its shape is not that of the configuration.
    """
    config = read_config(source)
    cls = _class_of(source, config, auto_class)
    if not options:  # otherwise they may be fields of the configuration, which is read again
        options["config"] = config
    with _naming_source(source):
        model, info = cls.from_pretrained(
            source,
            **options | {"ignore_mismatched_sizes": True},  # transformers would only log them
            output_loading_info=True,
        )
    encoder = "" if model is model.base_model else f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    shapes = mismatched(info)
    if new_head:
        missing = [name for name in missing if name.startswith(encoder)]
    if new_head or not encoder:  # masked language models are saved without a pooler
        missing = [name for name in missing if "pooler." not in name]
    if options.get("ignore_mismatched_sizes"):
        shapes = {name: text for name, text in shapes.items() if name.startswith(encoder)}
    if problems := _listed({"missing": missing, "of another shape": shapes.values()}):
        raise ValueError(
            f"{source} is not a checkpoint of this {type(model).__name__}. {problems}. To resolve: "
            "save the model again, with its configuration."
        )
    return model


def without_weights(source: str | os.PathLike) -> PreTrainedModel:
    """A saved model on the meta device, which costs no memory: its sizes."""
    config = read_config(source)
    cls = _class_of(source, config)
    with _naming_source(source), torch.device("meta"):
        return cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in a saved model's folder.

    Raises:
        OSError: If there is none.
        ValueError: If a file is damaged.
    """
    check_source(source)
    absent = OSError(
        f"{source} has no tokenizer; save it there with "
        f"tokenizer.save_pretrained({os.fspath(source)!r})."
    )
    with _naming_source(source):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            if any(Path(source).glob("tokenizer*")):  # damaged, not missing
                raise
            raise absent from error
    # Without tokenizer files transformers makes up a vocabulary of special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise absent
    return tokenizer


def check_source(source: str | os.PathLike | None) -> None:
    """Raise unless ``source`` is None, a folder, or a name that a model on the Hub could have.

    Raises:
        NotADirectoryError: If it is a file.
        FileNotFoundError: If it is a path, and nothing is there.
    """
    if source is None or (Path(source).is_dir() and os.fspath(source)):
        return
    remedy = "give the folder of a saved model, or a name on the Hub"
    if Path(source).is_file():
        raise NotADirectoryError(f"{source} is a file; {remedy}.")
    try:
        if isinstance(source, str):
            validate_repo_id(source)
            return
    except HFValidationError:
        pass
    raise FileNotFoundError(f"{source or repr(source)} is not a folder; {remedy}.")


def _class_of(
    source: str | os.PathLike, config: PreTrainedConfig, auto_class: str | None = None
) -> Any:
    if config.is_encoder_decoder:
        raise TypeError(f"{source} has an encoder and a decoder; give a model with one of them.")
    # Checkpoints of bare encoders may name no class.
    name = auto_class or (config.architectures or ["AutoModel"])[0]
    package = kroneckerbert if name.startswith("Kronecker") else transformers
    cls = getattr(package, name, None)
    if not hasattr(cls, "from_pretrained"):
        raise TypeError(
            f"{source} is a {name} ({config.model_type}), which is missing from this version of "
            f"transformers ({transformers.__version__})."
        )
    return cls


# --- check what was loaded


def check_loaded(
    model: PreTrainedModel,
    info: dict[str, Any],
    source: str | os.PathLike | None,
    new_head: bool = False,
) -> None:
    """Raise unless a factorised model without its head is exactly the saved one.

    transformers draws missing tensors and only logs them. A pooler or a head may be new, as at the
    start of fine-tuning.

    Args:
        model: Returned by ``from_pretrained`` ...
        info: ... with ``output_loading_info=True``.
        source: The checkpoint's name, for the message.
        new_head: Accept a head whose shape is not the checkpoint's.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape or not of floating-point
            or int8 numbers, or a factor is not finite.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()} - {"pooler"}

    def of_encoder(names: Iterable[str]) -> list[str]:
        return sorted(n for n in names if n.removeprefix(prefix).split(".")[0] in parts)

    missing, unexpected = of_encoder(info["missing_keys"]), of_encoder(info["unexpected_keys"])
    shapes = mismatched(info)
    other_shape = of_encoder(shapes) if new_head else list(shapes)
    state = {name.removeprefix(prefix): t for name, t in model.state_dict().items()}
    floating = {name for name, t in state.items() if t.is_floating_point()}
    int8 = {name for name, t in state.items() if t.dtype == torch.int8}
    dtypes = {} if source is None else _file_dtypes(Path(source))
    problems = _listed(
        {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": [shapes[name] for name in other_shape],
            "not of floating-point numbers": [
                f"{name} ({dtype})"
                for name, dtype in dtypes.items()
                if name.removeprefix(prefix) in floating and not dtype.startswith(("F", "BF"))
            ],
            "not of int8 numbers": [
                f"{name} ({dtype})"
                for name, dtype in dtypes.items()
                if name.removeprefix(prefix) in int8 and dtype != "I8"
            ],
        }
    )
    if problems:
        dense = {name.removesuffix(".weight") for name in unexpected}
        if any(_FACTOR.sub("", name) in dense for name in missing):
            remedy = (
                "these are dense weights where config.kronecker_factors asks for factors: load "
                "them with their own class and call kroneckerbert.compress(model, config)"
            )
        elif other_shape and not of_encoder(other_shape):
            remedy = "pass ignore_mismatched_sizes=True for a new head"
        else:
            remedy = "load it with the config it was saved with, or save it again"
        raise ValueError(
            f"{source} is not a checkpoint of this {type(model).__name__}. {problems}. To resolve: "
            f"{remedy}."
        )
    for path, module in model.named_modules():
        if not isinstance(module, KroneckerLinear | KroneckerEmbedding):
            continue
        for name in ("a", "b"):
            factor = getattr(module, name)
            if not factor.is_meta and not factor.isfinite().all():
                raise ValueError(
                    f"{path}.{name} in {source} has NaN or infinite entries; the training that "
                    "wrote it diverged or the file is damaged: use an earlier checkpoint, or "
                    "dtype=torch.float32 if it was loaded in half precision."
                )


def mismatched(info: dict[str, Any]) -> dict[str, str]:
    """Tensors whose shape is not the checkpoint's: their names, and a text with both shapes."""
    return {
        name: f"{name} {tuple(saved)} instead of {tuple(own)}"
        for name, saved, own in sorted(info["mismatched_keys"])
    }


def _listed(problems: dict[str, Iterable[str]]) -> str:
    """``"Tensors missing: a, b; unexpected: c"``, at most eight of each; empty if none."""
    texts = []
    for problem, found in problems.items():
        if names := list(found):
            others = f" and {len(names) - 8} more" if len(names) > 8 else ""
            texts.append(f"{problem}: {', '.join(names[:8])}{others}")
    return f"Tensors {'; '.join(texts)}" if texts else ""


# --- name the damaged file


@contextmanager
def naming_damage(
    source: str | os.PathLike | None, config_class: type[PreTrainedConfig] | None = None
) -> Iterator[None]:
    """Turn errors of reading damaged model files into errors that name the file.

    Errors with other causes (memory, network, arguments, code) pass unchanged, with a note.

    Args:
        source: The model's name or folder. None if the model is made from a configuration and a
            state_dict; all errors then pass unchanged.
        config_class: The class of the configuration that is read; None if none is.

    Raises:
        FileNotFoundError: If ``source`` is a path, and nothing is there.
        OSError: If a file is damaged or missing.
        ValueError: If the configuration cannot be read.
    """
    check_source(source)
    try:
        yield
    except Exception as error:
        if source is None:
            raise
        if problem := _damage(Path(source)):
            raise OSError(f"cannot load {source}: {problem}.") from error
        if isinstance(error, SafetensorError):
            raise OSError(
                f"the weights of {source} are damaged or cut short ({error}); copy or save them "
                "again."
            ) from error
        if isinstance(error, UnpicklingError | EOFError):
            raise OSError(
                f"{source} has pickled weights that are damaged, or would run code when they are "
                "read; get it as safetensors, or load it where you trust it and save it again with "
                "model.save_pretrained(folder)."
            ) from error
        if isinstance(error, _INVALID) or _comes_from_config(error, source, config_class):
            raise _invalid_config(source, error) from error
        error.add_note(f"This happened while {source} was loaded.")
        raise


@contextmanager
def _naming_source(source: str | os.PathLike) -> Iterator[None]:
    """Like ``naming_damage``, but every error becomes one sentence that names the model.

    transformers does not validate most JSON values: a wrong one may raise any exception.
    Only for calls without arguments of the user's, which could be the cause as well.
    """
    try:
        with naming_damage(source):
            yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # the files are not the cause
        raise
    except Exception as error:
        if isinstance(error, RecursionError):
            raise ValueError(
                f"{source} has a file that is nested too deeply to be read."
            ) from error
        if isinstance(error, AttributeError | KeyError | ZeroDivisionError):
            raise _invalid_config(source, error) from error
        kind = next((k for k in (OSError, ValueError, TypeError) if isinstance(error, k)), None)
        if kind is not None and re.search(rf"(?<!\w){re.escape(str(source))}(?!\w)", str(error)):
            raise
        reason = f"{type(error).__name__}: {error}" if kind is None else error
        raise (kind or ValueError)(
            f"{source} cannot be loaded ({reason}); check its config.json and its tokenizer's "
            "files, or save it again."
        ) from error


def _comes_from_config(
    error: Exception, source: str | os.PathLike, config_class: type[PreTrainedConfig] | None
) -> bool:
    """Whether reading the folder's configuration alone raises the same error."""
    if config_class is None or not (Path(source) / "config.json").is_file():
        return False
    try:
        config_class.from_pretrained(source)
    except Exception as found:
        return type(found) is type(error) and str(found) == str(error)
    return False


def _invalid_config(source: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(
        f"no model can be made of the configuration of {source} "
        f"({type(error).__name__}: {' '.join(str(error).split())}); correct its config.json."
    )


def _damage(folder: Path) -> str | None:
    """The first damaged file of a model's folder, and the remedy; None if none is found."""
    for name in ("config.json", _INDEX):
        if not (folder / name).is_file():
            continue
        try:
            content = read_json(folder / name)
        except ValueError as error:
            return f"{error}; copy or save the model again"
        shards = content.get("weight_map")
        is_map = isinstance(shards, dict) and all(isinstance(v, str) for v in shards.values())
        if name == _INDEX and not is_map:
            return f"{name} must map tensors to files in weight_map; copy or save the model again"
    for file in _weight_files(folder):
        if not file.is_file():
            return f"{_INDEX} names {file.name}, which is not there; copy the whole folder"
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                return f"{file.name} is Git LFS's pointer to the file; run git lfs pull"
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is damaged or cut short ({error}); copy or save the model again"
    return None


def _file_dtypes(folder: Path) -> dict[str, str]:
    """The dtypes of the tensors in a folder's safetensors, in their notation: ``"F32"``."""
    dtypes: dict[str, str] = {}
    for file in filter(Path.is_file, _weight_files(folder)):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- it is no dictionary
                dtypes[name] = tensors.get_slice(name).get_dtype()
    return dtypes


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        return []
    shards = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


# --- models in memory that compress and plan cannot take

# Wrappers by their class's name: their packages may be absent and take long to import. A user's
# class may have the same name, so the package is compared as well.
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
    "OptimizedModule": "it was made by torch.compile; pass model._orig_mod and compile the student",
    "ScriptModule": "it is a TorchScript program, whose layers cannot be replaced; pass the model "
    "that it was made of",
    "Pipeline": "it is a pipeline; pass pipeline.model, and make a new pipeline of the student",
    "OptimizedModel": "it runs an exported program; pass the PyTorch model that was exported",
}
# By the beginning of the module of a layer's or a tensor's class.
_REPLACED = {
    "peft.": "has adapters in it; merge them with peft's merge_and_unload() first",
    "bitsandbytes.": "is quantised; load it without quantization_config",
    "torchao.": "is quantised; load it without quantisation, and quantise the student",
    "torch.ao.nn.": "is quantised; pass the model of floating-point weights",
    "torch.distributed.": "is sharded; compress the model before you shard it",
}


def why_not(model: Any) -> str | None:
    """Why this is not a plain module of dense weights, with the remedy; None if it is."""
    for cls in type(model).__mro__:
        if cls.__name__ in _WRAPPERS and _package(cls) in _PACKAGES:
            return _WRAPPERS[cls.__name__]
    if isinstance(model, type):
        return "it is a class; pass a model, such as one from its from_pretrained"
    if not isinstance(model, nn.Module):
        return "it is not a model; pass a loaded one, such as AutoModel.from_pretrained(name)"
    if not isinstance(model, PreTrainedModel):
        return None  # its layers are checked one by one
    if getattr(model, "hf_quantizer", None) is not None:
        return "it is quantised; load it without quantization_config"
    parts = [(name, type(m)) for name, m in model.named_modules()]
    parts += [(name, type(p.data)) for name, p in model.named_parameters()]
    for name, cls in parts:
        for package, reason in _REPLACED.items():
            if cls.__module__.startswith(package):
                return f"{name or 'it'} ({cls.__name__}) {reason}"
    return None


def is_sentence_folder(source: str | os.PathLike) -> bool:
    """Whether a folder is one that a SentenceTransformer was saved to."""
    return (Path(source) / _MODULES).is_file()


def load_encoder(source: str | os.PathLike) -> Any:
    """A saved SentenceTransformer with all its modules; of any other model, it without its head.

    Raises:
        ImportError: If the folder is a SentenceTransformer's and its package is missing.
        OSError, TypeError, ValueError: As ``load``.
    """
    if not is_sentence_folder(source):
        return load(source, "AutoModel")
    read_config(source)
    from sentence_transformers import SentenceTransformer

    with _naming_source(source):
        return SentenceTransformer(str(source), device="cpu")


def copy_modules(source: str | os.PathLike, folder: Path) -> None:
    """Copy what makes a folder a SentenceTransformer's, apart from its transformer, if it is one.

    That is the list of its modules, their settings and the weights of all but the first.
    """
    if not is_sentence_folder(source):
        return
    for name in (_MODULES, *_SETTINGS):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
    for module in json.loads((Path(source) / _MODULES).read_text("utf-8"))[1:]:
        path = module["path"]
        if path and (Path(source) / path).is_dir():
            shutil.copytree(Path(source) / path, folder / path, dirs_exist_ok=True)


def is_sentence_transformer(model: Any) -> bool:
    """Whether this is a model of sentence-transformers with a transformer in it."""
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
