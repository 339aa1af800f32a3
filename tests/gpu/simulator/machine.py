"""The machine: a batch of CTAs with registers and memories, and the prepared kernel."""

from collections import Counter

import numpy as np

from . import bits, conversions, copies, floats, integers, loads, matrix, moves, warps, wgmma  # noqa: F401
from .access import Accesses, Granules, Options
from .errors import SimulationError, Unsupported
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BITS, GlobalMemory
from .operands import Operands
from .ptx import Instruction, Kernel, elements
from .scheduler import CONTROL, WARP, Scheduler
from .steps import BINDERS, Mask, Step


class Machine:
    """Executes a kernel for batches of CTAs of one grid."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: np.ndarray,
        memory: GlobalMemory,
        *,
        batch: int,
        dynamic_shared: int,
        options: Options,
    ):
        self.kernel, self.parameters, self.options = kernel, parameters, options
        self.grid, self.block, self.ctas = grid, block, batch
        self.grid_size = int(np.prod(grid))
        self.block_size = int(np.prod(block))
        limit, size = kernel.block_limit, self.block_size
        if limit and (size > limit or (kernel.block_exact and size != limit)):
            raise SimulationError(f"{kernel.name}: is compiled for {limit} threads, not {size}")
        self.warps_per_cta = -(-self.block_size // WARP)
        padded = self.warps_per_cta * WARP  # the missing threads of the last warp never run
        self.threads = batch * padded
        self.warps = self.threads // WARP
        index = np.arange(self.threads)
        self.cta, self.thread = index // padded, index % padded
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        self.cta_number = np.zeros(self.threads, np.int64)
        self.exists = self.thread < self.block_size

        static = kernel.shared.size
        dynamic = -(-static // 1024) * 1024 if dynamic_shared else static
        self.accesses = Accesses(
            self, memory, dynamic + dynamic_shared, kernel.local.size, smallest_accesses(kernel)
        )
        symbols = {**kernel.shared.offsets, **kernel.local.offsets}
        symbols.update(dict.fromkeys(kernel.dynamic_shared, dynamic))
        for name, data in kernel.constants.items():
            symbols[name] = memory.add(data.copy(), name).base
        symbols.update({one.name: one.offset for one in kernel.parameters})
        self.operands = Operands(kernel, self.threads, symbols)
        self._special_registers(dynamic_shared)
        self.windows = {
            "shared": SHARED_WINDOW << WINDOW_BITS,
            "local": LOCAL_WINDOW << WINDOW_BITS,
            "param": PARAM_WINDOW << WINDOW_BITS,
        }

        self.executed = [0] * len(kernel.instructions)
        self.copies = copies.Copies(self)
        self.products = wgmma.Products(self)
        self.steps = [self._at_first(i, one) for i, one in enumerate(kernel.instructions)]

    # ---- for the instructions

    def fail(self, instruction: Instruction, text: str, mask: Mask = True) -> None:
        """Raise a finding that names the first thread of the mask."""
        lanes = np.flatnonzero(np.broadcast_to(mask, self.threads))
        where = f"PTX line {instruction.line}"
        if instruction.source:
            where += f", {instruction.source}"
        thread = ""
        if lanes.size:
            first = lanes[0]
            thread = f"; CTA {self._cta_name(first)} thread {self.thread[first]}"
            thread += f" and {lanes.size - 1} more" if lanes.size > 1 else ""
        shown = str(instruction)
        shown = shown if len(shown) < 120 else f"{shown[:117]}..."
        raise SimulationError(f"{self.kernel.name}: {text} ({where}: {shown}{thread})")

    def one(self, mask: Mask, index: int) -> np.ndarray:
        """A mask with only the index-th thread of a mask."""
        chosen = np.zeros(self.threads, bool)
        chosen[index if mask is True else np.flatnonzero(mask)[index]] = True
        return chosen

    def active(self, mask: Mask) -> np.ndarray:
        return np.ones(self.threads, bool) if mask is True else mask

    def count_warps(self, mask: Mask) -> int:
        if mask is True:
            return self.warps
        return int(np.count_nonzero(mask.reshape(-1, WARP).any(axis=1)))

    def require_whole_warps(self, instruction: Instruction, mask: Mask) -> None:
        if mask is not True:
            rows = mask.reshape(-1, WARP)
            partly = rows.any(axis=1) & ~rows.all(axis=1)
            if partly.any():
                bad = np.repeat(partly, WARP) & mask
                self.fail(instruction, "warp-wide instruction in a partly active warp", bad)

    # ---- preparation

    def _cta_name(self, thread: int) -> str:
        number, (width, height, _) = int(self.cta_number[thread]), self.grid
        return f"({number % width}, {number // width % height}, {number // (width * height)})"

    def _special_registers(self, dynamic_shared: int) -> None:
        special = self.operands.special

        def define(name: str, value) -> None:
            special[name] = np.broadcast_to(value, self.threads).astype(np.uint32)

        x, y, _ = self.block
        for axis, values in zip(
            "xyz", (self.thread % x, self.thread // x % y, self.thread // (x * y)), strict=True
        ):
            define(f"%tid.{axis}", values)
        for i, axis in enumerate("xyz"):
            define(f"%ctaid.{axis}", 0)
            define(f"%ntid.{axis}", self.block[i])
            define(f"%nctaid.{axis}", self.grid[i])
            define(f"%clusterid.{axis}", 0)
            define(f"%cluster_ctaid.{axis}", 0)
            define(f"%cluster_nctaid.{axis}", 1)
        for name in ("%cluster_ctarank", "%smid", "%clock"):
            define(name, 0)
        for name in ("%clock64", "%globaltimer"):
            special[name] = np.zeros(self.threads, np.uint64)
        define("%cluster_nctarank", 1)
        define("%nsmid", 1)
        define("%laneid", self.lane)
        define("%warpid", self.warp)
        define("%dynamic_smem_size", dynamic_shared)
        special["%is_explicit_cluster"] = np.zeros(self.threads, bool)
        bit = 1 << self.lane
        define("%lanemask_eq", bit)
        define("%lanemask_lt", bit - 1)
        define("%lanemask_le", 2 * bit - 1)
        define("%lanemask_gt", 0x1_0000_0000 - 2 * bit)
        define("%lanemask_ge", 0x1_0000_0000 - bit)

    def _at_first(self, index: int, instruction: Instruction) -> Step | None:
        """Prepare an instruction when it is first reached: many never are.

        None for control flow, which the scheduler handles.
        """
        if instruction.opcode in CONTROL:
            return None

        def first(mask: Mask) -> None:
            step = self.steps[index] = self._prepare(instruction)
            step(mask)

        return first

    def _prepare(self, instruction: Instruction) -> Step:
        """The function that executes an instruction."""
        try:
            binder = BINDERS.get(instruction.opcode)
            if binder is None:
                raise Unsupported(f"opcode {instruction.opcode}")
            step = binder(self, instruction)
        except (Unsupported, KeyError, IndexError, ValueError, StopIteration) as reason:
            return self._refuse(instruction, f"not supported: {reason}")
        prologue = self.operands.take_prologue()
        if prologue:
            step = _after(prologue, step)
        return self._guarded(instruction, step) if instruction.guard else step

    def _refuse(self, instruction: Instruction, text: str) -> Step:
        # Only when it is reached: a kernel may contain instructions that a launch never executes.
        return lambda mask: self.fail(instruction, text, mask)

    def _guarded(self, instruction: Instruction, step: Step) -> Step:
        name, negated = instruction.guard
        predicate = self.operands.read(name, "pred")
        choose = np.greater if negated else np.logical_and  # mask > predicate: active and not set

        def guarded(mask: Mask) -> None:
            chosen = choose(mask, predicate)
            count = np.count_nonzero(chosen)
            if count == self.threads:
                step(True)
            elif count:
                step(chosen)

        return guarded

    # ---- execution

    def run(self, first: int, count: int) -> None:
        """Execute `count` CTAs of the grid from `first` on; the batch has room for them."""
        width, height, _ = self.grid
        number = first + self.cta
        self.cta_number[:] = number
        values = (number % width, number // width % height, number // (width * height))
        for axis, value in zip("xyz", values, strict=True):
            self.operands.special[f"%ctaid.{axis}"][:] = value
            self.operands.special[f"%clusterid.{axis}"][:] = value
        self.accesses.reset()
        self.copies.reset()
        self.products.reset()
        Scheduler(self, self.exists & (self.cta < count)).run()
        self.copies.finish()
        self.products.finish()

    def close(self) -> None:
        """Free the memories now: reference cycles would keep them."""
        vars(self).clear()

    # ---- counts

    def counts(self) -> Counter[str]:
        """Executed warp instructions by opcode, some of them by variant."""
        counts: Counter[str] = Counter()
        for instruction, number in zip(self.kernel.instructions, self.executed, strict=True):
            counts[_count_name(instruction)] += number
        return +counts

    def line_counts(self) -> Counter[int]:
        """The same by line of the PTX."""
        counts: Counter[int] = Counter()
        for instruction, number in zip(self.kernel.instructions, self.executed, strict=True):
            counts[instruction.line] += number
        return +counts


_COUNTED_BY_VARIANT = {"ld", "st", "mma", "cp", "bar", "shfl", "atom", "red"}


def _count_name(instruction: Instruction) -> str:
    if instruction.opcode not in _COUNTED_BY_VARIANT:
        return instruction.opcode
    variant = [one for one in instruction.modifiers if one not in ("sync", "aligned")]
    return ".".join((instruction.opcode, *variant))


def _after(prologue: list, step: Step) -> Step:
    def both(mask: Mask) -> None:
        for action in prologue:
            action()
        step(mask)

    return both


def smallest_accesses(kernel: Kernel) -> Granules:
    """The sizes of the kernel's smallest accesses to shared and global memory, at most 16."""
    shared = device = 16
    for instruction in kernel.instructions:
        size = _access_size(instruction)
        spaces = [modifier.split("::")[0] for modifier in instruction.modifiers]
        if size and not {"param", "local", "const"} & set(spaces):
            if "global" not in spaces or "shared" in spaces:
                shared = min(shared, size)
            if "shared" not in spaces or "global" in spaces:
                device = min(device, size)
    return Granules(shared, device)


def _access_size(instruction: Instruction) -> int:
    if instruction.opcode == "cp" and len(instruction.operands) > 2:
        return int(instruction.operands[2], 0)
    if instruction.opcode not in ("ld", "ldu", "st", "atom", "red"):
        return 0
    vector = instruction.operands[1 if instruction.opcode in ("st", "red") else 0]
    return loads.width(instruction) * len(elements(vector))
