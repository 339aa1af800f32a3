"""Shared by every test: NaN in fresh memory, and one place that draws operands."""

import gc
import os

import pytest
import torch

from benchmarks.gpu.checks import arithmetic


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """A result that a kernel forgot to write fails, instead of passing with what lay there."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """Trainer collects garbage at every start: spare it the million objects of imported modules.

    A training of four steps then takes a third of the time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind reports leaks at exit


def pytest_configure():
    """One thread, for fixtures of a session, too: the last bits of a sum depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small operations on two busy cores wait for one another; tests of threads ask for them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_loss_of_power(monkeypatch):
    """What tests write need not outlive the machine, and waiting for a busy disk takes seconds."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws from the global generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def dtype(request):
    """A dtype, or float32 multiplied in tf32."""
    with arithmetic(request.param) as found:
        yield found
