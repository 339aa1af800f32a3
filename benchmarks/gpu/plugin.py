"""pytest's options, fixtures and hooks for the runs of ``python -m benchmarks.gpu``.

A run's plan is a file of JSON, written by ``__main__``: the section, the folder of the report, the
journal's stamp, the cases that are done, and the time by which to stop.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import failures
from benchmarks.gpu.journal import FAILED, NOT_DONE, NOT_REACHED, PASSED, Journal, Result, name_of
from benchmarks.gpu.order import ordered
from benchmarks.gpu.timing import Gpu

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


def pytest_addoption(parser):
    group = parser.getgroup("measurements on a GPU")
    group.addoption("--quick", action="store_true", help="fewer workloads and tiles")
    group.addoption("--tiles", type=Path, default=Path("tuning.jsonl"), help="measured tiles")
    group.addoption("--plan", type=Path, help="a file that python -m benchmarks.gpu writes")


def pytest_configure(config):
    path = config.getoption("plan")
    config.plan = json.loads(path.read_text()) if path else {}
    config.launches = failures.Launches()
    if config.plan and not hasattr(config, "workerinput"):
        out = Path(config.plan["out"])
        journal = Journal(out / "journal.jsonl", config.plan["stamp"])
        config.pluginmanager.register(Keeper(journal, config.plan["section"], out))


@pytest.fixture
def gpu():
    return Gpu()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what is done, and put first what is learnt first.

    xdist's workers collect alike, a restarted one too: the plan does not change during a run.
    """
    if not config.plan:
        return
    done, only = set(config.plan["done"]), config.plan["only"]
    items[:] = [item for item in items if item.nodeid not in done]
    if only is not None:
        chosen = set(only)
        items[:] = [i for i in items if i.nodeid in chosen or "test_workload" not in i.nodeid]
    if config.plan["section"] == "correctness":
        items[:] = ordered(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > item.config.plan.get("until", float("inf")):
        pytest.skip(NOT_REACHED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Wait for the GPU, or the next test would get the blame for an error on it."""
    plan, launches = item.config.plan, item.config.launches
    log = Path(plan["out"], "launches", f"{_WORKER or 'main'}.jsonl") if plan else None
    watch = plan.get("section") not in ("timing", "tuning")  # their clocks would see it
    with launches.recorded(log, item.nodeid, watch):
        result = yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    plan = item.config.plan
    if plan and report.failed:
        evidence = item.config.launches.evidence(Path(plan["out"]), item.nodeid)
        report.user_properties.append(("evidence", evidence))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """End a worker that lost its GPU, as by an illegal address; xdist starts another."""
    if _WORKER and _lost():
        os._exit(1)


def _lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() != 1
    except RuntimeError:
        return True


class Keeper:
    """Writes the journal, in the process that runs the workers."""

    def __init__(self, journal: Journal, section: str, out: Path):
        self.journal, self.section, self.out, self.collected = journal, section, out, False
        self.failed: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if not self.collected:  # the same from every worker
            self.collected = True
            self.journal.add({"section": self.section, "cases": list(ids)})

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        # What follows a failure, such as the end of a worker that lost its GPU, hides the cause.
        if report.nodeid in self.failed:
            return
        self.failed |= {report.nodeid} if report.failed else set()
        message, traceback = _why(report)
        if message == NOT_REACHED:
            return
        properties = dict(report.user_properties)
        evidence = properties.get("evidence")
        if report.when == "???":  # xdist's report of a worker that crashed or hung
            worker = report.node.gateway.id
            evidence = failures.of_crash(self.out, worker, report.nodeid)
        state = PASSED if report.passed else FAILED if report.failed else NOT_DONE
        result = Result(
            self.section,
            name_of(report.nodeid),
            state,
            message,
            traceback,
            round(report.duration, 3) if hasattr(report, "duration") else 0.0,
            json.loads(properties.get("data", "null")),
            report.nodeid,
            time.time(),
            evidence,
        )
        self.journal.add(result._asdict())


def _why(report) -> tuple[str, str]:
    """A report's message in a line or two, and its traceback."""
    if report.passed:
        return "", ""
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: "), ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr)
    return (crash.message if crash else text), (text if crash else "")
