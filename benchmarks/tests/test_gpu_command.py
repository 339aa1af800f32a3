"""The command for GPU owners and its measurements, without a GPU."""

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__, contenders, environment, tuning
from benchmarks.gpu.contenders import Workload
from benchmarks.gpu.journal import FAILED, NOT_DONE, NOT_REACHED, PASSED, Journal, Result
from benchmarks.gpu.order import ordered
from benchmarks.gpu.report import not_done, order_table, timing_tables
from benchmarks.gpu.workloads import time_workload, workloads
from kron_kernels import KronShape, dispatch
from kron_kernels.backends.triton import configs, launch
from kron_kernels.backends.triton.configs import Tile

pytest_plugins = ["benchmarks.gpu.simulated"]
ROOT = Path(__file__).parents[2]
TINY = tuning.Case(KronShape(4, 2, 16, 32), torch.float16, 16)
OTHER = tuning.Case(KronShape(3, 4, 5, 2), torch.float16, 4)
UP, DOWN = KronShape(4, 2, 12, 24), KronShape(2, 4, 24, 12)


# --- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command as if there were a GPU; returns its exit status and report."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(__main__, "environment", lambda: ({"gpu": "no GPU"}, []))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    def run(sections, *pytest_arguments, plugin="", tests=""):
        """With a plugin of pytest, and other tests in place of those of correctness."""
        (tmp_path / "planted.py").write_text(plugin)
        if tests:
            path = tmp_path / "test_planted.py"
            path.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{tests}")
            monkeypatch.setitem(__main__.TESTS, "correctness", [str(path), "-c", "pyproject.toml"])
        arguments = ["--quick", "--only", *sections, "--out", str(tmp_path / "out")]
        status = __main__.main([*arguments, "--", "-p", "planted", *pytest_arguments])
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return status, report, (tmp_path / "out" / "report.md").read_text()

    return run


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "no GPU" in printed and "simulator" in printed
    assert not (tmp_path / "out").exists()


def test_the_environment_is_read_in_a_process_that_may_fail(monkeypatch):
    facts = environment.software()
    assert facts["torch"] == torch.__version__ and facts["triton"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found, (failed,) = __main__.environment()
    assert not found and failed.state == "failed" and "Traceback" in failed.traceback


@pytest.mark.slow
def test_measurements_by_the_command(command, tmp_path):
    """Of small cases, in the simulator."""
    plugin = f"""
from torch import float16
from benchmarks.gpu import tuning, workloads
from benchmarks.gpu.contenders import Workload
from benchmarks.gpu.simulated import gpu
from kron_kernels import KronShape
workloads.workloads = lambda quick: [Workload("forward", "a label", ({UP},), 5, "float16")]
tuning.cases = lambda quick: [tuning.Case({OTHER.shape}, float16, 4)] * quick
"""
    status, report, text = command(["timing", "tuning"], "-k", "not overhead", plugin=plugin)
    assert status == 0 and report["counts"] == {"passed": 3}, text
    _, timing, tile = (r["data"] for r in report["results"])
    assert set(timing["loop"]) >= {"triton", "eager", "dense"} and tile["key"] == OTHER.key
    assert set(tuning.measured(tmp_path / "out" / "tuning.jsonl", "simulated")) == {OTHER.key}
    assert "### forward, float16" in text and "## Tuning" in text
    assert "Nothing that was done failed" in text and str(ROOT) not in text
    assert "the section correctness: it was not asked for" in text
    assert not (ROOT / "kron_kernels/backends/triton/tuned/simulated.json").exists()


def test_a_wrong_kernel_is_a_failure(command, tmp_path, monkeypatch):
    plugin = """
from kron_kernels.backends.triton import launch
right = launch.kron_matmul
launch.kron_matmul = lambda *operands: right(*operands) + 1
"""
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text(
        "#!/bin/sh\necho $* | tail -c 300\necho ========= Invalid read of 2 bytes\n"
    )
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(sanitizer.parent), prepend=os.pathsep)
    chosen = "simulated and triton and (contiguous or outside_the_table)"
    status, report, text = command(
        ["correctness"], "-m", "not gpu and not slow", "-k", chosen, plugin=plugin
    )
    assert status == 1 and report["counts"] == {"failed": 1, "passed": 1}
    (failed,) = (r for r in report["results"] if r["state"] == "failed")
    assert (
        failed["name"] == "test_operands_that_are_not_contiguous_or_not_aligned[simulated triton]"
    )
    assert "in units of" in failed["message"] and "assert_close" in failed["traceback"]
    assert text.index("## Failures") < text.index("## What was done")
    evidence = failed["evidence"]
    assert evidence["repeat"] in text and f"'{failed['id']}'" in evidence["repeat"]
    assert evidence["launches"][-1].startswith("kron_matmul_kernel[(")
    assert "float16[6, 48] strides [48, 1]" in evidence["launches"][0]
    assert evidence["sanitizer"] == "========= Invalid read of 2 bytes"  # of this case alone
    ptx = (tmp_path / "out" / evidence["ptx"][0]).read_text()
    assert ".target sm_80" in ptx and "With gpu no GPU." in text
    assert any("section timing" in gap for gap in report["not_done"])


