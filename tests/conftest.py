"""Shared by every test: NaN in fresh memory, and one place that draws operands."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """A result that a kernel forgot to write fails, instead of passing with what lay there."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
