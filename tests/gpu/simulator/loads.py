"""ld, st, atom and red."""

import numpy as np

from .errors import Unsupported
from .formats import TYPES, UNSIGNED, bf16_bits, bf16_values
from .ptx import Instruction, elements
from .steps import Mask, Step, assign, executes

_SPACES = {"global", "shared", "local", "const", "param"}
_ORDERED = {"acquire", "release", "relaxed", "volatile", "mmio"}
_ATOMICS = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"}


def width(instruction: Instruction) -> int:
    """Bytes of one element."""
    return TYPES[instruction.types[-1]].itemsize


def state_space(instruction: Instruction) -> str:
    """The state space of an address, or '' if it is generic."""
    spaces = (modifier.split("::")[0] for modifier in instruction.modifiers)
    space = next((one for one in spaces if one in _SPACES), "")
    return "global" if space == "const" else space


@executes("ld", "ldu")
def _load(machine, instruction: Instruction) -> Step:
    type_, space = instruction.types[-1], state_space(instruction)
    dtype, operands = TYPES[type_], machine.operands
    names = elements(instruction.operands[0])
    destinations = [operands.write(name, dtype) for name in names]
    if space == "param" and not instruction.operands[1].strip("[ ").startswith("%"):
        return _load_parameter(machine, instruction, destinations, dtype)
    address, size = operands.address(instruction.operands[1]), dtype.itemsize * len(names)
    ordered = bool(_ORDERED & set(instruction.modifiers))
    accesses = machine.accesses
    # Narrow values are sign- or zero-extended; otherwise bits are copied.
    extend = any(one.itemsize != dtype.itemsize for one in destinations)
    if not extend:
        destinations = [one.view(UNSIGNED[dtype.itemsize]) for one in destinations]

    def step(mask: Mask) -> None:
        # Compute the address before a destination with the same name changes.
        where = address()
        if len(destinations) > 1:
            where = where.copy()
        for place in accesses.places(
            instruction, space, where, size, mask, "load", ordered=ordered
        ):
            cells, index = place.cells(dtype.itemsize)
            for i, destination in enumerate(destinations):
                # Inactive threads may have any address: clip it.
                values = cells.take(index + i if i else index, mode="clip")
                if extend:
                    assign(destination, values.view(dtype), place.mask)
                else:
                    np.copyto(destination, values, where=place.mask)

    return step


def _load_parameter(
    machine, instruction: Instruction, destinations: list[np.ndarray], dtype: np.dtype
) -> Step:
    name, _, offset = instruction.operands[1].strip("[] ").partition("+")
    start = machine.operands.parameters[name.strip()].offset + int(offset or 0)
    end = start + dtype.itemsize * len(destinations)
    values = machine.parameters[start:end].view(dtype)

    def step(mask: Mask) -> None:
        for destination, value in zip(destinations, values, strict=True):
            assign(destination, value, mask)

    return step


@executes("st")
def _store(machine, instruction: Instruction) -> Step:
    type_, space = instruction.types[-1], state_space(instruction)
    dtype, operands = UNSIGNED[TYPES[type_].itemsize], machine.operands
    sources = [operands.read(name, dtype) for name in elements(instruction.operands[1])]
    address, size = operands.address(instruction.operands[0]), dtype.itemsize * len(sources)
    ordered = bool(_ORDERED & set(instruction.modifiers))
    accesses = machine.accesses

    def step(mask: Mask) -> None:
        where = address()
        for place in accesses.places(
            instruction, space, where, size, mask, "store", ordered=ordered
        ):
            cells, index = place.cells(dtype.itemsize)
            chosen = slice(None) if place.mask is True else place.mask
            index = index[chosen]
            for i, source in enumerate(sources):
                cells[index + i] = source[chosen]
            if place.memory is accesses.shared:
                _agreement(machine, instruction, place, sources, size)

    return step


