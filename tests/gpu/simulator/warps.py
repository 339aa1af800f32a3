"""Instructions of whole warps other than matrix products: shuffles, votes and reductions."""

import numpy as np

from .formats import TYPES
from .ptx import Instruction
from .steps import Mask, Step, executes, only

_LANES = 32


@executes("shfl")
def _shfl(machine, instruction: Instruction) -> Step:
    only(instruction, "sync", "bfly", "up", "down", "idx")
    operands = machine.operands
    mode = next(one for one in instruction.modifiers if one in ("bfly", "up", "down", "idx"))
    names = [one.strip() for one in instruction.operands[0].split("|")]
    destination = operands.write(names[0], "b32")
    inside = operands.write(names[1], "pred") if len(names) > 1 else None
    values = operands.read(instruction.operands[1], "b32")
    distance, limits, members = (operands.read(one, "u32") for one in instruction.operands[2:5])
    lane, index = machine.lane, np.arange(machine.threads)

    def sources() -> tuple[np.ndarray, np.ndarray]:
        by, limit = distance.astype(np.int64) & 31, limits.astype(np.int64)
        segment, clamp = limit >> 8 & 31, limit & 31
        last = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            other = lane - by
            valid = other >= last
        else:
            first = lane & segment
            other = {"down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
            valid = other <= last
        return index - lane + np.where(valid, other, lane), valid

    constant = all(operands.constant(one) is not None for one in instruction.operands[2:4])
    known = sources() if constant else None
    everyone = operands.constant(instruction.operands[4]) in (-1, 0xFFFFFFFF)

    def step(mask: Mask) -> None:
        other, valid = known or sources()
        if mask is not True:
            bad = mask & ~mask[other]
            if bad.any():
                machine.fail(instruction, "shfl reads an inactive lane", bad)
        if not everyone:
            bad = (members.astype(np.int64) >> lane & 1 == 0) & mask
            if bad.any():
                machine.fail(instruction, "shfl by a lane outside its member mask", bad)
        result = values[other]
        np.copyto(destination, result, where=mask)
        if inside is not None:
            np.copyto(inside, valid, where=mask)

    return step


def _ballot(values: np.ndarray) -> np.ndarray:
    """A bit mask of each warp's lanes."""
    return np.packbits(values.reshape(-1, _LANES), axis=1, bitorder="little").view(np.uint32)[:, 0]


@executes("vote")
def _vote(machine, instruction: Instruction) -> Step:
    only(instruction, "sync", "all", "any", "uni", "ballot")
    operands, modifiers = machine.operands, instruction.modifiers
    predicate = operands.read(instruction.operands[1], "pred")
    destination = operands.write(instruction.operands[0], instruction.types[-1])

    def step(mask: Mask) -> None:
        members, chosen = _ballot(machine.active(mask)), _ballot(predicate & mask)
        if "ballot" in modifiers:
            result = chosen
        elif "all" in modifiers:
            result = members == chosen
        elif "any" in modifiers:
            result = chosen != 0
        else:
            result = (chosen == 0) | (members == chosen)
        np.copyto(destination, np.repeat(result, _LANES), where=mask)

    return step


@executes("redux")
def _redux(machine, instruction: Instruction) -> Step:
    only(instruction, "sync", "add", "min", "max", "and", "or", "xor", "NaN")
    function = {
        "add": np.add,
        "min": np.minimum if "NaN" in instruction.modifiers else np.fmin,
        "max": np.maximum if "NaN" in instruction.modifiers else np.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[
        next(
            one for one in instruction.modifiers if one in ("add", "min", "max", "and", "or", "xor")
        )
    ]
    type_ = instruction.types[-1]
    destination = machine.operands.write(instruction.operands[0], type_)
    source = machine.operands.read(instruction.operands[1], type_)

    def step(mask: Mask) -> None:
        machine.require_whole_warps(instruction, mask)
        result = function.reduce(source.reshape(-1, _LANES), axis=1, dtype=TYPES[type_])
        np.copyto(destination, np.repeat(result, _LANES), where=mask)

    return step


@executes(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "griddepcontrol",
    "setmaxnreg",
    "discard",
)
def _nothing(machine, instruction: Instruction) -> Step:
    """Fences and hints, which have no effect without weak memory and caches."""
    return lambda mask: None


@executes("trap")
def _trap(machine, instruction: Instruction) -> Step:
    return lambda mask: machine.fail(instruction, "trap executed", mask)
