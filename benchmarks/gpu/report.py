"""The report: report.json with everything, report.md to read."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import tuning
from benchmarks.gpu.contenders import OURS
from benchmarks.gpu.journal import FAILED, NOT_DONE, PASSED, Result
from kron_kernels import dispatch
from kron_kernels.files import write_file

NEVER = [
    "KroneckerBERT's distillation and command line on a GPU",
    "training on several GPUs",
    "GPUs and versions of Triton other than those under Environment",
    "profilers: memory traffic and occupancy; sanitizers of what passed",
]


def write_report(
    out: Path,
    environment: dict[str, Any],
    results: list[Result],
    sections: Sequence[str],
    quick: bool,
    log: Sequence[str] = (),
) -> None:
    gaps = [
        f"the section {s}: it was not asked for"
        for s in ("correctness", "timing", "tuning")
        if s not in sections
    ]
    if quick:
        gaps.append("the cases that --quick leaves out")
    report = {
        "quick": quick,
        "sections": list(sections),
        "counts": dict(Counter(r.state for r in results)),
        "not_done": not_done(results) + gaps + NEVER,
        "environment": environment,
        "log": list(log),
        "results": [r._asdict() | {"group": r.group} for r in results],
    }
    write_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_file(out / "report.md", markdown(environment, results, report["not_done"], log))


def not_done(results: list[Result]) -> list[str]:
    """Skipped tests and contenders, a line for each reason."""
    reasons = defaultdict(list)
    for r in results:
        if r.state == NOT_DONE:
            reasons[r.section, r.message].append(r.name)
    lines = []
    for (section, why), names in reasons.items():
        others = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{section}: {'; '.join(names[:4])}{others}: {why}")
    for library, why in missing_contenders(results).items():
        lines.append(f"timing: {library}: {why}")
    return lines


def missing_contenders(results: list[Result]) -> dict[str, str]:
    """Contenders left out of every workload, with their first reason."""
    timed = timings(results)
    missing: dict[str, str] = {}
    for timing in timed:
        missing = timing["left_out"] | missing
    present = {key for timing in timed for key in timing["loop"]}
    return {k: why for k, why in missing.items() if k not in present}


def timings(results: list[Result]) -> list[dict[str, Any]]:
    """Data of the workloads that were timed."""
    return [r.data for r in results if r.section == "timing" and r.data and "loop" in r.data]


def markdown(
    environment: dict[str, Any], results: list[Result], gaps: list[str], log: Sequence[str] = ()
) -> str:
    counts = Counter(r.state for r in results)
    lines = [
        f"# kron_kernels on {environment.get('gpu', 'a GPU')}",
        "",
        f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[NOT_DONE]} not done.",
        "",
        *failures(results, environment),
        *groups(results),
        *timing_tables(results),
        *tuning_lines(results),
        "## Not done",
        "",
        *(f"- {line}" for line in gaps),
        "",
        "## Environment",
        "",
        *(f"- {key}: {value}" for key, value in environment.items()),
        "",
        *order_table(results),
        *(["## What was done when", "", *(f"- {line}" for line in log), ""] if log else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def failures(results: list[Result], environment: dict[str, Any]) -> list[str]:
    """Each with what a developer needs who has no such GPU."""
    failed = [r for r in results if r.state == FAILED]
    if not failed:
        return ["Nothing that was done failed.", ""]
    names = ("gpu", "driver_version", "python", "torch", "triton", "cuda", "commit")
    versions = ", ".join(f"{key} {environment[key]}" for key in names if environment.get(key))
    lines = ["## Failures", "", f"With {versions}.", ""]
    for r in failed:
        text = f"{r.message}\n{r.traceback}".strip()
        lines += [f"### {r.section}: {r.name}", "", "```", text, "```", ""]
        lines += evidence(r.evidence or {})
    return lines


def evidence(found: dict[str, Any]) -> list[str]:
    lines = []
    if "repeat" in found:
        lines += ["To repeat it, in the repository's folder:", "", "```sh", found["repeat"], "```"]
    if launches := found.get("launches"):
        lines += ["", "Its last launches, the latest at the end:", ""]
        lines += ["```", *launches, "```"]
    if ptx := found.get("ptx"):
        lines += ["", f"Their PTX: {', '.join(ptx)}."]
    if sanitizer := found.get("sanitizer"):
        lines += ["", "compute-sanitizer, of the case by itself:", "", "```", sanitizer, "```"]
    return [*lines, ""] if lines else []


def groups(results: list[Result]) -> list[str]:
    table = defaultdict(Counter)
    for r in results:
        table[r.section, r.group][r.state] += 1
    lines = ["## What was done", "", "| section | what | passed | failed | not done |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (section, group), n in table.items():
        lines.append(f"| {section} | {group} | {n[PASSED]} | {n[FAILED]} | {n[NOT_DONE]} |")
    return [*lines, ""]


def timing_tables(results: list[Result]) -> list[str]:
    """By kind and dtype: our first contender in microseconds, the others as multiples of it."""
    tables = defaultdict(list)
    for timing in timings(results):
        tables[timing["kind"], timing["dtype"]].append(timing)
    overhead = [r.data for r in results if r.name == "test_launch_overhead" and r.data]
    lines = ["## Timing", ""] if tables or overhead else []
    for call in overhead:
        lines += ["CPU time of launching one call, in microseconds:", ""]
        lines += [*(f"- {key}: {us}" for key, us in call.items()), ""]
    if tables:
        lines.append(
            "The first column in microseconds a call, the median and in brackets the quartiles; "
            "the others' medians as multiples of it. Ours are triton, or for blocks and qkv fused "
            "and calls, and cuda. Calls are made one by one, or replayed as a CUDA graph. "
            "A star marks operands that fit into the L2 cache."
        )
    for (kind, dtype), entries in tables.items():
        lines += ["", f"### {kind}, {dtype}", "", *ratio_table(entries)]
    return [*lines, ""] if lines else []


def ratio_table(timings: list[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(k for timing in timings for k in timing["loop"])
    own = next((key for key in OURS if key in keys), "ours")
    names = [key for key in keys if key != own]
    columns = [f"{key}{suffix}" for suffix in ("", ", graph") for key in (own, *names)]
    lines = [f"| | tokens | {' | '.join(columns)} |", f"|{' --- |' * 2}{' ---: |' * len(columns)}"]
    for timing in timings:
        entries = [*ratios(timing["loop"], own, names), *ratios(timing["graph"], own, names)]
        star = "" if timing["larger_than_L2"] else " *"
        length = timing.get("length")  # of a model's sequences
        tokens = f"{timing['tokens'] // length} x {length}" if length else timing["tokens"]
        lines.append(f"| {timing['label']}{star} | {tokens} | {' | '.join(entries)} |")
    return lines


def ratios(times: dict[str, list[float]], own: str, names: Sequence[str]) -> list[str]:
    if own not in times:
        return ["-"] * (1 + len(names))
    middle, low, high = times[own]
    others = [f"{times[key][0] / middle:.2f}" if key in times else "-" for key in names]
    return [f"{middle:.4g} ({low:.4g} to {high:.4g})", *others]


SPANS = ((4, "up to 4"), (16, "5 to 16"))


def order_table(results: list[Result]) -> list[str]:
    """Whether dispatch.GPU_ORDER has the faster engine first."""
    table: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for timing in timings(results):
        if "cuda" not in timing["loop"]:
            continue
        # Triton's time over CUDA's, of calls one by one and of graphs.
        pair = [
            times[key][0] / times["cuda"][0]
            for times in (timing["loop"], timing["graph"])
            for key in ("triton", "fused")
            if key in times
        ]
        if len(pair) == 2:
            tokens = next((span for most, span in SPANS if timing["tokens"] <= most), "more")
            table[timing["row"], timing["kind"].split()[-1], tokens].append(pair)
    if not table:
        return []
    lines = [
        "## The faster engine",
        "",
        "The rows of dispatch.GPU_ORDER, the engines in their order, and how many of the workloads "
        "under Timing with both engines were faster by CUDA's: called one by one, and as CUDA "
        "graphs. Then Triton's time over CUDA's, of graphs: median, minimum and maximum.",
        "",
        "| row | order | | tokens | workloads | cuda faster | cuda faster, graph | triton / cuda |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows, measured = list(dispatch.GPU_ORDER), {row for row, *_ in table}
    for (row, kind, tokens), pairs in sorted(table.items(), key=lambda e: rows.index(e[0][0])):
        order = ", ".join(dispatch.GPU_ORDER[row])
        wins = [sum(pair[i] > 1 for pair in pairs) for i in (0, 1)]
        ratios = [pair[1] for pair in pairs]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(
            f"| {row} | {order} | {kind} | {tokens} | {len(pairs)} | {wins[0]} | {wins[1]} "
            f"| {spread} |"
        )
    return [
        *lines,
        *(f"\nNo workload of the row: {row}." for row in rows if row not in measured),
        "",
    ]


def tuning_lines(results: list[Result]) -> list[str]:
    records = [r.data for r in results if r.section == "tuning" and r.data]
    if not records:
        return []
    better = [r for r in records if r["best"] != r["rule"]]
    head = f"{len(better)} of {len(records)} cases have a tile that beats the rule's."
    return ["## Tuning", "", head, "", *(f"- {tuning.summary(r)}" for r in better), ""]
