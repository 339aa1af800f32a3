"""Products of two to eight equal factors, the ground of FastKron: three groups of ``layers``.

    python -m benchmarks layers --only many_factors

measures the first, which alone has FastKron, by its own x86 kernels; ``many_factors_columns`` has
vectors as columns, and ``many_factors_training`` gradients. Nobody forms the product, or a part of
it, ahead of the call.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks import layers

run = layers.run


def tables(results: dict[str, Any]) -> list[Table | str]:
    facts = {key: value for key, value in results["machine"].items() if key != "peers"}
    shown: list[Table | str] = [", ".join(f"{key} {value}" for key, value in facts.items())]
    for group in layers.MANY:
        if rows := layers.rows_of(results, group):
            table = layers.table(group, rows, facts["gemm_gflops"])
            shown += [table, *layers.remarks(rows), layers.summary(group, rows), ""]
    return shown
