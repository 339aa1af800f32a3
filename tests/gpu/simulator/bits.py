"""Operations on bits: logic, shifts, fields, permutations and counts."""

import numpy as np

from .errors import Unsupported
from .formats import TYPES, UNSIGNED
from .operands import integer
from .ptx import Instruction
from .steps import Mask, Step, assign, executes, only

_LOGIC = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


@executes(*_LOGIC)
def _logic(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    only(instruction)
    function = _LOGIC[instruction.opcode]
    destination = operands.write(instruction.operands[0], type_)
    if instruction.opcode in ("shl", "shr"):
        return _shift(machine, instruction, destination)
    sources = [operands.read(one, type_) for one in instruction.operands[1:]]
    return lambda mask: function(*sources, out=destination, where=mask)


def _shift(machine, instruction: Instruction, destination: np.ndarray) -> Step:
    """numpy shifts out all bits for distances beyond the width, as PTX does."""
    function, dtype = _LOGIC[instruction.opcode], TYPES[instruction.types[-1]]
    source = machine.operands.read(instruction.operands[1], dtype)
    distance = machine.operands.read(instruction.operands[2], "u32")
    constant = machine.operands.constant(instruction.operands[2])
    if constant is not None:
        by = np.full(machine.threads, min(constant, 64), dtype)
        return lambda mask: function(source, by, out=destination, where=mask)
    # A large distance must not become negative in a signed type.
    return lambda mask: function(
        source, np.minimum(distance, 64).astype(dtype), out=destination, where=mask
    )


@executes("lop3")
def _lop3(machine, instruction: Instruction) -> Step:
    """Any function of three bits, as a sum of the products that the table selects."""
    only(instruction)
    operands = machine.operands
    destination = operands.write(instruction.operands[0], "b32")
    a, b, c = (operands.read(one, "b32") for one in instruction.operands[1:4])
    table = integer(instruction.operands[4])
    inverted = table.bit_count() > 4
    if inverted:
        table ^= 0xFF
    products = [i for i in range(8) if table >> i & 1]

    def step(mask: Mask) -> None:
        result = np.zeros_like(a)
        for i in products:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        assign(destination, ~result if inverted else result, mask)

    return step


@executes("bfe")
def _bfe(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    dtype, width = TYPES[type_], 8 * TYPES[type_].itemsize
    destination = operands.write(instruction.operands[0], type_)
    source = operands.read(instruction.operands[1], UNSIGNED[dtype.itemsize])
    start, length = (operands.read(one, "u32") for one in instruction.operands[2:4])

    def step(mask: Mask) -> None:
        first = (start & 255).astype(np.uint64)
        count = np.minimum(length & 255, 64).astype(np.uint64)
        ones = np.left_shift(np.uint64(1), count) - np.uint64(1)  # numpy: 1 << 64 is 0
        value = source.astype(np.uint64)
        result = np.right_shift(value, first) & ones
        if dtype.kind == "i":
            last = np.minimum(first + count, width) - np.uint64(1)
            negative = (np.right_shift(value, last) & np.uint64(1) != 0) & (count > 0)
            result = np.where(negative, result | ~ones, result)
        assign(destination.view(UNSIGNED[dtype.itemsize]), result, mask)

    return step


@executes("bfi")
def _bfi(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    destination = operands.write(instruction.operands[0], type_)
    field, into = (operands.read(one, type_) for one in instruction.operands[1:3])
    start, length = (operands.read(one, "u32") for one in instruction.operands[3:5])

    def step(mask: Mask) -> None:
        first, count = ((one & 255).astype(np.uint64) for one in (start, length))
        ones = np.left_shift(np.left_shift(np.uint64(1), count) - np.uint64(1), first)
        moved = np.left_shift(field.astype(np.uint64), first)
        assign(destination, (moved & ones) | (into & ~ones), mask)

    return step


@executes("prmt")
def _prmt(machine, instruction: Instruction) -> Step:
    """Pick four bytes from eight; a selector's fourth bit replicates the byte's sign instead."""
    only(instruction)
    operands = machine.operands
    destination = operands.write(instruction.operands[0], "b32")
    low, high, selector = (operands.read(one, "b32") for one in instruction.operands[1:4])
    constant = operands.constant(instruction.operands[3])
    signs = constant is None or constant & 0x8888
    picks = [(selector >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]

    def step(mask: Mask) -> None:
        both = high.astype(np.uint64) << np.uint64(32) | low
        result = np.zeros(machine.threads, np.uint32)
        for i in range(4):
            pick = picks[i] if constant is not None else selector >> np.uint32(4 * i)
            byte = np.right_shift(both, (pick & 7) * 8).astype(np.uint32) & np.uint32(255)
            if signs:
                sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
                byte = np.where(pick & 8, sign, byte)
            result |= byte << np.uint32(8 * i)
        assign(destination, result, mask)

    return step


@executes("shf")
def _shf(machine, instruction: Instruction) -> Step:
    """Shift a pair of registers as one."""
    only(instruction, "l", "r", "wrap", "clamp")
    operands = machine.operands
    destination = operands.write(instruction.operands[0], "b32")
    low, high, distance = (operands.read(one, "u32") for one in instruction.operands[1:4])
    wrap, left = "wrap" in instruction.modifiers, "l" in instruction.modifiers

    def step(mask: Mask) -> None:
        by = (distance & 31 if wrap else np.minimum(distance, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        assign(destination, (both << by) >> np.uint64(32) if left else both >> by, mask)

    return step


def _bit_length(values: np.ndarray) -> np.ndarray:
    """Bit length of unsigned integers, by halves, which float64 represents exactly."""
    high = np.frexp((values >> values.dtype.type(4 * values.itemsize)).astype(np.float64))[1]
    halves = values & values.dtype.type((1 << 4 * values.itemsize) - 1)
    low = np.frexp(halves.astype(np.float64))[1]
    return np.where(high > 0, high + 4 * values.itemsize, low)


def _reversed(values: np.ndarray) -> np.ndarray:
    bytes_ = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    bits = np.unpackbits(bytes_, axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(values.dtype)[:, 0]


@executes("clz", "popc", "brev", "bfind")
def _count(machine, instruction: Instruction) -> Step:
    type_, operands = instruction.types[-1], machine.operands
    only(instruction)
    width = 8 * TYPES[type_].itemsize
    if instruction.opcode == "bfind" and type_.startswith("s"):
        raise Unsupported(f"opcode {instruction.name}")
    function = {
        "clz": lambda values: width - _bit_length(values),
        "popc": np.bitwise_count,
        "brev": _reversed,
        "bfind": lambda values: _bit_length(values) - 1,
    }[instruction.opcode]
    result = type_ if instruction.opcode == "brev" else "u32"
    destination = operands.write(instruction.operands[0], result)
    source = operands.read(instruction.operands[1], UNSIGNED[width // 8])
    return lambda mask: assign(destination, function(source), mask)
