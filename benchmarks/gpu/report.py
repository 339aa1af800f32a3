"""The report: report.json with all of it, report.md to read."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import tune
from benchmarks.gpu.contenders import OURS
from benchmarks.gpu.jobs import FAILED, NOT_DONE, PASSED
from kron_kernels import dispatch
from kron_kernels.files import write_file

SECTIONS = ("environment", "correctness", "timing", "tuning")
NEVER = [
    "KroneckerBERT's models, their distillation and command line on a GPU",
    "training on several GPUs",
    "GPUs and versions of Triton other than those under Environment",
    "profilers and sanitizers: memory traffic, occupancy, races",
]


def write_report(out: Path, results: list[dict[str, Any]], sections: Sequence[str], args) -> None:
    gaps = [f"the section {s}: it was not asked for" for s in SECTIONS if s not in sections]
    if args.simulate:
        gaps.insert(0, "a GPU: nothing here was run on one, the checks ran in the simulator")
    if args.quick:
        gaps.append("the cases that --quick leaves out")
    report = {
        "simulated": args.simulate,
        "quick": args.quick,
        "sections": list(sections),
        "counts": dict(Counter(r["state"] for r in results)),
        "not_done": not_done(results) + gaps + NEVER,
        "results": results,
    }
    write_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_file(out / "report.md", markdown(report))


def not_done(results: list[dict[str, Any]]) -> list[str]:
    """A line a reason."""
    reasons = defaultdict(list)
    for r in results:
        if r["state"] == NOT_DONE:
            reasons[r["section"], r["message"]].append(r["name"])
    lines = []
    for (section, why), names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{section}: {'; '.join(names[:4])}{more}: {why}")
    for library, why in missing_contenders(results).items():
        lines.append(f"timing: {library}: {why}")
    return lines


def missing_contenders(results: list[dict[str, Any]]) -> dict[str, str]:
    """Who was left out of every cell, and why first."""
    cells = [r["data"] for r in results if r["section"] == "timing" and "left_out" in _data(r)]
    missing: dict[str, str] = {}
    for cell in cells:
        missing |= {k: why for k, why in cell["left_out"].items() if k not in missing}
    timed = {key for cell in cells for key in cell["loop"]}
    return {k: why for k, why in missing.items() if k not in timed}


def _data(result: dict[str, Any]) -> dict[str, Any]:
    return result.get("data") or {}


def markdown(report: dict[str, Any]) -> str:
    results, counts = report["results"], Counter(report["counts"])
    facts = next((_data(r) for r in results if r["section"] == "environment"), {})
    where = "in the simulator" if report["simulated"] else f"on {facts.get('gpu', 'a GPU')}"
    lines = [
        f"# kron_kernels {where}",
        "",
        f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[NOT_DONE]} not done.",
        "",
        *failures(results),
        *checked_groups(results),
        *timing_tables(results),
        *tuning_lines(results),
        "## Not done",
        "",
        *(f"- {line}" for line in report["not_done"]),
        "",
        "## Environment",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        *order_table(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def failures(results: list[dict[str, Any]]) -> list[str]:
    failed = [r for r in results if r["state"] == FAILED]
    lines = ["## Failures", ""] if failed else ["Nothing that was done failed.", ""]
    for r in failed:
        detail = r.get("traceback") or r["message"]
        lines += [f"### {r['section']}: {r['name']}", "", "```", detail.rstrip(), "```", ""]
    return lines


def checked_groups(results: list[dict[str, Any]]) -> list[str]:
    table = defaultdict(Counter)
    for r in results:
        table[r["section"], r["group"]][r["state"]] += 1
    lines = ["## What was done", "", "| section | what | passed | failed | not done |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (section, group), n in table.items():
        lines.append(f"| {section} | {group} | {n[PASSED]} | {n[FAILED]} | {n[NOT_DONE]} |")
    return [*lines, ""]


def timing_tables(results: list[dict[str, Any]]) -> list[str]:
    """By kind and dtype: one of ours in microseconds, and the others' time over it."""
    done = [_data(r) for r in results if r["section"] == "timing" and r["state"] == PASSED]
    tables = defaultdict(list)
    for cell in done:
        if "loop" in cell:
            tables[cell["kind"], cell["dtype"]].append(cell)
    lines = ["## Timing", ""] if done else []
    for cell in done:
        if "loop" not in cell:
            lines.append("Launching one call keeps the CPU for, in microseconds:")
            lines += ["", *(f"- {key}: {us}" for key, us in cell.items()), ""]
    if tables:
        lines.append(
            "The first column in microseconds a call, the median and in brackets the quartiles; "
            "the others' medians as multiples of it. Ours are triton, or for blocks and qkv fused "
            "and calls, and cuda. Calls are made one by one, or replayed as a CUDA graph. "
            "A star marks operands that fit into the L2 cache."
        )
    for (kind, dtype), cells in tables.items():
        lines += ["", f"### {kind}, {dtype}", "", *ratio_table(cells)]
    return [*lines, ""] if lines else []


