"""Program counters, branches and barriers.

Threads at the same program counter form a front, which executes an instruction for all of them at
once. The front at the lowest counter runs first, so the two sides of a branch meet where they join,
if the compiler put that below them. Otherwise they meet at the next instruction of whole warps (a
shuffle, a product, __syncwarp), which holds the threads that arrive first.
"""

from typing import NamedTuple

import numpy as np

from .errors import SimulationError
from .ptx import Instruction
from .steps import Mask

CONTROL = {"bra", "brx", "ret", "exit", "bar", "barrier"}
WARP = 32

_LIMIT = 2_000_000  # instructions of a batch; beyond it, the loop is considered endless
_FAIRNESS = 64  # every 64th turn is of the front that waited longest: spin locks end
_COLLECTIVE = {"mma", "ldmatrix", "stmatrix", "shfl", "vote", "wgmma", "redux"}


class Front(NamedTuple):
    """Threads at the same instruction."""

    threads: np.ndarray
    last_run: int  # turn
    held: bool = False  # waiting for other threads of their warps


class Scheduler:
    """Runs a machine's threads from the kernel's first instruction to the end."""

    def __init__(self, machine, alive: np.ndarray):
        self.machine, self.alive = machine, alive
        self.instructions = machine.kernel.instructions
        self.together = [
            one.opcode in _COLLECTIVE or "warp" in one.modifiers for one in self.instructions
        ]
        self.fronts = {0: Front(alive.copy(), 0)}
        self.turn = self.steps = 0
        self.waiting = np.full(machine.threads, -1)  # the barrier of each waiting thread,
        self.wait_position = np.zeros(machine.threads, np.int64)  # its instruction,
        self.wait_needed = np.zeros(
            machine.threads, np.int64
        )  # and the number of threads it waits for; 0: all alive

    def run(self) -> None:
        while self.fronts or self.alive.any():
            if not self.fronts:
                self._deadlock()
            self.turn += 1
            free = [one for one, front in self.fronts.items() if not front.held]
            fair = self.turn % _FAIRNESS == 0 and len(free) > 1
            if fair:
                position = min(free, key=lambda one: self.fronts[one].last_run)
            else:
                position = min(free or self.fronts)
            # If all are held, no other threads will come: the first continues as it is.
            self._advance(position, self.fronts.pop(position).threads, fair, hold=bool(free))
            if self.steps > _LIMIT:
                name = self.machine.kernel.name
                raise SimulationError(f"{name}: too many steps; an endless loop?")

    def _advance(self, position: int, threads: np.ndarray, fair: bool, hold: bool) -> None:
        """Execute a front until it splits, waits, ends or meets another one."""
        machine, executed, steps = self.machine, self.machine.executed, self.machine.steps
        count = np.count_nonzero(threads)
        mask: Mask = True if count == machine.threads else threads
        warps = machine.count_warps(mask)
        stop = min((other for other in self.fronts if other > position), default=-1)
        while position < len(steps):
            step = steps[position]
            if self.together[position]:
                if fair:
                    break  # its warps may still be incomplete
                if hold and mask is not True:
                    threads = self._hold(position, threads)
                    count = np.count_nonzero(threads)
                    if not count:
                        return
                    mask, warps = threads, machine.count_warps(threads)
            hold = True
            executed[position] += warps
            self.steps += 1
            if step is not None:
                step(mask)
                position += 1
                if position == stop:
                    break
                continue
            after = self._control(position, threads)
            if after is None:
                return
            position = after
            if self.fronts or self.steps > _LIMIT:
                break
        if position < len(steps):
            self._join(position, threads)
        else:
            self._exit(threads)

    def _hold(self, position: int, threads: np.ndarray) -> np.ndarray:
        """Hold the threads of incomplete warps. Return the threads that can continue."""
        rows, alive = threads.reshape(-1, WARP), self.alive.reshape(-1, WARP)
        partly = rows.any(axis=1) & (rows != alive).any(axis=1)
        if not partly.any():
            return threads
        held = np.repeat(partly, WARP) & threads
        self.fronts[position] = Front(held, self.turn, held=True)
        return threads & ~held

    def _join(self, position: int, threads: np.ndarray) -> None:
        """Add threads to the front at an instruction."""
        if not threads.any():
            return
        last_run, other = self.turn, self.fronts.get(position)
        if other:
            threads, last_run = threads | other.threads, min(last_run, other.last_run)
        self.fronts[position] = Front(threads, last_run)

    def _control(self, position: int, threads: np.ndarray) -> int | None:
        """Execute control flow. Return the next position if all threads continue together."""
        instruction = self.instructions[position]
        if not instruction.guard:
            return self._obey(instruction, position, threads)
        name, negated = instruction.guard
        predicate = self.machine.operands.read(name, "pred")
        chosen = threads & ~predicate if negated else threads & predicate
        others = threads & ~chosen
        if not chosen.any():
            return position + 1
        if not others.any():
            return self._obey(instruction, position, threads)
        self._join(position + 1, others)
        after = self._obey(instruction, position, chosen)
        if after is not None:
            self._join(after, chosen)
        return None

    def _obey(self, instruction: Instruction, position: int, threads: np.ndarray) -> int | None:
        if instruction.opcode == "bra":
            return self.machine.kernel.labels[instruction.operands[0]]
        if instruction.opcode == "brx":
            return self._choose(instruction, threads)
        if instruction.opcode in ("ret", "exit"):
            self._exit(threads)
            return None
        if "warp" in instruction.modifiers:
            return position + 1  # the threads of a warp are in step
        return self._barrier(instruction, position, threads)

    def _choose(self, instruction: Instruction, threads: np.ndarray) -> int | None:
        """Branch to the target that each thread's index selects."""
        index = self.machine.operands.read(instruction.operands[0], "u32")
        targets = self.machine.kernel.targets[instruction.operands[1]]
        beyond = threads & (index >= len(targets))
        if beyond.any():
            self.machine.fail(instruction, f"beyond the {len(targets)} branch targets", beyond)
        chosen = np.unique(index[threads])
        after = [self.machine.kernel.labels[targets[one]] for one in chosen]
        if len(set(after)) == 1:
            return after[0]
        for one, position in zip(chosen, after, strict=True):
            self._join(position, threads & (index == one))
        return None

    def _exit(self, threads: np.ndarray) -> None:
        self.alive &= ~threads
        # Barriers only wait for threads that are alive.
        if (self.waiting >= 0).any():
            for cta in np.unique(self.machine.cta[threads]):
                self._release(int(cta))

    # ---- barriers

    def _barrier(self, instruction: Instruction, position: int, threads: np.ndarray) -> int | None:
        if {"arrive", "red"} & set(instruction.modifiers):
            self.machine.fail(instruction, "not supported: split or reducing barriers", threads)
        operands = [self.machine.operands.read(one, "u32") for one in instruction.operands]
        if len(operands) < 2 and np.array_equal(threads, self.alive):
            # All threads are here: the common case needs no bookkeeping.
            self._complete(instruction, threads)
            return position + 1
        self.waiting[threads] = operands[0][threads] if operands else 0
        self.wait_position[threads] = position
        self.wait_needed[threads] = operands[1][threads] if len(operands) > 1 else 0
        for cta in np.unique(self.machine.cta[threads]):
            self._release(int(cta))
        return None

    def _release(self, cta: int) -> None:
        """Release the threads of a CTA whose barrier is complete."""
        inside = self.machine.cta == cta
        for barrier in np.unique(self.waiting[inside & (self.waiting >= 0)]):
            here = inside & (self.waiting == barrier)
            needed = self.wait_needed[here].max() or np.count_nonzero(inside & self.alive)
            if np.count_nonzero(here) < needed:
                continue
            positions = np.unique(self.wait_position[here]).tolist()
            instruction = self.instructions[positions[0]]
            if len(positions) > 1:
                lines = ", ".join(str(self.instructions[one].line) for one in positions)
                text = f"divergent barrier: threads meet at different bar.sync, lines {lines}"
                self.machine.fail(instruction, text, here)
            self._complete(instruction, here)
            self.waiting[here] = -1
            self._join(positions[0] + 1, here)

    def _complete(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Order everything these threads did before everything they do next."""
        machine, races = self.machine, self.machine.accesses.shared_races
        rows = threads.reshape(-1, WARP)
        partly = rows.any(axis=1) & (rows != machine.exists.reshape(-1, WARP)).any(axis=1)
        aligned = instruction.opcode == "bar" or "aligned" in instruction.modifiers
        if aligned and partly.any():
            text = "divergent barrier: threads of the same warp never reach it"
            machine.fail(instruction, text, np.repeat(partly, WARP) & threads)
        if races:
            races.barrier(rows.any(axis=1).reshape(machine.ctas, machine.warps_per_cta))

    def _deadlock(self) -> None:
        instruction = self.instructions[int(self.wait_position[self.alive][0])]
        text = "deadlock: a barrier that other threads never reach (divergent barrier)"
        self.machine.fail(instruction, text, self.alive)
