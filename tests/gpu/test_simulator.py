"""The simulator executes Triton's and hand-written PTX correctly, and finds bugs planted in it."""

import re
from collections.abc import Callable

import pytest
import torch
from torch.torch_version import TorchVersion

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from simulator import Device, SimulationError, run_ptx  # noqa: E402
from simulator.tritons import active_driver, why_no_amd  # noqa: E402

TRITON = TorchVersion(triton.__version__)


@triton.jit
def add_kernel(x, y, out, n, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + scale * tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def unmasked_add_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def matmul_kernel(
    a, b, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISE: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inside = k + inner < K
        x = tl.load(
            a + rows[:, None] * K + (k + inner)[None, :],
            mask=(rows < M)[:, None] & inside[None, :],
            other=0.0,
        )
        y = tl.load(
            b + (k + inner)[:, None] * N + columns[None, :],
            mask=inside[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        total = tl.dot(x, y, total, input_precision=PRECISE)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + i, mask=i < columns, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=0))
    result = values / tl.sum(values, axis=0)
    tl.store(out + row * columns + i, result.to(out.dtype.element_ty), mask=i < columns)


@triton.jit
def histogram_kernel(x, counts, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(counts + values, 1, mask=i < n)
    tl.atomic_max(total, tl.max(values, axis=0))


@triton.jit
def overlapping_store_kernel(out, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out + i, i)


@triton.jit
def sum_all_kernel(x, out, scales, n, BLOCK: tl.constexpr):
    """A tuple argument, 64-bit offsets, a while loop and integer reductions."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < n:
        total += tl.load(x + pid * n + start + i, mask=start + i < n, other=0)
        start += BLOCK
    tl.store(out + pid, tl.sum(total, axis=0) * scales[0] + scales[1])


@triton.jit
def locked_sum_kernel(x, out, lock):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out, tl.load(out) + tl.load(x + tl.program_id(0)))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def inclined_kernel(x, out, n, BLOCK: tl.constexpr):
    """Mathematical functions, scans and transposes."""
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    values = tl.load(x + i[:, None] * BLOCK + j[None, :])
    values = tl.cumsum(tl.trans(values), axis=0)
    values = tl.erf(values) + tl.sqrt(tl.abs(values)) + tl.sin(values) + tl.floor(values)
    tl.store(out + i[:, None] * BLOCK + j[None, :], values)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def matmul(gpu: Device, dtype: torch.dtype, size=(50, 48, 128), precision="tf32", tile=32) -> float:
    """The relative error of a product; the operands are the same every time."""
    generator = torch.Generator().manual_seed(0)
    m, n, k = size
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    out = torch.full((m, n), float("nan"))
    with gpu:
        matmul_kernel[triton.cdiv(m, 64), triton.cdiv(n, tile)](
            a, b, out, m, n, k, BM=64, BN=tile, BK=32, PRECISE=precision, num_warps=4, num_stages=3
        )
    return relative_error(out, a.double() @ b.double())


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_elementwise_with_a_ragged_tail(arch, generator):
    x, y = (torch.randn(1008, generator=generator) for _ in range(2))
    out = torch.full((1008,), float("nan"))
    with Device(arch) as gpu:
        add_kernel[lambda meta: (triton.cdiv(1008, meta["BLOCK"]),)](
            x, y, out, 1008, 0.5, BLOCK=256
        )
    assert torch.equal(out, torch.addcmul(x, y, torch.tensor(0.5)))
    (launch,) = gpu.launches
    assert (launch.name, launch.grid, launch.num_warps) == ("add_kernel", (4, 1, 1), 4)
    assert {"ptx", "cubin", "ttgir"} <= set(launch.asm)
    assert f".target sm_{arch}" in launch.asm["ptx"]
    assert launch.traffic["load_bytes"] == 8064
    assert launch.traffic["load_sectors"] == 252
    assert launch.traffic["store_sectors"] == 126
    assert launch.instructions["add"] > 0 or launch.instructions["fma"] > 0


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pipelined_matmul(arch, dtype):
    gpu = Device(arch)
    # tf32 keeps 10 bits of a factor and cuts off the rest.
    assert matmul(gpu, dtype) < (2e-3 if dtype == torch.float32 else 1e-6)
    opcode = "wgmma" if arch == 90 else "mma"
    assert any(name.startswith(opcode) for name in gpu.launches[0].instructions)
    assert gpu.launches[0].traffic["mma_flops"] >= 2 * 50 * 48 * 128


def test_tf32_cuts_the_operands_off():
    """Everything below the upper 19 bits, without rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=generator), torch.randn(32, 32, generator=generator)
    out = torch.empty(16, 32)
    with Device(80):
        matmul_kernel[(1, 1)](a, b, out, 16, 32, 32, BM=16, BN=32, BK=32, PRECISE="tf32")
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    assert relative_error(out, cut[0] @ cut[1]) < 1e-6


def test_exact_matmul_uses_fma():
    gpu = Device(80)
    assert matmul(gpu, torch.float32, (16, 32, 64), precision="ieee") < 1e-6
    assert gpu.launches[0].instructions["fma"] and not gpu.launches[0].traffic["mma_flops"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reduction(arch, dtype, generator):
    x = torch.randn(5, 300, generator=generator).to(dtype)
    out = torch.empty_like(x)
    with Device(arch):
        softmax_kernel[(5,)](x, out, 300, BLOCK=512, num_warps=4)
    assert relative_error(out, x.double().softmax(-1)) < 4 * torch.finfo(dtype).eps


def test_atomics(generator):
    x = torch.randint(0, 7, (500,), generator=generator, dtype=torch.int32)
    counts, largest = torch.zeros(7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with Device(80):
        histogram_kernel[(4,)](x, counts, largest, 500, BLOCK=128)
    assert counts.tolist() == torch.bincount(x, minlength=7).tolist()
    assert largest.item() == x.max().item()


def test_a_spin_lock_ends():
    """The waiting CTAs do not stop the one that holds the lock."""
    x, out, lock = torch.arange(5.0), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with Device(80, races=False):
        locked_sum_kernel[(5,)](x, out, lock)
    assert out.item() == 10
    with Device(80), pytest.raises(SimulationError, match="race between CTAs in 'out'"):
        locked_sum_kernel[(5,)](x, out, lock.zero_())


def test_tuples_and_loops(generator):
    x = torch.randint(-50, 50, (3, 300), generator=generator, dtype=torch.int32)
    out = torch.zeros(3, dtype=torch.int32)
    with Device(80):
        sum_all_kernel[(3,)](x, out, (3, 7), 300, BLOCK=128)
    assert out.tolist() == (x.sum(1) * 3 + 7).tolist()


@pytest.mark.parametrize("arch", [80, 90])
def test_functions_and_scans(arch, generator):
    x = torch.randn(32, 32, generator=generator)
    out = torch.empty(32, 32)
    with Device(arch):
        inclined_kernel[(1,)](x, out, 32, BLOCK=32)
    sums = x.T.double().cumsum(0)
    expected = sums.erf() + sums.abs().sqrt() + sums.sin() + sums.floor()
    assert relative_error(out, expected) < 1e-6


def test_every_architecture_compiles_its_own_code_once(generator):
    x = torch.randn(64, generator=generator)
    out = torch.empty(64)

    def launch(arch):
        with Device(arch) as gpu:
            for _ in range(2):
                unmasked_add_kernel[(1,)](x, x, out, BLOCK=64)
        return gpu.launches

    first, again, other = launch(80), launch(80), launch(89)
    assert first[0].asm is first[1].asm is again[0].asm
    assert ".target sm_89" in other[0].asm["ptx"] and ".target sm_80" in again[0].asm["ptx"]


@pytest.mark.parametrize("arch", [90, "gfx942"])
def test_compile_only(arch):
    if arch != 90 and (reason := why_no_amd()):
        pytest.skip(reason)
    x = torch.zeros(64)
    out = torch.full((64,), 3.0)
    with Device(arch, execute=False) as gpu:
        unmasked_add_kernel[(1,)](x, x, out, BLOCK=64)
    assert (out == 3).all()
    assert ("cubin" if arch == 90 else "amdgcn") in gpu.launches[0].asm


def test_the_previous_driver_returns():
    before = active_driver()
    with pytest.raises(ZeroDivisionError), Device(80):
        raise ZeroDivisionError
    assert active_driver() is before


def test_views_of_a_storage_alias():
    data = torch.arange(128, dtype=torch.float32)
    with Device(80):
        unmasked_add_kernel[(1,)](data[:64], data[64:], data[:64], BLOCK=64)
    assert torch.equal(data[:64], 2 * torch.arange(64) + 64.0)


# ---- planted bugs


def edited(old: str, new: str, which: int) -> Callable[[str], str]:
    """Replaces the which-th match of a pattern."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(old, ptx))[which]
        return ptx[: found.start()] + found.expand(new) + ptx[found.end() :]

    return edit


def caught(arch: int, dtype: torch.dtype, edit: Callable[[str], str]) -> bool:
    try:
        return not matmul(Device(arch, edit=edit), dtype) < 5e-3
    except SimulationError:
        return True


def matmul_ptx(arch: int, dtype: torch.dtype) -> str:
    gpu = Device(arch)
    matmul(gpu, dtype)
    return gpu.launches[0].asm["ptx"]


def survivors(arch: int, dtype: torch.dtype, old: str, new: str, most: int = 99) -> list[str]:
    """The places where an edit has no effect."""
    found = list(re.finditer(old, matmul_ptx(arch, dtype)))
    assert found
    places = range(0, len(found), max(1, len(found) // most))
    return [found[i][0] for i in places if not caught(arch, dtype, edited(old, new, i))]


@pytest.mark.parametrize("arch", [80, 90])
def test_every_dropped_barrier_is_a_race(arch):
    # Before 3.9 Triton put a redundant one between the copies of two steps. From 3.8 on the loop
    # for sm_80 begins with one for data that the previous barrier already guards.
    redundant = (TRITON < (3, 9)) + (arch == 80 and TRITON >= (3, 8))
    assert len(survivors(arch, torch.float16, r"bar\.sync[^;]*;", "")) == redundant


def test_swapped_registers_of_a_product():
    old = r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)"
    assert not survivors(80, torch.float16, old, r"\1\3, \2", most=4)


def test_wrongly_transposed_fragments():
    assert not survivors(80, torch.float16, r"(ldmatrix\.\S+)\.trans", r"\1", most=4)
    assert not survivors(80, torch.float16, r"(ldmatrix\S+x4)(\.shared)", r"\1.trans\2", most=4)


@pytest.mark.parametrize(("arch", "kind"), [(80, "cp.async"), (90, "cp.async"), (90, "wgmma")])
def test_dropped_waits(arch, kind):
    drop = Device(arch, edit=lambda ptx: re.sub(rf"{kind}\.wait_group[^;]*;", "", ptx))
    with pytest.raises(SimulationError, match=r"before the copy's wait|never waited"):
        matmul(drop, torch.float16)


def test_dropped_mask(generator):
    x = torch.randn(1000, generator=generator)
    drop = edited(r"@%p\d+ (ld\.global)", r"\1", -1)
    with pytest.raises(
        SimulationError, match=r"out-of-bounds global load .*'y'.*test_simulator.py"
    ):
        launch_add(x, x.clone(), drop)


def test_bound_off_by_one(generator):
    x = torch.randn(1000, generator=generator)
    wider = edited(r"setp\.lt\.s32", "setp.le.s32", 0)
    errors = 0
    for which in range(8):
        try:
            wider = edited(r"setp\.lt\.s32", "setp.le.s32", which)
            launch_add(x, x.clone(), wider)
        except IndexError:
            break
        except SimulationError:
            errors += 1
    assert errors == 1  # the comparison that lets the first element beyond the end through


def launch_add(x: torch.Tensor, y: torch.Tensor, edit=None) -> torch.Tensor:
    out = torch.empty_like(x)
    with Device(80, edit=edit):
        add_kernel[(4,)](x, y, out, x.numel(), 1.0, BLOCK=256)
    return out


def test_reading_past_the_end():
    x, out = torch.zeros(255), torch.zeros(256)
    with Device(80), pytest.raises(SimulationError, match=r"at byte 1016 of 'y'.*CTA \(0, 0, 0\)"):
        unmasked_add_kernel[(1,)](out, x, out.clone(), BLOCK=256)


def test_race_between_ctas():
    out = torch.zeros(256, dtype=torch.int32)
    with Device(80):
        overlapping_store_kernel[(4,)](out, STRIDE=64, BLOCK=64)
        with pytest.raises(SimulationError, match="race between CTAs in 'out'"):
            overlapping_store_kernel[(4,)](out, STRIDE=63, BLOCK=64)
    with Device(80, races=False):
        overlapping_store_kernel[(4,)](out, STRIDE=63, BLOCK=64)


HAND_WRITTEN = """
.version 8.0
.target sm_80
.address_size 64
.shared .align 16 .b8 pool[512];
.visible .entry hand(.param .u64 p)
{
    .reg .pred %p<4>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [p];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r3, pool;
    shl.b32 %r4, %r1, 2;
    add.s32 %r3, %r3, %r4;
    setp.lt.u32 %p1, %r1, 16;
    BODY
    st.global.u32 [%rd3], %r2;
    ret;
}
"""


def by_hand(body: str) -> list[int]:
    out = torch.zeros(64, dtype=torch.int32)
    run_ptx(HAND_WRITTEN.replace("BODY", body), "hand", (1,), (64,), [out])
    return out.tolist()


def test_branches_join_again():
    body = """
    @%p1 bra $A;
    mov.u32 %r2, 5;
    bra.uni $B;
$A: mov.u32 %r2, 6;
$B: shfl.sync.bfly.b32 %r5|%p2, %r2, 16, 31, -1;
    add.s32 %r2, %r2, %r5;
    """
    assert by_hand(body) == [11] * 32 + [10] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@%p1 bar.sync 0;", "divergent barrier"),
        ("bar.sync 1, 96;", "deadlock"),
        ("@%p1 bra $A; bar.sync 0; bra.uni $B;\n$A: bar.sync 0;\n$B:", "different bar.sync"),
        ("@%p1 bra $A; shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;\n$A:", "inactive lane"),
        ("st.shared.u32 [pool], %r1;", "store different values"),
        ("xor.b32 %r5, %r3, 128; st.shared.u32 [%r3], %r1; ld.shared.u32 %r2, [%r5];", "race"),
        ("ld.shared.u32 %r2, [%r3+512];", "out-of-bounds shared"),
        ("ld.shared.u64 %rd1, [%r3];", "misaligned"),
        ("ld.global.u32 %r2, [%rd2];", "null pointer"),
        ("add.cc.u32 %r2, %r1, %r1;", "not supported"),
        ("mbarrier.init.shared.b64 [%r3], 1;", "not supported"),
        (
            "cp.async.ca.shared.global [%r3], [%rd3], 4; ld.shared.u32 %r2, [%r3];"
            " cp.async.wait_all;",
            "before the copy's wait",
        ),
        ("cp.async.ca.shared.global [%r3], [%rd3], 4;", "never waited"),
        ("trap;", "trap"),
    ],
)
def test_findings(body, message):
    with pytest.raises(SimulationError, match=message):
        by_hand(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("lop3.b32 %r2, %r1, 12, 10, 0x96;", lambda i: i ^ 12 ^ 10),
        ("bfe.u32 %r2, %r1, 2, 3;", lambda i: i >> 2 & 7),
        ("bfe.s32 %r2, %r1, 2, 3;", lambda i: (i >> 2 & 7) - (8 if i >> 4 & 1 else 0)),
        ("bfi.b32 %r2, %r1, -1, 4, 6;", lambda i: ~0x3F0 | i << 4 & 0x3F0),
        ("prmt.b32 %r2, %r1, 7, 0x7740;", lambda i: i | 7 << 8),
        ("shf.l.wrap.b32 %r2, -2147483648, %r1, 33;", lambda i: 2 * i + 1),
        ("clz.b32 %r2, %r1;", lambda i: 32 - i.bit_length()),
        ("bfind.u32 %r2, %r1;", lambda i: i.bit_length() - 1),
        ("brev.b32 %r2, %r1; shr.u32 %r2, %r2, 26;", lambda i: int(f"{i:06b}"[::-1], 2)),
        ("popc.b32 %r2, %r1;", int.bit_count),
        ("mov.u32 %r5, -7; shr.s32 %r2, %r5, %r1;", lambda i: -7 >> i),
        ("mov.u32 %r5, 1; shl.b32 %r2, %r5, %r1;", lambda i: 1 << i),
        (
            "mov.u64 %rd2, 1; shl.b64 %rd2, %rd2, %r1; mov.b64 {_, %r2}, %rd2;",
            lambda i: 1 << i >> 32,
        ),
        ("mad.lo.s32 %r2, %r1, %r1, -5;", lambda i: i * i - 5),
        ("mul.hi.s32 %r2, %r1, -2;", lambda i: -1 if i else 0),
        ("mul.wide.s32 %rd2, %r1, -3; cvt.u32.u64 %r2, %rd2;", lambda i: -3 * i),
        ("cvt.s64.s32 %rd2, %r1; mul.hi.s64 %rd2, %rd2, -1; LOW", lambda i: -1 if i else 0),
        ("cvt.u64.u32 %rd2, %r1; mul.hi.u64 %rd2, %rd2, -1; LOW", lambda i: max(i - 1, 0)),
        ("sub.s32 %r2, %r1, 30; div.s32 %r2, %r2, 7;", lambda i: int((i - 30) / 7)),
        ("sub.s32 %r2, %r1, 30; rem.s32 %r2, %r2, 7;", lambda i: i - 30 - 7 * int((i - 30) / 7)),
        ("mov.b64 %rd2, {%r1, 9}; mov.b64 {_, %r5}, %rd2; add.u32 %r2, %r5, %r1;", lambda i: 9 + i),
        ("cvt.rn.f32.u32 %r5, %r1; cvt.rzi.s32.f32 %r2, %r5;", lambda i: i),
        ("mov.b32 %r5, 0f3F800001; add.rz.f32 %r2, %r5, 0f33000000;", lambda i: 0x3F800001),
        ("mov.b32 %r5, 0f3F800001; add.rp.f32 %r2, %r5, 0f33000000;", lambda i: 0x3F800002),
        ("cvt.rn.bf16x2.f32 %r2, 0f3F808000, 0f3F818000;", lambda i: 0x3F803F82),
        ("fma.rn.f16x2 %r2, 0x3C004000, 0x42003C00, 0x3C003C00;", lambda i: 0x44004200),
        ("setp.gt.and.u32 %p2|%p3, %r1, 5, %p1; selp.u32 %r2, 1, 0, %p3;", lambda i: i <= 5),
        ("vote.sync.ballot.b32 %r2, %p1, -1;", lambda i: 0xFFFF if i < 32 else 0),
        ("redux.sync.max.s32 %r2, %r1, -1;", lambda i: i | 31),
        ("shfl.sync.down.b32 %r2, %r1, 3, 0x1c1f, -1;", lambda i: i if i % 4 else i + 3),
        ("shfl.sync.up.b32 %r2, %r1, 1, 0, -1;", lambda i: i - 1 if i % 32 else i),
        ("st.shared.u32 [%r3], 5; atom.shared.cas.b32 %r2, [%r3], 5, %r1;", lambda i: 5),
    ],
)
def test_instructions(body, expected):
    result = by_hand(body.replace("LOW", "cvt.u32.u64 %r2, %rd2;"))
    assert [one & 0xFFFFFFFF for one in result] == [expected(i) & 0xFFFFFFFF for i in range(64)]


@pytest.mark.parametrize(
    "together",
    [
        "bar.warp.sync -1; xor.b32 %r5, %r3, 64; ld.shared.u32 %r2, [%r5];",
        "ld.shared.u32 %r2, [%r3]; shfl.sync.bfly.b32 %r2, %r2, 16, 31, -1;",
    ],
)
def test_threads_of_a_warp_wait_for_others_whose_code_is_further_down(together):
    body = f"""
    @%p1 bra $FAR;
    st.shared.u32 [%r3], 7;
$JOIN:
    {together}
    st.global.u32 [%rd3], %r2;
    ret;
$FAR:
    st.shared.u32 [%r3], 5;
    bra.uni $JOIN;
    """
    assert by_hand(body) == [7] * 16 + [5] * 16 + [7] * 32


def test_a_branch_by_a_table():
    body = """
    shr.u32 %r5, %r1, SHIFT;
$T: .branchtargets $A, $B,
        $A, $C;
    brx.idx %r5, $T;
$A: mov.u32 %r2, 1;
    bra.uni $D;
$B: mov.u32 %r2, 2;
    bra.uni $D;
$C: mov.u32 %r2, 3;
$D:
    """
    assert by_hand(body.replace("SHIFT", "4")) == [1] * 16 + [2] * 16 + [1] * 16 + [3] * 16
    assert by_hand(body.replace("SHIFT", "6")) == [1] * 64
    with pytest.raises(SimulationError, match="beyond the 4 branch targets"):
        by_hand(body.replace("SHIFT", "3"))


def test_an_endless_loop_is_given_up(monkeypatch):
    monkeypatch.setattr("simulator.scheduler._LIMIT", 1000)
    for body in ("$A: bra.uni $A;", "$A: @%p1 bra $A;"):
        with pytest.raises(SimulationError, match="endless loop"):
            by_hand(body)


def test_comments_do_not_move_lines():
    body = "/* one\n two */ // three\n trap;"
    with pytest.raises(SimulationError, match=r"PTX line 21\b"):
        by_hand(body)


@triton.jit
def widening(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(y + i, mask=i < n, other=0.0)
    tl.store(
        out + i, a.to(tl.float32) * b.to(tl.float32) + tl.load(out + i, mask=i < n), mask=i < n
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bits_into_32(dtype):
    """From sm_100 on one instruction widens and multiplies, if Triton's LLVM has it."""
    x, y, out = torch.randn(50).to(dtype), torch.randn(50).to(dtype), torch.randn(50)
    expected = x.double() * y.double() + out.double()
    with Device(120) as gpu:
        widening[(1,)](x, y, out, 50, BLOCK=64)
    name = "f16" if dtype == torch.float16 else "bf16"
    assert (f"fma.rn.f32.{name}" in gpu.launches[0].asm["ptx"]) == (TRITON >= (3, 7))
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
