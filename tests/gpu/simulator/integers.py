"""Arithmetic on integers, and the opcodes that integers and floats share."""

import numpy as np

from . import floats
from .errors import Unsupported
from .formats import FLOATS, SIGNED, TYPES, UNSIGNED
from .ptx import Instruction
from .steps import Mask, Step, assign, executes, only


@executes(*floats.OPERATIONS)
def _operation(machine, instruction: Instruction) -> Step:
    type_ = instruction.types[-1]
    if type_ in FLOATS:
        return floats.prepare(machine, instruction, type_)
    return _integer_operation(machine, instruction, type_)


_INTEGER_OPERATIONS = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
}


def _integer_operation(machine, instruction: Instruction, type_: str) -> Step:
    opcode, operands = instruction.opcode, machine.operands
    if opcode in ("mul", "mad"):
        return _product(machine, instruction, type_)
    if opcode == "div":
        return _division(machine, instruction)
    only(instruction)
    function = _INTEGER_OPERATIONS.get(opcode)
    if function is None:
        raise Unsupported(f"opcode {instruction.name}")
    destination = operands.write(instruction.operands[0], type_)
    sources = [operands.read(one, type_) for one in instruction.operands[1:]]
    return lambda mask: function(*sources, out=destination, where=mask)


def _product(machine, instruction: Instruction, type_: str) -> Step:
    only(instruction, "lo", "hi", "wide")
    operands, dtype = machine.operands, TYPES[type_]
    result = dtype
    if "wide" in instruction.modifiers:
        result = (SIGNED if dtype.kind == "i" else UNSIGNED)[2 * dtype.itemsize]
    a, b = (operands.read(one, type_) for one in instruction.operands[1:3])
    destination = operands.write(instruction.operands[0], result)
    if "hi" in instruction.modifiers:

        def product(**_) -> np.ndarray:
            return _high_half(a, b, dtype)
    else:

        def product(**keywords) -> np.ndarray:
            return np.multiply(a, b, dtype=result, **keywords)

    if instruction.opcode == "mad":
        c = operands.read(instruction.operands[3], result)
        return lambda mask: np.add(product(), c, out=destination, where=mask)
    if "hi" in instruction.modifiers:
        return lambda mask: assign(destination, product(), mask)
    return lambda mask: product(out=destination, where=mask)


def _high_half(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.itemsize < 8:
        wide = (SIGNED if dtype.kind == "i" else UNSIGNED)[2 * dtype.itemsize]
        return (np.multiply(a, b, dtype=wide) >> (8 * dtype.itemsize)).astype(dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.view(dtype)


@executes("rem")
def _division(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    only(instruction)
    a, b = (operands.read(one, type_) for one in instruction.operands[1:3])
    destination = operands.write(instruction.operands[0], type_)

    def step(mask: Mask) -> None:
        divisor = np.where(b == 0, b.dtype.type(1), b)  # any result is allowed
        remainder = np.fmod(a, divisor)  # truncates, as PTX does
        result = remainder
        if instruction.opcode == "div":
            result = (a - remainder) // divisor
        assign(destination, result, mask)

    return step
