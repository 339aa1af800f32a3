"""What the compiled GPU kernels cost stays within benchmarks/gpu_budget.json."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_budget
from benchmarks.gpu_static import check_budget

BUDGET = json.loads(gpu_budget.BUDGET.read_text())
KERNELS = list(dict.fromkeys(entry["match"]["kernel"] for entry in BUDGET))
# One of each kernel and of each way through it; the others are alike.
OFTEN = {"8x attention forward", "21x up forward", "21x down dA, dB", "square dA, dB"}
OFTEN |= {"21x block forward", "21x block backward", "embedding forward"}


def held(kernel: str, archs=gpu_budget.ARCHS) -> None:
    rows = [row for row in gpu_budget.rows(kernel, archs) if row["kernel"] == kernel]
    budget = [
        entry
        for entry in BUDGET
        if entry["match"]["kernel"] == kernel and entry["match"]["arch"] in archs
    ]
    assert len(rows) == len(budget) == len(archs)
    assert not check_budget(budget, rows)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k in OFTEN])
def test_a_kernel_keeps_to_its_budget(kernel):
    held(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in OFTEN])
def test_every_other_kernel_keeps_to_its_budget(kernel):
    held(kernel)


def test_the_budget_has_every_case_and_no_spill():
    names = {f"{layer} {action}" for layer, action, _ in gpu_budget.cases()}
    assert set(KERNELS) == names and names >= OFTEN
    for entry in BUDGET:
        if entry["match"]["arch"] == "gfx942":
            continue
        assert entry["max"]["spill_loads"] == entry["max"]["spill_stores"] == 0
        kernel = entry["match"]["kernel"]
        product = "embedding" not in kernel and ("dA" not in kernel or "square" in kernel)
        assert entry["min"]["tensor"] > 0 or not product, entry
        assert entry["min"]["wide_loads"] > 0, entry
