"""Budgets: committed limits on the resources of compiled kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_budget(file: Path, entries: Sequence[Row]) -> None:
    """Replace the entries that match the same rows, and keep the others; one entry per line."""
    old = json.loads(file.read_text()) if file.exists() else []
    new = [entry["match"] for entry in entries]
    lines = map(json.dumps, [*(e for e in old if e["match"] not in new), *entries])
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def check_budget(
    budget: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> list[str]:
    """Violations of ``budget`` by ``rows``, one line each.

    A row is a report as a dictionary, with ``kernel``, ``arch`` and the measured fields. An entry
    of the budget applies to the rows whose fields equal all of its ``match``, and limits fields by
    ``max`` and ``min``, both inclusive; a field that counts by kind (``tensor``) is summed. A
    budget that checks nothing is a defect: an entry that matches no row or has no limit, and a row
    that lacks a limited field, are violations too.
    """
    rows = list(rows)
    violations = []
    for entry in budget:
        match = entry["match"]
        limits = [(way, *limit) for way in ("max", "min") for limit in entry.get(way, {}).items()]
        matching = [r for r in rows if all(f in r and r[f] == v for f, v in match.items())]
        if not limits:
            violations.append(f"budget entry {_fields(match)}: has neither max nor min")
        if not matching:
            violations.append(f"budget entry {_fields(match)}: matches no row")
        for row in matching:
            named = {f: row[f] for f in ("kernel", "arch", *match) if f in row}
            for way, quantity, limit in limits:
                if problem := _excess(row, way, quantity, limit):
                    violations.append(f"{_fields(named)}: {problem}")
    return violations


def _excess(row: Mapping[str, Any], way: str, quantity: str, limit: float) -> str | None:
    if quantity not in row:
        return f"{quantity} is missing, {way} {limit}"
    value = row[quantity]
    if isinstance(value, Mapping):
        value = sum(value.values())
    # Not negated: a NaN is within no limit.
    within = value <= limit if way == "max" else value >= limit
    return None if within else f"{quantity} = {value}, {way} {limit}"


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())
