"""The command for owners of a GPU, and the tuner, as far as they go without one."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import emulator
import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

from benchmarks.gpu.correctness import of_engine  # noqa: E402

from benchmarks.gpu import (  # noqa: E402
    __main__,
    clocks,
    contenders,
    correctness,
    simulated,
    tune,
)
from benchmarks.gpu.blocks import unknown_ids  # noqa: E402
from benchmarks.gpu.contenders import Cell  # noqa: E402
from benchmarks.gpu.jobs import ENGINES, Job, Place, attempt  # noqa: E402
from benchmarks.gpu.processes import in_processes, read_lines  # noqa: E402
from benchmarks.gpu.products import forward, strides  # noqa: E402
from benchmarks.gpu.report import not_done, order_table, timing_tables  # noqa: E402
from benchmarks.gpu.timing import time_cell  # noqa: E402
from kron_kernels import KronShape, dispatch  # noqa: E402
from kron_kernels.backends import cuda  # noqa: E402
from kron_kernels.backends.triton import configs as triton_launch  # noqa: E402
from kron_kernels.backends.triton import launch as triton_gpu  # noqa: E402
from kron_kernels.backends.triton.configs import Tile  # noqa: E402
from kron_kernels.timing import Timing  # noqa: E402

TINY = tune.Case(KronShape(4, 2, 16, 32), torch.float16, 16)
OTHER = tune.Case(KronShape(3, 4, 5, 2), torch.float16, 4)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def report_of(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


# --- the command


@pytest.mark.parametrize("module", [__main__, tune])
def test_without_a_gpu_it_says_so(module, tmp_path, capsys):
    assert module.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no GPU" in said and "--simulate" in said
    assert not (tmp_path / "out").exists()


def test_a_simulated_quick_run_reports_what_was_not_done(tmp_path):
    assert __main__.main(["--simulate", "--quick", "--out", str(tmp_path)]) == 0
    report, text = report_of(tmp_path)
    assert report["simulated"] and "failed" not in report["counts"]
    states = {(r["section"], r["state"]) for r in report["results"]}
    assert {s for s, state in states if state == "passed"} == {
        "environment",
        "correctness",
        "tuning",
    }
    assert ("timing", "passed") not in states
    gaps = "\n".join(report["not_done"])
    words = "no clock", "no CUDA graphs", "no streams", "one GPU", "nothing here was run on one"
    for word in words:
        assert word in gaps and word in text
    assert "Nothing that was done failed" in text and str(ROOT) not in text
    assert not (ROOT / "kron_kernels/backends/tuned/simulated.json").exists()


def test_a_wrong_kernel_is_a_failure(tmp_path, monkeypatch, capsys):
    right, some = triton_gpu.kron_matmul, []

    def wrong(*operands):
        return right(*operands) + 1

    monkeypatch.setattr(triton_gpu, "kron_matmul", wrong)
    monkeypatch.setattr(correctness, "_shape_jobs", lambda place: [])
    monkeypatch.setattr(correctness, "_few_jobs", lambda: some)
    monkeypatch.setattr(correctness, "_simulated_cuda_jobs", lambda: [])
    some.append(Job("forward", "strides", strides))
    some.append(Job("tables", "ids that are no rows", unknown_ids))
    arguments = ["--simulate", "--quick", "--only", "correctness", "--out", str(tmp_path)]
    assert __main__.main(arguments) == 1
    report, text = report_of(tmp_path)
    assert report["counts"] == {"failed": 1, "passed": 1}
    (failed,) = (r for r in report["results"] if r["state"] == "failed")
    assert "in units of" in failed["message"] and "assert_close" in failed["traceback"]
    assert text.index("## Failures") < text.index("## What was done")
    assert "strides FAILED" in capsys.readouterr().err
    assert any("section timing" in gap for gap in report["not_done"])


@contextmanager
def emulated_cuda():
    from simulator.cuda import serving

    with serving(emulator.load()):
        yield


needs_emulator = pytest.mark.skipif(bool(emulator.why_not()), reason=str(emulator.why_not()))


@needs_emulator
def test_each_engine_is_checked_by_its_own_kernels(tmp_path, monkeypatch):
    """CUDA's are wrong here, the emulator standing for its simulator."""
    right, up = cuda.kron_matmul, KronShape(32, 32, 24, 24)  # which CUDA's kernels do not serve
    monkeypatch.setattr(cuda, "kron_matmul", lambda *operands: right(*operands) + 1)
    monkeypatch.setattr(simulated, "cuda", emulated_cuda)
    large = partial(forward, s=up, name="float16", tokens=2, turn=0)
    some = [
        Job("forward", "strides", strides),
        Job("forward", "large", large),
        Job("tables", "ids that are no rows", unknown_ids),
    ]
    jobs = [job for engine in ENGINES for job in of_engine(engine, some)]
    place = Place("cpu", True, tmp_path, None)
    with simulated.clock(tmp_path / "tuned"):
        results = [attempt("correctness", job, place) for job in jobs]
    assert {r["name"]: r["state"] for r in results} == {
        "triton: strides": "passed",
        "triton: large": "passed",
        "triton: ids that are no rows": "passed",
        "cuda: strides": "failed",
        "cuda: large": "not done",
    }
    assert "sides of 64 at most" in "\n".join(not_done(results))


