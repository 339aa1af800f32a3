"""Trainings limited by time, and checkpoints by time."""

import math
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Deadline(TrainerCallback):
    """Tracks the share of the time that has passed; at 1 the current step becomes the last."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.spent = 0.0  # seconds spent by the run that this one resumes
        self.share = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = monotonic() - self.spent
        self.share = min(self.spent / self.seconds, 1.0)

    # Before the optimizer's step: the schedule's step, which follows it, uses the share.
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        share = (monotonic() - self.start) / self.seconds
        if args.world_size > 1:  # one clock for all processes, or they stop at different steps
            share = broadcast(torch.tensor(share, device=args.device)).item()
        self.share = min(share, 1.0)
        if share >= 1:  # Trainer then evaluates, saves and stops as after a planned last step
            state.max_steps = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= self.share >= 1  # the last step may fall between two reports

    def govern(self, scheduler: LRScheduler, steps: int, warmup: float) -> None:
        """Make the learning rate follow the share of time or of steps, whichever is larger.

        A ``warmup`` of a number of steps, not a share, takes these steps all the same.
        """
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"max_minutes needs a schedule that is a function of the step, got "
                f"{type(scheduler).__name__}; use lr_scheduler_type='linear' or 'cosine'."
            )

        def ahead(rate: Callable[[Any], float]) -> Callable[[float], float]:
            def now(step: float) -> float:
                rising = step / warmup if warmup >= 1 else math.inf
                return min(rising, rate(max(step, self.share * steps)))

            return now

        scheduler.lr_lambdas = [ahead(rate) for rate in scheduler.lr_lambdas]


class Checkpoints(TrainerCallback):
    """Saves a checkpoint after every so many seconds, and hands over each that is saved.

    Args:
        seconds: Between two checkpoints.
        take: Called with a checkpoint's folder; it may move it.
    """

    def __init__(self, seconds: float, take: Callable[[Path], None]):
        self.seconds, self.take = seconds, take

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.last = monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if monotonic() - self.last >= self.seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        self.last = monotonic()
        if state.is_world_process_zero:
            self.take(Path(args.output_dir) / f"checkpoint-{state.global_step}")
