"""Which checkpoint a training resumes from, and whether that checkpoint is complete.

``start`` chooses among a trainer's own checkpoints. ``keep`` stores the checkpoint of a training
that the user has stopped, and ``find`` returns it.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kron_kernels.shapes import check_number
from kroneckerbert.distillation.provenance import MADE_OF, is_made_of, read_json, write_json
from kroneckerbert.files import damaged, read_checksums, replace_folder

STATE = "trainer_state.json"
UNFINISHED = ".unfinished"  # subfolder of the output folder in which checkpoints are written
_CHECKPOINT, _CLOCK = "checkpoint", "clock.json"
# The optimizer's files as Trainer, FSDP and DeepSpeed name them.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-optimizer.pt", "global_step*")
_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "seed"),
    *("data_seed", "embedding_weight", "attention_weight", "hidden_weight", "logits_weight"),
    *("labels_weight", "sentence_weight", "relation_weight", "temperature", "layer_map"),
    *("teacher_annealing", "student_dropout"),
)


def settings(arguments: Mapping[str, Any], **others: int | None) -> dict[str, Any]:
    """The settings that the weights depend on; two runs that share them are the same run.

    Args:
        arguments: ``DistillationConfig.to_dict()``.
        **others: Others, such as the number of rows of the data.
    """
    chosen = {name: arguments[name] for name in _ARGUMENTS}
    steps = arguments["max_steps"] if arguments["max_steps"] > 0 else None
    length = {
        "max_steps": steps,
        "num_train_epochs": None if steps else arguments["num_train_epochs"],
    }
    timed = arguments["max_minutes"] is not None
    return json.loads(json.dumps({**chosen, **length, "ends by the clock": timed, **others}))


def start(
    wanted: str | bool | None, folder: Path, now: Mapping[str, Any], ranks: Sequence[int], of: int
) -> tuple[str | None, int]:
    """The checkpoint to resume from, if any, and the run's number, larger for later runs.

    Args:
        wanted: A checkpoint's folder; True for the last one of the run with the present settings;
            None or False to begin a new run.
        folder: Where checkpoints are.
        now: The present ``settings``.
        ranks: Processes whose random states must be in the checkpoint.
        of: Number of processes.

    Raises:
        OSError: If a file of the checkpoint is missing or damaged.
        ValueError: If there are checkpoints, but of runs with other settings.
    """
    if wanted is True:
        for path in (folder / UNFINISHED).glob("checkpoint-*"):
            # The process was killed just before the rename, or between the two renames that
            # replace an older checkpoint of this name.
            if not (folder / path.name).exists() and _run(path) and not damaged(path):
                path.rename(folder / path.name)
    checkpoint = last(folder, now) if wanted is True else Path(wanted) if wanted else None
    if checkpoint is None:
        return None, time.time_ns()
    if not checkpoint.exists():
        names = ", ".join(path.name for path in sorted(_checkpoints(folder), key=_step)) or "none"
        raise FileNotFoundError(
            f"there is no folder {checkpoint} to resume from; the checkpoints in {folder} are: "
            f"{names}. Pass the path of one, or True for the last."
        )
    check(checkpoint, ranks, of)
    about = read_checksums(checkpoint)
    if about is None:
        warnings.warn(
            f"{checkpoint} has no checksums (earlier versions wrote none): its files are present "
            "and readable, but damage inside them cannot be detected.",
            stacklevel=2,
        )
    is_same_run = about is not None and not _changes(about["settings"], now)
    return str(checkpoint), about["run"] if about and is_same_run else time.time_ns()


def last(folder: Path, now: Mapping[str, Any]) -> Path | None:
    """The last checkpoint of the latest run with these settings; None if there is no checkpoint.

    Raises:
        ValueError: If all checkpoints are of runs with other settings.
    """
    own, older, others = [], [], {}
    for path in _checkpoints(folder):
        try:
            about = read_checksums(path)
        except OSError:  # `check` reports it
            own.append((math.inf, _step(path), path))
            continue
        if changes := _changes(_settings(path, about, now), now):
            others[path] = changes
        elif about is None:
            older.append((0, _step(path), path))
        else:
            own.append((about["run"], _step(path), path))
    found = max(own or older, default=None)
    for path in sorted(others, key=_step, reverse=True):
        message = f"{path} is of another run: {'; '.join(others[path])}."
        if found is None:
            raise ValueError(
                f"{message} To resume from it anyway, pass resume_from_checkpoint={str(path)!r}; "
                "to start over, choose another output_dir or delete it."
            )
        warnings.warn(f"{message} It is ignored.", stacklevel=2)
        break
    return found and found[-1]


def last_of(folder: Path, run: int) -> Path | None:
    """The last checkpoint of the run with this number."""
    return max((p for p in _checkpoints(folder) if _run(p) == run), key=_step, default=None)


def check(checkpoint: Path, ranks: Sequence[int], of: int) -> None:
    """Raise unless a checkpoint is complete and undamaged.

    Args:
        checkpoint: Written by our trainer or transformers' own.
        ranks: Processes whose random states must be in it.
        of: Number of processes.

    Raises:
        OSError: Naming the bad file, and the last complete checkpoint beside it.
    """
    if (problem := _problem(checkpoint, ranks, of)) is None:
        return
    run = _run(checkpoint)
    earlier = [
        path
        for path in _checkpoints(checkpoint.parent)
        if _step(path) < _step(checkpoint) and (run is None or _run(path) in (None, run))
    ]
    complete = (p for p in sorted(earlier, key=_step, reverse=True) if not _problem(p, ranks, of))
    if found := next(complete, None):
        remedy = (
            f"{found} is complete: pass resume_from_checkpoint={str(found)!r}, or delete "
            f"{checkpoint}"
        )
    else:
        remedy = f"no earlier one beside it is complete: delete {checkpoint} to start over"
    raise OSError(f"cannot resume from {checkpoint}: {problem}. To resolve: {remedy}.")


def _problem(checkpoint: Path, ranks: Sequence[int], of: int) -> str | None:
    if not checkpoint.is_dir():
        return "it is not a folder"
    if found := damaged(checkpoint):
        return found
    if not any(f for pattern in _OPTIMIZERS for f in checkpoint.glob(pattern)):
        return (
            f"{checkpoint / 'optimizer.pt'} is missing (save_only_model does not save it, and the "
            "training cannot be resumed)"
        )
    needed = [STATE]
    if not any(checkpoint.glob("global_step*")):  # DeepSpeed may keep the schedule there
        needed.append("scheduler.pt")
    needed += [f"rng_state_{rank}.pth" for rank in ranks] if of > 1 else ["rng_state.pth"]
    for name in needed:
        if not (checkpoint / name).is_file():
            saved = len(list(checkpoint.glob("rng_state*.pth")))
            return f"{checkpoint / name} is missing" + (
                f" (processes: {saved} when it was saved, {of} now; start {saved})"
                if name.startswith("rng_state") and saved not in (0, of)
                else ""
            )
    return None if read_checksums(checkpoint) else _unreadable(checkpoint)


def _unreadable(checkpoint: Path) -> str | None:
    """Damage that shows without our checksums: torch's zip files have their own, JSON parses."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        return f"{path} is damaged"
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (zipfile.BadZipFile, SafetensorError, ValueError) as error:
            return f"{path} is damaged ({error})"
    return None


