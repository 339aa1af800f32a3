"""Resources of the compiled CUDA C++ kernels stay within static/cuda_budget.json."""

import json
import subprocess

import pytest
import torch
from simulator.cuda import why_not
from static import cuda_budget
from static.budget import check_budget
from static.reading import nvidia_tool

BUDGET = json.loads(cuda_budget.BUDGET.read_text())
try:
    COMPILED = set(cuda_budget.embedded(module) if (module := cuda_budget.installed()) else ())
except ImportError:  # the tools are missing: the tests skip
    COMPILED = set()


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    # Launches are recorded, not run: do not touch the memory of their results.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        nvidia_tool("cuobjdump"), nvidia_tool("nvdisasm")
    except ImportError:
        pytest.skip("needs cuobjdump and nvdisasm, of the CUDA toolkit or of Triton")


# nvcc takes a minute for each architecture that the installation has not compiled.
@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in COMPILED else pytest.mark.slow)
        for arch in cuda_budget.ARCHS
    ],
)
def test_the_kernels_keep_to_their_budget(arch):
    if arch not in COMPILED and (reason := why_not()):
        pytest.skip(reason)
    rows = list(cuda_budget.rows(archs=(arch,)))
    budget = [entry for entry in BUDGET if entry["match"]["arch"] == arch]
    assert len(rows) == len(budget)
    assert not check_budget(budget, rows)


def test_the_budget_has_every_kernel_and_no_spill():
    static = [entry for entry in BUDGET if entry["match"]["case"] == cuda_budget.CODE]
    kernels = {(entry["match"]["kernel"], entry["match"]["arch"]) for entry in static}
    names = {name for name, _ in kernels}
    assert kernels == {(name, arch) for name in names for arch in cuda_budget.ARCHS}
    assert {name.rpartition("_")[2] for name in names - {"all"}} == set(cuda_budget.cuda.MATHS)
    for entry in static:
        if entry["match"]["kernel"] != "all":
            most = entry["max"]
            assert most["spill_loads"] == most["spill_stores"] == most["stack"] == 0, entry
    launched = [entry for entry in BUDGET if entry not in static]
    assert {entry["match"]["arch"] for entry in launched} == set(cuda_budget.ARCHS)
    assert all(entry["min"]["blocks_per_sm"] > 0 for entry in launched)


# --- the reading itself, of a module with toy kernels

TOY = """
extern "C" __global__ void spilling(float *x, int n) {
  float many[64];
  for (int i = 0; i < 64; i++) many[i] = x[threadIdx.x + 32 * i];
  for (int j = 0; j < n; j++) many[int(x[j]) & 63] += j;
  float sum = 0;
  for (int i = 0; i < 64; i++) sum += many[i] * many[63 - i];
  x[threadIdx.x] = sum;
}
extern "C" __global__ void copying(const float4 *x, float4 *y) {
  __shared__ float4 kept[64];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[63 - threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.cu").write_text(TOY)
    command = "nvcc -shared -Xcompiler -fPIC -cudart none toy.cu -o toy.so"
    for code in ("80", "90a"):
        command += f" -gencode arch=compute_{code},code=sm_{code}"
    subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "toy.so"


def test_a_module_is_read(toy, monkeypatch):
    assert set(cuda_budget.embedded(toy)) == {80, 90}
    monkeypatch.setattr(cuda_budget, "installed", lambda: toy)
    monkeypatch.setattr(cuda_budget, "launches", lambda *_: [])
    cuda_budget.cubins.cache_clear()
    try:
        rows = list(cuda_budget.rows(archs=(80, 90)))
    finally:
        cuda_budget.cubins.cache_clear()
    found = {(row["kernel"], row["arch"]): row for row in rows}
    assert len(found) == len(rows) == 6
    for arch in (80, 90):
        spilling, copying = found["spilling", arch], found["copying", arch]
        assert spilling["stack"] == 256 and spilling["spill_loads"] and spilling["spill_stores"]
        assert copying["stack"] == copying["spill_loads"] == copying["spill_stores"] == 0
        assert copying["shared"] == 1024 and copying["barriers"] == 1
        assert copying["global_loads"] == copying["global_stores"] == {128: 1}
        assert copying["wide_loads"] == 1 and copying["code"] % 16 == 0
        assert found["all", arch]["bytes"] > spilling["code"] > copying["code"] > 0
    budget = [cuda_budget.entry(row) for row in rows]
    over = check_budget(budget, rows)
    assert len(over) == 6 and all("spilling" in one for one in over)
    assert all(cuda_budget.show(row) for row in rows)


def test_a_module_without_kernels_for_gpus(tmp_path):
    (tmp_path / "empty.so").write_bytes(b"\x7fELF")
    assert cuda_budget.embedded(tmp_path / "empty.so") == {}
