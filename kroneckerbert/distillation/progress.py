"""What a training shows: a bar on a terminal, elsewhere lines that a person can read."""

import math
import sys
from collections.abc import Mapping
from time import monotonic
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kroneckerbert.distillation.clock import Deadline

_LINE_SECONDS = 10  # at least, between two lines of losses
_UNSAID = ("epoch", "step", "core_hours", "grad_norm", "total_flos", "learning_rate")
_SPEEDS = ("_runtime", "_per_second", "_preparation_time")


def show_progress(trainer: Trainer, deadline: Deadline | None = None) -> None:
    """Replace transformers' bar and its dictionaries by ``Bar`` on a terminal, else by ``Lines``.

    Callbacks of the user's own and a notebook's table stay.
    """
    stock = [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback) in (ProgressCallback, PrinterCallback)
    ]
    for callback in stock:
        trainer.remove_callback(callback)
    if stock or deadline is not None:
        bar = sys.stderr.isatty() and not trainer.args.disable_tqdm
        trainer.add_callback((Bar if bar else Lines)(deadline))


class Bar(ProgressCallback):
    """A bar over the steps, or over the seconds of a limit, with the latest loss."""

    training_bar: Any

    def __init__(self, deadline: Deadline | None = None):
        super().__init__()
        self.deadline = deadline

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.loss, self.start = "", _Start(state)
        if self.deadline is None:
            super().on_train_begin(args, state, control, **kwargs)
        elif state.is_world_process_zero:
            layout = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}"
            self.training_bar = tqdm(
                total=self.deadline.seconds, bar_format=layout, dynamic_ncols=True
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3g}"
            if "loss_sentence" in logs:  # of unit vectors, 1 minus the cosine
                self.loss += f", similarity {1 - logs['loss_sentence']:.3f}"
        elif logs and self.training_bar is not None:
            self.training_bar.write(_line(logs, state, self.start, self.deadline))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        bar = self.training_bar
        if bar is None:
            return
        if self.deadline is None:
            bar.set_postfix_str(self.loss, refresh=False)
            super().on_step_end(args, state, control, **kwargs)
        else:
            bar.n = self.deadline.share * self.deadline.seconds
            bar.set_postfix_str(", ".join(filter(None, (f"step {state.global_step}", self.loss))))


class Lines(PrinterCallback):
    """A line for each report on standard output, of losses every ten seconds at most."""

    def __init__(self, deadline: Deadline | None = None):
        super().__init__()
        self.deadline = deadline
        self.start, self.printed = _Start(TrainerState()), -math.inf

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start, self.printed = _Start(state), -math.inf

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs and state.global_step < state.max_steps:  # the last is always printed
            if monotonic() - self.printed < _LINE_SECONDS:
                return
            self.printed = monotonic()
        print(_line(logs, state, self.start, self.deadline), flush=True)


class _Start:
    """Where this process's part of a training began."""

    def __init__(self, state: TrainerState):
        self.step, self.time = state.global_step, monotonic()


def _line(
    logs: Mapping[str, Any], state: TrainerState, start: _Start, deadline: Deadline | None
) -> str:
    """A report in words: ``step 120 of 750, 3 min left: loss 0.93, …``."""
    step = state.global_step
    if "train_runtime" in logs:
        done = step - start.step
        words = [f"{done} step{'s' * (done != 1)} in {_duration(logs['train_runtime'])}"]
        if "train_steps_per_second" in logs:
            words.append(f"{logs['train_steps_per_second']:.3g} steps a second")
        if "train_samples_per_second" in logs:
            words.append(f"{logs['train_samples_per_second']:.3g} rows a second")
        return ", ".join(words)
    where, left = f"step {step} of {state.max_steps}", math.inf
    if step > start.step:
        left = (monotonic() - start.time) / (step - start.step) * (state.max_steps - step)
    if deadline is not None and (limit := (1 - deadline.share) * deadline.seconds) < left:
        where, left = f"step {step}", limit  # the steps planned will not be reached
    if 0 < left < math.inf:
        where += f", {_duration(left)} left"
    words = [
        f"{name.removeprefix('loss_').replace('_', ' ')} {value:.3g}"
        for name, value in logs.items()
        if isinstance(value, int | float) and name not in _UNSAID and not name.endswith(_SPEEDS)
    ]
    if "learning_rate" in logs:
        words.append(f"rate {_scientific(logs['learning_rate'])}")
    said = [where] if state.max_steps else []  # an evaluation without a training
    return ": ".join([*said, ", ".join(words)])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
