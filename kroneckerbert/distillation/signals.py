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
        number: The signal's.
        kept: What is kept of the work, in a sentence; empty if nothing is.
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(kept)
        self.number, self.kept = number, kept


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """A handler of signals that raises ``Interrupted``, so that temporary files go."""
    raise Interrupted(number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call ``handler``.

    Elsewhere than in the main thread nothing changes, nor under ``torchrun``: it sends signals of
    its own, to processes that must all stop at the same step. What is ignored stays so: a shell
    starts jobs in the background without SIGINT. A forked child ends as it would without handlers.
    """
    owner = os.getpid()

    def act(received: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(received, frame)
        # A forked child has the handlers, too. Ctrl-C reaches all processes of a terminal: to end
        # in good order, a training needs its workers for the step at hand.
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
    """Whether a signal has come; the second one raises ``Interrupted``."""

    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            interrupt(number)
        self.number = number
        os.write(2, _NOTICE)  # print() must not be called again within itself


@contextmanager
def stoppable(trainer: Any) -> Iterator[Stop]:
    """Within, the first SIGINT or SIGTERM ends a training after its step, with a checkpoint.

    A training that is at its end by then is not stopped: what follows within, such as saving its
    result, is not interrupted either. A second signal raises ``Interrupted`` at once.

    Args:
        trainer: A ``transformers.Trainer``.

    Yields:
        Its ``number`` is that of the signal, once there was one.
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
