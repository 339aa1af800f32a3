"""Timing and tuning, as tests: ``python -m benchmarks.gpu`` runs them by pytest.

A measurement is stored as the test's property "data" in pytest's XML.
"""

import json

import pytest
import torch

from benchmarks.gpu.contenders import why_not
from benchmarks.gpu.tuning import cases, tune
from benchmarks.gpu.workloads import launch_overhead, time_workload, workloads

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("quick")
    if "workload" in metafunc.fixturenames:
        metafunc.parametrize("workload", workloads(quick), ids=str)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(quick), ids=lambda case: case.key)


@pytest.fixture
def record(record_property):
    return lambda data: record_property("data", json.dumps(data))


def test_launch_overhead(record):
    record(launch_overhead())


def test_workload(workload, gpu, record):
    try:
        record(time_workload(workload, gpu))
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
