"""The budget: limits on parameters, bytes, FLOPs, latency and error."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from math import inf

from kron_kernels.shapes import check_mapping

KEYS = ("parameters", "bytes", "flops", "latency", "error")


def check_arguments(budget: Mapping[str, float | str], objective: str) -> None:
    if objective not in ("error", "size", "latency"):
        raise ValueError(f"objective = {objective!r} must be 'error', 'size' or 'latency'.")
    check_mapping("budget", budget, '{"parameters": "8x"}')
    if not budget and objective == "error":
        raise ValueError(
            "the budget is empty, so every layer would stay dense; give one of "
            f"{', '.join(KEYS)}, such as {{'parameters': '8x'}}, or another objective."
        )
    for key, value in budget.items():
        if key not in KEYS:
            raise ValueError(f"budget has {key!r}, but can have {', '.join(KEYS)}.")
        _limit(key, value, 1.0)


def _limit(key: str, value: float | str, dense: float) -> float:
    """A number as it is; "8x" and "50%" relative to the dense module's value."""
    number: float | None = None
    if isinstance(value, str):
        text = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([x%])\s*", value)
        if text and text[1].count(".") < 2 and 0 < float(text[1]) < inf:
            share = 1 / float(text[1]) if text[2] == "x" else float(text[1]) / 100
            if key != "error" or text[2] == "%":  # the dense module has no error
                number = share * dense
    elif not isinstance(value, bool) and isinstance(value, int | float):
        # Not inf: 10**400, an int, is less.
        number = float(value) if 0 <= value <= sys.float_info.max else None
    if number is None:
        raise ValueError(
            f"budget[{key!r}] = {value!r} must be a number"
            + ("" if key == "error" else ", 'times smaller' as in '8x',")
            + " or a share as in '50%'."
        )
    return number


def limits_of(budget: Mapping[str, float | str], dense: Mapping[str, float]) -> dict[str, float]:
    """The budget in absolute numbers, given the totals of the dense module."""
    return {key: _limit(key, value, dense.get(key, 1.0)) for key, value in budget.items()}
