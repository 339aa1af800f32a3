"""Comparison in units of rounding, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    terms: int,
    *,
    scale: float | None = None,
    slack: float = 4,
) -> None:
    """Compare ``actual`` with a float64 oracle, within the error that rounding explains.

    The rounding error of a sum of n products grows as √n. If the entries have an RMS of s and
    ``actual``'s dtype a machine epsilon of eps, the error's RMS may reach ``slack * eps * √n * s``
    and its maximum six times that. A 16-bit result may have one rounding more, and sums in
    float32: with a 16-bit eps, 1024 terms would excuse any error.

    Args:
        name: The tensor's name, for the error message.
        actual: The tensor under test, floating point or complex; a NaN fails.
        expected: The oracle, of the same shape, in float64 or complex128.
        terms: n, the number of products summed into an entry, along all contractions.
        scale: Expected RMS of an entry; measured on ``expected`` by default, which may have too
            few entries to show it.
        slack: Factor for the intermediate roundings of a kernel.

    Raises:
        AssertionError: If the shapes differ or the error is larger; with the worst entry.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not actual.numel():
        return
    if actual.is_complex() and not expected.is_complex():
        raise AssertionError(f"{name}: {actual.dtype}, but expected is real")
    rounding = torch.finfo(actual.dtype)
    sums = torch.finfo(torch.float32).eps if rounding.bits == 16 else rounding.eps
    if scale is None:
        scale = expected.abs().square().mean().sqrt().item()
    unit = max(max(rounding.eps, sums * terms**0.5) * scale, rounding.tiny)
    error = (actual.to(expected.dtype) - expected).abs() / unit
    rms, worst = error.square().mean().sqrt().item(), error.max().item()
    if not (rms <= slack and worst <= 6 * slack):
        at = tuple(
            int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
        )
        raise AssertionError(
            f"{name}: error {rms:.2g} RMS and {worst:.2g} max, in units of {unit:.2g}; "
            f"allowed {slack:g} and {6 * slack:g}; worst at {at}: {actual[at].item()!r}, "
            f"expected {expected[at].item()!r}"
        )
