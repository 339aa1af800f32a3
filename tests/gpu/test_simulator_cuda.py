"""The simulator executes kernels that nvcc compiled, and finds bugs planted in them."""

import mmap
import re
import struct

import pytest
import torch
from simulator import SimulationError, Structure, run_ptx
from simulator.cuda import KERNELS, CudaDevice, kernel_ptx, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

# The end of a kernel's name is its math, which is compiled separately. Here there is only one.
TOYS = """
#include "HEADER"
using namespace kron;

struct Side { const float *data; int64_t rows, columns; int32_t which; };
struct Mixed {
  Side sides[4];
  const float *x; float *y; int64_t *q;
  int64_t tokens, divisor;
  uint64_t unsigned_divisor;
  int32_t activation, repeats;
  float scale; int16_t small; uint8_t tiny;
};

KRON_DEVICE float activated(int which, float x) {
  switch (which) {
    case 0: return x;
    case 1: return x > 0 ? x : 0;
    case 2: return x * reciprocal(1 + power_of_two(-1.44269504f * x));
    case 3: return fminf(fmaxf(x, -0.5f), 0.5f);
    default: return -x;
  }
}

KRON_DEVICE void mix(const Mixed &m) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m.tokens) return;
  m.q[4 * i] = (i - 20) / m.divisor, m.q[4 * i + 1] = (i - 20) % m.divisor;
  m.q[4 * i + 2] = uint64_t(i) / m.unsigned_divisor;
  m.q[4 * i + 3] = uint64_t(i) % m.unsigned_divisor;
  float kept[8];
#pragma unroll 1
  for (int j = 0; j < 8; j++) kept[(j + m.repeats) & 7] = j * m.x[4 * i];
  const float4 v = reinterpret_cast<const float4 *>(m.x)[i];
  const Side &side = m.sides[i & 3];
  float4 sum;
  sum.x = activated(m.activation, v.x) + kept[i & 7];
  sum.y = fmaf(v.y, m.scale, side.data[i & 1]);
  sum.z = v.z + side.rows * side.columns - side.which;
  sum.w = m.small * m.tiny + (i > 3 && v.w > 0 || i == 1);
  reinterpret_cast<float4 *>(m.y)[i] = sum;
}
KRON_KERNEL(mixed_float32, Mixed, 128, 1, mix)

struct Product { const void *a, *b; float *d; void *e; bool left, right; };

template <class N> KRON_DEVICE void multiply(const Product &p) {
  constexpr int PITCH = 48;
  const int lane = threadIdx.x % 32;
  unsigned char *a = shared_memory(), *b = a + 16 * PITCH, *parts = b + 16 * PITCH;
  for (int i = threadIdx.x; i < 32; i += blockDim.x)
    copy_async(a + i / 2 * PITCH + i % 2 * 16, static_cast<const char *>(p.a) + i * 16, true);
  copies_commit();
  for (int i = threadIdx.x; i < 32; i += blockDim.x)
    copy_async(b + i / 2 * PITCH + i % 2 * 16, static_cast<const char *>(p.b) + i * 16, true);
  copies_commit();
  copies_wait<1>();
  __syncthreads();
  uint32_t left[4], right[4];
  const int near = (lane & 15) * PITCH + (lane >> 4) * 16;
  const int far = ((lane & 7) + (lane >> 4) * 8) * PITCH + (lane >> 3 & 1) * 16;
  if (sizeof(N) == 2 && p.left)
    load_matrices_transposed(left, a + far);
  else
    load_matrices(left, a + near);
  copies_wait<0>();
  __syncthreads();
  if (sizeof(N) == 2 && p.right)
    load_matrices_transposed(right, b + near);
  else
    load_matrices(right, b + far);
  if constexpr (sizeof(N) == 4)
    for (int i = 0; i < 4; i++) left[i] = to_tf32(left[i]), right[i] = to_tf32(right[i]);
  const int half = threadIdx.x / 32;
  const uint32_t some[2] = {right[2 * half], right[2 * half + 1]};
  float d[4] = {};
  multiply_add(d, left, some, N{});
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    p.d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
    sum += d[i];
  }
  for (int i = 1; i < 32; i *= 2) sum += shuffle_xor(sum, i);
  if (lane == 0) reinterpret_cast<float *>(parts)[half] = sum;
  __syncthreads();
  const float total = reinterpret_cast<float *>(parts)[0] + reinterpret_cast<float *>(parts)[1];
  if constexpr (sizeof(N) == 2) {
    if (threadIdx.x < 8) {
      static_cast<uint32_t *>(p.e)[threadIdx.x] = pack(total, d[0], N{});
      const N rounded = from_float(total, N{});
      static_cast<N *>(p.e)[16 + threadIdx.x] = rounded;
      static_cast<N *>(p.e)[24 + threadIdx.x] = from_float(to_float(rounded) * 2, N{});
    }
  }
}
KRON_KERNEL(half_float32, Product, 64, 1, multiply<Float16>)
KRON_KERNEL(bfloat_float32, Product, 64, 1, multiply<Bfloat16>)
KRON_KERNEL(single_float32, Product, 64, 1, multiply<float>)

struct Reach { const float *x; float *y; const float *table[3]; int64_t which, shift; };
KRON_DEVICE void reach(const Reach &r) {
  const float *from = r.table[r.which];
  r.y[threadIdx.x] = *reinterpret_cast<const float *>(
      reinterpret_cast<const char *>(threadIdx.x % 2 ? from : r.x) + 4 * threadIdx.x + r.shift);
}
KRON_KERNEL(reach_float32, Reach, 32, 1, reach)
"""

