"""Saving that an interruption cannot harm, and loading that says what is wrong."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kroneckerbert import files
from kroneckerbert.loading import file_dtypes, mismatched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Every checkpoint has this file. Without our package transformers knows none of our model types;
# it asks for trust_remote_code=True, and with it runs this.
LOADER = "load_kroneckerbert"
_LOADER_TEXT = '''"""Loads the class {name} from the package kroneckerbert."""

try:
    import kroneckerbert
except ImportError as error:
    raise ImportError(
        "this is a Kronecker-factorised model: pip install 'kron-kernels[bert]', "
        "then import kroneckerbert before loading it"
    ) from error

{name} = kroneckerbert.{name}
'''
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<variant>.+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(\.(?P<variant>.+))?\.json")
_FACTOR = re.compile(r"(\.parts\.\d+)?\.[ab]$")


def weights_last(new: Path, folder: Path) -> tuple[list[str], list[str]]:
    """The order in which a model's new files replace old ones: see ``files.replacing_files``.

    A loader finds weights by one name, ``model.safetensors`` or the index of the shards, and reads
    them with ``config.json``. So that no reader, ours or another, ever sees parts of two models,
    that name goes first and comes last; in between there is no model, which every loader says.
    Saved again with the config it had, a model in one file is one rename, old or new.

    Of the old weights those of the same variant go, ``model.fp16.safetensors`` by
    ``variant="fp16"``, for they would be found before the new ones, and no others.
    """
    names = sorted(os.listdir(new))
    weights = {n: m for n in names if (m := _WEIGHTS.fullmatch(n) or _INDEX.fullmatch(n))}
    entries = [n for n, m in weights.items() if not m.groupdict().get("shard")]
    move = [n for n in names if n in weights or not _same(new / n, folder / n)]
    move.sort(key=lambda name: name in entries)
    variants = {(m["stem"], m["variant"]) for m in weights.values()}
    remove = []
    for path in sorted(folder.iterdir()):
        m = _WEIGHTS.fullmatch(path.name) or _INDEX.fullmatch(path.name)
        if m and path.is_file() and (m["stem"], m["variant"]) in variants:
            is_entry = not m.groupdict().get("shard")
            if path.name not in move or (is_entry and len(move) > 1):
                remove.append(path.name)
    remove.sort(key=lambda name: bool(_SHARD.search(name)))  # an index before what it names
    return remove, move


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and filecmp.cmp(a, b, shallow=False)


def check_whole(folder: str | os.PathLike) -> None:
    """Raise if a killed save left a model's folder between its old and its new files.

    Raises:
        OSError: With the call that completes it. Loading does not: who reads may not write here.
    """
    if files.is_between(folder):
        raise OSError(
            f"the last save in {folder} was cut off while its files took their places. Nothing is "
            f"lost: unless a process is saving there now, call kroneckerbert.files.finish("
            f"{os.fspath(folder)!r}), or save there again; then load it."
        )


def write_loader(folder: Path, config_name: str) -> None:
    """The module that tells those without our package what they need."""
    (folder / f"{LOADER}.py").write_text(_LOADER_TEXT.format(name=config_name))


def check_loaded(
    model: PreTrainedModel,
    info: dict[str, Any],
    source: str | os.PathLike | None,
    new_head: bool = False,
) -> None:
    """Raise unless the model without its head is what was saved.

    transformers draws what a checkpoint lacks and logs a table. A pooler or a head may be new: that
    is how fine-tuning starts.

    Args:
        model: As ``from_pretrained`` made it ...
        info: ... with ``output_loading_info=True``.
        source: The name of the checkpoint, for the message.
        new_head: Whether a head of another shape than the checkpoint's is a new one.

    Raises:
        ValueError: If a tensor is missing, in surplus, of another shape or not of floating-point
            numbers, or a factor is not finite.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()} - {"pooler"}

    def of_encoder(names: Any) -> list[str]:
        return sorted(n for n in names if n.removeprefix(prefix).split(".")[0] in parts)

    missing, surplus = of_encoder(info["missing_keys"]), of_encoder(info["unexpected_keys"])
    shapes = mismatched(info)
    other_shape = of_encoder(shapes) if new_head else list(shapes)
    state = model.state_dict().items()
    floating = {name.removeprefix(prefix) for name, t in state if t.is_floating_point()}
    numbers = [
        f"{name} ({dtype})"
        for name, dtype in ({} if source is None else file_dtypes(Path(source))).items()
        if name.removeprefix(prefix) in floating and not dtype.startswith(("F", "BF"))
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
        for what, names in (
            ("missing", missing),
            ("in surplus", surplus),
            ("of another shape", [shapes[name] for name in other_shape]),
            ("not of floating-point numbers", numbers),
        )
        if names
    ]
    if problems:
        dense = {name.removesuffix(".weight") for name in surplus}
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
            f"{source} is no checkpoint of this {type(model).__name__}. "
            f"Tensors {'; '.join(problems)}. To resolve: {remedy}."
        )
    for path, factor in _factors(model):
        if not factor.is_meta and not factor.isfinite().all():
            raise ValueError(
                f"{path} in {source} has NaN or infinite entries; the training that wrote it "
                "diverged or the file is damaged: use an earlier checkpoint, or "
                "dtype=torch.float32 if it was loaded in half precision."
            )


def _factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, KroneckerLinear | KroneckerEmbedding):
            yield f"{path}.a", module.a
            yield f"{path}.b", module.b
