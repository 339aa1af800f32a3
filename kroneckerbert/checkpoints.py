"""Saving that an interruption cannot harm, and loading that says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kron_kernels import KroneckerEmbedding, KroneckerLinear
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
_FACTOR = re.compile(r"(\.parts\.\d+)?\.[ab]$")


@contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Within, write files to the folder that this gives; at the end they move into ``folder``.

    Each takes the place of the old one at once; other files stay. An error or an interruption
    before the end leaves everything as it was; if the process is killed, a hidden folder remains in
    ``folder``, which the next call removes.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder.")
    partial = folder / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise OSError(
            f"cannot write {folder}: {error.strerror} ({error.filename}); choose a folder in a "
            "place that you can write to."
        ) from error
    try:
        yield partial
        new = sorted(partial.iterdir())
        for file in new:
            os.replace(file, folder / file.name)
        # Shards of an earlier, larger model would be read with the new ones.
        names = {file.name for file in new}
        if "model.safetensors" in names or "model.safetensors.index.json" in names:
            for old in folder.glob("model*.safetensors*"):
                if old.name not in names:
                    old.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
