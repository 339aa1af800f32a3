"""Errors of loading that name the file and what is wrong with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
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
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from kroneckerbert.configuration_kroneckerbert import PREFIX
from kroneckerbert.files import read_json

_INDEX = "model.safetensors.index.json"
# What transformers raises for values in a config.json that it cannot use.
_INVALID = (StrictDataclassClassValidationError, StrictDataclassFieldValidationError)


@contextmanager
def naming_damage(
    source: str | os.PathLike | None, config_class: type[PreTrainedConfig] | None = None
) -> Iterator[None]:
    """Within, transformers reads a model's files; damage of these becomes an error that names it.

    Errors of anything else (memory, the network, arguments, code) pass unchanged, with a note.

    Args:
        source: The model's name or folder. None if the model is made from a configuration and a
            state_dict; errors then pass unchanged.
        config_class: Of the configuration that is read within; None if none is.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
        OSError: If a file is damaged or not there.
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
def naming_source(source: str | os.PathLike) -> Iterator[None]:
    """Within, a command reads a model's files; every error names the model and is one sentence.

    transformers takes JSON as it comes, so a wrong value may end as any exception. A command has
    no arguments of its own that could be the cause.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
        OSError: If a file is damaged or not there.
        ValueError: If no model can be made from the files.
        TypeError: Raised by transformers; the message names the model.
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
        what = f"{type(error).__name__}: {error}" if kind is None else error
        raise (kind or ValueError)(
            f"{source} cannot be loaded ({what}); check its config.json and its tokenizer's files, "
            "or save it again."
        ) from error


def _comes_from_config(
    error: Exception, source: str | os.PathLike, config_class: type[PreTrainedConfig] | None
) -> bool:
    """Whether reading the folder's configuration alone raises the same."""
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


def check_source(source: str | os.PathLike | None) -> None:
    """Raise if ``source`` is a path where nothing is.

    Raises:
        FileNotFoundError: If nothing is there, and it is not a name that the Hub could have.
    """
    if source is None or Path(source).exists():
        return
    try:
        if isinstance(source, str):
            validate_repo_id(source)
            return
    except HFValidationError:
        pass
    raise FileNotFoundError(
        f"{source} is not there; give the folder of a saved model, or a name on the Hub."
    )


def read_config(source: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a saved model, dense or not.

    Raises:
        OSError: If there is none, or it is damaged.
        ValueError: If the model is of an architecture that this version of transformers lacks.
    """
    if Path(source).is_file():
        raise NotADirectoryError(f"{source} is a file; give the folder of config.json and weights.")
    with naming_damage(source):
        fields, _ = PreTrainedConfig.get_config_dict(source)
    found = fields.get("model_type")
    if not isinstance(found, str) or not found:
        raise ValueError(
            f"{source} has model_type {found!r} in its config.json, which must be a name such as "
            "'bert'; correct it, or save the model again."
        )
    if found not in CONFIG_MAPPING:
        raise ValueError(
            f"{source} is a {found}, and transformers {transformers.__version__} has no "
            f"{found.removeprefix(PREFIX)}: another version may have it; an architecture of "
            "your own must be registered first, see kroneckerbert.register."
        )
    with naming_damage(source):
        try:
            # The code in a folder is not run, and nobody is asked whether to run it.
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


def load(cls: type[PreTrainedModel], source: str | os.PathLike) -> PreTrainedModel:
    """A saved model, dense or not, every weight of it from the file.

    Raises:
        OSError: If there is none, or a file is damaged.
        ValueError: If a tensor is missing, or has another shape than the configuration says.
    """
    with naming_damage(source):
        model, info = cls.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # Without its pooler an encoder is still whole: masked language models are saved so.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    other_shape = list(mismatched(info).values())
    for what, names in (("missing", missing), ("of another shape", other_shape)):
        if names:
            more = f" and {len(names) - 8} more" * (len(names) > 8)
            raise ValueError(
                f"{source} is no checkpoint of this {type(model).__name__}. Tensors {what}: "
                f"{', '.join(names[:8])}{more}. To resolve: save the model again, with the "
                "configuration that it has."
            )
    return model


def mismatched(info: dict[str, Any]) -> dict[str, str]:
    """The tensors of another shape, by name, with both shapes."""
    return {
        name: f"{name} {tuple(saved)} instead of {tuple(own)}"
        for name, saved, own in sorted(info["mismatched_keys"])
    }


def file_dtypes(folder: Path) -> dict[str, str]:
    """The dtypes of the tensors in a folder's safetensors, as they are written there: ``"F32"``."""
    dtypes: dict[str, str] = {}
    for file in filter(Path.is_file, _weight_files(folder)):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- it is no dictionary
                dtypes[name] = tensors.get_slice(name).get_dtype()
    return dtypes


def _damage(folder: Path) -> str | None:
    """What is wrong with the files in a folder, and what to do; None if nothing is found."""
    for name in ("config.json", _INDEX):
        if not (folder / name).is_file():
            continue
        try:
            content = read_json(folder / name)
        except ValueError as error:
            return f"{error}; copy or save the model again"
        if name == _INDEX and not _is_map(content.get("weight_map")):
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


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / _INDEX).is_file():
        return []
    shards = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]
