"""A launch: arguments become parameters, the grid is run in batches, counts are added up."""

import re
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from .access import Options
from .errors import SimulationError
from .machine import Machine
from .memory import GlobalMemory
from .ptx import Kernel, Parameter, parse

_BATCH_THREADS = 4096  # in lockstep: many, but their registers should stay in the cache


@dataclass
class Launch:
    """One launch of a kernel.

    `instructions` counts what each warp executed, by opcode, `lines` by the PTX's line. `traffic`
    counts

    - load_, store_ and atomic_{requests,bytes,sectors} of global memory: warp instructions, the
      bytes they move, and the 32-byte sectors they touch;
    - smem_{load,store,atomic}_{wavefronts,ideal}: passes through the banks of shared memory, and
      how many there would be without conflicts;
    - local_{load,store}: accesses of threads to local memory;
    - mma_flops: of all matrix instructions, two for a multiplication and addition.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    asm: dict[str, str | bytes]
    instructions: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)


class SimulatedDevice:
    """What a device of any front end has: its launches, and what it is to look for in them."""

    def __init__(self, execute: bool, edit: Callable[[str], str] | None, options: Options):
        self.execute, self.edit, self.options = execute, edit, options
        self.launches: list[Launch] = []
        self._fresh: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}

    def expect_written(self, *tensors: torch.Tensor) -> None:
        """Counts the storages of these tensors as uninitialised from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            written = np.zeros(storage.nbytes(), bool)
            self._fresh[storage.data_ptr()] = storage, written  # kept: its address stays its own

    def run(self, launch: Launch, threads: int, arguments: "list[Argument]") -> None:
        """Executes a launch's PTX, with the planted bugs."""
        ptx = launch.asm["ptx"]
        ptx = self.edit(ptx) if self.edit else ptx
        written = {pointer: state for pointer, (_, state) in self._fresh.items()}
        kernel = parse(ptx)[launch.name]
        execute(kernel, launch, (threads, 1, 1), arguments, self.options, written)


Argument = tuple[str, Any]  # name and value


@dataclass(frozen=True)
class Structure:
    """A struct passed by value, as the host has it, and the tensors whose addresses it may hold.

    Every 8 aligned bytes that are an address inside a tensor's storage become the one at which the
    kernel sees it. Any other address leads nowhere, which is found if it is used.
    """

    data: bytes
    tensors: Mapping[str, torch.Tensor]  # by name, for the findings' texts

    def encoded(self, memory: GlobalMemory, written: dict[int, np.ndarray]) -> bytes:
        storages = [(name, one.untyped_storage()) for name, one in self.tensors.items()]
        found = sorted(
            [(one.data_ptr(), one.nbytes(), name, one) for name, one in storages if one.nbytes()],
            key=itemgetter(0),
        )
        starts = [start for start, *_ in found]
        whole = len(self.data) // 8 * 8
        words = np.frombuffer(self.data[:whole], np.uint64).copy()
        for i, word in enumerate(words.tolist()):
            place = bisect_right(starts, word) - 1
            if place >= 0 and word - starts[place] < found[place][1]:
                start, _, name, storage = found[place]
                words[i] = memory.storage(storage, name, written.get(start)).base + word - start
        return words.tobytes() + self.data[whole:]


def execute(
    kernel: Kernel,
    launch: Launch,
    block: tuple[int, int, int],
    arguments: list[Argument],
    options: Options,
    written: dict[int, np.ndarray] | None = None,
) -> None:
    """Runs a kernel on tensors in place, and adds the counts to the launch.

    `written` has, for storages by address, which bytes are initialised; others are wholly so.
    """
    memory = GlobalMemory()
    parameters = _parameter_bytes(kernel, memory, arguments, written or {})
    ctas = int(np.prod(launch.grid))
    if not ctas:
        return
    threads = int(np.prod(block))
    batches = -(-ctas * threads // _BATCH_THREADS)
    batch = -(-ctas // min(batches, ctas))
    # numpy warns of what PTX defines: wrapping, infinities, NaN.
    with np.errstate(all="ignore"):
        machine = Machine(
            kernel,
            launch.grid,
            block,
            parameters,
            memory,
            batch=batch,
            dynamic_shared=launch.shared,
            options=options,
        )
        with closing(machine):
            for first in range(0, ctas, batch):
                machine.run(first, min(batch, ctas - first))
            launch.instructions += machine.counts()
            launch.lines += machine.line_counts()
            launch.traffic += machine.accesses.traffic


def _parameter_bytes(
    kernel: Kernel,
    memory: GlobalMemory,
    arguments: list[Argument],
    written: dict[int, np.ndarray],
) -> np.ndarray:
    last = kernel.parameters[-1] if kernel.parameters else Parameter("", "u8", 0, 0)
    data = np.zeros(last.offset + last.size, np.uint8)  # further parameters are null
    if len(arguments) > len(kernel.parameters):
        raise SimulationError(f"{kernel.name}: takes {len(kernel.parameters)} arguments")
    for parameter, (name, value) in zip(kernel.parameters, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            state = written.get(value.untyped_storage().data_ptr())
            value = memory.pointer(value, name, state)
        elif isinstance(value, Structure):
            value = value.encoded(memory, written)
            if len(value) != parameter.size:
                text = f"{len(value)} bytes for the {parameter.size} of {name}"
                raise SimulationError(f"{kernel.name}: {text}")
        encoded = np.frombuffer(_encode(parameter, value), np.uint8)
        data[parameter.offset : parameter.offset + parameter.size] = encoded
    return data


def _encode(parameter: Parameter, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value.ljust(parameter.size, b"\0")
    if value is None:
        value = 0
    if isinstance(value, float) or parameter.type in ("f16", "f32", "f64"):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[parameter.size], value)
    bits = int(value) & (1 << 8 * parameter.size) - 1
    return bits.to_bytes(parameter.size, "little")


def run_ptx(
    ptx: str,
    kernel_name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: list[Any],
    *,
    arch: int | None = None,
    names: list[str] | None = None,
    shared: int = 0,
    races: bool = True,
    statistics: bool = True,
    uninitialised: bool = True,
    late_copies: bool = True,
) -> Launch:
    """Executes a kernel of a PTX module, such as nvcc's, on tensors, numbers and Structures.

    `shared` is the size of its dynamic shared memory; `names` are for the findings' texts; PTX for
    an architecture newer than `arch` is refused, as a driver would.
    """
    target = re.search(r"\.target\s+sm_(\d+)", ptx)
    if arch and target and int(target[1]) > arch:
        raise SimulationError(f"{kernel_name}: compiled for sm_{target[1]}, not for sm_{arch}")
    kernel = parse(ptx)[kernel_name]
    sizes = [(*map(int, size), 1, 1)[:3] for size in (grid, block)]
    warps = -(-int(np.prod(sizes[1])) // 32)
    launch = Launch(kernel_name, sizes[0], warps, shared, {"ptx": ptx})
    names = names or [parameter.name for parameter in kernel.parameters]
    arguments = list(zip(names, args, strict=False))
    options = Options(races, statistics, uninitialised, late_copies)
    execute(kernel, launch, sizes[1], arguments, options)
    return launch