ARCHS = [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)]
PRODUCTS = {
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "single": torch.float32,
}
SHARED = 2 * 16 * 48 + 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("toys") / "toys.cu"
    file.write_text(TOYS.replace("HEADER", str(KERNELS.with_name("device.h"))))
    return file


class Toy:
    """Launches toy kernels as the emulated module does, with a struct of addresses."""

    def __init__(self, gpu: CudaDevice):
        self.gpu = gpu

    def __call__(self, kernel: str, grid: int, threads: int, shared: int, form: str, *values):
        values = [self.gpu.address(one) if isinstance(one, torch.Tensor) else one for one in values]
        data = struct.pack(form, *values)
        data += bytes(-len(data) % 8)
        if error := self.gpu.launch(kernel, grid, threads, shared, data):
            raise RuntimeError(error)


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def toy(request, source):
    with CudaDevice(request.param, source=source, attached=False) as gpu:
        yield Toy(gpu)


def mixed(toy: Toy, activation: int, tokens: int = 150, grid: int = 2, rows: int = 150):
    x, sides = torch.randn(rows, 4), [torch.randn(2) for _ in range(4)]
    y, q = torch.zeros(rows, 4), torch.zeros(rows, 4, dtype=torch.int64)
    records = [(one, i, 2 + i, 5 * i) for i, one in enumerate(sides)]
    toy(
        *("mixed_float32", grid, 128, 0, "=" + 4 * "Qqqi4x" + "QQQqqQiifhB"),
        *(value for record in records for value in record),
        *(x, y, q, tokens, 7, 9, activation, 3, 1.5, -300, 200),
    )
    return x, sides, y, q


