"""SIGINT (Ctrl-C) and SIGTERM: one exception for both, and trainings that end in good order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nInterrupted: ends after this step, with a checkpoint. Once more to quit at once.\n"


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work.

    Attributes:
        number: The signal's number.
        kept: A sentence on the work that is kept; empty if none is.
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(kept)
        self.number, self.kept = number, kept


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Signal handler that raises ``Interrupted``: clean-up code then removes temporary files."""
    raise Interrupted(number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let ``handler`` handle SIGINT and SIGTERM inside the block.

    Nothing changes outside the main thread, or under ``torchrun``, which sends its own signals to
    processes that must all stop at the same step. An ignored signal stays ignored: shells start
    background jobs without SIGINT. A forked child ends as it would without handlers.
    """
    owner = os.getpid()

    def act(received: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(received, frame)
        # Forked children inherit the handler, and Ctrl-C reaches all processes of a terminal. A
        # training that is to end in good order needs its workers until the end of the step.
        elif received != signal.SIGINT or not isinstance(handler, Stop):
            signal.signal(received, signal.SIG_DFL)
            signal.raise_signal(received)

    is_ours = threading.current_thread() is threading.main_thread() and "RANK" not in os.environ
    before = {
        number: signal.signal(number, act)
        for number in _NUMBERS
        if is_ours and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stop:
    """Signal handler that keeps the first signal's number; the second raises ``Interrupted``."""

    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            interrupt(number)
        self.number = number
        os.write(2, _NOTICE)  # print() is not reentrant


@contextmanager
def stoppable(trainer: Any) -> Iterator[Stop]:
    """Let the first SIGINT or SIGTERM end a training after the current step, with a checkpoint.

    A training that has taken its last step is not stopped, and the rest of the block, such as
    saving the result, is not interrupted. A second signal raises ``Interrupted`` at once.

    Args:
        trainer: A ``transformers.Trainer``.

    Yields:
        The handler; its ``number`` is that of the first signal, or None.
    """
    from transformers import TrainerCallback

    stop = Stop()

    class StopAfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if stop.number is not None and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(StopAfterStep)
    with handled(stop):
        yield stop