def _settings(
    checkpoint: Path, about: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> dict[str, Any]:
    if about is not None:
        return about["settings"]
    # An earlier version wrote no checksums. Of what Trainer itself records, only max_steps can be
    # compared: for a run by epochs or by the clock it is the resulting number of steps.
    if not now["max_steps"] or now["ends by the clock"]:
        return {}
    try:
        return {"max_steps": json.loads((checkpoint / STATE).read_text())["max_steps"]}
    except (OSError, ValueError, KeyError):  # `check` reports it, if this one is chosen
        return {}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before[name]} and is {now[name]}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def _run(checkpoint: Path) -> int | None:
    try:
        return (read_checksums(checkpoint) or {}).get("run")
    except OSError:
        return None


def _checkpoints(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) < math.inf
    ]


def _step(checkpoint: Path) -> float:
    name = re.fullmatch(r"checkpoint-(\d+)", checkpoint.resolve().name)
    return int(name[1]) if name else math.inf


# A training that was stopped by the user


def keep(folder: Path, checkpoint: Path, made_of: Mapping[str, Any], seconds: float) -> None:
    """Move the checkpoint of a stopped training to a separate folder.

    Args:
        folder: Replaced if an earlier call wrote it; on the checkpoint's file system.
        checkpoint: The checkpoint's folder.
        made_of: Everything the training depends on.
        seconds: Training time so far.

    Raises:
        OSError: If the folder cannot be written.
    """
    with replace_folder(folder) as new:
        write_json(new / MADE_OF, made_of)
        write_json(new / _CLOCK, {"seconds": seconds})
        checkpoint.rename(new / _CHECKPOINT)


def find(folder: Path, made_of: Mapping[str, Any]) -> tuple[Path | None, float]:
    """The checkpoint that ``keep`` left, None if there is none, and the training time until then.

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
        raise OSError(f"{problem}. To resolve: delete {folder} to start over.")
    try:
        return checkpoint, check_number("seconds", read_json(clock, "seconds")["seconds"])
    except FileNotFoundError as error:
        raise ValueError(f"{clock} is missing; delete {folder} to start over.") from error
    except ValueError as error:
        raise ValueError(f"{error} It is read from {clock}.") from error
