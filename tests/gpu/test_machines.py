"""The tests' machines: each runs its own engine, and a missing engine skips with its reason."""

from contextlib import nullcontext

import machines
import pytest
import test_on_gpu
import torch
from machines import CUDA, TRITON

from kron_kernels import KronShape
from kron_kernels.backends import cuda


def test_each_engine_is_checked_by_its_own_kernels(simulator, emulated_cuda, monkeypatch):
    """CUDA's are wrong here."""
    right = cuda.kron_matmul
    monkeypatch.setattr(cuda, "kron_matmul", lambda *operands: right(*operands) + 1)
    check = test_on_gpu.test_operands_that_are_not_contiguous_or_not_aligned
    check(TRITON)
    with pytest.raises(AssertionError, match="in units of"):
        check(CUDA)
    large = KronShape(32, 32, 24, 24)
    TRITON.draw(large, 2, torch.float16)
    with pytest.raises(pytest.skip.Exception, match="sides of 64 at most"):
        CUDA.draw(large, 2, torch.float16)


def test_a_missing_engine_skips_with_its_reason(monkeypatch):
    monkeypatch.setattr(machines, "why_not", lambda machine: None)
    monkeypatch.setattr(machines, "simulated", lambda engine: nullcontext())
    monkeypatch.setattr(cuda, "why_not", lambda *operands: "there are no such kernels")
    with pytest.raises(pytest.skip.Exception, match="no such kernels"), machines.ready(CUDA):
        pass
