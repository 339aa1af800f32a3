"""The address space. Every tensor's storage stands in the middle of its own window of 64 GiB, so
an access before or beyond it cannot land in another one. Kernels work on the tensors' own memory,
without copies.
"""

import ctypes

import numpy as np

from .formats import UNSIGNED

WINDOW_BITS = 36
SHARED_WINDOW = 1
LOCAL_WINDOW = 2
PARAM_WINDOW = 3
FIRST_BUFFER = 16
POISON = 0xFF  # bytes of fresh shared and local memory: NaN in every float format


class Buffer:
    """The bytes of one storage, and the addresses a kernel sees them at."""

    def __init__(self, data: np.ndarray, name: str, window: int):
        self.data, self.name = data, name
        # Keep the true alignment, which the compiler relies on.
        middle = (window << WINDOW_BITS) + (1 << WINDOW_BITS - 1)
        self.base = middle + data.ctypes.data % 4096
        self.end = self.base + data.size
        self._cells: dict[int, tuple[np.ndarray, int]] = {}

    def cells(self, width: int) -> tuple[np.ndarray, int]:
        """The storage as naturally aligned cells, and the address of the first one."""
        if width not in self._cells:
            rows, origin = self.rows(width)
            self._cells[width] = rows.reshape(-1).view(UNSIGNED[width]), origin
        return self._cells[width]

    def rows(self, width: int) -> tuple[np.ndarray, int]:
        """The same as rows of bytes of any width."""
        skipped = -self.base % width
        count = max(0, (self.data.size - skipped) // width)
        part = self.data[skipped : skipped + count * width]
        return part.reshape(-1, width), self.base + skipped


class GlobalMemory:
    """The global memory of a launch, by window."""

    def __init__(self):
        self.buffers: dict[int, Buffer] = {}
        self._by_pointer: dict[int, Buffer] = {}

    def add(self, data: np.ndarray, name: str) -> Buffer:
        window = FIRST_BUFFER + len(self.buffers)
        self.buffers[window] = buffer = Buffer(data, name, window)
        return buffer

    def pointer(self, tensor, name: str) -> int:
        """The address of a tensor's first element; tensors that share a storage alias."""
        start = self.storage(tensor.untyped_storage(), name).base
        return start + tensor.storage_offset() * tensor.element_size()

    def storage(self, storage, name: str) -> Buffer:
        key = storage.data_ptr() if storage.nbytes() else -1 - len(self.buffers)
        if key not in self._by_pointer:
            self._by_pointer[key] = self.add(storage_bytes(storage), name)
        buffer = self._by_pointer[key]
        if name not in buffer.name.split("/"):
            buffer.name += f"/{name}"
        return buffer


def storage_bytes(storage) -> np.ndarray:
    """A view of a torch storage's memory, as numpy bytes."""
    if not storage.nbytes():
        return np.empty(0, np.uint8)
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(raw, np.uint8)


class PrivateMemory:
    """Shared memory of every CTA, or local memory of every thread: equal parts of one array."""

    def __init__(self, parts: int, size: int):
        self.size = size
        self.stride = max(16, -(-size // 16) * 16)
        self.data = np.full(parts * self.stride, POISON, np.uint8)
        self._cells = {width: self.data.view(dtype) for width, dtype in UNSIGNED.items()}

    def cells(self, width: int) -> np.ndarray:
        return self._cells[width]