def _agreement(machine, instruction: Instruction, place, sources, size: int) -> None:
    """Fail if warps store different values to one address in the same instruction."""
    accesses = machine.accesses
    offsets = place.positions - machine.cta * accesses.shared.stride
    lost = accesses.overwritten(offsets, size, place.mask)
    if lost is None:
        return
    cells, index = place.cells(size // len(sources))
    for i, source in enumerate(sources):
        differs = cells[index[lost] + i] != source[lost]
        if differs.any():
            bad = np.zeros(machine.threads, bool)
            bad[lost[differs]] = True
            text = "shared-memory race: warps store different values to the same address"
            machine.fail(instruction, text, bad)


@executes("atom", "red")
def _atomic(machine, instruction: Instruction) -> Step:
    type_, space = instruction.types[-1], state_space(instruction)
    operation = next(one for one in instruction.modifiers if one in _ATOMICS)
    combine = _combination(operation, type_)
    names, operands = list(instruction.operands), machine.operands
    destinations: list[np.ndarray] = []
    if instruction.opcode == "atom":
        bits = UNSIGNED[TYPES[type_].itemsize]
        destinations = [operands.write(one, bits) for one in elements(names.pop(0))]
    address = operands.address(names[0])
    sources = [operands.read(one, type_) for one in elements(names[1])]
    swapped = operands.read(names[2], type_) if operation == "cas" else None
    itemsize = TYPES[type_].itemsize
    size = itemsize * len(sources)

    def step(mask: Mask) -> None:
        where = address()
        for place in machine.accesses.places(instruction, space, where, size, mask, "atomic"):
            cells, index = place.cells(itemsize)
            values = cells.view(TYPES[type_])
            lanes = np.arange(machine.threads) if place.mask is True else np.flatnonzero(place.mask)
            before = [np.zeros(machine.threads, values.dtype) for _ in sources]
            for turn in _turns(lanes, index):
                for i, source in enumerate(sources):
                    cell = index[turn] + i
                    before[i][turn] = old = values[cell]
                    swap = swapped[turn] if swapped is not None else None
                    values[cell] = combine(old, source[turn], swap)
            for destination, old in zip(destinations, before, strict=False):
                assign(destination, old.view(destination.dtype), place.mask)

    return step


def _turns(lanes: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """Split threads into turns without a shared address; lower threads go first."""
    order = lanes[np.argsort(index[lanes], kind="stable")]
    cells = index[order]
    begins = np.ones(len(order), bool)
    begins[1:] = cells[1:] != cells[:-1]
    positions = np.arange(len(order))
    rank = positions - np.maximum.accumulate(np.where(begins, positions, 0))
    if not rank.any():
        return [order]
    by_rank = np.argsort(rank, kind="stable")
    return np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1])


def _combination(operation: str, type_: str):
    """A function (old, value, swapped) -> new."""
    if type_ in ("bf16", "bf16x2", "f16x2"):
        if operation not in ("add", "exch"):
            raise Unsupported(f"atomic {operation} of {type_}")
        if operation == "add" and type_ == "f16x2":

            def add_halves(old, value, _):
                parts = [np.ascontiguousarray(one).view(np.float16) for one in (old, value)]
                return (parts[0] + parts[1]).view(np.uint32)

            return add_halves
        if operation == "add":

            def add_bfloats(old, value, _):
                parts = [np.ascontiguousarray(one).view(np.uint16) for one in (old, value)]
                total = bf16_bits(bf16_values(parts[0]) + bf16_values(parts[1]))
                return total.view(old.dtype)

            return add_bfloats
    return {
        "add": lambda old, value, _: old + value,
        "min": lambda old, value, _: np.minimum(old, value),
        "max": lambda old, value, _: np.maximum(old, value),
        "and": lambda old, value, _: old & value,
        "or": lambda old, value, _: old | value,
        "xor": lambda old, value, _: old ^ value,
        "exch": lambda old, value, _: value,
        "cas": lambda old, value, swapped: np.where(old == value, swapped, old),
        "inc": lambda old, value, _: np.where(old >= value, 0, old + old.dtype.type(1)),
        "dec": lambda old, value, _: np.where(
            (old == 0) | (old > value), value, old - old.dtype.type(1)
        ),
    }[operation]
