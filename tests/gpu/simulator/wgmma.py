"""wgmma.mma_async: a product of matrices in shared memory, by the four warps of a warpgroup.

It is computed when it is issued, but counts as reading its operands until the warps wait for it. A
descriptor locates a matrix: its start, the strides between its 8-row blocks, and the permutation of
the 16-byte chunks of its rows.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .formats import decoder
from .matrix import Fragment, first_factor, shape
from .operands import integer
from .ptx import Instruction, elements
from .steps import Mask, Step, executes

_THREADS = 128
_WIDTH = {"f16": 2, "bf16": 2, "tf32": 4}
_ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # by swizzle mode
_SWIZZLE_BITS = {1: 7, 2: 3, 3: 1}


@lru_cache(maxsize=1024)
def _addresses(descriptor: int, rows: int, inner: int, width: int, transposed: bool) -> np.ndarray:
    """The position in shared memory, in bytes, of each element (row, inner index)."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    r, k = np.arange(rows)[:, None], np.arange(inner)[None, :]
    row_bytes = _ROW_BYTES[mode]
    per_row = row_bytes // width
    if not transposed:  # the inner dimension is contiguous
        offset = r % 8 * row_bytes + r // 8 * stride
        offset = offset + (k % per_row * width + k // per_row * leading if mode == 0 else k * width)
    elif mode == 0:
        offset = r % per_row * width + r // per_row * stride + k % 8 * 16 + k // 8 * leading
    else:
        offset = r % per_row * width + r // per_row * leading + k % 8 * row_bytes + k // 8 * stride
    places = start + offset
    if mode:
        places ^= (places >> 7 & _SWIZZLE_BITS[mode]) << 4
    return places


class _SharedMatrix:
    """An operand in shared memory, given by a descriptor."""

    def __init__(self, machine, instruction: Instruction, name: str, size, width, transposed):
        self.machine, self.instruction = machine, instruction
        self.descriptor = machine.operands.read(name, "b64").reshape(-1, _THREADS)
        self.size, self.width, self.transposed = size, width, transposed

    def values(self, groups: np.ndarray) -> np.ndarray:
        """The bits of the matrices of these warpgroups."""
        machine, accesses = self.machine, self.machine.accesses
        given = self.descriptor[groups]
        ctas = machine.cta.reshape(-1, _THREADS)[groups, 0]
        if (given != given[:, :1]).any():
            machine.fail(self.instruction, "the descriptor differs inside a warpgroup")
        cells = accesses.shared.cells(self.width).reshape(machine.ctas, -1)
        result = np.empty((len(groups), *self.size), cells.dtype)
        for descriptor in np.unique(given[:, 0]).tolist():
            rows = np.flatnonzero(given[:, 0] == descriptor)
            places = _addresses(descriptor, *self.size, self.width, self.transposed)
            if places.max() + self.width > accesses.shared.size:
                machine.fail(self.instruction, "wgmma operand outside shared memory")
            result[rows] = cells[ctas[rows][:, None, None], places // self.width]
            machine.products.read(self.instruction, groups[rows], places)
        return result


class _Reading(NamedTuple):
    """Pending reads of warpgroups: one row for each warp and granule."""

    instruction: Instruction
    cells: np.ndarray
    threads: np.ndarray  # the first thread of the reading warp
    number: np.ndarray  # the number of the commit group


class Products:
    """The pending products, and each warpgroup's number of committed groups."""

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(-(-machine.threads // _THREADS), np.int64)
        self.under_way: list[_Reading] = []
        # For each warpgroup, the last group with a product, and the last one waited for.
        self.issued, self.complete = np.zeros((2, len(self.committed)), np.int64)
        self.last: Instruction | None = None

    def reset(self) -> None:
        self.under_way.clear()
        for counts in (self.committed, self.issued, self.complete):
            counts[:] = 0

    def read(self, instruction: Instruction, groups: np.ndarray, places: np.ndarray) -> None:
        """Record that every warp of the warpgroups reads these bytes of shared memory."""
        machine, accesses = self.machine, self.machine.accesses
        self.issued[groups], self.last = self.committed[groups] + 1, instruction
        granule = accesses.granules.shared
        offsets = np.unique(places // granule) * granule
        first = groups * _THREADS
        if accesses.copies_on_their_way:
            base = machine.cta[first][:, None] * accesses.shared.stride
            if accesses.pending[(offsets + base) // granule].any():
                machine.fail(instruction, "cp.async's target read before the copy's wait")
        if accesses.shared_races:
            warps = (first[:, None] + np.arange(0, _THREADS, 32)).reshape(-1)
            threads = np.repeat(warps, len(offsets))
            cells = accesses.shared_races.cells(
                machine.cta[threads], np.tile(offsets, len(warps)), granule
            )
            reading = _Reading(instruction, cells, threads, self.committed[threads // _THREADS])
            self._record(reading)
            self.under_way.append(reading)

    def commit(self, mask: Mask) -> None:
        self.committed += self._groups(mask)

    def wait(self, mask: Mask, allowed: int) -> None:
        """Record the reads of all groups but the last `allowed` ones as happening now."""
        waiting, remaining = self._groups(mask), []
        np.maximum(self.complete, self.committed - allowed, out=self.complete, where=waiting)
        for reading in self.under_way:
            group = reading.threads // _THREADS
            done = waiting[group] & (reading.number < self.committed[group] - allowed)
            if done.any():
                self._record(_Reading(reading.instruction, *(one[done] for one in reading[1:])))
            if not done.all():
                remaining.append(
                    _Reading(reading.instruction, *(one[~done] for one in reading[1:]))
                )
        self.under_way = remaining

    def finish(self) -> None:
        late = np.repeat(self.issued > self.complete, _THREADS)
        if late.any():
            self.machine.fail(self.last, "wgmma never waited for", late[: self.machine.threads])

    def _groups(self, mask: Mask) -> np.ndarray:
        return self.machine.active(mask).reshape(-1, _THREADS).all(axis=1)

    def _record(self, reading: _Reading) -> None:
        machine, threads = self.machine, reading.threads
        found = machine.accesses.shared_races.access(
            reading.cells,
            machine.cta[threads],
            machine.warp[threads],
            "load",
            reading.instruction.line,
        )
        if found:
            mask = np.zeros(machine.threads, bool)
            mask[threads[found[0]]] = True
            machine.fail(reading.instruction, f"shared-memory race: {found[1]}", mask)


@executes("wgmma")
def _wgmma(machine, instruction: Instruction) -> Step:
    kind = instruction.modifiers[0]
    if kind == "fence":
        return lambda mask: None  # orders registers, which are read and written immediately here
    if machine.threads % _THREADS or machine.warps_per_cta % 4:
        raise Unsupported("wgmma without whole warpgroups")
    if kind == "commit_group":
        return machine.products.commit
    if kind == "wait_group":
        allowed = integer(instruction.operands[0])
        return lambda mask: machine.products.wait(mask, allowed)
    types = instruction.types
    if len(types) != 3 or types[0] != "f32" or types[1] not in _WIDTH or types[1] != types[2]:
        raise Unsupported(f"opcode {instruction.name}")
    _, columns, inner = shape(instruction)
    width = _WIDTH[types[1]]
    operands = machine.operands
    destination, first, second, scale = instruction.operands[:4]
    flags = [integer(one) for one in instruction.operands[4:]]
    sign = (flags[0] if flags else 1) * (flags[1] if len(flags) > 1 else 1)
    in_registers = first.startswith("{")
    transposed = flags[2:]
    left: Fragment | _SharedMatrix
    if in_registers:
        registers = [operands.read(one, "b32") for one in elements(first)]
        table = first_factor(len(registers), 4 // width)
        left = Fragment(registers, table, width, decoder(types[1]))
    else:
        turned = bool(transposed and transposed[0])
        left = _SharedMatrix(machine, instruction, first, (64, inner), width, turned)
    turned = bool(transposed and transposed[-1])
    right = _SharedMatrix(machine, instruction, second, (columns, inner), width, turned)
    names = elements(destination)
    results = [operands.write(one, "f32") for one in names]
    addends = [operands.read(one, "f32") for one in names]
    accumulate = operands.read(scale, "pred")
    decode = decoder(types[1])
    lane, warp = np.arange(_THREADS) % 32, np.arange(_THREADS) // 32
    places = [
        (16 * warp + lane // 4 + 8 * (i // 2 % 2)) * columns + i // 4 * 8 + lane % 4 * 2 + i % 2
        for i in range(len(results))
    ]

    def step(mask: Mask) -> None:
        active = machine.active(mask).reshape(-1, _THREADS)
        groups = np.flatnonzero(active.all(axis=1))
        if active.any(axis=1).sum() != len(groups):
            machine.fail(instruction, "wgmma with a partly active warpgroup", mask)
        if isinstance(left, Fragment):
            a = left.values().reshape(-1, 64, inner)[groups]
        else:
            a = decode(left.values(groups))
        b = decode(right.values(groups))
        product = np.matmul(
            a.astype(np.float32, copy=False), b.astype(np.float32, copy=False).transpose(0, 2, 1)
        )
        full = np.zeros((len(active), 64 * columns), np.float32)
        full[groups] = sign * product.reshape(len(groups), -1)
        for result, addend, place in zip(results, addends, places, strict=True):
            total = full.take(place, axis=1).reshape(-1)
            np.add(total, addend, out=total, where=accumulate)
            np.copyto(result, total, where=mask)
        machine.accesses.traffic["mma_flops"] += 2 * 64 * columns * inner * len(groups)

    return step
