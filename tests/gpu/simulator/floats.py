"""Arithmetic on floats."""

from collections.abc import Callable
from functools import reduce

import numpy as np

from .errors import Unsupported
from .formats import TYPES, UNSIGNED, decoder, element_width, encoder
from .ptx import Instruction
from .steps import Mask, Step, assign, only

_ROUNDING = {"rn", "rz", "rm", "rp"}
_IGNORED = ("rn", "approx", "full", "noftz", "ftz", "sat", "relu", "NaN")


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fused,
    "mad": _fused,
    "div": np.divide,
    "min": lambda *values: reduce(np.fmin, values),
    "max": lambda *values: reduce(np.fmax, values),
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "abs": np.abs,
    "neg": np.negative,
}
_PROPAGATING = {
    "min": lambda *values: reduce(np.minimum, values),
    "max": lambda *values: reduce(np.maximum, values),
}
_DIRECT = {"add", "sub", "mul"}  # numpy's operation rounds once


def flush(values: np.ndarray, type_: str) -> np.ndarray:
    """Replace subnormal float32 numbers by zeros of the same sign."""
    if type_ not in ("f32", "f32x2"):
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(0, values), values)


def round_directed(values: np.ndarray, dtype: np.dtype, mode: str) -> np.ndarray:
    """Round float64 values toward zero, down or up."""
    nearest = values.astype(dtype)
    with np.errstate(all="ignore"):
        if mode == "rz":
            wrong, goal = np.abs(nearest) > np.abs(values), 0
        else:
            wrong = nearest > values if mode == "rm" else nearest < values
            goal = -np.inf if mode == "rm" else np.inf
        return np.where(wrong, np.nextafter(nearest, dtype.type(goal)), nearest)


def prepare(machine, instruction: Instruction, type_: str) -> Step:
    """A single ufunc if numpy rounds as PTX does; otherwise computed in float64 and rounded."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    only(instruction, *_IGNORED, *_ROUNDING)
    function = (_PROPAGATING if "NaN" in modifiers else {}).get(opcode)
    function = function or OPERATIONS.get(opcode)
    if function is None:
        raise Unsupported(f"opcode {instruction.name}")
    if len(instruction.types) > 1:
        return _mixed_step(machine, instruction, function)
    operands = machine.operands
    destination = operands.write(instruction.operands[0], type_)
    sources = [operands.read(one, type_) for one in instruction.operands[1:]]
    direction = next((one for one in modifiers if one in ("rz", "rm", "rp")), None)
    plain = not {"ftz", "sat", "relu"} & set(modifiers) and direction is None
    if plain and TYPES[type_].kind == "f":
        if opcode in _DIRECT:
            a, b = sources
            return lambda mask: function(a, b, out=destination, where=mask)
        if opcode in ("fma", "mad") and type_ != "f64":
            return _fused_step(destination, *sources)
    if direction and type_ not in ("f32", "f32x2"):
        raise Unsupported(f"rounding .{direction} of {type_}")

    bits = [one.view(UNSIGNED[element_width(type_)]) for one in sources]
    decode, encode = decoder(type_), encoder(type_)
    dtype = np.dtype(np.float32)
    output = destination.view(UNSIGNED[destination.itemsize])

    def step(mask: Mask) -> None:
        values = [decode(one).astype(np.float64) for one in bits]
        if "ftz" in modifiers:
            values = [flush(one, type_) for one in values]
        result = function(*values)
        if "relu" in modifiers:
            result = np.maximum(result, 0)
        if "sat" in modifiers:
            result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1)
        if direction:
            result = round_directed(result, dtype, direction)
        if "ftz" in modifiers:
            result = flush(result, type_)
        assign(output, encode(result).view(output.dtype), mask)

    return step


def _fused_step(destination: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Step:
    """The product of two floats is exact in float64, so the result is rounded (almost) once."""

    def step(mask: Mask) -> None:
        total = np.multiply(a, b, dtype=np.float64)
        np.add(total, c, out=total)
        assign(destination, total, mask)

    return step


def _mixed_step(machine, instruction: Instruction, function: Callable) -> Step:
    """From sm_100 on, such as ``fma.rn.f32.bf16``: all operands but the last have 16 bits."""
    wide, narrow = instruction.types
    if (
        wide != "f32"
        or narrow not in ("f16", "bf16")
        or {"sat", "ftz"} & set(instruction.modifiers)
    ):
        raise Unsupported(f"opcode {instruction.name}")
    operands, decode = machine.operands, decoder(narrow)
    destination = operands.write(instruction.operands[0], wide)
    *short, last = instruction.operands[1:]
    bits = [operands.read(one, narrow).view(np.uint16) for one in short]
    last = operands.read(last, wide)

    def step(mask: Mask) -> None:
        values = [decode(one).astype(np.float64) for one in bits]
        assign(destination, function(*values, last.astype(np.float64)).astype(np.float32), mask)

    return step
