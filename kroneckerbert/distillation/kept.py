"""A training that was stopped: its checkpoint, what it was made of, and the time that it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kron_kernels.shapes import check_number
from kroneckerbert.distillation.provenance import MADE_OF, is_made_of, read_json, write_json
from kroneckerbert.files import damaged, replace_folder

_CHECKPOINT, _CLOCK = "checkpoint", "clock.json"


def keep(folder: Path, checkpoint: Path, made_of: Mapping[str, Any], seconds: float) -> None:
    """Move a checkpoint to a folder of its own, in place of one that is kept there.

    Args:
        folder: On the same file system; new, or of an earlier call.
        checkpoint: The checkpoint's folder.
        made_of: What the training depends on.
        seconds: That it took until now.

    Raises:
        OSError: If the folder cannot be written.
    """
    with replace_folder(folder) as new:
        write_json(new / MADE_OF, made_of)
        write_json(new / _CLOCK, {"seconds": seconds})
        checkpoint.rename(new / _CHECKPOINT)


def find(folder: Path, made_of: Mapping[str, Any]) -> tuple[Path | None, float]:
    """The checkpoint that ``keep`` left in a folder, None if there is none, and its seconds.

    Raises:
        ValueError: If it is of a training with other arguments, or damaged.
        OSError: If a file of the checkpoint is missing or damaged.
        FileExistsError: If the folder is something else.
    """
    if not folder.exists():
        return None, 0.0
    if not is_made_of(folder, made_of, renew=False):
        raise FileExistsError(
            f"{folder} is not an interrupted training of `distill`, which would be kept there; "
            "rename it, or choose another output folder."
        )
    checkpoint, clock = folder / _CHECKPOINT, folder / _CLOCK
    if not checkpoint.exists():
        return None, 0.0
    if problem := damaged(checkpoint):
        raise OSError(f"{problem}. To resolve: delete {folder} to begin anew.")
    try:
        return checkpoint, check_number("seconds", read_json(clock, "seconds")["seconds"])
    except FileNotFoundError as error:
        raise ValueError(f"{clock} is missing; delete {folder} to begin anew.") from error
    except ValueError as error:
        raise ValueError(f"{error} It is read from {clock}.") from error