def test_a_missing_engine_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda *operands: "there are no such kernels")
    monkeypatch.setattr(simulated, "cuda", nullcontext)
    jobs = of_engine("cuda", correctness._few_jobs())
    place = Place("cpu", True, tmp_path, None)
    results = [attempt("correctness", job, place) for job in jobs]
    assert {r["state"] for r in results} == {"not done"} and len(results) > 5
    (line,) = not_done(results)
    assert "cuda: strides" in line and line.endswith("there are no such kernels")


def test_a_command_that_dies_or_hangs_costs_one_job(tmp_path):
    """What stands for a section's process: job 1 crashes, job 3 hangs, job 4 loses the GPU."""
    jobs = [Job("group", f"job {i}", lambda place: None) for i in range(6)]
    lines = tmp_path / "lines"
    child = """
import json, os, sys, time
path, first = sys.argv[1], int(sys.argv[2])
for i in range(first, 6):
    if i == 1: os.abort()
    if i == 3: time.sleep(60)
    with open(path, "a") as file:
        state = "failed" if i == 4 else "passed"
        file.write(json.dumps({"name": f"job {i}", "state": state}) + "\\n")
    if i == 4: sys.exit(3)
"""
    start = [sys.executable, "-c", child, str(lines)]
    in_processes("timing", jobs, lines, lambda first: [*start, str(first)], patience=2)
    results = read_lines(lines)
    assert [r["name"] for r in results] == [job.name for job in jobs]
    assert [r["state"] == "passed" for r in results] == [True, False, True, False, False, True]
    assert "exit status" in results[1]["message"] and "no result for 2 s" in results[3]["message"]


def test_processes_that_end_at_once_are_not_started_for_ever(tmp_path):
    jobs = [Job("group", f"job {i}", lambda place: None) for i in range(50)]
    lines, starts = tmp_path / "lines", []

    def command(first):
        starts.append(first)
        return [sys.executable, "-c", "raise SystemExit(1)"]

    in_processes("timing", jobs, lines, command)
    assert len(starts) == 2
    states = [r["state"] for r in read_lines(lines)]
    assert states == ["failed"] * 2 + ["not done"] * 48


def test_a_section_in_a_process_of_its_own(tmp_path):
    """The child's side of it, by the simulator."""
    flags = ["--simulate", "--quick", "--out", str(tmp_path), "--child", "environment", "0"]
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", *flags], cwd=ROOT, check=True)
    (result,) = read_lines(tmp_path / "jobs-environment.jsonl")
    assert result["state"] == "passed" and result["data"]["torch"] == torch.__version__


