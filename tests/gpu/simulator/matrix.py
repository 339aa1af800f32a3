"""ldmatrix, stmatrix and mma.sync: the layouts of matrices over the registers of a warp.

With g = lane // 4 and t = lane % 4, a register of a factor holds neighbours along the inner
dimension, from column t on: of row g in the first factor (odd registers: g + 8), of column g in the
second. The result has rows g and g + 8, columns 2 t and 2 t + 1.
"""

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .errors import Unsupported
from .formats import UNSIGNED, decoder
from .ptx import Instruction, elements
from .steps import Mask, Step, assign, executes, only

_LANES = np.arange(32)
_GROUP, _INSIDE = _LANES // 4, _LANES % 4

_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}


def shape(instruction: Instruction) -> tuple[int, int, int]:
    name = next(one for one in instruction.modifiers if re.fullmatch(r"m\d+n\d+k\d+", one))
    rows, columns, inner = map(int, re.findall(r"\d+", name))
    return rows, columns, inner


def _flat(register: int, element: int, per_register: int) -> np.ndarray:
    """The positions of an element of each lane in a warp's gathered registers."""
    return (register * 32 + _LANES) * per_register + element


@lru_cache
def first_factor(registers: int, per_register: int) -> np.ndarray:
    """The position in a warp's registers, by row and inner index."""
    table = np.zeros((16, registers // 2 * 4 * per_register), np.intp)
    for register in range(registers):
        for element in range(per_register):
            inner = (register // 2 * 4 + _INSIDE) * per_register + element
            table[_GROUP + 8 * (register % 2), inner] = _flat(register, element, per_register)
    return table


@lru_cache
def second_factor(registers: int, per_register: int) -> np.ndarray:
    """The position in a warp's registers, by inner index and column."""
    table = np.zeros((registers * 4 * per_register, 8), np.intp)
    for register in range(registers):
        for element in range(per_register):
            inner = (register * 4 + _INSIDE) * per_register + element
            table[inner, _GROUP] = _flat(register, element, per_register)
    return table


class Fragment:
    """A matrix in the registers of each warp."""

    def __init__(
        self, registers: list[np.ndarray], table: np.ndarray, width: int, decode: Callable
    ):
        self.registers = [one.reshape(-1, 32) for one in registers]
        self.table, self.width, self.decode = table, width, decode
        warps = len(self.registers[0])
        self.gathered = np.empty((warps, len(registers), 32), np.uint32)

    def values(self) -> np.ndarray:
        """A matrix for each warp."""
        for i, register in enumerate(self.registers):
            self.gathered[:, i] = register
        flat = self.gathered.view(UNSIGNED[self.width]).reshape(len(self.gathered), -1)
        return self.decode(flat.take(self.table, axis=1))


@executes("mma")
def _mma(machine, instruction: Instruction) -> Step:
    only(instruction, "sync", "aligned", "row", "col", *instruction.modifiers[:3])
    rows, columns, inner = shape(instruction)
    types = instruction.types
    if (rows, columns) != (16, 8) or types[1] not in _BYTES:
        raise Unsupported(f"opcode {instruction.name}")
    if types != ("f32", types[1], types[1], "f32"):
        raise Unsupported(f"opcode {instruction.name}")
    width = _BYTES[types[1]]
    per_register = 4 // width

    def decode(bits: np.ndarray) -> np.ndarray:
        return decoder(types[1])(bits).astype(np.float32, copy=False)

    operands = machine.operands
    names = [elements(one) for one in instruction.operands]
    registers = [[operands.read(one, "b32") for one in group] for group in names[1:3]]
    first = Fragment(registers[0], first_factor(len(names[1]), per_register), width, decode)
    second = Fragment(registers[1], second_factor(len(names[2]), per_register), width, decode)
    if first.table.shape[1] != inner or second.table.shape[0] != inner:
        raise Unsupported(f"opcode {instruction.name}")
    destinations = [operands.write(one, types[0]) for one in names[0]]
    addends = [operands.read(one, types[3]) for one in names[3]]
    places = [(_GROUP + 8 * (i // 2)) * 8 + 2 * _INSIDE + i % 2 for i in range(4)]
    order = np.concatenate(places)

    def step(mask: Mask) -> None:
        machine.require_whole_warps(instruction, mask)
        product = np.matmul(first.values(), second.values()).reshape(-1, 128)
        parts = product.take(order, axis=1).reshape(-1, 4, 32)
        # Read all addends before changing a destination: they may be the same registers.
        totals = [parts[:, i].reshape(-1) + addend for i, addend in enumerate(addends)]
        for destination, total in zip(destinations, totals, strict=True):
            assign(destination, total, mask)
        flops = 2 * rows * columns * inner
        machine.accesses.traffic["mma_flops"] += flops * machine.count_warps(mask)

    return step


@executes("ldmatrix", "stmatrix")
def _matrices(machine, instruction: Instruction) -> Step:
    """1, 2 or 4 matrices of 8 rows of 16 bytes each; every lane has the address of a row."""
    only(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    if instruction.types != ("b16",):
        raise Unsupported(f"opcode {instruction.name}")
    number = int(next(one for one in instruction.modifiers if one in ("x1", "x2", "x4"))[1])
    load = instruction.opcode == "ldmatrix"
    where, vector = instruction.operands[:: -1 if load else 1]
    operands = machine.operands
    address = operands.address(where)
    names = elements(vector)
    registers = [(operands.write if load else operands.read)(one, "b32") for one in names]
    addressing = machine.lane < 8 * number  # the lanes whose addresses are used
    matrix = 8 * np.arange(number)[:, None]
    if "trans" in instruction.modifiers:
        rows = [matrix + 2 * _INSIDE + i for i in range(2)]
        columns, cell = _GROUP, 2
    else:
        rows, columns, cell = [matrix + _GROUP], _INSIDE, 4

    def step(mask: Mask) -> None:
        machine.require_whole_warps(instruction, mask)
        lanes = mask if number == 4 else addressing & mask
        kind = "load" if load else "store"
        for place in machine.accesses.places(instruction, "shared", address(), 16, lanes, kind):
            cells, index = place.cells(cell)
            index = index.reshape(-1, 32)
            each = [index.take(one, axis=1) + columns for one in rows]
            if load:
                parts = [cells.take(one, mode="clip").astype(np.uint32, copy=False) for one in each]
                value = parts[0] if cell == 4 else parts[0] | parts[1] << np.uint32(16)
                for i, register in enumerate(registers):
                    np.copyto(register, value[:, i].reshape(-1), where=mask)
                continue
            active = machine.active(mask).reshape(-1, 32)[:, 0]
            value = np.stack([one.reshape(-1, 32) for one in registers], axis=1)[active]
            for i, one in enumerate(each):
                cells[one[active]] = value >> np.uint32(16 * i) if cell == 2 else value

    return step
