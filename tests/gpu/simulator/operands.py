"""Registers, and operands as numpy views of them.

A register is one row of an array: its value in every thread. The rows never move, so that an
operand is found once, when an instruction is prepared, and executing it is often a single ufunc
from views into a view. Immediates and special registers are rows, too.
"""

import re
from collections.abc import Callable

import numpy as np

from .errors import SimulationError, Unsupported
from .formats import SIGNED, TYPES, UNSIGNED
from .ptx import Kernel

_FLOAT32 = re.compile(r"0[fF][0-9a-fA-F]{8}$")
_FLOAT64 = re.compile(r"0[dD][0-9a-fA-F]{16}$")
_DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][-+]?\d+)?$")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_SYMBOL = re.compile(r"([\w$]+)(?:\+(-?\d+))?$")
_ADDRESS = re.compile(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")

_IGNORED = "_"  # the bit bucket, as a destination


def integer(text: str) -> int:
    return int(text.rstrip("U"), 0)


def _immediate(text: str, dtype: np.dtype) -> np.generic:
    if _FLOAT32.match(text):
        value = np.array([int(text[2:], 16)], np.uint32).view(np.float32)
        return (value.astype(dtype) if dtype.kind == "f" else value.view(dtype))[0]
    if _FLOAT64.match(text):
        value = np.array([int(text[2:], 16)], np.uint64).view(np.float64)
        return (value.astype(dtype) if dtype.kind == "f" else value.view(dtype))[0]
    if _DECIMAL.match(text):
        return dtype.type(float(text))
    if not _INTEGER.match(text):
        raise Unsupported(f"operand {text!r}")
    if dtype.kind == "b":
        return np.bool_(integer(text))
    bits = integer(text) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], UNSIGNED[dtype.itemsize]).view(dtype)[0]


class Operands:
    """Resolves the operands of a kernel for a fixed number of threads."""

    def __init__(self, kernel: Kernel, threads: int, symbols: dict[str, int]):
        self.threads, self.symbols = threads, symbols
        self.special: dict[str, np.ndarray] = {}
        self.parameters = {parameter.name: parameter for parameter in kernel.parameters}
        self.rows: dict[str, np.ndarray] = {}
        widths: dict[int | str, list[str]] = {}
        for name, type_ in kernel.registers.items():
            widths.setdefault("pred" if type_ == "pred" else TYPES[type_].itemsize, []).append(name)
        for width, names in widths.items():
            dtype = bool if width == "pred" else UNSIGNED[width]
            self.rows.update(zip(names, np.zeros((len(names), threads), dtype), strict=True))
        self._constants: dict[tuple, np.ndarray] = {}
        self._prologue: list[Callable[[], None]] = []

    def read(self, text: str, type_: str | np.dtype) -> np.ndarray:
        """A view of an operand's values in all threads."""
        dtype = TYPES[type_] if isinstance(type_, str) else np.dtype(type_)
        if text.startswith("!"):
            return self._negated(text[1:])
        row = self.rows.get(text)
        if row is None:
            row = self.special.get(text)
        if row is None:
            return self._constant(text, dtype)
        if (row.dtype.kind == "b") != (dtype.kind == "b"):
            raise Unsupported(f"predicate {text} read as {dtype}")
        if row.itemsize == dtype.itemsize:
            return row.view(dtype)
        if row.itemsize < dtype.itemsize:
            raise SimulationError(f"register {text} is too narrow for {dtype}")
        return row.view(dtype)[:: row.itemsize // dtype.itemsize]  # the low part

    def write(self, text: str, type_: str | np.dtype) -> np.ndarray:
        """A view of a destination. If it is wider than the type, values are extended."""
        dtype = TYPES[type_] if isinstance(type_, str) else np.dtype(type_)
        if text == _IGNORED:
            return np.empty(self.threads, dtype)
        row = self.rows.get(text)
        if row is None:
            raise SimulationError(f"{text} is not a register")
        if row.itemsize == dtype.itemsize:
            return row.view(dtype)
        if row.itemsize < dtype.itemsize:
            raise SimulationError(f"register {text} is too narrow for {dtype}")
        return row.view((SIGNED if dtype.kind == "i" else UNSIGNED)[row.itemsize])

    def constant(self, text: str) -> int | None:
        """The value of an integer immediate, or None for any other operand."""
        return integer(text) if _INTEGER.match(text) else None

    def address(self, text: str) -> Callable[[], np.ndarray]:
        """A function that computes [register + offset] as int64."""
        found = _ADDRESS.match(text)
        if not found:
            raise Unsupported(f"address {text!r}")
        base, offset = found[1], integer(found[2] or "0")
        if base not in self.rows:
            symbol = self.symbols.get(base)
            value = np.full(self.threads, (integer(base) if symbol is None else symbol) + offset)
            return lambda: value
        row = self.rows[base]
        if row.itemsize == 8:
            row = row.view(np.int64)
            return (lambda: row + offset) if offset else (lambda: row)
        return lambda: np.add(row, offset, dtype=np.int64)

    def take_prologue(self) -> list[Callable[[], None]]:
        """Actions to run before each execution of the instruction just prepared."""
        prologue, self._prologue = self._prologue, []
        return prologue

    def _negated(self, text: str) -> np.ndarray:
        source, result = self.read(text, "pred"), np.empty(self.threads, bool)
        self._prologue.append(lambda: np.logical_not(source, out=result))
        return result

    def _constant(self, text: str, dtype: np.dtype) -> np.ndarray:
        key = text, dtype
        if key not in self._constants:
            symbol = _SYMBOL.match(text)
            if symbol and symbol[1] in self.symbols:
                value = dtype.type(self.symbols[symbol[1]] + int(symbol[2] or 0))
            elif text == "WARP_SZ":
                value = dtype.type(32)
            else:
                value = _immediate(text, dtype)
            self._constants[key] = np.full(self.threads, value, dtype)
        return self._constants[key]
