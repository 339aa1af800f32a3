"""Models, tokenizers and text that commands read, and the folders they write.

transformers and torch are imported inside the functions: help and wrong options answer at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CALIBRATION_TEXTS = 512


def read_model(source: str) -> PreTrainedModel:
    """A saved model in the class that its configuration names, all weights taken from the file."""
    import transformers

    import kroneckerbert
    from kroneckerbert.loading import load, naming_source, read_config

    check_source(source)
    # Progress bars and weight reports: any real problem is raised as an error below.
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with naming_source(source):
        config = read_config(source)
    if config.is_encoder_decoder:
        raise TypeError(f"{source} has an encoder and a decoder; give a model with one of them.")
    # Checkpoints of bare encoders may name no class.
    name = (config.architectures or ["AutoModel"])[0]
    model_class: Any = getattr(kroneckerbert, name, None) or getattr(transformers, name, None)
    if not hasattr(model_class, "from_pretrained"):
        raise TypeError(
            f"{source} is a {name} ({config.model_type}), which is no model of this version of "
            f"transformers ({transformers.__version__})."
        )
    with naming_source(source):
        return load(model_class, source).eval()


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model."""
    from transformers import AutoTokenizer

    from kroneckerbert.loading import naming_source

    check_source(source)
    absent = OSError(
        f"{source} has no tokenizer; save it there with tokenizer.save_pretrained({source!r})."
    )
    with naming_source(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            if any(Path(source).glob("tokenizer*")):  # damaged rather than absent
                raise
            raise absent from error
    # Without tokenizer files transformers makes up a vocabulary of special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise absent
    return tokenizer


def check_source(source: str) -> None:
    """Refuse a path without a model, before the hub's client complains about the form of its name.

    Raises:
        FileNotFoundError: If ``source`` is a path that is not a folder, or has no config.json.
    """
    # Hub names have the form "owner/name" and no other.
    is_local = not source or source.startswith((".", "~", "/")) or source.count("/") > 1
    if (is_local or os.path.isfile(source)) and not os.path.isdir(source):
        raise FileNotFoundError(
            f"{source or repr(source)} is not a folder; give a saved model's, or a hub name."
        )
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise FileNotFoundError(
            f"{source} holds no model, for it has no config.json; give a folder that "
            "save_pretrained wrote."
        )


def existing(*sources: str | Path | None) -> list[Path]:
    """The inputs of a command that were given, which its outputs must not overwrite."""
    return [Path(source) for source in sources if source is not None]


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU, if there is one."""
    import torch

    return model.cuda() if torch.cuda.is_available() else model


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None leaves it."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def save(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model and tokenizer to a new folder, complete or not at all."""
    from kroneckerbert.files import replace_folder

    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def calibration_texts(path: Path | None) -> list[str] | None:
    """The texts of a calibration file. Read before the models, which take longer."""
    from kroneckerbert.data import is_table, read_lines, read_table

    if path is None:
        return None
    return read_table(path).texts if is_table(path) else read_lines(path)


def calibration_batches(texts: list[str] | None, model: PreTrainedModel, source: str) -> Any:
    """At most 512 texts as padded batches, by the tokenizer at ``source``."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    from kroneckerbert.data import TextDataset
    from kroneckerbert.modeling_kroneckerbert import max_tokens

    if texts is None:
        return None
    tokenizer = read_tokenizer(source)
    # Spread over the whole file: neighbouring lines are often about the same subject.
    texts = texts[:: max(1, len(texts) // _CALIBRATION_TEXTS)][:_CALIBRATION_TEXTS]
    dataset = TextDataset(tokenizer, texts, max_length=min(128, max_tokens(model, tokenizer)))
    return DataLoader(dataset, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
