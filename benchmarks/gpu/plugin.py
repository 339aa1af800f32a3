"""pytest's options, fixtures and hooks for the runs of ``python -m benchmarks.gpu``."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.timing import Gpu


def pytest_addoption(parser):
    group = parser.getgroup("measurements on a GPU")
    group.addoption("--quick", action="store_true", help="fewer workloads and tiles")
    group.addoption("--tiles", type=Path, default=Path("tuning.jsonl"), help="measured tiles")


@pytest.fixture
def gpu():
    return Gpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Wait for the GPU, or the next test would get the blame for an error on it."""
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """End a worker that lost its GPU, as by an illegal address; xdist starts another."""
    if "PYTEST_XDIST_WORKER" in os.environ and _lost():
        os._exit(1)


def _lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() != 1
    except RuntimeError:
        return True
