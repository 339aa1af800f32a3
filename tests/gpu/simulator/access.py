"""Every memory access passes through here, to be checked for bounds and races, and counted."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import traffic
from .memory import (
    FIRST_BUFFER,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    POISON,
    SHARED_WINDOW,
    WINDOW_BITS,
    Buffer,
    GlobalMemory,
    PrivateMemory,
)
from .ptx import Instruction
from .races import GlobalRaces, SharedRaces
from .steps import Mask

_OFFSET = (1 << WINDOW_BITS) - 1


class Place(NamedTuple):
    """The target of an access: cells of some width, and each thread's index among them."""

    memory: Buffer | PrivateMemory
    positions: np.ndarray
    mask: Mask

    def cells(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        shift = width.bit_length() - 1
        if isinstance(self.memory, PrivateMemory):
            return self.memory.cells(width), self.positions >> shift
        cells, origin = self.memory.cells(width)
        return cells, (self.positions - origin) >> shift


class Options(NamedTuple):
    races: bool = True  # look for races in shared memory, and between CTAs in global memory
    statistics: bool = True  # count sectors and wavefronts


class Granules(NamedTuple):
    """The smallest accesses of a kernel, in bytes."""

    shared: int
    device: int


class Accesses:
    """The memories of a batch of CTAs, and the checks of accesses to them."""

    def __init__(self, machine, memory: GlobalMemory, shared: int, local: int, granules: Granules):
        self.machine, self.memory, self.options = machine, memory, machine.options
        self.shared = PrivateMemory(machine.ctas, shared)
        self.local = PrivateMemory(machine.threads, local)
        self._shared_base = machine.cta * self.shared.stride
        self._local_base = np.arange(machine.threads) * self.local.stride
        self._parameters = PrivateMemory(1, machine.parameters.size)
        self._parameters.data[: machine.parameters.size] = machine.parameters
        self.traffic: Counter[str] = Counter()
        self.granules = granules
        self.shared_races: SharedRaces | None = None
        if self.options.races and machine.warps_per_cta > 1:
            self.shared_races = SharedRaces(
                machine.ctas, machine.warps_per_cta, self.shared.stride, granules.shared
            )
        self.global_races: dict[int, GlobalRaces] | None = None
        if self.options.races and machine.grid_size > 1:
            self.global_races = {}
        self.pending = np.zeros(machine.ctas * self.shared.stride // granules.shared, bool)
        self.copies_on_their_way = False

    def reset(self) -> None:
        for private in (self.shared, self.local):
            private.data.fill(POISON)
        if self.shared_races:
            self.shared_races.reset()
        self.pending[:] = False

    def places(
        self,
        instruction: Instruction,
        space: str,
        addresses: np.ndarray,
        size: int,
        mask: Mask,
        kind: str,
        *,
        ordered: bool = False,
        alignment: int | None = None,
    ) -> Iterator[Place]:
        """Check an access and yield its targets: one, rarely several.

        `kind` is load, store or atomic. An `ordered` access (acquire, relaxed, volatile) does not
        race with other CTAs' atomics.
        """
        active = addresses if mask is True else addresses[mask]
        if not active.size:
            return
        bits = int(np.bitwise_or.reduce(active))
        if bits & ((alignment or size) - 1):
            bad = (addresses & ((alignment or size) - 1) != 0) & mask
            self.machine.fail(instruction, f"misaligned {kind} of {size} bytes", bad)
        if space == "shared":
            yield self._shared(instruction, addresses, active, size, mask, kind)
        elif space == "local":
            yield self._local(instruction, addresses, active, size, mask, kind)
        elif space == "param":
            yield self._param(instruction, addresses, active, size, mask, kind)
        else:
            windows = active >> WINDOW_BITS
            first, last = int(windows.min()), int(windows.max())
            if first != last:
                addresses = addresses.copy()  # the first part of a load may change their register
            for window in [first] if first == last else np.unique(windows).tolist():
                part, subset = mask, active
                if first != last:
                    part = (addresses >> WINDOW_BITS == window) & mask
                    subset = addresses[part]
                if window == SHARED_WINDOW and space == "":
                    offsets = addresses & _OFFSET
                    yield self._shared(instruction, offsets, subset & _OFFSET, size, part, kind)
                elif window == LOCAL_WINDOW and space == "":
                    offsets = addresses & _OFFSET
                    yield self._local(instruction, offsets, subset & _OFFSET, size, part, kind)
                elif window == PARAM_WINDOW and space == "":
                    offsets = addresses & _OFFSET
                    yield self._param(instruction, offsets, subset & _OFFSET, size, part, kind)
                else:
                    yield self._global(
                        instruction, addresses, subset, size, part, kind, window, ordered
                    )

    # ---- global

    def _global(self, instruction, addresses, active, size, mask, kind, window, ordered) -> Place:
        buffer = self.memory.buffers.get(window)
        if buffer is None or active.min() < buffer.base or active.max() + size > buffer.end:
            self._out_of_bounds(instruction, addresses, size, mask, kind, buffer, window)
        if self.global_races is not None and not (ordered and kind == "load"):
            ctas = self.machine.cta_number if mask is True else self.machine.cta_number[mask]
            races = self.global_races.get(window)
            if races is None:
                races = GlobalRaces(buffer.data.size, self.granules.device, buffer.base)
                self.global_races[window] = races
            # An ordered store counts as an atomic.
            found = races.access(active, size, ctas, "atomic" if ordered else kind)
            if found:
                text = f"race between CTAs in {buffer.name!r}: {found[1]}"
                self.machine.fail(instruction, text, self.machine.one(mask, found[0]))
        if self.options.statistics:
            self.traffic[f"{kind}_sectors"] += traffic.sectors(addresses, mask)
            self.traffic[f"{kind}_bytes"] += active.size * size
            self.traffic[f"{kind}_requests"] += self.machine.count_warps(mask)
        return Place(buffer, addresses, mask)

    def _out_of_bounds(self, instruction, addresses, size, mask, kind, buffer, window) -> None:
        text = f"out-of-bounds global {kind} of {size} bytes"
        if buffer is None:
            bad = (addresses >> WINDOW_BITS == window) & mask
            text += " through a null pointer" if window == 0 else ""
            # Stepping over either end of a 64 GiB window leads into an arbitrary neighbour's.
            text += " far from every tensor" if window >= FIRST_BUFFER else ""
        else:
            bad = ((addresses < buffer.base) | (addresses + size > buffer.end)) & mask
            offset = int(addresses[bad][0]) - buffer.base
            text += f" at byte {offset} of {buffer.name!r}, whose storage has {buffer.data.size}"
        self.machine.fail(instruction, text, bad)

    # ---- shared

    def _shared(self, instruction, offsets, active, size, mask, kind) -> Place:
        if active.min() < 0 or active.max() + size > self.shared.size:
            bad = ((offsets < 0) | (offsets + size > self.shared.size)) & mask
            text = f"out-of-bounds shared {kind} of {size} bytes at {int(offsets[bad][0])}"
            self.machine.fail(instruction, f"{text} of {self.shared.size}", bad)
        if self.copies_on_their_way and kind == "load":
            self._not_pending(instruction, offsets, size, mask)
        if self.shared_races:
            self.race(instruction, offsets, size, mask, kind)
        if self.options.statistics:
            turns, ideal = traffic.wavefronts(offsets, size, mask)
            self.traffic[f"smem_{kind}_wavefronts"] += turns
            self.traffic[f"smem_{kind}_ideal"] += ideal
        return Place(self.shared, offsets + self._shared_base, mask)

    def race(
        self, instruction: Instruction, offsets: np.ndarray, size: int, mask: Mask, kind: str
    ) -> None:
        """Fail if two warps access the same shared memory without a barrier in between."""
        races, machine = self.shared_races, self.machine
        if races is None:
            return
        ctas, warps = machine.cta, machine.warp
        if mask is not True:
            offsets, ctas, warps = offsets[mask], ctas[mask], warps[mask]
        cells = races.cells(ctas, offsets, size)
        found = races.access(cells, ctas, warps, kind, instruction.line)
        if found:
            lane = machine.one(mask, found[0])
            machine.fail(instruction, f"shared-memory race: {found[1]}", lane)

    def overwritten(self, offsets: np.ndarray, size: int, mask: Mask) -> np.ndarray | None:
        """Threads whose store was overwritten by another warp in the same instruction."""
        races, machine = self.shared_races, self.machine
        if races is None:
            return None
        lanes = np.arange(machine.threads) if mask is True else np.flatnonzero(mask)
        cells = races.cells(machine.cta[lanes], offsets[lanes], size)
        lost = races.overwritten(cells, machine.warp[lanes])
        return lanes[lost] if lost.any() else None

    def set_pending(self, offsets: np.ndarray, size: int, lanes: np.ndarray, value: bool) -> None:
        """Mark the shared memory that an asynchronous copy will fill, or has filled."""
        self.pending[self._pending_cells(offsets[lanes], size, lanes)] = value

    def _not_pending(self, instruction, offsets, size, mask) -> None:
        lanes = np.arange(self.machine.threads) if mask is True else np.flatnonzero(mask)
        early = self.pending[self._pending_cells(offsets[lanes], size, lanes)].any(axis=1)
        if early.any():
            bad = self.machine.one(mask, int(np.argmax(early)))
            self.machine.fail(instruction, "cp.async's target read before the copy's wait", bad)

    def _pending_cells(self, offsets, size, lanes) -> np.ndarray:
        first = (offsets + self._shared_base[lanes]) // self.granules.shared
        return first[:, None] + np.arange(size // self.granules.shared)

    # ---- local

    def _local(self, instruction, offsets, active, size, mask, kind) -> Place:
        if active.min() < 0 or active.max() + size > self.local.size:
            bad = ((offsets < 0) | (offsets + size > self.local.size)) & mask
            self.machine.fail(instruction, f"out-of-bounds local {kind}", bad)
        if self.options.statistics:
            self.traffic[f"local_{kind}"] += active.size
        return Place(self.local, offsets + self._local_base, mask)

    # ---- parameters

    def _param(self, instruction, offsets, active, size, mask, kind) -> Place:
        """Loads at addresses in the parameters that are computed at run time."""
        if kind != "load":
            self.machine.fail(instruction, f"{kind} to the kernel's parameters", mask)
        if active.min() < 0 or active.max() + size > self.machine.parameters.size:
            bad = ((offsets < 0) | (offsets + size > self.machine.parameters.size)) & mask
            self.machine.fail(instruction, "load beyond the kernel's parameters", bad)
        return Place(self._parameters, offsets, mask)
