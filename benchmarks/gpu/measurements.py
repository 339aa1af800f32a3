"""Timing and tuning, as tests: ``python -m benchmarks.gpu`` runs them by pytest.

A measurement is stored as the test's property "data", which the journal keeps. A run's plan chooses
the workloads; without a plan there are all of them, so that any case can be repeated by its name.
"""

import json

import pytest
import torch

from benchmarks.gpu.contenders import why_not
from benchmarks.gpu.tuning import cases, cases_of, tune
from benchmarks.gpu.workloads import (
    compile_workload,
    launch_overhead,
    shown,
    simulated,
    time_workload,
    workloads,
)

pytestmark = pytest.mark.gpu


def chosen(config):
    """The workloads to time, and the cases to tune."""
    which, quick = config.plan.get("which"), config.getoption("quick")
    if which == "simulated":
        return simulated(), cases_of([w for w in simulated() if w.kind == "forward"])
    if which == "shown":
        return shown(), cases_of(shown())
    if which == "all":
        return workloads(quick), cases(quick)
    listed = [*workloads(False), *workloads(True), *shown(), *simulated()]
    tiles = [*cases(False), *cases(True), *cases_of(listed)]
    return list(dict.fromkeys(listed)), list({case.key: case for case in tiles}.values())


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        metafunc.parametrize("workload", chosen(metafunc.config)[0], ids=str)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", chosen(metafunc.config)[1], ids=lambda case: case.key)


@pytest.fixture
def record(record_property):
    return lambda data: record_property("data", json.dumps(data))


def test_launch_overhead(gpu, record):
    if gpu.device == "cpu":
        pytest.skip("the simulator has no clock")
    record(launch_overhead())


def test_workload(workload, gpu, record, pytestconfig):
    if workload.kind.startswith("model"):
        pytest.importorskip("transformers")
    measure = time_workload
    if pytestconfig.plan.get("section") == "compilation":
        measure = compile_workload
    try:
        record(measure(workload, gpu))
    except torch.OutOfMemoryError:
        pytest.skip("does not fit the GPU's memory")


def test_tile(case, gpu, record, pytestconfig):
    if reason := why_not("triton", gpu.device):
        pytest.skip(reason)
    rounds = 1 if pytestconfig.getoption("quick") else 3
    try:
        found = tune(case, gpu, rounds, pytestconfig.getoption("tiles"))
    except torch.OutOfMemoryError:
        pytest.skip("does not fit the GPU's memory")
    record(found)
    assert not found["wrong"], "tiles with a wrong result"
