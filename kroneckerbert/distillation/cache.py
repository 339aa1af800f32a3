"""On-disk cache of the teacher's outputs for a data set.

The teacher does most of a step's forward work, with the same result for a text in every epoch, for
every student and seed. The files are uncompressed (20 kB per token for the hidden states of a
BERT_BASE in float16): worth it for small data sets that are read often.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kroneckerbert.data import by_length
from kroneckerbert.distillation.terms import SENTENCE
from kroneckerbert.files import read_json, replace_folder

ROW = "teacher_row"
_DTYPE = torch.float16  # relative error 5e-4; bfloat16's is 4e-3
_IDS = "input_ids"
# Axes along the sequence. Other logits: axis 1 if they have three.
_ALONG = {_IDS: (1,), "hidden_states": (2,), "attentions": (3, 4)}
_ALONG |= dict.fromkeys(("start_logits", "end_logits"), (1,))


@runtime_checkable
class Rows(Protocol):
    """A data set that can be read by row, unlike a stream."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class NumberedRows(Dataset):
    """A data set whose rows contain their number, the key of the cache."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], ROW: index}


class TeacherCache:
    """The teacher's outputs for the rows of one data set, in memory-mapped files.

    A call with row numbers ``(batch,)`` and ``input_ids`` ``(batch, sequence)`` returns the
    teacher's output, zero-padded to the batch's length.

    Args:
        folder: A folder written by ``write``.
        device: Device of the outputs.

    Raises:
        OSError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device):
        about = _about(folder)
        self.device = device
        self.shapes: dict[str, list] = about["shapes"]
        self.lengths = torch.tensor(about["lengths"])
        sizes = {name: _sizes(shape, self.lengths) for name, shape in self.shapes.items()}
        order = torch.tensor(by_length(about["lengths"]))
        self.starts = {name: torch.empty_like(size) for name, size in sizes.items()}
        for name, size in sizes.items():
            self.starts[name][order] = size[order].cumsum(0) - size[order]
        self.files = {
            name: _mapped(
                folder / f"{name}.bin", int(size.sum()), torch.int32 if name == _IDS else _DTYPE
            )
            for name, size in sizes.items()
        }

    def __call__(self, rows: Tensor, input_ids: Tensor) -> ModelOutput:
        tokens = input_ids.shape[1]
        read = {
            name: torch.stack([self._row(name, row, tokens) for row in rows.tolist()])
            for name in self.shapes
        }
        ids = read.pop(_IDS).to(input_ids.device)
        real = torch.arange(tokens) < self.lengths[rows.cpu()][:, None]
        if not (ids == input_ids).logical_or(~real.to(ids.device)).all():
            raise ValueError(
                "the batch's tokens differ from those that the teacher's outputs were cached for: "
                "data that is masked, cropped or augmented at random cannot be cached; unset "
                "teacher_cache."
            )
        outputs: dict[str, Any] = {
            name: value.to(self.device, non_blocking=True) for name, value in read.items()
        }
        for name in ("hidden_states", "attentions"):
            if name in outputs:  # (batch, layers, …)
                outputs[name] = outputs[name].unbind(1)
        return ModelOutput(outputs)

    def _row(self, name: str, row: int, tokens: int) -> Tensor:
        """One row's tensor, its sequence axes padded to ``tokens``."""
        length = int(self.lengths[row])
        shape = [length if n is None else n for n in self.shapes[name]]
        start = int(self.starts[name][row])
        value = self.files[name][start : start + math.prod(shape)].view(shape)
        if None not in self.shapes[name]:
            return value
        padded = value.new_zeros([tokens if n is None else n for n in self.shapes[name]])
        padded[tuple(slice(n) for n in shape)] = value
        return padded