@pytest.mark.slow
def test_a_crash_a_hang_and_a_lost_gpu_cost_one_test_each(command, monkeypatch):
    monkeypatch.setattr(__main__, "PATIENCE", 3)
    tests = """
import os, time
from benchmarks.gpu import plugin
def test_0(): pass
def test_1(): os.abort()
def test_2(): pass
def test_3(): time.sleep(100)
def test_4():
    plugin._lost = lambda: True
    assert 1 == 2, "an illegal address"
def test_5(): pass
def test_6(): pytest.skip("no reason")
"""
    status, report, text = command(["correctness"], tests=tests)
    results = sorted(report["results"], key=lambda r: r["name"])
    assert status == 1 and [r["name"] for r in results] == [f"test_{i}" for i in range(7)]
    assert "".join(r["state"][0] for r in results) == "pfpffpn"
    messages = [r["message"] for r in results]
    assert "crashed while running" in messages[1] and "crashed while running" in messages[3]
    assert "an illegal address" in messages[4]
    assert "correctness: test_6: no reason" in text


PLANTED = """
import os, time
from functools import partial
import pytest, torch
from kron_kernels.backends.triton import launch
faults = {  # by a part of a case's name
    "test_forward[simulated triton-float16-32x32": "wrong",
    "test_gradients[simulated triton-float16-3x4": "memory",
    "test_gradients[simulated triton-float16-32x32": "compile",
    "test_feed_forward[simulated triton-float16-5x3": "crash",
    "test_three_products_of_one_x[simulated triton-bfloat16": "hang",
}
planted = set()

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    fault = next((f for name, f in faults.items() if item.name.startswith(name)), None)
    mark = os.environ["PLANTED"] + "/" + str(fault)
    if fault is None or os.path.exists(mark):  # each fault once
        return (yield)
    open(mark, "w").close()
    def bad(function, *operands, **options):
        if fault == "wrong":
            return function(*operands, **options) + 1
        if fault == "hang":
            time.sleep(1000)
        if fault == "crash":
            function(*operands, **options)
            os.abort()
        if fault == "compile":
            raise RuntimeError("PassManager::run failed")
        raise torch.OutOfMemoryError("CUDA out of memory")
    names = ("kron_matmul", "kron_feed_forward", "kron_qkv")
    before = [getattr(launch, name) for name in names]
    for name in names:
        setattr(launch, name, partial(bad, getattr(launch, name)))
    try:
        return (yield)
    finally:
        for name, function in zip(names, before):
            setattr(launch, name, function)
"""