# --- timing, with a pretended clock


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that the simulator stands for, and every turn takes as long."""

    def by_events(turns, each, seconds):
        for turn in turns.values():
            turn()
        return {name: Timing(1e-3 * i, 1e-3 * i, 1e-3 * i) for i, name in enumerate(turns, 1)}

    def captured(calls, pool=None):
        return lambda: [call() for call in calls]

    monkeypatch.setattr(clocks, "by_events", by_events)
    monkeypatch.setattr(clocks, "captured", captured)
    monkeypatch.setattr(clocks, "rotation", lambda each: 2)
    monkeypatch.setattr(clocks, "cache_size", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Place, "needs_gpu", lambda self, why: None)
    with simulated.clock(tmp_path / "tuned") as clock:
        yield Place("cpu", True, tmp_path, clock)


UP, DOWN = KronShape(4, 2, 12, 24), KronShape(2, 4, 24, 12)


@pytest.mark.parametrize(
    "kind, shapes, names",
    [
        ("forward", (UP,), {"triton", "eager", "dense"}),
        ("training", (UP,), {"triton", "eager", "dense"}),
        ("block training", (UP, DOWN), {"fused", "calls", "dense"}),
        ("qkv forward", (UP,) * 3, {"fused", "calls", "dense"}),
    ],
)
def test_a_timing_cell_checks_and_times_everyone(kind, shapes, names, pretended):
    dtype = "float32" if kind == "training" else "float16"
    cell = Cell(kind, "a label", shapes, 5, dtype)
    job = Job(kind, str(cell), lambda place: time_cell(place, cell))
    result = attempt("timing", job, pretended)
    assert result["state"] == "passed", result
    data = json.loads(json.dumps(result))["data"]
    assert set(data["loop"]) == set(data["graph"]) >= names
    assert "a label" in "\n".join(timing_tables([result]))


BOTH = [
    ("forward", (UP,), {"triton", "cuda", "eager"}),
    ("block training", (UP, DOWN), {"fused", "calls", "cuda", "cuda calls"}),
    ("qkv forward", (UP,) * 3, {"fused", "calls", "cuda", "cuda calls"}),
]


@needs_emulator
@pytest.mark.parametrize("kind, shapes, names", BOTH)
def test_both_engines_are_timed_and_compared_by_the_order(kind, shapes, names, pretended):
    results = []
    for tokens in (1, 19):
        cell = Cell(kind, "a label", shapes, tokens, "float16")
        job = Job(kind, str(cell), partial(time_cell, cell=cell))
        with emulated_cuda():
            results.append(attempt("timing", job, pretended))
    assert [r["state"] for r in results] == ["passed"] * 2, results
    assert all(set(r["data"]["loop"]) == set(r["data"]["graph"]) >= names for r in results)
    header = next(line for line in timing_tables(results) if "tokens" in line)
    assert " cuda |" in header and " cuda, graph |" in header
    # The pretended clock gives the first contender, Triton's, one unit, and CUDA's more.
    table = order_table(results)
    (few,) = (line for line in table if "| up to 4 tokens |" in line)
    assert f"| cuda, triton | {kind.split()[-1]} | up to 4 | 1 | 0 | 0 | 0." in few
    (more,) = (line for line in table if "| more |" in line)
    assert " | 1 | 0 | 0 | 0." in more
    assert sum("No cell of the row" in line for line in table) == len(dispatch.GPU_ORDER) - 2


def test_a_wrong_contender_is_left_out_and_one_of_ours_fails(pretended, monkeypatch):
    cell = Cell("forward", "a label", (UP,), 5, "float16")
    monkeypatch.setattr(contenders, "dense_call", lambda cell, x, layers: x.new_zeros(5, 48))
    assert "dense" in time_cell(pretended, cell)["left_out"]
    right = triton_gpu.kron_matmul
    monkeypatch.setattr(triton_gpu, "kron_matmul", lambda *o, **more: right(*o, **more) + 1)
    with pytest.raises(AssertionError, match="in units of"):
        time_cell(pretended, cell)


# --- the tuner


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """With a rule that is easily beaten."""
    bad = Tile(tokens=8, depth=16, columns=16, tiles=1, warps=8, stages=2)
    monkeypatch.setattr(triton_launch, "rule", lambda *case: bad)
    with simulated.clock(tmp_path / "tuned") as clock:
        yield tune.Bench("cpu", clock, rounds=1)


def test_the_tuner_writes_a_table_that_launches_take(bench, tmp_path):
    (record,) = tune.run([TINY], bench, tmp_path / "tuning.jsonl")
    assert record["gain"] > tune.BETTER and not record["wrong"] and len(record["times"]) > 4
    best = Tile(**record["best"])
    assert best != Tile(**record["rule"])
    device = triton_launch.SIMULATED
    assert triton_launch.tile(TINY.geometry, 16, torch.float16, False, device) == best
    assert triton_launch.tile(TINY.geometry, 9, torch.float16, False, device) == best
    assert triton_launch.tile(TINY.geometry, 8, torch.float16, False, device) != best
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["simulated.json"]


def test_the_tuner_by_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "SIMULATED", [OTHER])
    path = tmp_path / "tuning.jsonl"
    assert tune.main(["--simulate", "--quick", "--out", str(path)]) == 0
    assert list(tune.measured(path, "simulated")) == [OTHER.key]
    said = capsys.readouterr().out
    assert OTHER.key in said and "1 cases" in said
    assert not triton_launch.simulating and triton_launch.TUNED.name == "tuned"


def test_an_interrupted_run_goes_on_where_it_was(bench, tmp_path, monkeypatch):
    path, seen = tmp_path / "tuning.jsonl", []
    real = tune.tune_case

    def interrupted(case, bench):
        seen.append(case)
        if case == OTHER and seen.count(OTHER) == 1:
            raise KeyboardInterrupt
        return real(case, bench)

    monkeypatch.setattr(tune, "tune_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run([TINY, OTHER], bench, path)
    (tmp_path / "tuned" / "simulated.json").unlink()
    triton_launch._table.cache_clear()
    with path.open("a") as file:
        file.write('{"device": "simul')  # torn off
    tune.run([TINY, OTHER], bench, path)
    assert seen == [TINY, OTHER, OTHER]
    assert set(tune.measured(path, "simulated")) == {TINY.key, OTHER.key}
    table = json.loads((tmp_path / "tuned" / "simulated.json").read_text())
    assert TINY.key in table  # with what was measured before the interruption


def test_candidates_that_do_not_compile_are_counted_and_wrong_ones_named(bench, monkeypatch):
    launch = tune.launch

    def planted(key, tile, *operands):
        if tile.warps == 4:
            raise RuntimeError("out of resource")
        ys = launch(key, tile, *operands)
        return [y + 1 for y in ys] if tile.stages == 4 else ys

    monkeypatch.setattr(tune, "launch", planted)
    record = tune.tune_case(TINY, bench)
    assert record["left_out"] == {"RuntimeError": 1}
    (wrong,) = record["wrong"]
    assert "stages 4" in wrong and "1 WRONG" in tune.line(record)


def test_only_possible_neighbours_are_tried():
    for case in tune.cases(quick=True):
        g, products = case.geometry, case.products
        t = triton_launch.rule(g, case.tokens, 2, False, triton_launch.SIMULATED, products)
        near = tune.neighbours(g, t, products)
        assert t not in near and len(set(near)) == len(near) > 3
        assert all(n.tokens * g.vectors >= 16 and min(n.depth, n.columns) >= 16 for n in near)
    assert len({case.key for case in tune.cases(quick=False)}) == len(tune.cases(quick=False))