def write(
    folder: Path,
    about: dict,
    rows: Rows,
    batches: Iterable[Mapping[str, Tensor]],
    teach: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Run the teacher over a data set and store its outputs.

    Args:
        folder: New, or written by an earlier call; written completely or not at all.
        about: The result of ``described``, and everything else the outputs depend on.
        rows: The data set.
        batches: Its rows in the order of ``kroneckerbert.data.by_length``, padded on the right.
        teach: Computes the teacher's tensors for a batch, see ``captured``.

    Raises:
        OSError: If the disk has too little space.
        ValueError: If batches are not padded on the right, or an output exceeds float16.
    """
    lengths = about["lengths"]
    order = iter(by_length(lengths))
    shapes: dict[str, list[int | None]] = {}
    files: dict[str, IO[bytes]] = {}
    with replace_folder(folder) as new:
        with ExitStack() as stack:
            for batch in batches:
                outputs = {_IDS: batch[_IDS].int(), **teach(batch)}
                if not files:
                    shapes = {name: _shape(name, value) for name, value in outputs.items()}
                    _check_room(folder, shapes, torch.tensor(lengths))
                    files = {n: stack.enter_context(open(new / f"{n}.bin", "wb")) for n in shapes}
                numbers = [next(order) for _ in batch[_IDS]]
                taken = [lengths[number] for number in numbers]
                for ids, number in zip(batch[_IDS].cpu(), numbers, strict=True):
                    given = torch.as_tensor(rows[number][_IDS])
                    if not torch.equal(ids[: len(given)].long(), given.long()):
                        raise ValueError(
                            "the batch's tokens are not those of the row: pad on the right, and "
                            "truncate or mask in the data set, not the collator; or unset "
                            "teacher_cache."
                        )
                for name, value in outputs.items():
                    if name != _IDS:
                        value = value.to(_DTYPE)
                        if not torch.isfinite(value).all():
                            raise ValueError(
                                f"the teacher's {name} exceed float16's 65504 or are not finite: "
                                "unset teacher_cache."
                            )
                    value = value.cpu()
                    for row, length in zip(value, taken, strict=True):
                        ends = [length if n is None else n for n in shapes[name]]
                        part = row[tuple(slice(end) for end in ends)].contiguous()
                        files[name].write(part.numpy().data)
        (new / "about.json").write_text(json.dumps(about | {"shapes": shapes}))


def fits(folder: Path, about: dict, wanted: Mapping[str, bool]) -> bool:
    """Whether a folder holds these outputs of this teacher for this data.

    Raises:
        ValueError: If it holds other outputs.
        OSError: If its description is damaged.
    """
    path = folder / "about.json"
    if not path.exists():
        return False
    stored = _about(folder)
    differing = [name for name, value in about.items() if stored.get(name) != value]
    outputs = {name.removeprefix("output_") for name, asked in wanted.items() if asked}
    if differing or (differing := sorted(outputs - set(stored["shapes"]))):
        raise ValueError(
            f"{folder} holds a teacher's outputs for other settings (different: "
            f"{', '.join(differing)}). Give teacher_cache another folder, or delete this one."
        )
    return True


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of all parameters, saved buffers and settings of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    settings = model.config.to_dict()
    for name in ("_name_or_path", "_attn_implementation", "transformers_version", "dtype"):
        settings.pop(name, None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def described(rows: Rows, without: Collection[str]) -> dict[str, Any]:
    """The lengths of all rows, and a hash of all columns except those in ``without``."""
    digest, lengths = hashlib.sha256(), []
    for i in range(len(rows)):
        row = rows[i]
        for name in sorted(row.keys() - without):
            value = row[name]
            value = value.tolist() if hasattr(value, "tolist") else value
            digest.update(f"{name} {value!r}".encode())
        lengths.append(len(row[_IDS]))
    return {"data": digest.hexdigest(), "lengths": lengths}


def captured(output: ModelOutput) -> dict[str, Tensor]:
    """The tensors of an output that the loss uses, with layers on axis 1."""
    kept = {n: value for n, value in output.items() if n.endswith("logits") or n == SENTENCE}
    for name in ("hidden_states", "attentions"):
        if output.get(name):
            kept[name] = torch.stack(output[name], 1)
    return kept


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "about.json"
    try:
        return read_json(path, "lengths", "shapes")
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """Memory-map a file. Checks its length first: a short file would crash with a bus error."""
    found = path.stat().st_size if path.exists() else 0
    if found != size * dtype.itemsize:
        raise _damaged(path, f"it has {found} bytes, not {size * dtype.itemsize}")
    return torch.from_file(str(path), size=size, dtype=dtype)


def _damaged(path: Path, why: str) -> OSError:
    return OSError(
        f"{path}, of the cached teacher's outputs, is missing or damaged: {why}. To resolve: "
        f"delete {path.parent}; the next training computes it again."
    )


def _shape(name: str, value: Tensor) -> list[int | None]:
    """The shape of one row, with None for axes along the sequence."""
    along = _ALONG.get(name, (1,) if value.ndim == 3 else ())
    return [None if axis in along else n for axis, n in enumerate(value.shape)][1:]


def _sizes(shape: list[int | None], lengths: Tensor) -> Tensor:
    """Number of elements of each row."""
    fixed = math.prod(n for n in shape if n is not None)
    return fixed * lengths ** sum(n is None for n in shape)


def _check_room(folder: Path, shapes: dict, lengths: Tensor) -> None:
    needed = sum(
        int(_sizes(shape, lengths).sum()) * (4 if name == _IDS else 2)
        for name, shape in shapes.items()
    )
    free = shutil.disk_usage(folder.resolve().parent).free
    if needed > free:
        raise OSError(
            f"the teacher's outputs would take {needed / 1e9:.1f} GB at {folder}, where "
            f"{free / 1e9:.1f} GB are free; unset teacher_cache, choose another disk, or set the "
            "weights of some terms to 0."
        )
