"""Tiles for the Triton kernels, measured on a GPU and written to its table.

For each case (a product's geometry, a dtype, a number of tokens) the rule's tile and its neighbours
take turns, after a comparison with the rule's result. The fastest is the next whose neighbours are
tried. It enters the device's table, kron_kernels/backends/triton/tuned/<device>.json, if it beats
the rule's tile by more than 3 %. Each finished case is a line in the file of measurements, from
which a later run continues.

float16 and bfloat16 are measured. float32, the factors' gradients and the fused feed-forward block
keep the rule's tiles; the latter two do not read the table.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.contenders import Layer, Workload, fresh_layer
from benchmarks.gpu.timing import Gpu
from kron_kernels.backends.triton import configs, launch
from kron_kernels.backends.triton.configs import Geometry, Tile
from kron_kernels.shapes import KronShape
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import DECODER, PRESETS, SQUARES
from kron_kernels.timing import Timing

BETTER = 1.03  # a tile must be this much faster to replace the rule's
_SUMS = 192 * 1024  # bytes of sums in a candidate; a block has no registers for more
_MIX = 192  # entries that a thread mixes in registers


class Case(NamedTuple):
    """A product that has its own entry in the table."""

    shape: KronShape
    dtype: torch.dtype
    tokens: int
    products: int = 1

    @property
    def geometry(self) -> Geometry:
        return configs.geometry(self.shape)

    @property
    def key(self) -> str:
        return configs.key(self.geometry, self.tokens, self.dtype, self.products)


def cases(quick: bool) -> list[Case]:
    """Every case once, even if several shapes share it."""
    # A gradient of x is a product with the transposed factors.
    layers = [*PRESETS.values(), *SQUARES]
    layers += [s.transposed for s in layers]
    tokens = (16, 1024, 16384) if quick else [2**i for i in range(17)]
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16)
    found = [Case(s, dtype, t) for dtype in dtypes for s in layers for t in tokens]
    # The attention whose three products kron_qkv makes in one launch.
    found += [Case(PRESETS["21x attention"], dtype, t, 3) for dtype in dtypes for t in tokens]
    found += [Case(DECODER, dtype, t) for dtype in dtypes for t in tokens if t <= 4096]
    return list({case.key: case for case in found}.values())


def cases_of(workloads: Sequence[Workload]) -> list[Case]:
    """The products that these workloads launch by our kernels, each once, in their order."""
    found = []
    for w in workloads:
        dtype = getattr(torch, w.dtype, None)
        if dtype not in (torch.float16, torch.bfloat16):
            continue
        training = w.kind.endswith("training")
        # Blocks of these shapes are one kernel, which does not read the table.
        for s in w.shapes[:1] if w.kind in ("forward", "training", "qkv forward") else ():
            found.append(Case(s, dtype, w.tokens, len(w.shapes)))
            if training:  # a gradient of x is a product with the transposed factors
                found.append(Case(s.transposed, dtype, w.tokens))
    return list({case.key: case for case in found}.values())


def neighbours(g: Geometry, t: Tile, products: int = 1) -> list[Tile]:
    """Tiles that differ from this one in one or two numbers, and can run."""
    changes = [
        *({"tokens": n} for n in (2 * t.tokens, t.tokens // 2)),
        *({"depth": n} for n in (2 * t.depth, t.depth // 2)),
        *({"columns": n} for n in (2 * t.columns, t.columns // 2)),
        *({"tiles": n} for n in (2 * t.tiles, ceil(t.tiles / 2))),
        {"columns": 2 * t.columns, "tiles": ceil(t.tiles / 2)},
        {"warps": 12 - t.warps},
        {"tokens": 2 * t.tokens, "warps": 8},
        *({"stages": n} for n in (1, 2, 3, 4)),
    ]
    tiles = [replace(t, **change) for change in changes]
    tiles = [replace(n, tiles=min(n.tiles, ceil(g.N / n.columns))) for n in tiles if n.columns]
    return [n for n in dict.fromkeys(tiles) if n != t and possible(g, n, products)]


def possible(g: Geometry, t: Tile, products: int = 1) -> bool:
    """Whether a tile is large enough for matrix instructions and fits the registers."""
    power_of_two = configs.power_of_two
    held = 0 if g.by_dot else power_of_two(g.O) + power_of_two(g.U) * g.inner
    return (
        t.tokens >= 1
        and t.tokens * g.vectors >= 16
        and 16 <= t.depth < max(17, 2 * g.K)
        and 16 <= t.columns < max(17, 2 * g.N)
        and products * t.tokens * g.sums * t.columns * t.tiles * 4 <= _SUMS
        and (not g.mix_first or t.tokens * t.depth * held <= _MIX * 32 * t.warps)
    )


# --- one case


def operands(case: Case, gpu: Gpu) -> list[tuple[Tensor, list[Layer]]]:
    """Sets of x and layers, together larger than the L2 cache."""
    s, products = case.shape, range(case.products)
    each = case.tokens * (s.in_features + len(products) * s.out_features) + s.parameters
    sets = gpu.rotation(each * case.dtype.itemsize)
    new = {"device": gpu.device, "dtype": case.dtype}
    return [
        (
            torch.randn(case.tokens, s.in_features, **new),
            [fresh_layer(s, **new) for _ in products],
        )
        for _ in range(sets)
    ]


def run(key: str, tile: Tile, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """Launch the product, or the products of one x, with this tile."""
    with patch.object(configs, "_table", lambda device: {key: tile}):
        if len(layers) > 1:
            return launch.kron_qkv(x, layers)
        ((a, b, bias),) = layers
        return [launch.kron_matmul(x, (a, b), bias)]


def tune_case(case: Case, gpu: Gpu, rounds: int) -> dict[str, Any]:
    """Measure a case, in this many rounds of neighbours of the best tile so far.

    Returns:
        A record of the rule's tile, the best, and the times or failures of all candidates.
    """
    torch.manual_seed(0)
    sets = operands(case, gpu)
    device = configs.device_of(sets[0][0])
    itemsize = case.dtype.itemsize
    rule = configs.rule(case.geometry, case.tokens, itemsize, False, device, case.products)
    expected = [y.double() for y in run(case.key, rule, *sets[0])]
    best, times, wrong, left_out = rule, {}, {}, Counter()

    def time(tiles: list[Tile]) -> dict[Tile, Timing]:
        calls = {t: [partial(run, case.key, t, *one) for one in sets] for t in tiles}
        found = gpu.time_graphs(calls)
        times.update(found)
        return found

    for _ in range(rounds):
        new = [best, *neighbours(case.geometry, best, case.products)]
        # The best tile is timed again: only times of one round can be compared.
        fit = [t for t in new if t == best or (t not in times and t not in wrong)]
        fit = [t for t in fit if _fits(case, t, sets[0], expected, wrong, left_out)]
        found = time(fit)
        fastest = min(fit, key=lambda t: found[t].median)
        if found[best].median <= BETTER * found[fastest].median:
            break
        best = fastest
    if best != rule:
        time([rule, best])  # the two alone once more
        if times[rule].median <= BETTER * times[best].median:
            best = rule
    return {
        "device": device.name,
        "key": case.key,
        "rounds": rounds,
        "sets": len(sets),
        "rule": asdict(rule),
        "best": asdict(best),
        "gain": times[rule].median / times[best].median,
        "times": {_text(t): list(timing) for t, timing in times.items()},
        "left_out": dict(left_out),
        "wrong": {_text(t): why for t, why in wrong.items()},
    }


def _fits(
    case: Case,
    t: Tile,
    operands: tuple[Tensor, list[Layer]],
    expected: list[Tensor],
    wrong: dict[Tile, str],
    left_out: Counter[str],
) -> bool:
    """Whether a candidate compiles, runs, and gives the rule's result; else note the reason."""
    try:
        ys = run(case.key, t, *operands)
        terms = case.shape.rank * (case.shape.n1 + case.shape.n2)
        for y, other in zip(ys, expected, strict=True):
            assert_close("y", y, other, terms, slack=8)  # both are rounded
    except AssertionError as error:
        wrong[t] = str(error)
        return False
    except Exception as error:  # the compiler's, or too much shared memory
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the GPU is lost
        left_out[type(error).__name__] += 1
        return False
    return True