@pytest.mark.slow
def test_a_limited_run_in_the_simulator_with_a_fault_of_each_kind(tmp_path, monkeypatch, capfd):
    """It stops in time, each fault costs one case, and a second run goes on from there."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("PLANTED", str(tmp_path / "marks"))
    out = tmp_path / "out"
    arguments = ["--simulate", "--minutes", "2", "--out", str(out), "--", "-p", "planted"]
    start = time.time()
    assert __main__.main(arguments) == 1
    assert time.time() - start < 125
    report = json.loads((out / "report.json").read_text())
    results = [r for r in report["results"] if r["section"] == "correctness"]
    failed = {r["name"]: r for r in results if r["state"] == "failed"}
    faults = {path.name for path in (tmp_path / "marks").iterdir()}
    # On a slow machine the time may be over before a hanging case is.
    assert len(faults - {"hang"}) <= len(failed) <= len(faults), (faults, failed)
    assert all(r["evidence"]["repeat"] for r in failed.values())
    crash = next((r for r in failed.values() if "test_feed_forward" in r["name"]), None)
    if crash:
        assert "crashed while running" in crash["message"]
        assert crash["evidence"]["launches"][-1].startswith("feed_forward_kernel[(")
    passed = {r["id"] for r in results if r["state"] == "passed"}
    assert len(passed) >= 5
    text = (out / "report.md").read_text()
    assert "not reached in the time given" in text and "## What was done when" in text
    assert re.search(r"\d+ s: correctness ends: \d+ passed", text)

    capfd.readouterr()
    again = ["--simulate", "--minutes", "1", "--only", "correctness", "--out", str(out)]
    __main__.main([*again, "--", "-p", "planted"])
    assert "cases done by an earlier run" in capfd.readouterr().out
    report = json.loads((out / "report.json").read_text())
    later = {r["id"]: r for r in report["results"] if r["state"] == "passed"}
    assert passed <= later.keys()
    before = {r["id"]: r["at"] for r in results}
    assert all(later[case]["at"] == before[case] for case in passed)


def test_the_journal_keeps_what_ended_and_names_what_did_not(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", "this")
    assert journal.results("correctness") == []
    journal.add({"section": "correctness", "cases": ["t.py::a", "t.py::b", "t.py::c"]})
    for state in (PASSED, FAILED):  # as of a teardown that fails
        result = Result("correctness", "a", state, id="t.py::a", at=1.0)
        journal.add(result._asdict())
    other = Result("correctness", "b", PASSED, id="t.py::b")
    Journal(journal.path, "another GPU").add(other._asdict())
    with journal.path.open("a") as file:
        file.write('{"stamp": "this", "sec')  # torn off by a kill
    journal.add({"section": "timing", "cases": ["t.py::d"]})
    a, b, c = journal.results("correctness")
    assert a == result and (b.name, b.state, b.message) == ("b", NOT_DONE, NOT_REACHED)
    assert c.name == "c" and journal.done("correctness") == ["t.py::a"]
    assert [r.name for r in journal.results("timing")] == ["d"]


def test_tests_that_were_never_run_are_reported():
    crashed = Result("correctness", "test_0", "failed", "worker 'gw0' crashed while running it")
    most = [crashed] * __main__.RESTARTS
    assert not __main__.unfinished("correctness", 1, most)
    (stopped,) = __main__.unfinished("correctness", 1, [*most, crashed])
    assert stopped.state == "not done" and "20 tests crashed" in stopped.message
    (ended,) = __main__.unfinished("correctness", 5, [])
    assert ended.state == "failed" and "status 5" in ended.message
    assert not __main__.unfinished("correctness", 5, [crashed])  # an earlier run did everything
    (none,) = __main__.unfinished("correctness", None, [])
    assert (none.state, none.message) == ("not done", NOT_REACHED)


def test_what_is_learnt_from_most_comes_first():
    tests = [
        ("test_more_than_32_bits_of_entries", {"s": TINY.shape}, "cuda"),
        ("test_forward", {"dtype": "bfloat16", "s": UP}, "triton"),
        ("test_forward", {"dtype": "float16", "s": UP}, "triton"),
        ("test_forward", {"dtype": "float16", "s": KronShape(32, 32, 24, 24)}, "triton slow"),
        ("test_forward", {"dtype": "float16", "s": DOWN}, "triton"),
        ("test_forward", {"dtype": "float16", "s": UP, "tokens": 3}, "cuda"),
        ("test_forward", {"dtype": "float16", "s": UP, "tokens": 19}, "cuda"),
        ("test_side_issue", {}, "triton"),
        ("test_numbers_of_tokens", {"s": UP, "tokens": 0}, "triton"),
        ("test_numbers_of_tokens", {"s": UP, "tokens": 1}, "triton"),
        ("test_gradients", {"dtype": "float16", "s": UP}, "triton"),
    ]

    def item(function, params, engine):
        machine = SimpleNamespace(engine=engine.split()[0])
        return SimpleNamespace(
            originalname=function,
            callspec=SimpleNamespace(params=params | {"machine": machine}),
            get_closest_marker=lambda name: True if name in engine else None,
        )

    items = [item(*test) for test in tests]
    order = [items.index(i) for i in ordered(items)]
    # A case of each kernel, engine and dtype, float16 first; other questions; the rest.
    assert order[:6] == [2, 5, 6, 3, 10, 1]
    assert order[6:9] == [8, 7, 0] and sorted(order[9:]) == [4, 9]


def test_skipped_tests_are_one_line_for_each_reason():
    results = [Result("correctness", f"test_{i}[cuda]", "not done", "no CUDA") for i in range(6)]
    results.append(Result("correctness", "test_9", "not done", "one GPU"))
    many, one = not_done(results)
    assert many.startswith("correctness: test_0[cuda]; ") and many.endswith("and 2 more: no CUDA")
    assert one == "correctness: test_9: one GPU"
    assert results[0].group == "cuda: 0" and results[-1].group == "9"


# --- timing


@pytest.mark.parametrize(
    "kind, shapes, names",
    [
        ("forward", (UP,), {"triton", "eager", "dense"}),
        ("training", (UP,), {"triton", "eager", "dense"}),
        ("block training", (UP, DOWN), {"fused", "calls", "dense"}),
        ("qkv forward", (UP,) * 3, {"fused", "calls", "dense"}),
    ],
)
def test_every_contender_of_a_workload_is_checked_and_timed(kind, shapes, names, gpu):
    dtype = "float32" if kind == "training" else "float16"
    data = time_workload(Workload(kind, "a label", shapes, 5, dtype), gpu)
    assert set(data["loop"]) == set(data["graph"]) >= names
    result = Result("timing", "test_workload", "passed", data=json.loads(json.dumps(data)))
    assert "a label" in "\n".join(timing_tables([result]))


@pytest.mark.parametrize(
    "kind, shapes, names",
    [
        ("forward", (UP,), {"triton", "cuda", "eager"}),
        ("block training", (UP, DOWN), {"fused", "calls", "cuda", "cuda calls"}),
        ("qkv forward", (UP,) * 3, {"fused", "calls", "cuda", "cuda calls"}),
    ],
)
def test_both_engines_are_timed_and_compared_with_the_order(
    kind, shapes, names, gpu, emulated_cuda
):
    timed = [
        time_workload(Workload(kind, "a label", shapes, tokens, "float16"), gpu)
        for tokens in (1, 19)
    ]
    assert all(set(data["loop"]) == set(data["graph"]) >= names for data in timed)
    results = [Result("timing", "test_workload", "passed", data=data) for data in timed]
    header = next(line for line in timing_tables(results) if "tokens" in line)
    assert " cuda |" in header and " cuda, graph |" in header
    # The simulated clock gives the first contender, Triton's, one unit, and CUDA's more.
    table = order_table(results)
    (few,) = (line for line in table if "| up to 4 tokens |" in line)
    assert f"| cuda, triton | {kind.split()[-1]} | up to 4 | 1 | 0 | 0 | 0." in few
    (many,) = (line for line in table if "| more |" in line)
    assert " | 1 | 0 | 0 | 0." in many
    missing = sum("No workload of the row" in line for line in table)
    assert missing == len(dispatch.GPU_ORDER) - 2


def test_a_wrong_contender_is_left_out_and_one_of_ours_fails(gpu, monkeypatch):
    workload = Workload("forward", "a label", (UP,), 5, "float16")
    monkeypatch.setattr(contenders, "dense_call", lambda workload, x, layers: x.new_zeros(5, 48))
    assert "dense" in time_workload(workload, gpu)["left_out"]
    right = launch.kron_matmul
    monkeypatch.setattr(launch, "kron_matmul", lambda *o, **options: right(*o, **options) + 1)
    with pytest.raises(AssertionError, match="in units of"):
        time_workload(workload, gpu)


def test_a_quick_run_times_a_part_of_the_workloads():
    quick, full = workloads(quick=True), workloads(quick=False)
    assert len(full) == len(set(full)) == 3 * 7 * 22 and len(quick) == 4 * 22
    assert {w.kind for w in quick} == {w.kind for w in full}


# --- tuning


@pytest.fixture
def slow_rule(monkeypatch):
    """A rule that any other beats."""
    bad = Tile(tokens=8, depth=16, columns=16, tiles=1, warps=8, stages=2)
    monkeypatch.setattr(configs, "rule", lambda *case: bad)


@pytest.mark.usefixtures("slow_rule")
def test_tuning_writes_a_table_that_launches_read(gpu, tmp_path):
    record = tuning.tune(TINY, gpu, 1, tmp_path / "tuning.jsonl")
    assert record["gain"] > tuning.BETTER and not record["wrong"] and len(record["times"]) > 4
    best = Tile(**record["best"])
    assert best != Tile(**record["rule"])
    simulated = configs.GPU("simulated", 2, 99 * 1024)
    assert configs.tile(TINY.geometry, 16, torch.float16, False, simulated) == best
    assert configs.tile(TINY.geometry, 9, torch.float16, False, simulated) == best
    assert configs.tile(TINY.geometry, 8, torch.float16, False, simulated) != best
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["simulated.json"]


@pytest.mark.usefixtures("slow_rule")
def test_an_interrupted_tuning_continues(gpu, tmp_path, monkeypatch):
    path, seen = tmp_path / "tuning.jsonl", []
    real = tuning.tune_case

    def interrupted(case, *rest):
        seen.append(case)
        if case == OTHER and seen.count(OTHER) == 1:
            raise KeyboardInterrupt
        return real(case, *rest)

    def tune():
        for case in (TINY, OTHER):
            tuning.tune(case, gpu, 1, path)

    monkeypatch.setattr(tuning, "tune_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune()
    (tmp_path / "tuned" / "simulated.json").unlink()
    configs._table.cache_clear()
    with path.open("a") as file:
        file.write('{"device": "simul')  # torn off
    tune()
    assert seen == [TINY, OTHER, OTHER]
    assert set(tuning.measured(path, "simulated")) == {TINY.key, OTHER.key}
    table = json.loads((tmp_path / "tuned" / "simulated.json").read_text())
    assert TINY.key in table  # measured before the interruption


@pytest.mark.usefixtures("slow_rule")
def test_candidates_that_do_not_compile_are_counted_and_wrong_ones_named(gpu, monkeypatch):
    run = tuning.run

    def planted(key, tile, *operands):
        if tile.warps == 4:
            raise RuntimeError("out of resource")
        ys = run(key, tile, *operands)
        return [y + 1 for y in ys] if tile.stages == 4 else ys

    monkeypatch.setattr(tuning, "run", planted)
    record = tuning.tune_case(TINY, gpu, 1)
    assert record["left_out"] == {"RuntimeError": 1}
    (wrong,) = record["wrong"]
    assert "stages 4" in wrong and "1 WRONG" in tuning.summary(record)


def test_only_possible_neighbours_are_tried():
    small = configs.GPU("small", 2, 99 * 1024)
    for case in tuning.cases(quick=True):
        g, products = case.geometry, case.products
        t = configs.rule(g, case.tokens, 2, False, small, products)
        near = tuning.neighbours(g, t, products)
        assert t not in near and len(set(near)) == len(near) > 3
        assert all(n.tokens * g.vectors >= 16 and min(n.depth, n.columns) >= 16 for n in near)
    cases = tuning.cases(quick=False)
    assert len({case.key for case in cases}) == len(cases)
