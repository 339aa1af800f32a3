"""cp.async. A copy happens as late as possible: when its thread waits for its group. Until then its
target is poisoned and must not be read."""

from dataclasses import dataclass

import numpy as np

from .errors import Unsupported
from .memory import POISON, Buffer
from .operands import integer
from .ptx import Instruction
from .steps import Mask, Step, executes


@dataclass(slots=True)
class Copy:
    """Copies of one instruction that some threads have not waited for yet."""

    instruction: Instruction
    size: int
    waiting: np.ndarray  # threads
    group: np.ndarray  # of each thread
    offsets: np.ndarray  # into the CTA's shared memory
    sources: list[tuple[Buffer, np.ndarray, np.ndarray]]  # with addresses, and threads
    lengths: np.ndarray  # bytes to copy; the rest becomes zero


class Copies:
    """The pending copies, and each thread's number of committed groups."""

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.threads, np.int64)
        self.under_way: list[Copy] = []

    def reset(self) -> None:
        self.committed[:] = 0
        self.under_way.clear()
        self.machine.accesses.copies_on_their_way = False

    def start(self, copy: Copy) -> None:
        accesses = self.machine.accesses
        lanes = np.flatnonzero(copy.waiting)
        self._targets(copy.size)[self._rows(copy, lanes)] = POISON
        accesses.set_pending(copy.offsets, copy.size, lanes, True)
        accesses.copies_on_their_way = True
        self.under_way.append(copy)

    def wait(self, mask: Mask, allowed: int) -> None:
        """Complete the threads' groups except for the last `allowed` ones."""
        for copy in self.under_way:
            done = copy.waiting & (copy.group < self.committed - allowed) & mask
            if done.any():
                accesses, instruction = self.machine.accesses, copy.instruction
                accesses.race(instruction, copy.offsets, copy.size, done, "store")
                self._perform(copy, done)
                accesses.set_pending(copy.offsets, copy.size, np.flatnonzero(done), False)
                copy.waiting &= ~done
        self.under_way = [copy for copy in self.under_way if copy.waiting.any()]
        self.machine.accesses.copies_on_their_way = bool(self.under_way)

    def finish(self) -> None:
        for copy in self.under_way:
            self.machine.fail(copy.instruction, "cp.async never waited for", copy.waiting)

    def _targets(self, size: int) -> np.ndarray:
        return self.machine.accesses.shared.data.reshape(-1, size)

    def _rows(self, copy: Copy, lanes: np.ndarray) -> np.ndarray:
        base = self.machine.cta[lanes] * self.machine.accesses.shared.stride
        return (copy.offsets[lanes] + base) // copy.size

    def _perform(self, copy: Copy, threads: np.ndarray) -> None:
        targets, size = self._targets(copy.size), copy.size
        short = np.flatnonzero(threads & (copy.lengths < size))
        targets[self._rows(copy, short)] = 0
        for buffer, addresses, part in copy.sources:
            data, origin = buffer.rows(size)
            whole = np.flatnonzero(part & threads & (copy.lengths == size))
            targets[self._rows(copy, whole)] = data[(addresses[whole] - origin) // size]
            # Most short copies copy nothing; handle the few others one by one.
            for lane in np.flatnonzero(part & threads & (copy.lengths < size)):
                start, length = addresses[lane] - buffer.base, copy.lengths[lane]
                row = self._rows(copy, lane)
                targets[row, :length] = buffer.data[start : start + length]


@executes("cp")
def _cp(machine, instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    if "bulk" in modifiers or modifiers[0] != "async" or any("mbarrier" in m for m in modifiers):
        raise Unsupported(f"opcode {instruction.name}")
    copies = machine.copies
    if "commit_group" in modifiers:

        def commit(mask: Mask) -> None:
            copies.committed += mask

        return commit
    if "wait_group" in modifiers:
        allowed = integer(instruction.operands[0])
        return lambda mask: copies.wait(mask, allowed)
    if "wait_all" in modifiers:
        return lambda mask: copies.wait(mask, -1)  # uncommitted copies as well
    return _start(machine, instruction)


def _start(machine, instruction: Instruction) -> Step:
    operands, accesses = machine.operands, machine.accesses
    target, source = (operands.address(one) for one in instruction.operands[:2])
    size = integer(instruction.operands[2])
    length = None
    # A fourth operand of 64 bits is a cache policy.
    if len(instruction.operands) > 3:
        name = instruction.operands[3]
        if operands.constant(name) is not None or operands.rows[name].itemsize == 4:
            length = operands.read(name, "u32")

    def step(mask: Mask) -> None:
        offsets, addresses = target().copy(), source().copy()
        active = machine.active(mask).copy()
        lengths = np.full(machine.threads, size) if length is None else length.astype(np.int64)
        if length is not None and (lengths > size)[active].any():
            bad = (lengths > size) & active
            machine.fail(instruction, "cp.async copies more than its size", bad)
        for _ in accesses.places(instruction, "shared", offsets, size, mask, "store"):
            pass
        sources = []
        for count in np.unique(lengths[active]):
            if count:
                part = active & (lengths == count)
                part = True if part.all() else part
                for place in accesses.places(
                    instruction, "global", addresses, int(count), part, "load", alignment=size
                ):
                    sources.append((place.memory, addresses, machine.active(place.mask)))
        group = machine.copies.committed.copy()
        copy = Copy(instruction, size, active, group, offsets, sources, lengths)
        machine.copies.start(copy)

    return step
