"""Finds races, by vector clocks in shared memory and by ownership in global memory.

Memory is divided into granules of the kernel's smallest access. All accesses are aligned to them,
so two accesses overlap if and only if they share a granule.
"""

import numpy as np


class SharedRaces:
    """Orders the accesses of a CTA's warps. Each warp has a clock that a barrier advances, and the
    other warps' clocks as of their last common barrier. Threads of a warp count as in step."""

    def __init__(self, ctas: int, warps: int, size: int, granule: int):
        self.ctas, self.warps, self.granule = ctas, warps, granule
        self.stride = -(-size // granule)
        self.clocks = np.zeros((ctas, warps, warps), np.int32)
        cells = ctas * self.stride
        self.writer = np.zeros(cells, np.int32)
        self.write_clock = np.zeros(cells, np.int32)
        self.write_line = np.zeros(cells, np.int32)
        self.write_atomic = np.zeros(cells, bool)
        self.read_clock = np.zeros((cells, warps), np.int32)
        self._own = np.arange(warps)
        self.reset()

    def reset(self) -> None:
        self.clocks[:] = np.eye(self.warps, dtype=np.int32)
        self.write_clock[:] = 0
        self.read_clock[:] = 0

    def barrier(self, present: np.ndarray) -> None:
        """The warps that are present (CTA, warp) have waited for one another, in every CTA."""
        mask = present[:, :, None]
        common = np.where(mask, self.clocks, 0).max(axis=1, keepdims=True)
        np.copyto(self.clocks, common, where=mask)
        self.clocks[:, self._own, self._own] += present

    def cells(self, ctas: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
        """The granules of the accesses, one row for each."""
        first = offsets // self.granule + ctas * self.stride
        return first[:, None] + np.arange(size // self.granule)

    def access(
        self, cells: np.ndarray, ctas: np.ndarray, warps: np.ndarray, kind: str, line: int
    ) -> tuple[int, str] | None:
        """Record a load, store or atomic; return the row of `cells` and text of a conflict."""
        row = ctas * self.warps + warps
        known = self.clocks.reshape(-1, self.warps)[row]
        writer = self.writer.take(cells)
        unordered = self.write_clock.take(cells) > self.clocks.take(
            (row * self.warps)[:, None] + writer
        )
        if kind == "atomic":
            unordered &= ~self.write_atomic.take(cells)
        if unordered.any():
            i, j = np.argwhere(unordered)[0]
            text = f"{kind} by warp {warps[i]}, write by warp {writer[i, j]} at PTX line "
            return int(i), text + f"{self.write_line[cells[i, j]]}, and no barrier between them"
        own = known[np.arange(len(row)), warps][:, None]
        if kind == "load":
            self.read_clock[cells, warps[:, None]] = own
            return None
        unordered = self.read_clock.take(cells, axis=0) > known[:, None]
        if unordered.any():
            i, _, reader = np.argwhere(unordered)[0]
            text = f"{kind} by warp {warps[i]}, earlier read by warp {reader}"
            return int(i), text + ", and no barrier between them"
        self.writer[cells] = warps[:, None]
        self.write_clock[cells] = own
        self.write_line[cells] = line
        self.write_atomic[cells] = kind == "atomic"
        return None

    def overwritten(self, cells: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Rows of the last recorded store that another warp overwrote in the same instruction."""
        return (self.writer[cells] != warps[:, None]).any(axis=1)


class GlobalRaces:
    """CTAs of a launch are never ordered: no two may access a granule if one of them writes.

    Atomics may meet one another, but no plain access.
    """

    MANY = -1

    def __init__(self, size: int, granule: int, origin: int):
        self.granule, self.origin = granule, origin // granule
        cells = -(-(size + origin % granule) // granule)
        self.writer = np.zeros(cells, np.int32)  # CTA + 1, negative for an atomic
        self.reader = np.zeros(cells, np.int32)  # CTA + 1, or MANY
        self.any_written = False

    def access(
        self, addresses: np.ndarray, size: int, ctas: np.ndarray, kind: str
    ) -> tuple[int, str] | None:
        several = max(1, size // self.granule)
        cell = addresses // self.granule - self.origin
        cta = ctas + 1
        if several > 1:
            cell = (cell[:, None] + np.arange(several)).reshape(-1)
            cta = np.repeat(cta, several)
        if self.any_written:
            writer = self.writer[cell]
            conflict = (writer != 0) & (np.abs(writer) != cta)
            if kind == "atomic":
                conflict &= writer > 0
            if conflict.any():
                i = int(np.argmax(conflict))
                other = abs(int(writer[i])) - 1
                return i // several, f"{kind} by CTA {cta[i] - 1}, earlier write by CTA {other}"
        reader = self.reader[cell]
        if kind == "load":
            now = np.where((reader == 0) | (reader == cta), cta, self.MANY)
            self.reader[cell] = now
            # If several CTAs read in one instruction, only the last is recorded: make it MANY.
            lost = self.reader[cell] != now
            if lost.any():
                self.reader[cell[lost]] = self.MANY
            return None
        conflict = (reader != 0) & (reader != cta)
        if conflict.any():
            i = int(np.argmax(conflict))
            other = "others" if reader[i] == self.MANY else f"CTA {reader[i] - 1}"
            return i // several, f"{kind} by CTA {cta[i] - 1}, earlier read by {other}"
        self.any_written = True
        if kind == "atomic":
            self.writer[cell] = -cta
            return None
        self.writer[cell] = cta
        conflict = self.writer[cell] != cta
        if conflict.any():
            i = int(np.argmax(conflict))
            other = self.writer[cell[i]] - 1
            return i // several, f"the same store by CTA {cta[i] - 1} and CTA {other}"
        return None
