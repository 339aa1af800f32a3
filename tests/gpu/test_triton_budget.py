"""Resources of the compiled Triton kernels stay within static/triton_budget.json."""

import json

import pytest
from machines import needs_triton

needs_triton()

from static import triton_budget  # noqa: E402
from static.budget import check_budget  # noqa: E402

BUDGET = json.loads(triton_budget.BUDGET.read_text())
KERNELS = list(dict.fromkeys(entry["match"]["kernel"] for entry in BUDGET))
# Each kernel and each path through it once, on two generations; the others are alike.
TWO = (80, 90)
INSTALLED = triton_budget.VERSION
OFTEN = {"8x attention forward", "21x up forward", "21x down dA, dB", "square dA, dB"}
OFTEN |= {"21x block forward", "21x block backward", "embedding forward"}


def held(kernel: str, archs=triton_budget.ARCHS) -> None:
    if INSTALLED < (3, 8):
        pytest.skip(f"no budget is known for Triton {INSTALLED}, which spills in some kernels")
    rows = [row for row in triton_budget.rows(kernel, archs) if row["kernel"] == kernel]
    budget = [
        entry
        for entry in BUDGET
        if entry["match"]["kernel"] == kernel and entry["match"]["arch"] in archs
    ]
    assert len(rows) == len(budget) == len(archs)
    if not INSTALLED.startswith(triton_budget.BUDGETED):  # other versions' resources may differ
        none = {"spill_loads": 0, "spill_stores": 0}
        matches = [e["match"] for e in budget if e["match"]["arch"] != "gfx942"]
        budget = [{"match": match, "max": none} for match in matches]
    assert not check_budget(budget, rows)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k in OFTEN])
def test_a_kernel_keeps_to_its_budget(kernel):
    held(kernel, TWO)


def test_a_kernel_keeps_to_its_budget_on_the_other_generations():
    held("21x up forward", [arch for arch in triton_budget.ARCHS if arch not in TWO])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_to_its_budget_everywhere(kernel):
    held(kernel)


def test_the_budget_has_every_case_and_no_spill():
    names = {f"{layer} {action}" for layer, action, _ in triton_budget.cases()}
    assert set(KERNELS) == names and names >= OFTEN
    for entry in BUDGET:
        if entry["match"]["arch"] == "gfx942":
            continue
        assert entry["max"]["spill_loads"] == entry["max"]["spill_stores"] == 0
        kernel = entry["match"]["kernel"]
        product = "embedding" not in kernel and ("dA" not in kernel or "square" in kernel)
        assert entry["min"]["tensor"] > 0 or not product, entry
        assert entry["min"]["wide_loads"] > 0, entry
