"""What compiled kernels may cost: limits written down before, and the commands that renew them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def command(
    doc: str,
    file: Path,
    archs: Sequence[int | str],
    rows: Callable[[str, Sequence[int | str]], Iterable[Row]],
    show: Callable[[Row], str],
    entry: Callable[[Row], Row],
) -> None:
    """Print the rows of kernels and architectures; with --write renew their limits in the file."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", nargs="*", default=archs)
    parser.add_argument("--write", action="store_true", help=f"write {file.name}")
    arguments = parser.parse_args()
    named = {str(arch): arch for arch in archs}
    seen = []
    for row in rows(arguments.match, [named[str(arch)] for arch in arguments.arch]):
        seen.append(row)
        print(show(row), flush=True)
    if arguments.write:
        new = [entry(row) for row in seen]
        old = json.loads(file.read_text()) if file.exists() else []
        kept = [e for e in old if e["match"] not in [n["match"] for n in new]]
        file.write_text(one_a_line([*kept, *new]))


def one_a_line(entries: Sequence[Row]) -> str:
    """JSON of which a change is a line."""
    return "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n"


def check_budget(
    budget: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> list[str]:
    """What in ``rows`` exceeds ``budget``, one readable line for each violation.

    A row is a report as a dictionary, with ``kernel`` and ``arch`` and whatever else was measured.
    An entry of the budget applies to the rows whose fields equal all of its ``match``, and gives
    limits by field as ``max`` and ``min``, both inclusive; a field that counts by kind (``tensor``)
    is summed. A budget that checks nothing is a defect: an entry that matches no row or has no
    limit, and a row that lacks a limited field, are violations too.
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
    # Not the other way round: a NaN is within no limit.
    within = value <= limit if way == "max" else value >= limit
    return None if within else f"{quantity} = {value}, {way} {limit}"


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())
