"""Measure tiles for the Triton kernels on this GPU and write its table.

    python -m benchmarks.tune --quick

For every case (a product's geometry, a dtype, a number of tokens) the rule's tile and its
neighbours take turns, each held to the rule's result first; the fastest is the next to have its
neighbours tried. It goes into the device's table, kron_kernels/backends/tuned/<device>.json, if it
beats the rule's by more than 3 %. Every finished case is a line of the measurements' file, from
which a later run goes on.

float16 and bfloat16 are measured. float32 keeps the rule's tiles, and so do the factors' gradients
and the fused feed-forward block, which do not look into the table.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import clocks, simulated
from benchmarks.gpu.jobs import Job, NotDone, Place
from kron_kernels.backends.triton import configs as triton_launch
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.backends.triton.configs import Geometry, Tile
from kron_kernels.shapes import KronShape
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import DECODER, PRESETS, SQUARES
from kron_kernels.testing.checks import require

BETTER = 1.03  # what a tile must gain to replace the rule's
NO_GPU = (
    "PyTorch finds no GPU here, and this command measures one; --simulate runs its checks, with "
    "small sizes and without timing, in the simulator of tests/gpu/simulator."
)
_SUMS = 192 * 1024  # bytes of sums in a candidate: beyond it a thread has no registers for them
_MIX = 192  # entries a thread of what is mixed in registers


class Case(NamedTuple):
    """What has a tile of its own."""

    shape: KronShape
    dtype: torch.dtype
    tokens: int
    products: int = 1

    @property
    def geometry(self) -> Geometry:
        return triton_launch.geometry(self.shape)

    @property
    def key(self) -> str:
        return triton_launch.key(self.geometry, self.tokens, self.dtype, self.products)


def cases(quick: bool) -> list[Case]:
    """Every case once, whatever shapes share it."""
    # A gradient of x is a product with the transposed factors.
    layers = [*PRESETS.values(), *SQUARES]
    layers += [s.transposed for s in layers]
    tokens = (16, 1024, 16384) if quick else [2**i for i in range(17)]
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16)
    found = [Case(s, dtype, t) for dtype in dtypes for s in layers for t in tokens]
    # Of KroneckerBERT's attentions, kron_qkv multiplies this one in one launch.
    found += [Case(PRESETS["21x attention"], dtype, t, 3) for dtype in dtypes for t in tokens]
    found += [Case(DECODER, dtype, t) for dtype in dtypes for t in tokens if t <= 4096]
    return list({case.key: case for case in found}.values())


@contextmanager
def forced(key: str, tile: Tile) -> Iterator[None]:
    """Within, the launches of this key take this tile."""
    before = triton_launch._table
    triton_launch._table = lambda device: {key: tile}
    try:
        yield
    finally:
        triton_launch._table = before


def neighbours(g: Geometry, t: Tile, products: int = 1) -> list[Tile]:
    """Tiles that differ from this one in a number or two, without those that cannot run."""
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
    """Whether a tile has the least size of matrix instructions and room in the registers."""
    power_of_two = triton_launch.power_of_two
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


@dataclass
class Bench:
    """Where and how candidates are measured."""

    device: str  # "cuda" or "cpu"
    clock: clocks.Clock
    rounds: int = 3  # of neighbours of the best so far

    @property
    def name(self) -> str:
        return triton_launch.device_of(torch.empty(0, device=self.device)).name


def operands(case: Case, bench: Bench) -> list[tuple[Tensor, list[triton_gpu.Layer]]]:
    """Sets of x and layers, together larger than the L2 cache."""
    s = case.shape
    new = {"device": bench.device, "dtype": case.dtype}

    def layer() -> triton_gpu.Layer:
        a = torch.randn(s.rank, s.m1, s.n1, **new) / s.n1**0.5
        b = torch.randn(s.rank, s.m2, s.n2, **new) / (s.n2 * s.rank) ** 0.5
        return a, b, torch.randn(s.out_features, **new)

    each = case.tokens * (s.in_features + case.products * s.out_features) + s.parameters
    sets = clocks.rotation(each * case.dtype.itemsize) if bench.device == "cuda" else 1
    return [
        (torch.randn(case.tokens, s.in_features, **new), [layer() for _ in range(case.products)])
        for _ in range(sets)
    ]


def launch(key: str, tile: Tile, x: Tensor, layers: Sequence[triton_gpu.Layer]) -> list[Tensor]:
    with forced(key, tile):
        if len(layers) > 1:
            return triton_gpu.kron_qkv(x, layers)
        ((a, b, bias),) = layers
        return [triton_gpu.kron_matmul(x, (a, b), bias)]


def tune_case(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure a case: the rule's tile, the best, and what became of every candidate."""
    torch.manual_seed(0)
    sets = operands(case, bench)
    device = triton_launch.device_of(sets[0][0])
    itemsize = case.dtype.itemsize
    rule = triton_launch.rule(case.geometry, case.tokens, itemsize, False, device, case.products)
    expected = [y.double() for y in launch(case.key, rule, *sets[0])]
    best, times, wrong, left_out = rule, {}, {}, Counter()
    for _ in range(bench.rounds):
        new = [best, *neighbours(case.geometry, best, case.products)]
        # The best takes turns with its neighbours again: times of one round may be compared.
        fit = [t for t in new if t == best or (t not in times and t not in wrong)]
        fit = [t for t in fit if _fits(case, t, sets[0], expected, wrong, left_out)]
        calls = {_words(t): [partial(launch, case.key, t, *one) for one in sets] for t in fit}
        found = bench.clock(calls)
        times |= {t: found[_words(t)] for t in fit}
        fastest = min(fit, key=lambda t: found[_words(t)].median)
        if found[_words(best)].median <= BETTER * found[_words(fastest)].median:
            break
        best = fastest
    if best != rule:  # once more, the two alone
        pair = {
            _words(t): [partial(launch, case.key, t, *one) for one in sets] for t in (rule, best)
        }
        found = bench.clock(pair)
        times |= {t: found[_words(t)] for t in (rule, best)}
        if times[rule].median <= BETTER * times[best].median:
            best = rule
    return {
        "device": device.name, "key": case.key, "rounds": bench.rounds, "sets": len(sets),
        "rule": asdict(rule), "best": asdict(best),
        "gain": times[rule].median / times[best].median,
        "times": {_words(t): list(timing) for t, timing in times.items()},
        "left_out": dict(left_out), "wrong": {_words(t): why for t, why in wrong.items()},
    }  # fmt: skip


