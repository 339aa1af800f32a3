"""The result: the choice for each layer, as JSON and as a table."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from kron_kernels.factors import Entry, parse, shapes_of, terms_text
from kron_kernels.files import write_file
from kron_kernels.modules import one_name

_REMEDY = "make it again with kron_kernels.plan.plan"


@dataclass(frozen=True)
class LayerPlan:
    """The choice for one layer; FLOPs and milliseconds are those of one forward pass.

    ``terms`` is None if the layer stays dense; ``reason`` then explains why. A reason beside terms
    means that they are slower than the dense layer on this machine. ``latency`` is None if it was
    not measured, because no choice depended on it.
    """

    path: str
    rows: int
    columns: int
    terms: Entry | None
    parameters_dense: int
    parameters: int
    flops_dense: int
    flops: int
    latency_dense: float | None
    latency: float | None
    error: float
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """Terms of each layer, their cost, and where it was measured; all values are plain JSON.

    Attributes:
        factors: From each layer's path to its terms, or None for a dense one, for ``factorise_``.
        layers: One ``LayerPlan`` per layer.
        totals: Totals of the whole module, ``{"dense": …, "planned": …}`` each, measured on a
            module built from the plan: ``parameters``, ``bytes`` of its file, ``flops`` and
            ``latency`` (milliseconds) of a forward pass, the latter with ``"predicted"`` where
            layers were timed; and ``error``, the layers' mean relative squared error, each
            layer weighed by what an error in it does to the module's output.
        setting: Device, dtype, threads, versions and inputs of the measurement.
        budget: The budget given.
        objective: The objective given.
    """

    factors: dict[str, Entry | None]
    layers: list[LayerPlan]
    totals: dict[str, Any]
    setting: dict[str, Any]
    budget: dict[str, float | str]
    objective: str
    version: int = 1

    def to_json(self) -> str:
        """JSON that ``from_json`` reads."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` returned.

        Raises:
            ValueError: If it is not a plan, or one of another version.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"this is not a plan: it is not JSON ({error}).") from error
        wanted = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or values.keys() != wanted or values["version"] != 1:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"this is not a plan of version 1: it has {found}, not {sorted(wanted)}; {_REMEDY}."
            )
        kinds = dict.fromkeys(("factors", "totals", "setting", "budget"), dict)
        for name, kind in {**kinds, "layers": list, "objective": str}.items():
            if not isinstance(values[name], kind):
                raise ValueError(
                    f"this is not a plan: its {name} must be a {kind.__name__}, got "
                    f"{values[name]!r:.80}; {_REMEDY}."
                )
        try:
            made = cls(**values | {"layers": [LayerPlan(**row) for row in values["layers"]]})
            str(made)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                "this is not a plan: its table cannot be made of its values "
                f"({type(error).__name__}: {error}); {_REMEDY}."
            ) from error
        return made

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, atomically."""
        write_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If it is not a plan, see ``from_json``, or not UTF-8.
            OSError: If it cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        return _table(self)


def quantity(key: str, value: float) -> str:
    if key == "latency":
        return f"{value:.3g} ms"
    if key == "error":
        return f"{value:.3g}"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g}"


def describe(inputs: Any) -> list[str]:
    """Dtypes and shapes of a module's inputs, such as ``"input_ids int64 (1, 128)"``."""
    if isinstance(inputs, Mapping):
        return [f"{key} {describe((value,))[0]}" for key, value in inputs.items()]
    return [
        f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}"
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in (inputs if isinstance(inputs, tuple) else (inputs,))
    ]


def _table(made: Plan) -> str:
    head = ["layer", "weight", "terms", "parameters", "of dense", "ms", "dense", "error", ""]
    lines = [head]
    for path, rows in _grouped(made.layers):
        first = rows[0]
        size = first.rows, first.columns
        terms = terms_text(shapes_of(parse(first.terms), size, False, path))
        times = [
            "" if None in (row := [getattr(r, k) for r in rows]) else f"{sum(row) / len(row):.3g}"
            for k in ("latency", "latency_dense")
        ]
        lines.append(
            [
                path or "(the module)",
                f"{first.rows}x{first.columns}",
                terms,
                quantity("parameters", first.parameters),
                f"{first.parameters / first.parameters_dense:.1%}",
                *times,
                f"{sum(r.error for r in rows) / len(rows):.3f}",
                first.reason or "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numbers = range(3, 8)
    text = [
        "  ".join(
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    text.append("")
    for key in ("parameters", "bytes", "flops", "latency"):
        total = made.totals[key]
        dense, planned = (quantity(key, total[k]) for k in ("dense", "planned"))
        less = total["dense"] / total["planned"] if total["planned"] else 1.0
        line = f"{key:11}{dense:>10} -> {planned:>10}  ({less:.2f}x less)"
        if total.get("predicted") is not None:
            line += f", {quantity(key, total['predicted'])} predicted"
        text.append(line)
    text.append(f"{'error':11}{'':10}    {made.totals['error']:>10.3f}  (mean of the layers)")
    budget = ", ".join(f"{k} {v}" for k, v in made.budget.items()) or "none"
    setting = made.setting
    text.append(
        f"budget: {budget}; least {made.objective}. Measured on {setting['device']}, "
        f"{setting['dtype']}, {setting['threads']} threads, torch {setting['torch']} "
        f"({setting['cpu_capability']}), with {'; '.join(setting['inputs'])}"
    )
    return "\n".join(text)


def _grouped(layers: Sequence[LayerPlan]) -> list[tuple[str, list[LayerPlan]]]:
    """Group rows that differ only in numbers in their path and in their error."""
    groups: dict[tuple, list[LayerPlan]] = defaultdict(list)
    for row in layers:
        pattern = re.sub(r"\d+", "*", row.path)
        reason = re.sub(r"[\d.]+(e-?\d+)?", "", row.reason or "")
        groups[pattern, row.rows, row.columns, json.dumps(row.terms), reason].append(row)
    return [(one_name([row.path for row in rows]), rows) for rows in groups.values()]