@pytest.mark.parametrize("activation", range(5))
def test_structs_loops_divisions_and_switches(toy, activation):
    x, sides, y, q = mixed(toy, activation)
    i = torch.arange(150)
    signed = torch.div(i - 20, 7, rounding_mode="trunc")
    expected = torch.stack([signed, i - 20 - 7 * signed, i // 9, i % 9], dim=1)
    assert torch.equal(q, expected)
    function = [
        lambda v: v,
        torch.relu,
        torch.nn.functional.silu,
        lambda v: v.clamp(-0.5, 0.5),
        torch.neg,
    ][activation]
    side = i % 4
    columns = [
        function(x[:, 0]) + (i % 8 - 3) % 8 * x[:, 0],
        1.5 * x[:, 1] + torch.stack(sides)[side, i % 2],
        x[:, 2] + side * (2 + side) - 5 * side,
        -60000.0 + (((i > 3) & (x[:, 3] > 0)) | (i == 1)),
    ]
    torch.testing.assert_close(y, torch.stack(columns, dim=1), rtol=1e-6, atol=1e-6)
    (launch,) = toy.gpu.launches
    assert (launch.name, launch.grid, launch.num_warps) == ("mixed_float32", (2, 1, 1), 4)
    assert launch.instructions["ld.global.v4.f32"] or launch.instructions["ld.global.nc.v4.f32"]
    assert launch.instructions["st.global.v4.f32"]


def product(toy: Toy, kind: str, left: bool = False, right: bool = False, shared: int = SHARED):
    """The kernel's product; it transposes a factor that is transposed in memory."""
    dtype = PRODUCTS[kind]
    a, b = torch.randn(16, 32 // dtype.itemsize), torch.randn(16, 32 // dtype.itemsize)
    a, b = a.to(dtype), b.to(dtype)
    memory = [one.T.contiguous() if turned else one for one, turned in ((a, left), (b, right))]
    d, e = torch.zeros(16, 16), torch.zeros(32, dtype=dtype)
    toy(f"{kind}_float32", 1, 64, shared, "=QQQQ??", *memory, d, e, left, right)
    return a, b, d, e


def check_product(toy: Toy, kind: str, left: bool, right: bool) -> None:
    a, b, d, e = product(toy, kind, left, right)
    expected = a.double() @ b.double().T
    error = 2**-9 if kind == "single" else 2**-20
    torch.testing.assert_close(d.double(), expected, rtol=error, atol=8 * error)
    if kind == "single":
        return
    total = expected.sum().to(e.dtype)
    first = [d[i // 4, 2 * (i % 4)] for i in range(8)]
    assert e[0:16:2].tolist() == pytest.approx([total.item()] * 8, rel=1e-2)
    assert torch.equal(e[1:16:2], torch.stack(first).to(e.dtype))
    assert torch.equal(e[24:], 2 * e[16:24]) and torch.equal(e[16:24], e[0:16:2])


TURNS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("left", "right"), TURNS)
@pytest.mark.parametrize("kind", ["half", "bfloat"])
def test_copies_fragments_and_products(toy, kind, left, right):
    check_product(toy, kind, left, right)
    launch = toy.gpu.launches[-1]
    assert launch.traffic["mma_flops"] == 2 * 2 * 16 * 8 * 16
    assert launch.instructions["cp.async.cg.shared.global"] == 2


def test_a_product_in_tf32(toy):
    check_product(toy, "single", False, False)


# ---- findings


@pytest.fixture
def device(source):
    def make(edit=None, **options) -> Toy:
        return Toy(CudaDevice(80, edit, source=source, attached=False, **options))

    return make


def reach(
    toy: Toy,
    which: int = 1,
    shift: int = 0,
    x: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
):
    x = torch.arange(32.0) if x is None else x
    y = torch.zeros(32) if y is None else y
    table = torch.arange(32.0) + 100
    toy("reach_float32", 1, 32, 0, "=QQQQQqq", x, y, 0, table, x, which, shift)
    return y


def test_a_table_of_pointers(device):
    expected = torch.arange(32.0) + 100 * (torch.arange(32) % 2)
    assert torch.equal(reach(device()), expected)


# Nothing stands before its first byte in its page: byte -4 has another page's number.
PAGE = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(31)}, r"out-of-bounds global store of 4 bytes at byte 124 of '.*: 31\)"),
        ({"shift": 4}, "out-of-bounds global load of 4 bytes at byte 128"),
        ({"shift": -4}, "out-of-bounds global load of 4 bytes at byte -4"),
        ({"shift": -4, "x": PAGE}, "out-of-bounds global load of 4 bytes at byte -4"),
        ({"shift": 2}, "misaligned load of 4 bytes"),
        ({"which": 0}, "through a null pointer"),
        ({"which": 5}, "beyond the kernel's parameters"),
        ({"which": -7}, "beyond the kernel's parameters"),
    ],
)
def test_wrong_addresses_are_found(device, change, message):
    with pytest.raises(RuntimeError, match=message):
        reach(device(), **change)


