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
    """Hold ``actual`` to a float64 oracle within what rounding explains, by maximum and by RMS.

    The rounding of a sum of n products grows as √n: with entries of expected RMS s, the error's RMS
    may reach ``slack * eps * √n * s`` and its maximum six times that, eps being the machine epsilon
    of actual's dtype. Sums of 16-bit products are held to float32's epsilon, and to one rounding of
    the result: with their own, 1024 terms would excuse anything.

    Args:
        name: What is compared, for the message.
        actual: The tensor under test, floating point or complex; a NaN fails.
        expected: The oracle, in float64 or complex128.
        terms: n, the number of products summed into an entry, along all contractions.
        scale: RMS that an entry can be expected to have, where expected has too few entries to
            show it; taken from expected otherwise.
        slack: Factor for the intermediate roundings of a kernel.
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
