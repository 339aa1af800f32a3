"""Models and text that commands read, and the folders they write.

transformers and torch are imported inside the functions: help and wrong options answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CALIBRATION_TEXTS = 512


def read_model(source: str) -> PreTrainedModel:
    """A saved model in the class that its configuration names."""
    import transformers

    from kroneckerbert.loading import load

    # Progress bars and weight reports: any real problem is raised as an error.
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return load(source)


def read_runnable(source: str) -> Any:
    """A saved model, or the program in a folder that 'export' wrote; on the GPU if there is one."""
    if (Path(source) / "export.json").is_file():
        from kroneckerbert.evaluation import Program

        return Program(source)
    return on_gpu(read_model(source))


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


def save(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    """Write model and tokenizer to a new folder, complete or not at all.

    A SentenceTransformer's other modules are copied from ``source``, the folder it was made from.
    """
    from kroneckerbert.files import replace_folder
    from kroneckerbert.loading import copy_modules

    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_modules(source, folder)


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
    from kroneckerbert.loading import load_tokenizer
    from kroneckerbert.modeling_kroneckerbert import max_tokens

    if texts is None:
        return None
    tokenizer = load_tokenizer(source)
    # Spread over the whole file: neighbouring lines are often about the same subject.
    texts = texts[:: max(1, len(texts) // _CALIBRATION_TEXTS)][:_CALIBRATION_TEXTS]
    dataset = TextDataset(tokenizer, texts, max_length=min(128, max_tokens(model, tokenizer)))
    return DataLoader(dataset, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