def _text(t: Tile) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(t).items())


# --- measurements and the table


def measured(path: Path, device: str, rounds: int = 0) -> dict[str, dict[str, Any]]:
    """Records of a device in a file, by key, with at least this many rounds.

    A line cut short by a kill is ignored.
    """
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["device"] == device and record["rounds"] >= rounds:
            found[record["key"]] = record
    return found


def keep(path: Path, record: dict[str, Any]) -> None:
    """Append a record to the file, and write the device's table from all of its records."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    write_table(record["device"], measured(path, record["device"]))


def write_table(device: str, records: Mapping[str, dict[str, Any]]) -> Path:
    """Update the device's table; entries without a record stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table may not exist yet
        table = dict(configs._table(device))
    for key, record in records.items():
        table.pop(key, None)
        if record["best"] != record["rule"]:
            table[key] = Tile(**record["best"])
    return configs.save(device, table)


def summary(record: dict[str, Any]) -> str:
    """One line on a record."""
    tried = f"{len(record['times'])} tiles measured"
    if record["left_out"]:
        tried += f", {sum(record['left_out'].values())} left out"
    if record["wrong"]:
        tried += f", {len(record['wrong'])} WRONG"
    if record["best"] == record["rule"]:
        return f"{record['key']}: the rule's tile stays ({tried})"
    changes = ", ".join(
        f"{name} {record['rule'][name]} to {value}"
        for name, value in record["best"].items()
        if value != record["rule"][name]
    )
    return f"{record['key']}: {record['gain']:.2f}x by {changes} ({tried})"


def tune(case: Case, gpu: Gpu, rounds: int, path: Path) -> dict[str, Any]:
    """Return the case's record from the file, or measure it and write file and table."""
    device = configs.device_of(torch.empty(0, device=gpu.device)).name
    if record := measured(path, device, rounds).get(case.key):
        return record
    record = tune_case(case, gpu, rounds)
    keep(path, record)
    return record
