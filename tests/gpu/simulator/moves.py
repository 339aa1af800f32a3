"""Comparisons, selections and moves."""

import numpy as np

from .errors import Unsupported
from .formats import FLOATS, TYPES, UNSIGNED, decoder
from .ptx import Instruction, elements
from .steps import Mask, Step, assign, executes, only


def _unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


_INTEGER_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}
_FLOAT_COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": _unordered,
}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@executes("setp")
def _setp(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    comparison = instruction.modifiers[0]
    only(instruction, comparison, "ftz", *_JOIN)
    if type_ in ("f16x2", "bf16x2"):
        raise Unsupported(f"opcode {instruction.name}")
    table = _FLOAT_COMPARISONS if type_ in FLOATS else _INTEGER_COMPARISONS
    compare = table[comparison]
    join = next((_JOIN[one] for one in instruction.modifiers[1:] if one in _JOIN), None)
    names = [one.strip() for one in instruction.operands[0].split("|")]
    destinations = [operands.write(one, "pred") for one in names]
    a, b = (operands.read(one, type_) for one in instruction.operands[1:3])
    third = operands.read(instruction.operands[3], "pred") if join else None
    if isinstance(compare, np.ufunc) and len(names) == 1 and not join and type_ != "bf16":
        (destination,) = destinations
        return lambda mask: compare(a, b, out=destination, where=mask)
    decode = decoder(type_) if type_ == "bf16" else lambda values: values

    def step(mask: Mask) -> None:
        result = compare(decode(a), decode(b))
        opposite = ~result
        if join:
            result, opposite = join(result, third), join(opposite, third)
        for destination, value in zip(destinations, (result, opposite), strict=False):
            assign(destination, value, mask)

    return step


@executes("selp")
def _selp(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    destination = operands.write(instruction.operands[0], type_)
    a, b = (operands.read(one, type_) for one in instruction.operands[1:3])
    predicate = operands.read(instruction.operands[3], "pred")
    return lambda mask: assign(destination, np.where(predicate, a, b), mask)


@executes("mov")
def _mov(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    target, source = instruction.operands
    if not target.startswith("{") and not source.startswith("{"):
        destination, value = operands.write(target, type_), operands.read(source, type_)
        return lambda mask: np.copyto(destination, value, where=mask)
    # A vector's elements are parts of the other side's register, starting at its low end.
    names = elements(target if target.startswith("{") else source)
    part = UNSIGNED[TYPES[type_].itemsize // len(names)]
    if target.startswith("{"):
        whole = operands.read(source, type_).view(part)
        pairs = [
            (operands.write(name, part), whole[i :: len(names)]) for i, name in enumerate(names)
        ]
    else:
        whole = operands.write(target, type_).view(part)
        pairs = [
            (whole[i :: len(names)], operands.read(name, part)) for i, name in enumerate(names)
        ]

    def step(mask: Mask) -> None:
        # Copy first: a part may be both source and destination.
        values = [value.copy() for _, value in pairs]
        for (destination, _), value in zip(pairs, values, strict=True):
            np.copyto(destination, value, where=mask)

    return step


@executes("cvta")
def _cvta(machine, instruction: Instruction) -> Step:
    """Convert between the addresses of a state space and generic ones."""
    type_, operands = instruction.types[-1], machine.operands
    spaces = [modifier.split("::")[0] for modifier in instruction.modifiers]
    space = next((one for one in spaces if one in machine.windows), None)
    shift = np.full(machine.threads, machine.windows[space] if space else 0).astype(TYPES[type_])
    destination = operands.write(instruction.operands[0], type_)
    source = operands.read(instruction.operands[1], type_)
    function = np.subtract if "to" in instruction.modifiers else np.add
    return lambda mask: function(source, shift, out=destination, where=mask)
