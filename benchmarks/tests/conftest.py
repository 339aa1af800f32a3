"""What tests of measurements share."""

import pytest
import torch

from benchmarks import machine


@pytest.fixture
def small_machine(monkeypatch):
    """One thread, and rates that are not measured."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "gemm_rate", lambda: 80.0)
    monkeypatch.setattr(machine, "bandwidth", lambda: 20.0)
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 0.0)
