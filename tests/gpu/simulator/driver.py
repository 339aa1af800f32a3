"""Triton's front end: a driver whose device is the simulator."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from standin import cpu_as_gpu

from kron_kernels.backends.triton import configs

from .access import Options
from .launch import Argument, Launch, SimulatedDevice
from .memory import storage_bytes
from .tritons import using

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
except ImportError:  # run_ptx needs none of it
    triton, DriverBase = None, object

_MAX_SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448}
_MAX_SHARED_OTHERS = {"cuda": 101376, "hip": 65536}


class Device(SimulatedDevice):
    """A simulated GPU. Inside `with`, Triton compiles for it and launches on it, and the backend
    "triton" takes CPU tensors.

    arch            a compute capability (80, 90, …), or the name of an AMD one (compile only)
    execute         if False, only compile and record the launches
    races           look for races in shared memory, and between CTAs in global memory
    statistics      count sectors and wavefronts
    edit            a function of the PTX, applied before execution: plants bugs
    multiprocessors, shared
                    the size of GPU that the backend chooses tiles for; by default a small one, for
                    which small cases take the tiles of large ones
    """

    backend = "triton"

    def __init__(
        self,
        arch: int | str = 80,
        *,
        execute: bool = True,
        races: bool = True,
        statistics: bool = True,
        edit: Callable[[str], str] | None = None,
        multiprocessors: int = 2,
        shared: int = 99 * 1024,
    ):
        super().__init__(execute, edit, Options(races, statistics))
        self.arch = arch
        self.gpu = configs.GPU("simulated", multiprocessors, shared)
        if isinstance(arch, str):
            self.target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
            # Triton caches compiled kernels by device number: give every architecture its own.
            self.number = int(arch.removeprefix("gfx"), 16)
            if execute:
                raise ValueError("AMD's machine code cannot be executed: pass execute=False")
        else:
            self.target, self.number = GPUTarget("cuda", arch, 32), arch

    def __enter__(self) -> "Device":
        driver = _Driver(self)
        self._stack = ExitStack()
        self._stack.enter_context(cpu_as_gpu(self.arch if isinstance(self.arch, int) else 80))
        self._stack.enter_context(using(driver))
        self._stack.enter_context(patch.object(configs, "device_of", lambda x: self.gpu))
        # Unset, Triton 3.9 warns that its default will change.
        self._stack.enter_context(patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def launch(self, grid, source, metadata, asm: dict[str, str | bytes], values: tuple) -> None:
        name, warps, shared = metadata.name, metadata.num_warps, metadata.shared
        launch = Launch(name, tuple(map(int, grid)), warps, shared, asm)
        self.launches.append(launch)
        if self.execute:
            self.run(launch, 32 * warps, list(_arguments(source.signature, values)))


def _arguments(signature: dict[str, Any], values: tuple) -> Iterator[Argument]:
    """The kernel's parameters in order, without constants and with tuples flattened."""
    for (name, type_), value in zip(signature.items(), values, strict=False):
        yield from _flat(name, type_, value)


def _flat(name: str, type_: Any, value: Any) -> Iterator[Argument]:
    if isinstance(type_, tuple):
        for i, (one, part) in enumerate(zip(type_, value, strict=True)):
            yield from _flat(f"{name}[{i}]", one, part)
    elif type_ == "constexpr":
        return
    elif type_ in ("fp16", "bf16", "fp32", "fp64", "f32"):
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}.get(type_)
        yield name, _tensor_bytes(torch.tensor(float(value), dtype=dtype or torch.float32))
    elif hasattr(value, "data_ptr") and not isinstance(value, torch.Tensor):
        yield name, value.base  # triton.reinterpret's wrapper
    else:
        yield name, value


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return storage_bytes(tensor.untyped_storage()).tobytes()


class _Utilities:
    """The functions that Triton calls when it loads a kernel."""

    def __init__(self, device: Device):
        self.device = device
        self.asm: dict[str, str | bytes] = {}

    def load_binary(self, name, kernel, shared, device):
        return object(), self.asm, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module) -> None:
        pass

    def get_device_properties(self, device) -> dict[str, int]:
        target = self.device.target
        return {
            "max_shared_mem": _MAX_SHARED.get(target.arch, _MAX_SHARED_OTHERS[target.backend]),
            "multiprocessor_count": 108,
            "warpSize": target.warp_size,
            "max_num_regs": 65536,
            "sm_clock_rate": 1_400_000,
            "mem_clock_rate": 1_200_000,
            "mem_bus_width": 5120,
        }


class _Launcher:
    """Triton keeps it with the compiled kernel, so it looks up the active device at each launch."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values) -> None:
        device = triton.runtime.driver.active.device
        device.launch((x, y, z), self.source, self.metadata, function, values)


class _Driver(DriverBase):
    def __init__(self, device: Device):
        self.device, self.utils, self.launcher_cls = device, _Utilities(device), _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen automatically

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_current_target(self):
        return self.device.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self) -> Callable:
        # All times are equal: an autotuner takes its first configuration.
        return lambda function, quantiles=None, **_: [1.0] * len(quantiles or [0])

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache) -> None:
        pass
