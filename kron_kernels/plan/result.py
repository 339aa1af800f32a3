"""A plan: what becomes of each layer, as JSON, and as a table to read."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kron_kernels.factorise import Entry, Terms, terms_of
from kron_kernels.files import write_file
from kron_kernels.shapes import KronShape


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; FLOPs and milliseconds are those of one forward pass.

    ``terms`` is None where the layer stays dense. ``reason`` says why it does, or that the
    factorised one is slower here. ``latency`` is None where nothing depended on it, so that it was
    not measured.
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
    """Terms of each layer, what they cost, and where that was measured; all values plain JSON.

    Attributes:
        factors: From each layer's path to its terms, or None for a dense one: what ``factorise_``
            takes.
        layers: One ``LayerPlan`` a layer.
        totals: Of the whole module, ``{"dense": …, "planned": …}`` each, measured on a module so
            built: ``parameters``, ``bytes`` of them, ``flops`` and ``latency`` (milliseconds) of a
            forward pass, the latter with ``"predicted"`` where layers were timed; and ``error``,
            the layers' mean relative squared error.
        setting: Where it was measured: device, dtype, threads, versions, and the inputs.
        budget: As it was asked for.
        objective: As it was asked for.
    """

    factors: dict[str, Entry | None]
    layers: list[LayerPlan]
    totals: dict[str, Any]
    setting: dict[str, Any]
    budget: dict[str, float | str]
    objective: str
    version: int = 1

    def to_json(self) -> str:
        """The plan as JSON, which ``from_json`` reads."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of this text.

        Raises:
            ValueError: If it is no plan, or one of another version.
        """
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"this is no plan, nor any JSON: {error}.") from error
        wanted = {f.name for f in fields(cls)}
        if not isinstance(told, dict) or told.keys() != wanted or told["version"] != 1:
            found = sorted(told) if isinstance(told, dict) else type(told).__name__
            raise ValueError(
                f"this is no plan of version 1: it has {found}, not {sorted(wanted)}; make it anew "
                "with kron_kernels.plan.plan."
            )
        kinds = dict.fromkeys(("factors", "totals", "setting", "budget"), dict)
        for name, kind in {**kinds, "layers": list, "objective": str}.items():
            if not isinstance(told[name], kind):
                raise ValueError(
                    f"this is no plan: its {name} must be a {kind.__name__}, got "
                    f"{told[name]!r:.80}; make it anew with kron_kernels.plan.plan."
                )
        columns = {f.name for f in fields(LayerPlan)}
        for row in told["layers"]:
            if not isinstance(row, dict) or row.keys() != columns:
                raise ValueError(
                    f"this is no plan: each of its layers must have {sorted(columns)}, got "
                    f"{row!r:.80}; make it anew with kron_kernels.plan.plan."
                )
        plan = cls(**told | {"layers": [LayerPlan(**row) for row in told["layers"]]})
        try:
            str(plan)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                "this is no plan: its table cannot be made of its values "
                f"({type(error).__name__}: {error}); make it anew with kron_kernels.plan.plan."
            ) from error
        return plan

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, at once or not at all."""
        write_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If it is no plan, see ``from_json``, or not UTF-8.
            OSError: If it cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        return _table(self)


def terms_text(size: tuple[int, int], terms: Terms) -> str:
    rows, columns = size
    told = []
    for (m1, n1), rank in terms:
        s = KronShape.split(rows, columns, (m1, n1), rank)
        product = f"{s.m1}x{s.n1} ⊗ {s.m2}x{s.n2}"
        one = f"{rank} of {product}" if rank > 1 else product
        told.append(f"rank {rank}" if s.is_low_rank else one)
    return " + ".join(told) or "dense"


def quantity(key: str, value: float) -> str:
    if key == "latency":
        return f"{value:.3g} ms"
    if key == "error":
        return f"{value:.3g}"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g}"


def _table(plan: Plan) -> str:
    head = ["layer", "weight", "terms", "parameters", "of dense", "ms", "dense", "error", ""]
    lines = [head]
    for path, rows in _grouped(plan.layers):
        first = rows[0]
        terms = terms_text((first.rows, first.columns), terms_of(first.terms))
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
        total = plan.totals[key]
        dense, planned = (quantity(key, total[k]) for k in ("dense", "planned"))
        less = total["dense"] / total["planned"] if total["planned"] else 1.0
        line = f"{key:11}{dense:>10} -> {planned:>10}  ({less:.2f}x less)"
        if total.get("predicted") is not None:
            line += f", {quantity(key, total['predicted'])} predicted"
        text.append(line)
    text.append(f"{'error':11}{'':10}    {plan.totals['error']:>10.3f}  (mean of the layers)")
    budget = ", ".join(f"{k} {v}" for k, v in plan.budget.items()) or "none"
    setting = plan.setting
    text.append(
        f"budget: {budget}; least {plan.objective}. Measured on {setting['device']}, "
        f"{setting['dtype']}, {setting['threads']} threads, torch {setting['torch']} "
        f"({setting['cpu_capability']}), with {'; '.join(setting['inputs'])}"
    )
    return "\n".join(text)


def _grouped(layers: Sequence[LayerPlan]) -> list[tuple[str, list[LayerPlan]]]:
    """Rows that are equal but for a number in their path and their error, under one path each."""
    groups: dict[tuple, list[LayerPlan]] = defaultdict(list)
    for row in layers:
        pattern = re.sub(r"\d+", "*", row.path)
        reason = re.sub(r"[\d.]+(e-?\d+)?", "", row.reason or "")
        groups[pattern, row.rows, row.columns, json.dumps(row.terms), reason].append(row)
    told = []
    for (pattern, *_), rows in groups.items():
        numbers = [[int(n) for n in re.findall(r"\d+", r.path)] for r in rows]
        parts = pattern.split("*")
        path = parts[0]
        for i, part in enumerate(parts[1:]):
            path += _ranges(sorted({n[i] for n in numbers})) + part
        told.append((path, rows))
    return told


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,5``"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
