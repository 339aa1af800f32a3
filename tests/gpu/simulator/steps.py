"""How a module says which opcodes it makes executable.

A binder takes the machine and an instruction, finds the operands, and returns a step: a function
of the threads that are to execute it.
"""

from collections.abc import Callable

import numpy as np

from .errors import Unsupported
from .formats import TYPES
from .ptx import Instruction

Mask = np.ndarray | bool  # the threads that execute: True for all of them
Step = Callable[[Mask], None]

BINDERS: dict[str, Callable] = {}


def assign(destination: np.ndarray, values: np.ndarray, mask: Mask) -> None:
    np.copyto(destination, values, where=mask, casting="unsafe")


def executes(*opcodes: str) -> Callable:
    """Registers a function(machine, instruction) that prepares a Step for these opcodes."""

    def register(binder: Callable) -> Callable:
        BINDERS.update(dict.fromkeys(opcodes, binder))
        return binder

    return register


def only(instruction: Instruction, *known: str) -> None:
    """Refuses a variant whose meaning would silently be ignored."""
    for modifier in instruction.modifiers:
        if modifier not in TYPES and modifier not in known:
            raise Unsupported(f"modifier .{modifier}")