def ratio_table(cells: list[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(k for cell in cells for k in cell["loop"])
    own = next((key for key in OURS if key in keys), "ours")
    names = [key for key in keys if key != own]
    columns = [f"{key}{how}" for how in ("", ", graph") for key in (own, *names)]
    lines = [f"| | tokens | {' | '.join(columns)} |", f"|{' --- |' * 2}{' ---: |' * len(columns)}"]
    for cell in cells:
        entries = [*ratios(cell["loop"], own, names), *ratios(cell["graph"], own, names)]
        star = "" if cell["larger_than_L2"] else " *"
        lines.append(f"| {cell['label']}{star} | {cell['tokens']} | {' | '.join(entries)} |")
    return lines


def ratios(times: dict[str, list[float]], own: str, names: Sequence[str]) -> list[str]:
    if own not in times:
        return ["-"] * (1 + len(names))
    middle, low, high = times[own]
    others = [f"{times[key][0] / middle:.2f}" if key in times else "-" for key in names]
    return [f"{middle:.4g} ({low:.4g} to {high:.4g})", *others]


SPANS = ((4, "up to 4"), (16, "5 to 16"))


def order_table(results: list[dict[str, Any]]) -> list[str]:
    """Whether dispatch.GPU_ORDER has the faster engine first."""
    table: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for cell in map(_data, results):
        if "row" not in cell or "cuda" not in cell["loop"]:
            continue
        # Triton's time over CUDA's, of calls one by one and of graphs.
        pair = [
            times[key][0] / times["cuda"][0]
            for times in (cell["loop"], cell["graph"])
            for key in ("triton", "fused")
            if key in times
        ]
        if len(pair) == 2:
            tokens = next((span for most, span in SPANS if cell["tokens"] <= most), "more")
            table[cell["row"], cell["kind"].split()[-1], tokens].append(pair)
    if not table:
        return []
    lines = [
        "## Who comes first",
        "",
        "The rows of dispatch.GPU_ORDER, whom each asks first, and in how many of the cells under "
        "Timing that had both engines CUDA's was faster: called one by one, and as CUDA graphs. "
        "Behind them Triton's time over CUDA's, of graphs: the median, the least and the greatest.",
        "",
        "| row | order | | tokens | cells | cuda faster | cuda faster, graph | triton / cuda |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows, measured = list(dispatch.GPU_ORDER), {row for row, *_ in table}
    for (row, kind, tokens), cells in sorted(table.items(), key=lambda e: rows.index(e[0][0])):
        who = ", ".join(dispatch.GPU_ORDER[row])
        wins = [sum(pair[i] > 1 for pair in cells) for i in (0, 1)]
        some = [pair[1] for pair in cells]
        spread = f"{median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
        lines.append(
            f"| {row} | {who} | {kind} | {tokens} | {len(cells)} | {wins[0]} | {wins[1]} "
            f"| {spread} |"
        )
    return [*lines, *(f"\nNo cell of the row: {row}." for row in rows if row not in measured), ""]


def tuning_lines(results: list[dict[str, Any]]) -> list[str]:
    records = [_data(r) for r in results if r["section"] == "tuning" and r["state"] == PASSED]
    if not records:
        return []
    better = [r for r in records if r["best"] != r["rule"]]
    simulated = any(r["device"] == "simulated" for r in records)
    clock = " Times are counts of simulated instructions, not times." * simulated
    head = f"{len(better)} of {len(records)} cases have a tile that beats the rule's.{clock}"
    return ["## Tuning", "", head, "", *(f"- {tune.line(r)}" for r in better), ""]