def test_a_finding_names_the_source_line_and_leaves_as_it_was(device):
    toy = device()
    with pytest.raises(SimulationError, match=r"reach_float32: misaligned .*toys\.cu:\d+"), toy.gpu:
        reach(toy, shift=2)


def test_memory_that_was_not_passed_is_out_of_bounds(device):
    toy, y = device(), torch.zeros(32)
    hidden = torch.arange(32.0)
    with pytest.raises(RuntimeError, match="far from every tensor"):
        toy("reach_float32", 1, 32, 0, "=QQQQQqq", y, y, 0, hidden.data_ptr(), y, 1, 0)


def test_a_tensor_lives_as_long_as_the_device(device):
    toy = device()
    with toy.gpu:
        address = toy.gpu.address(torch.full((32,), 7.0))
        clutter = [torch.zeros(32) for _ in range(10)]
        y = torch.zeros(32)
        toy("reach_float32", 1, 32, 0, "=QQQQQqq", address, y, 0, address, y, 1, 0)
    assert (y == 7).all() and not any(one.any() for one in clutter)


def test_a_grid_beyond_the_tokens(device):
    mixed(device(), 0, grid=4)
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        mixed(device(), 0, tokens=151)
    guard = r"setp\.ge\.s64(\s+%p1), %rd\d+, %rd\d+"
    unguarded = device(lambda ptx: re.sub(guard, r"mov.pred \1, 0", ptx, count=1))
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        mixed(unguarded, 0)


def test_too_little_shared_memory(device):
    with pytest.raises(RuntimeError, match="out-of-bounds shared"):
        product(device(), "half", shared=SHARED - 4)


@pytest.mark.parametrize("which", range(3))
def test_every_dropped_barrier_is_a_race(device, which):
    places = iter(range(3))
    toy = device(
        lambda ptx: re.sub(
            r"bar\.sync\s+0;", lambda found: "" if next(places) == which else found[0], ptx
        )
    )
    with pytest.raises(RuntimeError, match="shared-memory race"):
        product(toy, "half")


@pytest.mark.parametrize("kept", [0, 1])
def test_every_dropped_wait_is_found(device, kept):
    toy = device(lambda ptx: re.sub(rf"cp\.async\.wait_group\s+{kept};", "", ptx))
    with pytest.raises(RuntimeError, match=r"before the copy's wait|never waited"):
        product(toy, "half")


def test_dropped_transpositions(device):
    toy = device(lambda ptx: ptx.replace(".x4.trans", ".x4"))
    with pytest.raises(AssertionError):
        check_product(toy, "half", True, False)
    with pytest.raises(AssertionError):
        check_product(toy, "half", False, True)


def test_a_struct_of_another_size(device, source):
    with pytest.raises(RuntimeError, match="8 bytes for the 56 of arguments"):
        device()("reach_float32", 1, 32, 0, "=Q", 0)
    with pytest.raises(SimulationError, match="compiled for 32 threads, not 64"):
        args = [Structure(bytes(56), {})]
        run_ptx(kernel_ptx("reach_float32", 80, source), "reach_float32", (1,), (64,), args)


def test_a_missing_kernel(device):
    with pytest.raises(RuntimeError, match="the name must end in one of float16"):
        device()("reach", 1, 32, 0, "=Q", 0)
    with pytest.raises(RuntimeError, match=r"toys\.cu has no kernel other_float32"):
        device()("other_float32", 1, 32, 0, "=Q", 0)


def test_launches_are_recorded_without_execution(device):
    toy, y = device(execute=False), torch.zeros(31)
    reach(toy, y=y)
    (launch,) = toy.gpu.launches
    assert (launch.name, launch.shared, launch.num_warps) == ("reach_float32", 0, 1)
    assert not y.any() and not launch.asm
