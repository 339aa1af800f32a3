"""A launch: encodes its arguments, runs the grid in batches and adds up the counts."""

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
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

_BATCH_THREADS = 4096  # in lockstep; as many as have their registers in the processor's cache


@dataclass
class Launch:
    """One launch of a kernel.

    `instructions` counts executed warp instructions by opcode, and `lines` by line of the PTX.
    `traffic` counts

    - load_, store_ and atomic_{requests,bytes,sectors} of global memory: warp instructions, the
      bytes they move, and the 32-byte sectors they touch;
    - smem_{load,store,atomic}_{wavefronts,ideal}: passes through the banks of shared memory, and
      their number without conflicts;
    - local_{load,store}: accesses of threads to local memory;
    - mma_flops: floating-point operations of matrix instructions.
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
    """A device of either front end, and its launches."""

    backend: str  # of kron_kernels

    def __init__(self, execute: bool, edit: Callable[[str], str] | None, options: Options):
        self.execute, self.edit, self.options = execute, edit, options
        self.launches: list[Launch] = []

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """Yields a list that has the names of the launched kernels at the end of the `with`."""
        names: list[str] = []
        before = len(self.launches)
        yield names
        names += [launch.name for launch in self.launches[before:]]

    def run(self, launch: Launch, threads: int, arguments: "list[Argument]") -> None:
        """Execute a launch's PTX, edited."""
        ptx = launch.asm["ptx"]
        ptx = self.edit(ptx) if self.edit else ptx
        execute(parse(ptx)[launch.name], launch, (threads, 1, 1), arguments, self.options)


Argument = tuple[str, Any]  # name and value


@dataclass(frozen=True)
class Structure:
    """A struct passed by value, and the tensors whose addresses it may contain.

    Addresses inside the tensors' storages, at multiples of 8 bytes in the struct, are translated to
    the kernel's. Any other address is invalid, and a finding if it is used.
    """

    data: bytes
    tensors: Mapping[str, torch.Tensor]  # by name, for messages

    def encoded(self, memory: GlobalMemory) -> bytes:
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
                words[i] = memory.storage(storage, name).base + word - start
        return words.tobytes() + self.data[whole:]


def execute(
    kernel: Kernel,
    launch: Launch,
    block: tuple[int, int, int],
    arguments: list[Argument],
    options: Options,
) -> None:
    """Run a kernel on tensors in place, and add the counts to the launch."""
    memory = GlobalMemory()
    parameters = _parameter_bytes(kernel, memory, arguments)
    ctas = int(np.prod(launch.grid))
    if not ctas:
        return
    threads = int(np.prod(block))
    batches = -(-ctas * threads // _BATCH_THREADS)
    batch = -(-ctas // min(batches, ctas))
    # numpy warns of wrapping, infinities and NaN, which PTX defines.
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


def _parameter_bytes(kernel: Kernel, memory: GlobalMemory, arguments: list[Argument]) -> np.ndarray:
    last = kernel.parameters[-1] if kernel.parameters else Parameter("", "u8", 0, 0)
    data = np.zeros(last.offset + last.size, np.uint8)  # further parameters are null
    if len(arguments) > len(kernel.parameters):
        raise SimulationError(f"{kernel.name}: takes {len(kernel.parameters)} arguments")
    for parameter, (name, value) in zip(kernel.parameters, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            value = memory.pointer(value, name)
        elif isinstance(value, Structure):
            value = value.encoded(memory)
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
    shared: int = 0,
) -> Launch:
    """Execute a kernel of a PTX module on tensors, numbers and Structures.

    `shared` is the number of bytes of dynamic shared memory.
    """
    kernel = parse(ptx)[kernel_name]
    sizes = [(*map(int, size), 1, 1)[:3] for size in (grid, block)]
    warps = -(-int(np.prod(sizes[1])) // 32)
    launch = Launch(kernel_name, sizes[0], warps, shared, {"ptx": ptx})
    names = [parameter.name for parameter in kernel.parameters]
    execute(kernel, launch, sizes[1], list(zip(names, args, strict=False)), Options())
    return launch