def _fits(
    case: Case,
    t: Tile,
    operands: tuple[Tensor, list[triton_gpu.Layer]],
    expected: list[Tensor],
    wrong: dict[Tile, str],
    left_out: Counter[str],
) -> bool:
    """Whether a candidate compiles, fits the GPU, and gives the rule's result."""
    try:
        ys = launch(case.key, t, *operands)
        terms = case.shape.rank * (case.shape.n1 + case.shape.n2)
        for y, other in zip(ys, expected, strict=True):
            assert_close("y", y, other, terms, slack=8)  # both are rounded
    except AssertionError as error:
        wrong[t] = str(error)
        return False
    except Exception as error:  # of the compiler, or of what a program may have
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the GPU is lost to this process
        left_out[type(error).__name__] += 1
        return False
    return True


def _words(t: Tile) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(t).items())


# --- measurements and the table


def measured(path: Path, device: str, rounds: int = 0) -> dict[str, dict[str, Any]]:
    """The cases that a file has of this device, by key, of at least so many rounds.

    A line that a kill tore off is none.
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
    """Add a case to the file, and write the device's table with all of them."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    write_table(record["device"], measured(path, record["device"]))


def write_table(device: str, records: Mapping[str, dict[str, Any]]) -> Path:
    """Of earlier entries those that were not measured now stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no table yet
        table = dict(triton_launch._table(device))
    for key, record in records.items():
        table.pop(key, None)
        if record["best"] != record["rule"]:
            table[key] = Tile(**record["best"])
    return triton_launch.save(device, table)


def line(record: dict[str, Any]) -> str:
    """What became of a case."""
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


def run(some: Sequence[Case], bench: Bench, path: Path) -> list[dict[str, Any]]:
    """Measure the cases that the file does not have; print what becomes of each."""
    done = measured(path, bench.name, bench.rounds)
    for case in some:
        if case.key not in done:
            done[case.key] = tune_case(case, bench)
            keep(path, done[case.key])
            print(line(done[case.key]), flush=True)
    return [done[case.key] for case in some]


SIMULATED = [Case(KronShape(4, 2, 16, 32), torch.float16, 16)]


# --- as a section of benchmarks.gpu


def tuning_jobs(place: Place) -> list[Job]:
    some = SIMULATED if place.simulated else cases(place.quick)
    return [Job("tuning", case.key, partial(tuned, case=case), "triton") for case in some]


def tuned(place: Place, case: Case) -> dict[str, Any]:
    bench = Bench(place.device, place.clock, 1 if place.quick else 3)
    try:
        (record,) = run([case], bench, place.out / "tuning.jsonl")
    except torch.OutOfMemoryError:
        raise NotDone("the GPU's memory does not hold it") from None
    require(not record["wrong"], f"tiles with a wrong result: {record['wrong']}")
    return record


# --- the command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and candidates")
    parser.add_argument("--out", type=Path, default=Path("tuning.jsonl"), help="the measurements")
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    rounds = 1 if args.quick else 3
    if args.simulate:
        with simulated.clock(args.out.parent / "tuned") as clock:
            records = run(SIMULATED, Bench("cpu", clock, rounds), args.out)
    elif not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    else:
        records = run(cases(args.quick), Bench("cuda", clocks.graph_clock, rounds), args.out)
    better = sum(record["best"] != record["rule"] for record in records)
    print(f"{len(records)} cases; in {better} a tile beats the rule's by more than 3 %")
    return 1 if any(record["wrong"] for record in records) else 0
