"""The registry of opcodes.

A binder takes the machine and an instruction, resolves the operands, and returns a step: a function
that executes the instruction for a mask of threads.
"""

from collections.abc import Callable

import numpy as np

from .errors import Unsupported
from .formats import TYPES
from .ptx import Instruction

Mask = np.ndarray | bool  # the active threads; True for all
Step = Callable[[Mask], None]

BINDERS: dict[str, Callable] = {}


def assign(destination: np.ndarray, values: np.ndarray, mask: Mask) -> None:
    np.copyto(destination, values, where=mask, casting="unsafe")


def executes(*opcodes: str) -> Callable:
    """Register a function(machine, instruction) that returns a Step for these opcodes."""

    def register(binder: Callable) -> Callable:
        BINDERS.update(dict.fromkeys(opcodes, binder))
        return binder

    return register


def only(instruction: Instruction, *known: str) -> None:
    """Raise Unsupported for modifiers that would otherwise be ignored."""
    for modifier in instruction.modifiers:
        if modifier not in TYPES and modifier not in known:
            raise Unsupported(f"modifier .{modifier}")
