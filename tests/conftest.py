"""Fixtures of every test: NaN in fresh memory, one thread, a seed, dtypes by name."""

import os

import pytest
import torch

from kron_kernels.testing.checks import arithmetic


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """An entry that a kernel forgot to write fails, instead of passing with stale memory."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure():
    """One thread, for session fixtures too: the last bits of a sum depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, unless a test sets another number: threads of small operations only wait."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """No fsync: waiting for a busy disk takes seconds, and tests need no durable files."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _seed():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def dtype(request):
    """A dtype by name; "tf32" is float32 multiplied in tf32."""
    with arithmetic(request.param) as found:
        yield found
