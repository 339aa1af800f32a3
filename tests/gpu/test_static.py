"""Static reports of compiled GPU kernels, compared with facts known by other means."""

import functools
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from simulator.tritons import spilled_by_a_roomy_kernel, why_no_amd  # noqa: E402
from static import reading  # noqa: E402
from static.budget import check_budget  # noqa: E402
from static.multiprocessors import MULTIPROCESSORS  # noqa: E402
from static.reading import Static, occupancy, static_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

NVIDIA = [80, 90, 100, 120]
AMD = "gfx942"


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """One tile of C = A B in float16."""
    r, c, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for s in range(0, K, BK):
        a = tl.load(a_ptr + r[:, None] * K + s + k[None, :])
        b = tl.load(b_ptr + (s + k)[:, None] * N + c[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + r[:, None] * N + c[None, :], acc.to(tl.float16))


@triton.jit
def normalise(x_ptr, y_ptr, N: tl.constexpr):
    """All N values stay in registers while their sum is formed."""
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tl.store(y_ptr + n, (x / tl.sum(x.to(tl.float32), 0)).to(y_ptr.dtype.element_ty))


@pytest.fixture(scope="module", autouse=True)
def _compiler(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def compiled(name, arch, dtype="fp32", divisible=True, N=4096, **options):
    if name == "multiply":
        fn, constants = multiply, {"M": 128, "N": 128, "BK": 64}
        types = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp16", "K": "i32"}
    else:
        fn, constants = normalise, {"N": N}
        types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))} if divisible else {}
    signature = types | dict.fromkeys(constants, "constexpr")
    if arch == AMD and (reason := why_no_amd()):
        pytest.skip(reason)
    target = GPUTarget("hip", arch, 64) if arch == AMD else GPUTarget("cuda", arch, 32)
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": 4, **options})


