"""PTX's number formats as numpy types. Formats that numpy lacks (bf16, tf32) are kept as bits."""

from collections.abc import Callable

import numpy as np

UNSIGNED = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
SIGNED = {width: np.dtype(f"i{width}") for width in (1, 2, 4, 8)}

TYPES = {
    **{f"{kind}{8 * width}": UNSIGNED[width] for kind in "ub" for width in UNSIGNED},
    **{f"s{8 * width}": SIGNED[width] for width in SIGNED},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": UNSIGNED[2],
    "tf32": UNSIGNED[4],
    "f16x2": UNSIGNED[4],
    "bf16x2": UNSIGNED[4],
    "f32x2": UNSIGNED[8],
    "pred": np.dtype(bool),
}

FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2"}


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; every NaN becomes PTX's canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # The sum wraps for NaNs only, which are replaced.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def tf32_values(bits: np.ndarray) -> np.ndarray:
    """Tensor cores ignore the lower 13 bits of an operand."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def decoder(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from bits of a format to values that numpy can compute with."""
    if name in ("bf16", "bf16x2"):
        return bf16_values
    if name == "tf32":
        return tf32_values
    value = {"f16x2": np.float16, "f32x2": np.float32}.get(name) or TYPES[name]
    return lambda bits: bits.view(value)


def encoder(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The reverse: a function that rounds values to nearest and returns bits of the format."""
    if name in ("bf16", "bf16x2"):
        return bf16_bits
    value = np.dtype({"f16x2": np.float16, "f32x2": np.float32}.get(name) or TYPES[name])
    return lambda values: values.astype(value, copy=False).view(UNSIGNED[value.itemsize])


def element_width(name: str) -> int:
    """Bytes of one value; a packed pair contains two."""
    return TYPES[name].itemsize // (2 if name.endswith("x2") else 1)
