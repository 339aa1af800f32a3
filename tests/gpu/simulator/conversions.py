"""cvt: conversions between integers and floats of any width."""

from collections.abc import Callable

import numpy as np

from .errors import Unsupported
from .floats import flush, round_directed
from .formats import FLOATS, TYPES, UNSIGNED, bf16_bits, decoder, encoder
from .ptx import Instruction
from .steps import Mask, Step, assign, executes, only

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_NEAREST_TF32 = {"rna": np.uint32(0x1000), "rn": np.uint32(0x0FFF)}


@executes("cvt")
def _cvt(machine, instruction: Instruction) -> Step:
    only(instruction, *_TO_INTEGRAL, "rn", "rz", "rm", "rp", "rna", "ftz", "sat", "relu")
    if len(instruction.types) != 2:
        raise Unsupported(f"opcode {instruction.name}")
    target, source = instruction.types
    if target in ("f16x2", "bf16x2"):
        return _pack(machine, instruction, target)
    if target == "tf32":
        return _tf32(machine, instruction)
    values = machine.operands.read(instruction.operands[1], source)
    destination = machine.operands.write(instruction.operands[0], target)
    if target in FLOATS:
        return _to_float(instruction, target, source, values, destination)
    convert = _float_to_integer if source in FLOATS else _integer_to_integer
    function = convert(instruction, TYPES[target], source)
    return lambda mask: assign(destination, function(values), mask)


def _adjusted(instruction: Instruction, values: np.ndarray) -> np.ndarray:
    if "relu" in instruction.modifiers:
        values = np.where(values > 0, values, 0)
    if "sat" in instruction.modifiers:
        values = np.clip(np.nan_to_num(values, nan=0.0), 0, 1)
    return values


def _encoder(instruction: Instruction, target: str) -> Callable[[np.ndarray], np.ndarray]:
    """The instruction's rounding to a float format."""
    mode = next((one for one in instruction.modifiers if one in ("rz", "rm", "rp")), None)
    encode = encoder(target)
    if mode is None:
        return encode
    if target in ("bf16", "bf16x2"):
        if mode != "rz":
            raise Unsupported(f"opcode {instruction.name}")
        cut = np.uint32(0xFFFF0000)
        return lambda values: bf16_bits(
            (values.astype(np.float32).view(np.uint32) & cut).view("f4")
        )
    dtype = np.dtype(np.float16 if target == "f16x2" else TYPES[target])
    return lambda values: encode(round_directed(values.astype(np.float64), dtype, mode))


def _pack(machine, instruction: Instruction, target: str) -> Step:
    """Two floats into one register; the first operand is the upper half."""
    if instruction.types[1] != "f32":
        raise Unsupported(f"opcode {instruction.name}")
    operands, encode = machine.operands, _encoder(instruction, target)
    halves = operands.write(instruction.operands[0], "b32").view(np.uint16)
    high, low = (operands.read(one, "f32") for one in instruction.operands[1:3])

    def step(mask: Mask) -> None:
        parts = [encode(_adjusted(instruction, values)) for values in (low, high)]
        assign(halves[0::2], parts[0], mask)
        assign(halves[1::2], parts[1], mask)

    return step


def _tf32(machine, instruction: Instruction) -> Step:
    mode = next((_NEAREST_TF32[m] for m in instruction.modifiers if m in _NEAREST_TF32), None)
    if mode is None or "relu" in instruction.modifiers:
        raise Unsupported(f"opcode {instruction.name}")
    bits = machine.operands.read(instruction.operands[1], "b32")
    destination = machine.operands.write(instruction.operands[0], "b32")
    ties_to_even = "rn" in instruction.modifiers

    def step(mask: Mask) -> None:
        rounded = bits + mode
        if ties_to_even:
            rounded += (bits >> np.uint32(13)) & np.uint32(1)
        special = bits & np.uint32(0x7F800000) == np.uint32(0x7F800000)
        rounded = np.where(special, bits, rounded & np.uint32(0xFFFFE000))
        assign(destination, rounded, mask)

    return step


def _to_float(
    instruction: Instruction,
    target: str,
    source: str,
    values: np.ndarray,
    destination: np.ndarray,
) -> Step:
    modifiers = instruction.modifiers
    decode = decoder(source) if source == "bf16" else lambda bits: bits
    integral = next((_TO_INTEGRAL[one] for one in modifiers if one in _TO_INTEGRAL), None)
    simple = not {"rz", "rm", "rp", "sat", "relu", "ftz"} & set(modifiers) and integral is None
    if simple and target != "bf16":
        return lambda mask: assign(destination, decode(values), mask)
    encode = _encoder(instruction, target)
    output = destination.view(UNSIGNED[destination.itemsize])

    def step(mask: Mask) -> None:
        result = decode(values)
        if source not in FLOATS:
            result = result.astype(np.float64)
        if "ftz" in modifiers:
            result = flush(result, source)
        if integral is not None:
            result = integral(result)
        result = encode(_adjusted(instruction, result))
        if "ftz" in modifiers and target == "f32":
            result = flush(result.view(np.float32), target).astype(np.float32).view(np.uint32)
        assign(output, result, mask)

    return step


def _float_to_integer(
    instruction: Instruction, dtype: np.dtype, source: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Saturating conversion; NaN becomes zero."""
    limits = np.iinfo(dtype)
    decode = decoder(source) if source == "bf16" else lambda bits: bits
    modifiers = instruction.modifiers
    integral = next((_TO_INTEGRAL[one] for one in modifiers if one in _TO_INTEGRAL), np.trunc)

    def convert(bits: np.ndarray) -> np.ndarray:
        values = integral(np.nan_to_num(decode(bits).astype(np.float64), nan=0.0))
        above, below = values >= float(limits.max), values <= float(limits.min)
        result = np.where(above | below, 0, values).astype(dtype)
        result[above], result[below] = limits.max, limits.min
        return result

    return convert


def _integer_to_integer(
    instruction: Instruction, dtype: np.dtype, source: str
) -> Callable[[np.ndarray], np.ndarray]:
    if "sat" not in instruction.modifiers:
        return lambda values: values.astype(dtype)
    target, own = np.iinfo(dtype), np.iinfo(TYPES[source])
    low, high = max(target.min, own.min), min(target.max, own.max)
    return lambda values: np.clip(values, low, high).astype(dtype)