def report(name, arch, **options) -> Static:
    kernel = compiled(name, arch, **options)
    return static_report(kernel.asm, arch, kernel.metadata.num_warps, kernel.metadata.shared)


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_a_reduction(arch):
    lanes = 4 * (64 if arch == AMD else 32)
    got = report("normalise", arch)

    assert (got.arch, got.warps) == (arch, 4)
    assert 4096 // lanes < got.registers < 128
    assert (got.spill_loads, got.spill_stores, got.stack) == (0, 0, 0)
    # An instruction loads four float32 a lane, and nothing is loaded twice.
    assert got.global_loads == got.global_stores == {128: 4096 // lanes // 4}
    # A sum within each warp of 32 takes log2(32) shuffles, and one between four warps two more;
    # AMD has a sixth step, which may be v_readlane.
    assert got.shuffles >= 5 + 2
    # One float32 from each warp.
    assert got.shared == 4 * 4
    assert got.shared_loads and got.shared_stores and got.barriers >= 1
    assert not got.tensor
    assert got.instructions > got.shuffles + got.barriers


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_a_tensor_core_product(arch):
    got = report("multiply", arch, num_stages=3)
    macs = 128 * 128 * 64  # of one step of the loop, which is not unrolled

    if arch == AMD:
        assert all(name.startswith("v_mfma_f32_32x32x8") for name in got.tensor)
        assert got.tensor.total() % (macs // (32 * 32 * 8) // 4) == 0
    elif arch == 90:
        # One instruction for the 64 rows of the four warps, a warpgroup.
        assert got.tensor == {"HGMMA.64x128x16.F32": macs // (64 * 128 * 16)}
    elif arch == 100:
        assert set(got.tensor) == {"UTCHMMA"}
    else:
        assert got.tensor == {"HMMA.16816.F32": macs // (16 * 8 * 16) // 4}

    assert set(got.global_loads) == {128}
    assert got.shared >= 2 * 2 * (128 * 64) * 2  # two tiles of float16, twice for the pipeline
    if arch != AMD:
        assert got.global_stores == {128: 128 * 128 * 2 // 16 // 128}
        # 128 accumulators per thread, except where they lie in tensor memory.
        assert arch == 100 or got.registers > 128
    assert got.blocks_per_sm >= 1


@pytest.mark.parametrize("arch", NVIDIA)
def test_spills_are_seen(arch):
    roomy = report("normalise", arch, N=8192)
    tight = report("normalise", arch, N=8192, maxnreg=32)

    spilled = roomy.spill_loads, roomy.spill_stores, roomy.stack
    assert spilled <= spilled_by_a_roomy_kernel()
    assert tight.registers <= 32 < roomy.registers
    # 64 values per thread, and at most 32 of them fit.
    assert tight.stack >= 4 * 32
    assert tight.spill_loads > 0 and tight.spill_stores > 0
    assert tight.global_loads == roomy.global_loads


def test_spills_are_seen_at_amd():
    # Eight waves on one SIMD leave 64 of its 512 registers to each.
    tight = report("multiply", AMD, waves_per_eu=8)

    assert tight.registers <= 64
    assert tight.spill_loads > 0 and tight.spill_stores > 0 and tight.stack > 0


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_narrow_accesses_are_seen(arch):
    got = report("normalise", arch, dtype="fp16", divisible=False, N=1024)
    lanes = 4 * (64 if arch == AMD else 32)

    assert got.global_loads == got.global_stores == {16: 1024 // lanes}


@pytest.mark.parametrize(
    ("line", "field", "width"),
    [
        ("global_load_dwordx4 v[0:3], v4, s[0:1]", "global_loads", 128),
        ("global_load_dword v0, v4, s[0:1]", "global_loads", 32),
        ("global_load_ushort v0, v4, s[0:1]", "global_loads", 16),
        ("global_load_short_d16_hi v0, v4, s[0:1]", "global_loads", 16),
        ("global_load_lds_dword v[0:1], off", "global_loads", 32),
        ("buffer_load_ubyte v0, v4, s[0:3], 0 offen", "global_loads", 8),
        ("buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen", "global_stores", 64),
        ("ds_read_b128 v[0:3], v4", "shared_loads", 128),
        ("ds_read_u16_d16 v0, v4", "shared_loads", 16),
        ("ds_read2_b32 v[0:1], v4 offset1:1", "shared_loads", 64),
        ("ds_write2st64_b64 v4, v[0:1], v[2:3] offset1:1", "shared_stores", 128),
        ("ds_write_b8 v4, v0", "shared_stores", 8),
    ],
)
def test_widths_of_amd_instructions(line, field, width):
    code = f"""
\t{line}
\t; ds_read_b64 in a comment
    .group_segment_fixed_size: 16
    .private_segment_fixed_size: 8
    .vgpr_count: 4
"""
    got = static_report({"amdgcn": code}, AMD, num_warps=1, shared=100)

    assert getattr(got, field) == {width: 1}
    assert (got.instructions, got.registers, got.stack, got.shared) == (1, 4, 8, 116)


@pytest.mark.parametrize(
    ("line", "field", "width"),
    [
        ("LDG.E.LTC128B R4, desc[UR4][R2.64] ;", "global_loads", 32),
        ("LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;", "global_loads", 16),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;", "global_loads", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR4][R2.64] ;", "global_loads", 128),
        ("@!P2 STG.E.64 desc[UR4][R2.64], R4 ;", "global_stores", 64),
        ("LDS.U8 R4, [R2] ;", "shared_loads", 8),
        ("LDSM.16.M88 R4, [R2] ;", "shared_loads", 32),
        ("LDSM.16.MT88.2 R4, [R2] ;", "shared_loads", 64),
        ("@P0 LDSM.16.M88.4 R4, [R2] ;", "shared_loads", 128),
        ("STSM.16.M88.4 [R2], R4 ;", "shared_stores", 128),
        ("@UP0 STS.128 [R2], R4 ;", "shared_stores", 128),
    ],
)
def test_widths_of_nvidia_instructions(line, field, width):
    sass = f"""
.text.kernel:
        /*0000*/                   {line}
        /*0010*/              @!PT LDS RZ, [RZ] ;
.L_x_1:
        /*0020*/                   NOP;
"""
    got = reading._nvidia_census(sass)

    assert getattr(got, field) == {width: 1}
    assert got.instructions == 1


def test_several_kernels_in_one_file_are_refused():
    with pytest.raises(ValueError, match="2 kernels"):
        static_report({"amdgcn": "    .vgpr_count: 4\n" * 2}, AMD, num_warps=1, shared=0)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limited_by"),
    [
        # Worked out by hand from the tables of the CUDA C++ Programming Guide.
        (80, 128, 32, 0, 16, 1, "threads"),  # 2048 / 128
        (80, 32, 32, 0, 32, 1 / 2, "blocks"),
        (80, 256, 64, 0, 4, 1 / 2, "registers"),  # 65536 / (256 · 64)
        (80, 128, 255, 0, 2, 1 / 8, "registers"),  # 255 are given as 256
        (80, 32, 96, 0, 20, 20 / 64, "registers"),  # 5 warps in each of 4 parts, not 21 in one
        (80, 1024, 65, 0, 0, 0, "registers"),
        (80, 128, 32, 163 * 1024, 1, 1 / 16, "shared"),
        (80, 128, 32, 163 * 1024 + 1, 0, 0, "shared"),
        (86, 512, 40, 0, 3, 1, "threads"),  # 1536 / 512
        (86, 32, 16, 0, 16, 1 / 3, "blocks"),
        (89, 32, 16, 0, 24, 1 / 2, "blocks"),
        (90, 256, 32, 100 * 1024, 2, 1 / 4, "shared"),  # 228 / (100 + 1)
        (100, 128, 168, 75 * 1024, 3, 12 / 64, "registers"),  # shared memory holds 3 as well
        (120, 256, 32, 49 * 1024, 2, 1 / 3, "shared"),  # 100 / (49 + 1)
        ("gfx942", 256, 202, 0, 2, 1 / 4, "registers"),  # 512 / 208 waves on each SIMD
        ("gfx942", 256, 64, 32 * 1024, 2, 1 / 4, "shared"),
        ("gfx942", 256, 64, 0, 8, 1, "threads"),
    ],
)
def test_occupancy_by_hand(arch, threads, registers, shared, blocks, share, limited_by):
    got = occupancy(arch, threads, registers, shared)

    assert got.blocks_per_sm == blocks
    assert got.occupancy == pytest.approx(share)
    assert got.limited_by == limited_by


# Prints cudaOccMaxActiveBlocksPerMultiprocessor of NVIDIA's own header, over a grid.
ORACLE = """
#include <cuda_occupancy.h>
#include <cstdio>
#include <initializer_list>
int main(int count, char **arguments) {
    for (int i = 1; i < count; ++i) {
        int n[3];  // architecture, threads per SM, shared memory per SM
        if (std::sscanf(arguments[i], "%d,%d,%d", n, n + 1, n + 2) != 3) return 1;
        cudaOccDeviceProp device;
        device.computeMajor = n[0] / 10;
        device.computeMinor = n[0] % 10;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = n[1];
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 << 10;
        device.sharedMemPerMultiprocessor = n[2];
        device.sharedMemPerBlockOptin = n[2] - 1024;
        device.reservedSharedMemPerBlock = 1024;
        device.numSms = 1;
        for (int threads : {32, 96, 128, 224, 256, 512, 1024})
            for (int registers = 1; registers < 256; registers += 2)
                for (int shared = 0; shared < n[2] + 4096; shared += 10100) {
                    cudaOccFuncAttributes kernel;
                    kernel.maxThreadsPerBlock = 1024;
                    kernel.numRegs = registers;
                    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
                    kernel.maxDynamicSharedSizeBytes = shared;
                    kernel.numBlockBarriers = 1;
                    cudaOccDeviceState state;
                    cudaOccResult result;
                    if (cudaOccMaxActiveBlocksPerMultiprocessor(
                            &result, &device, &kernel, &state, threads, shared))
                        return 1;
                    std::printf("%d %d %d %d %d\\n", n[0], threads, registers, shared,
                                result.activeBlocksPerMultiprocessor);
                }
    }
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ for NVIDIA's own calculator")
def test_occupancy_against_nvidias_header(tmp_path):
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    if not (headers / "cuda_occupancy.h").exists():
        pytest.skip("this Triton comes without cuda_occupancy.h")
    (tmp_path / "oracle.cpp").write_text(ORACLE)
    command = ["g++", "-I", str(headers), "-o", str(tmp_path / "oracle")]
    subprocess.run([*command, str(tmp_path / "oracle.cpp")], check=True)
    devices = [
        f"{arch},{sm.threads},{sm.shared}"
        for arch, sm in MULTIPROCESSORS.items()
        if isinstance(arch, int)
    ]
    out = subprocess.run([tmp_path / "oracle", *devices], capture_output=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in out.splitlines()]

    assert {row[0] for row in rows} == {arch for arch in MULTIPROCESSORS if arch != AMD}
    assert [row for row in rows if occupancy(*row[:4]).blocks_per_sm != row[4]] == []


@pytest.mark.parametrize("name", ["multiply", "normalise"])
def test_occupancy_against_llvm(name):
    """LLVM writes how many waves fit on a SIMD; four waves are one on each of four SIMDs."""
    assembly = compiled(name, AMD).asm["amdgcn"]
    listed = int(assembly.split("; Occupancy:")[1].split()[0])
    registers = static_report(compiled(name, AMD).asm, AMD, 4, 0).registers

    assert occupancy(AMD, 256, registers, 0).blocks_per_sm == listed


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'gfx1100'"):
        static_report({"amdgcn": ""}, "gfx1100", num_warps=4, shared=0)


ROWS = [
    {"kernel": "k", "arch": 80, "registers": 160, "tensor": Counter({"HMMA": 4, "IMMA": 1})},
    {"kernel": "k", "arch": 90, "registers": 168, "tensor": Counter()},
]


@pytest.mark.parametrize(
    "entry",
    [
        {"match": {"kernel": "k", "arch": 80}, "max": {"registers": 160}},
        {"match": {"kernel": "k"}, "max": {"registers": 168}, "min": {"registers": 160}},
        {"match": {"arch": 80}, "min": {"tensor": 5}, "max": {"tensor": 5}},
    ],
)
def test_a_kept_budget(entry):
    assert check_budget([entry], ROWS) == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"match": {"kernel": "k"}, "max": {"registers": 160}},
            ["kernel k, arch 90: registers = 168, max 160"],
        ),
        (
            {"match": {"arch": 80}, "min": {"registers": 161, "tensor": 6}},
            [
                "kernel k, arch 80: registers = 160, min 161",
                "kernel k, arch 80: tensor = 5, min 6",
            ],
        ),
        (
            {"match": {"kernel": "k", "arch": "80"}, "max": {"registers": 1}},
            ["budget entry kernel k, arch 80: matches no row"],
        ),
        (
            {"match": {"kernel": "k", "config": "big"}, "max": {"registers": 1}},
            ["budget entry kernel k, config big: matches no row"],
        ),
        (
            {"match": {"arch": 80}, "max": {"regs": 1}},
            ["kernel k, arch 80: regs is missing, max 1"],
        ),
        (
            {"match": {"arch": 80}},
            ["budget entry arch 80: has neither max nor min"],
        ),
    ],
)
def test_a_broken_budget(entry, expected):
    assert check_budget([entry], ROWS) == expected


def test_a_budget_for_a_compiled_kernel():
    row = {"kernel": "multiply", **vars(report("multiply", 80))}
    match = {"kernel": "multiply", "arch": 80}
    kept = {"match": match, "max": {"spill_loads": 0}, "min": {"tensor": 128}}
    broken = {"match": match, "min": {"tensor": 129}}

    assert check_budget([kept, broken], [row]) == [
        "kernel multiply, arch 80: tensor = 128, min 129"
    ]


@pytest.mark.parametrize("way", ["max", "min"])
def test_only_numbers_keep_a_budget(way):
    row = {"kernel": "k", "arch": 80, "seconds": float("nan")}

    assert len(check_budget([{"match": {}, way: {"seconds": 1}}], [row])) == 1
