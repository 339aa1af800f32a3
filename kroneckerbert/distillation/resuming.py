"""Which checkpoint a training goes on from, and whether all of it is there."""

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

from kroneckerbert.files import damaged, read_checksums

STATE = "trainer_state.json"
UNFINISHED = ".unfinished"  # within the output folder, where checkpoints are written
# How Trainer and its FSDP and DeepSpeed save an optimizer.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-optimizer.pt", "global_step*")
_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "seed"),
    *("data_seed", "embedding_weight", "attention_weight", "hidden_weight", "logits_weight"),
    *("labels_weight", "temperature", "layer_map", "teacher_annealing", "student_dropout"),
)


def settings(arguments: Mapping[str, Any], **more: int | None) -> dict[str, Any]:
    """What makes two runs the same run: what the weights depend on, whatever the machine.

    Args:
        arguments: ``DistillationConfig.to_dict()``.
        **more: What else, such as the rows of the data.
    """
    chosen = {name: arguments[name] for name in _ARGUMENTS}
    steps = arguments["max_steps"] if arguments["max_steps"] > 0 else None
    length = {
        "max_steps": steps,
        "num_train_epochs": None if steps else arguments["num_train_epochs"],
    }
    timed = arguments["max_minutes"] is not None
    return json.loads(json.dumps({**chosen, **length, "ends by the clock": timed, **more}))


def start(
    wanted: str | bool | None, folder: Path, now: Mapping[str, Any], ranks: Sequence[int], of: int
) -> tuple[str | None, int]:
    """The checkpoint that a training goes on from, and its run: a number, later ones larger.

    Args:
        wanted: True for the last one of the run with the present settings, a folder, or neither.
        folder: Where checkpoints are.
        now: The present ``settings``.
        ranks: Of the processes whose random states are in that folder ...
        of: ... of so many.

    Raises:
        OSError: If a file of the checkpoint is missing or damaged.
        ValueError: If there are checkpoints, but of runs with other settings.
    """
    if wanted is True:
        for path in (folder / UNFINISHED).glob("checkpoint-*"):
            # Killed just before it took its name, or while an older one of this name was aside.
            if not (folder / path.name).exists() and _run(path) and not damaged(path):
                path.rename(folder / path.name)
    checkpoint = last(folder, now) if wanted is True else Path(wanted) if wanted else None
    if checkpoint is None:
        return None, time.time_ns()
    if not checkpoint.exists():
        there = ", ".join(path.name for path in sorted(_checkpoints(folder), key=_step)) or "none"
        raise FileNotFoundError(
            f"there is no folder {checkpoint} to go on from; the checkpoints in {folder} are: "
            f"{there}. Pass the path of one, or True for the last."
        )
    check(checkpoint, ranks, of)
    about = read_checksums(checkpoint)
    if about is None:
        warnings.warn(
            f"{checkpoint} has no checksums, which earlier versions did not write: its files are "
            "there and can be read, more is not known of them.",
            stacklevel=2,
        )
    goes_on = about is not None and not _changes(about["settings"], now)
    return str(checkpoint), about["run"] if about and goes_on else time.time_ns()


def last(folder: Path, now: Mapping[str, Any]) -> Path | None:
    """The last checkpoint of the run with these settings that began last; None if there is none.

    Raises:
        ValueError: If there are checkpoints, but of runs with other settings.
    """
    own, older, others = [], [], {}
    for path in _checkpoints(folder):
        try:
            about = read_checksums(path)
        except OSError:  # `check` will say so
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
        what = f"{path} is of another run: {'; '.join(others[path])}."
        if found is None:
            raise ValueError(
                f"{what} To go on from it all the same, pass resume_from_checkpoint="
                f"{str(path)!r}; to begin anew, choose another output_dir or delete it."
            )
        warnings.warn(f"{what} It is left aside.", stacklevel=2)
        break
    return found and found[-1]


def last_of(folder: Path, run: int) -> Path | None:
    """The last checkpoint of a run."""
    return max((p for p in _checkpoints(folder) if _run(p) == run), key=_step, default=None)


def check(checkpoint: Path, ranks: Sequence[int], of: int) -> None:
    """Raise unless all that a training goes on from is there and as it was written.

    Args:
        checkpoint: Of our trainer or of transformers'.
        ranks: Of the processes whose random states are in it ...
        of: ... of so many.

    Raises:
        OSError: With the file, and the last checkpoint beside it that is whole.
    """
    if (problem := _problem(checkpoint, ranks, of)) is None:
        return
    run = _run(checkpoint)
    earlier = [
        path
        for path in _checkpoints(checkpoint.parent)
        if _step(path) < _step(checkpoint) and (run is None or _run(path) in (None, run))
    ]
    whole = (p for p in sorted(earlier, key=_step, reverse=True) if not _problem(p, ranks, of))
    if found := next(whole, None):
        remedy = (
            f"{found} is whole: pass resume_from_checkpoint={str(found)!r}, or delete {checkpoint}"
        )
    else:
        remedy = f"no earlier one beside it is whole: delete {checkpoint} to begin anew"
    raise OSError(f"cannot go on from {checkpoint}: {problem}. To resolve: {remedy}.")


def _problem(checkpoint: Path, ranks: Sequence[int], of: int) -> str | None:
    if not checkpoint.is_dir():
        return "it is no folder"
    if found := damaged(checkpoint):
        return found
    if not any(f for pattern in _OPTIMIZERS for f in checkpoint.glob(pattern)):
        return (
            f"{checkpoint / 'optimizer.pt'} is missing (with save_only_model there is none, and no "
            "training to go on with)"
        )
    needed = [STATE]
    if not any(checkpoint.glob("global_step*")):  # DeepSpeed may keep the schedule in there
        needed.append("scheduler.pt")
    needed += [f"rng_state_{rank}.pth" for rank in ranks] if of > 1 else ["rng_state.pth"]
    for name in needed:
        if not (checkpoint / name).is_file():
            saved = len(list(checkpoint.glob("rng_state*.pth")))
            return f"{checkpoint / name} is missing" + (
                f" (processes: {saved} when it was saved, {of} now; start as many)"
                if name.startswith("rng_state") and saved not in (0, of)
                else ""
            )
    return None if read_checksums(checkpoint) else _unreadable(checkpoint)


def _unreadable(checkpoint: Path) -> str | None:
    """What can be known of files without checksums: torch's have some, and JSON has a form."""
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
    # Without checksums, from an earlier version: the little that Trainer keeps. By epochs it keeps
    # the steps that they make, and by the clock those that were taken.
    if not now["max_steps"] or now["ends by the clock"]:
        return {}
    try:
        return {"max_steps": json.loads((checkpoint / STATE).read_text())["max_steps"]}
    except (OSError, ValueError, KeyError):  # `check` says so, should it be this one
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
