"""The emulator runs CUDA C++ correctly, and finds bugs planted in it."""

import ctypes
import itertools
import re
import struct
import subprocess
import sys

import emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=str(emulator.why_not()))

SOURCE = r"""
#include "device.h"
#include "runtime.h"
#pragma GCC visibility push(default)
using namespace kron;

extern "C" const char *launch(const char *name, const void *entry, int64_t grid, int threads,
                              int64_t shared, const void *arguments, size_t size) {
  return run({name, entry}, {grid, threads, shared, nullptr}, arguments, size);
}
extern "C" const char *properties(int64_t index, int64_t *values) {
  Device device = {};
  const char *error = device_properties(index, device);
  values[0] = device.multiprocessors, values[1] = device.shared;
  return error;
}
extern "C" const char *on_device(int64_t index) { return OnDevice(index).error; }

struct Arguments {
  void *p[4];
  int64_t n;
};
template <class T> T *at(const Arguments &a, int i) { return static_cast<T *>(a.p[i]); }
#define KERNEL(NAME, ...) KRON_KERNEL(NAME, Arguments, 1024, 1, __VA_ARGS__)
#define THREAD int(threadIdx.x)

// ---- one instruction each

template <class N> KRON_DEVICE void widen(const Arguments &a) {
  for (int i = THREAD; i < a.n; i += blockDim.x) at<float>(a, 1)[i] = to_float(at<N>(a, 0)[i]);
}
KERNEL(widen_float16, widen<Float16>)
KERNEL(widen_bfloat16, widen<Bfloat16>)

template <class N> KRON_DEVICE void narrow(const Arguments &a) {
  const float *x = at<float>(a, 0);
  for (int i = THREAD; i < a.n; i += blockDim.x)
    at<uint32_t>(a, 1)[i] = pack(x[2 * i], x[2 * i + 1], N{});
}
KERNEL(narrow_float16, narrow<Float16>)
KERNEL(narrow_bfloat16, narrow<Bfloat16>)

KRON_DEVICE void round_to_tf32(const Arguments &a) {
  for (int i = THREAD; i < a.n; i += blockDim.x)
    at<uint32_t>(a, 1)[i] = to_tf32(at<uint32_t>(a, 0)[i]);
}
KERNEL(tf32, round_to_tf32)

KRON_DEVICE void functions(const Arguments &a) {
  const float x = at<float>(a, 0)[THREAD];
  at<float>(a, 1)[THREAD] = power_of_two(x), at<float>(a, 2)[THREAD] = reciprocal(x);
}
KERNEL(functions_of_floats, functions)

// The address of each lane's row is random.
KRON_DEVICE void matrices(const Arguments &a) {
  reinterpret_cast<uint4 *>(shared_memory())[THREAD] = at<uint4>(a, 0)[THREAD];
  __syncwarp();
  const unsigned char *row = shared_memory() + at<int>(a, 1)[THREAD] * 16;
  uint32_t plain[4], transposed[4];
  load_matrices(plain, row), load_matrices_transposed(transposed, row);
  for (int i = 0; i < 4; i++) {
    at<uint32_t>(a, 2)[THREAD * 4 + i] = plain[i];
    at<uint32_t>(a, 3)[THREAD * 4 + i] = transposed[i];
  }
}
KERNEL(matrices_of_rows, matrices)

template <class N> KRON_DEVICE void multiply(const Arguments &a) {
  float d[4];
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; i++) left[i] = at<uint32_t>(a, 0)[THREAD * 4 + i];
  for (int i = 0; i < 2; i++) right[i] = at<uint32_t>(a, 1)[THREAD * 2 + i];
  for (int i = 0; i < 4; i++) d[i] = at<float>(a, 2)[THREAD * 4 + i];
  multiply_add(d, left, right, N{});
  for (int i = 0; i < 4; i++) at<float>(a, 2)[THREAD * 4 + i] = d[i];
}
KERNEL(multiply_float16, multiply<Float16>)
KERNEL(multiply_bfloat16, multiply<Bfloat16>)
KERNEL(multiply_tf32, multiply<float>)

KRON_DEVICE void shuffles(const Arguments &a) {
  at<float>(a, 1)[THREAD] = shuffle_xor(at<float>(a, 0)[THREAD], int(a.n));
}
KERNEL(shuffles_of_floats, shuffles)

KRON_DEVICE void copies(const Arguments &a) {
  float *s = reinterpret_cast<float *>(shared_memory()) + THREAD * 8;
  float *x = at<float>(a, 0) + THREAD * 8, *y = at<float>(a, 1) + THREAD * 8;
  y[0] = s[1]; // never written
  s[1] = 1.f;
  copy_async(s, x), copies_commit();
  copy_async(s + 4, x + 4), copies_commit();
  y[1] = s[1];
  copies_wait<1>();
  y[2] = s[1], y[3] = s[6];
  copies_commit(); // an empty group: one more may be on its way
  copies_wait<1>();
  y[4] = s[6];
  copies_wait<0>();
  y[5] = s[7];
  copy_async(s, x, false), copies_commit();
  y[6] = s[1];
  copies_wait<0>();
  y[7] = s[1];
}
KERNEL(copies_in_groups, copies)

KRON_DEVICE void order(const Arguments &a) {
  int *log = at<int>(a, 0);
  for (int i = 0; i < 2; i++) {
    log[++log[0]] = int(blockIdx.x * blockDim.x) + THREAD;
    __syncthreads();
  }
}
KERNEL(order_of_threads, order)

// ---- y = x wᵀ for x (rows, 64) and w (32, 64) of float16, and the sums of squares of y's rows

enum {
  RIGHT, NO_BARRIER, NO_WAIT, NO_GUARD, MISALIGNED, DIVERGENT, SWAPPED, NO_BARRIER_IN_SUM,
  SAME_ADDRESS, PENDING, BEYOND, NO_SYNCWARP
};
template <int BUG> KRON_DEVICE void product(const Arguments &a) {
  constexpr int PITCH = BUG == MISALIGNED ? 136 : 144;
  const int lane = THREAD % 32, warp = THREAD / 32, first = int(blockIdx.x) * 16, rows = int(a.n);
  unsigned char *x = shared_memory(), *w = x + 16 * PITCH;
  float *parts = reinterpret_cast<float *>(w + 32 * PITCH), *own = parts + 4 * 16 + warp;
  for (int i = THREAD; i < 48 * 8; i += blockDim.x) {
    const int row = i / 8, byte = i % 8 * 16;
    unsigned char *to = x + row * PITCH + byte; // w is behind x
    if (row >= 16) copy_async(to, at<char>(a, 1) + (row - 16) * 128 + byte);
    else if (first + row < rows) copy_async(to, at<char>(a, 0) + (first + row) * 128 + byte);
    else *reinterpret_cast<uint4 *>(to) = make_uint4(0, 0, 0, 0);
  }
  copies_commit();
  if (BUG != NO_WAIT) copies_wait<0>();
  if (BUG == DIVERGENT && lane == 5) __syncthreads();
  else if (BUG != NO_BARRIER) __syncthreads();

  float d[4] = {};
#pragma unroll
  for (int step = 0; step < 4; step += 2) {
    uint32_t right[4], left[4];
    load_matrices(right, w + (warp * 8 + lane % 8) * PITCH + step * 32 + lane / 8 * 16);
    for (int i = 0; i < 2; i++) {
      load_matrices(left, x + lane % 16 * PITCH + (step + i) * 32 + lane / 16 * 16);
      if (BUG == SWAPPED) { const uint32_t l = left[1]; left[1] = left[2], left[2] = l; }
      const uint32_t part[] = {right[2 * i], right[2 * i + 1]};
      multiply_add(d, left, part, Float16{});
    }
  }

  if (lane == 31) *own = 1.f; // to the other lanes, through memory
  if (BUG != NO_SYNCWARP) __syncwarp();
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + half * 8;
    const float u = d[2 * half] * *own, v = d[2 * half + 1];
    if (first + row < rows || BUG == NO_GUARD)
      reinterpret_cast<float2 *>(at<float>(a, 2))[((first + row) * 32 + warp * 8) / 2 + lane % 4] =
          make_float2(u, v);
    float sum = u * u + v * v;
    sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0) parts[warp * 16 + row] = sum;
  }
  if (BUG != NO_BARRIER_IN_SUM) __syncthreads();
  if (warp == 3 && lane < 16 && first + lane < rows) {
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += parts[i * 16 + lane];
    at<float>(a, 3)[BUG == SAME_ADDRESS ? lane : first + lane] = sum;
  }
  if (BUG == PENDING && THREAD == 77) copy_async(x, at<char>(a, 0));
  if (BUG == BEYOND && THREAD == 77) parts[4 * 16 + 4] = 0.f;
}
KERNEL(product_right, product<RIGHT>)
KERNEL(product_no_barrier, product<NO_BARRIER>)
KERNEL(product_no_wait, product<NO_WAIT>)
KERNEL(product_no_guard, product<NO_GUARD>)
KERNEL(product_misaligned, product<MISALIGNED>)
KERNEL(product_divergent, product<DIVERGENT>)
KERNEL(product_swapped, product<SWAPPED>)
KERNEL(product_no_barrier_in_sum, product<NO_BARRIER_IN_SUM>)
KERNEL(product_same_address, product<SAME_ADDRESS>)
KERNEL(product_pending, product<PENDING>)
KERNEL(product_beyond, product<BEYOND>)
KERNEL(product_no_syncwarp, product<NO_SYNCWARP>)

// ---- misuse

KRON_DEVICE void two_places(const Arguments &) {
  uint32_t r[4];
  if (THREAD < 9) load_matrices(r, shared_memory());
  else load_matrices(r, shared_memory());
}
KERNEL(places_apart, two_places)

#define MISUSE(NAME, ...) KERNEL(NAME, [](const Arguments &a) { (void)a; __VA_ARGS__; })

MISUSE(some_end, if (THREAD < 3) return; __syncthreads())
MISUSE(some_wait, if (THREAD == 40) __syncthreads())
MISUSE(lane_missing, if (THREAD != 9) shuffle_xor(1.f, 1))
MISUSE(lanes_apart, if (THREAD < 9) shuffle_xor(1.f, 1); else __syncwarp())
MISUSE(some_lanes, __syncwarp(0xffff))
MISUSE(deadlock, if (THREAD % 32 < 16) shuffle_xor(1.f, 1); else __syncthreads())
MISUSE(misaligned_load, const uint4 v = *reinterpret_cast<uint4 *>(shared_memory() + 8);
  at<uint4>(a, 0)[0] = v)
MISUSE(misaligned_store, *reinterpret_cast<float2 *>(shared_memory() + 4) = make_float2(1, 2))
MISUSE(misaligned_number, __ldg(reinterpret_cast<uint32_t *>(at<char>(a, 0) + 2)))
MISUSE(misaligned_copy, copy_async(shared_memory(), at<char>(a, 0) + 8))
MISUSE(copy_beyond, copy_async(shared_memory() + 1024, at<char>(a, 0)))
MISUSE(row_beyond, uint32_t r[4]; load_matrices(r, shared_memory() + THREAD * 64))
MISUSE(not_shared, shared_address(a.p[0]))
MISUSE(too_many_copies, for (;;) copy_async(shared_memory(), a.p[0]))
"""
FLAGS = "-x c++ -Wno-unused-variable"
SHARED = 48 * 144 + 4 * 16 * 4 + 4 * 4  # of the product: x, w and parts; a number of each warp


@pytest.fixture(scope="session")
def units(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulator") / "kernels.cu"
    path.write_text(SOURCE)
    return emulator.Unit(path, FLAGS), emulator.EMULATOR


@pytest.fixture(scope="session")
def emulated(units):
    return emulator.load(units)


@pytest.fixture
def launch(emulated):
    """launch(kernel, tensors..., n=0, grid=1, threads=32, shared=1024) raises what run returns."""

    def run(name, *tensors, n=0, grid=1, threads=32, shared=1024):
        library = emulated.library
        library.launch.restype = ctypes.c_char_p
        entry = ctypes.cast(library[name], ctypes.c_void_p)
        pointers = [t.data_ptr() for t in tensors] + [0] * (4 - len(tensors))
        arguments = struct.pack("4Qq", *pointers, n)
        error = library.launch(
            name.encode(),
            entry,
            ctypes.c_int64(grid),
            threads,
            ctypes.c_int64(shared),
            arguments,
            ctypes.c_size_t(len(arguments)),
        )
        if error:
            raise RuntimeError(error.decode())

    emulated.seed(0)
    emulated.device()
    yield run
    emulated.seed(0)
    emulated.device()


# ---- numbers

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int16)


@pytest.mark.parametrize("name", HALVES)
def test_every_16_bit_number_is_widened(name, launch):
    x, y = PATTERNS.view(HALVES[name]), torch.empty(2**16)
    launch(f"widen_{name}", x, y, n=2**16)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", HALVES)
def test_floats_are_rounded_to_the_nearest_even_and_packed(name, launch):
    dtype = HALVES[name]
    numbers = PATTERNS.view(dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    between = (numbers[:-1].double() + numbers[1:].double()).mul(0.5).float()
    inf = torch.tensor(torch.inf)
    base = torch.cat([numbers, between, numbers.neg(), torch.tensor([inf, -inf, 65520.0, 3.4e38])])
    up, down = torch.nextafter(base, inf), torch.nextafter(base, -inf)
    x = torch.cat([base, up, down, torch.tensor([torch.nan, 1e-45, -1e-45, 1e-40])])
    x = x[: len(x) // 2 * 2]
    y = torch.empty(len(x) // 2, dtype=torch.int32)
    launch(f"narrow_{name}", x, y, n=len(y))
    torch.testing.assert_close(y.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_tf32_has_10_bits_of_fraction_and_ties_go_away_from_zero(launch):
    x = torch.randint(-(2**31), 2**31, (2**15,)).int()
    x[: 2**13] = x[: 2**13] & ~0x1FFF | 0x1000  # ties
    x = x[(x.view(torch.float32).abs() >= 2.0**-126)]  # neither NaN nor subnormal
    y = torch.empty_like(x)
    launch("tf32", x, y, n=len(x))
    fraction, exponent = x.view(torch.float32).double().frexp()
    rounded = fraction.sign() * (fraction.abs() * 2**11 + 0.5).floor() / 2**11
    assert torch.equal(y.view(torch.float32), torch.ldexp(rounded, exponent).float())
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    result = torch.empty_like(special)
    launch("tf32", special, result, n=3)
    torch.testing.assert_close(result, special, equal_nan=True)


def test_the_power_of_two_and_the_reciprocal(launch):
    x = torch.linspace(-80, 80, 32)
    e, r = torch.empty(32), torch.empty(32)
    launch("functions_of_floats", x, e, r)
    torch.testing.assert_close(e, x.double().exp2().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(r, 1 / x, rtol=1e-6, atol=0)
    x = torch.tensor([-140.0, 3e38, -3e38, 1e-40] * 8)
    launch("functions_of_floats", x, e, r)
    assert e[:2].tolist() == [0, torch.inf]
    assert r[1:4].tolist() == [0, 0, torch.inf]


# ---- instructions of warps


def test_matrices_of_8_rows_and_their_transposes(launch):
    x = torch.randint(-(2**15), 2**15, (32, 8)).short()
    row = torch.randperm(32).int()
    plain, transposed = torch.empty(32, 4, 2).short(), torch.empty(32, 4, 2).short()
    launch("matrices_of_rows", x, row, plain, transposed)
    m = x[row.long()].view(4, 8, 8)
    for lane, i, j in itertools.product(range(32), range(4), range(2)):
        assert plain[lane, i, j] == m[i, lane // 4, lane % 4 * 2 + j]
        assert transposed[lane, i, j] == m[i, lane % 4 * 2 + j, lane // 4]


def fragments(left, right, d):
    """The registers of each lane, as device.h defines them."""
    left, right = left.view(torch.uint8), right.view(torch.uint8)
    a, b, c = torch.empty(32, 4, 4).byte(), torch.empty(32, 2, 4).byte(), torch.empty(32, 4)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        starts = [(g, 4 * t), (g + 8, 4 * t), (g, 16 + 4 * t), (g + 8, 16 + 4 * t)]
        for i, (row, byte) in enumerate(starts):
            a[lane, i] = left[row, byte : byte + 4]
        for i, byte in enumerate([4 * t, 16 + 4 * t]):
            b[lane, i] = right[g, byte : byte + 4]
        places = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
        for i, (row, column) in enumerate(places):
            c[lane, i] = d[row, column]
    return a, b, c


@pytest.mark.parametrize("name", ["float16", "bfloat16", "tf32"])
def test_products_of_tensor_cores(name, launch):
    dtype = HALVES.get(name, torch.float32)
    depth = 32 // dtype.itemsize
    left, right = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype)
    d = torch.randn(16, 8)
    a, b, c = fragments(left, right, d)
    launch(f"multiply_{name}", a, b, c)
    if name == "tf32":  # the multiplier uses the upper bits of float32
        left, right = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (left, right))
    expected = fragments(left, right, d.double() + left.double() @ right.double().T)[2]
    torch.testing.assert_close(c, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("lanes", [1, 2, 16, 31])
def test_shuffles(lanes, launch):
    x, y = torch.randn(32), torch.empty(32)
    launch("shuffles_of_floats", x, y, n=lanes)
    assert torch.equal(y, x[torch.arange(32) ^ lanes])


def test_copies_arrive_when_their_group_is_waited_for(launch):
    x, y = torch.randn(32, 8), torch.empty(32, 8)
    launch("copies_in_groups", x, y)
    expected = torch.full((32, 8), torch.nan)
    expected[:, 7] = 0
    expected[:, 2], expected[:, 4], expected[:, 5] = x[:, 1], x[:, 6], x[:, 7]
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


# ---- the order of threads and blocks


def order(emulated, launch, seed):
    log = torch.zeros(1 + 2 * 3 * 64, dtype=torch.int32)
    emulated.seed(seed)
    launch("order_of_threads", log, grid=3, threads=64)
    return log[1:].view(3, 2, 64)


def test_the_order_is_drawn_from_the_seed(emulated, launch):
    number = torch.arange(192, dtype=torch.int32).view(3, 1, 64)
    assert torch.equal(order(emulated, launch, 0), number.expand(3, 2, 64))
    drawn = {seed: order(emulated, launch, seed) for seed in (1, 2, 3, 4)}
    for seed, log in drawn.items():
        assert torch.equal(order(emulated, launch, seed), log)
        # Every thread of one block after another passes one barrier after another.
        blocks = log[:, 0, 0] // 64
        assert sorted(blocks.tolist()) == [0, 1, 2]
        assert torch.equal(log.sort(dim=2).values, number[blocks.long()].expand(3, 2, 64))
    assert len({tuple(log.flatten().tolist()) for log in drawn.values()}) == 4
    assert len({tuple((log[:, 0, 0] // 64).tolist()) for log in drawn.values()}) > 1


# ---- a whole kernel, and bugs planted in it


def product(launch, kernel, rows=20):
    """The largest error of y and the sums."""
    x, w = torch.randn(rows, 64).half(), torch.randn(32, 64).half()
    y, sums = torch.full((rows, 32), torch.nan), torch.full((rows,), torch.nan)
    launch(kernel, x, w, y, sums, n=rows, grid=-(-rows // 16), threads=128, shared=SHARED)
    expected = x.double() @ w.double().T
    errors = torch.cat([(y - expected).flatten(), (sums - expected.square().sum(1)) / 100])
    return errors.nan_to_num(torch.inf).abs().max().item()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_a_correct_kernel_is_correct_in_any_order(rows, seed, emulated, launch):
    emulated.seed(seed)
    assert product(launch, "product_right", rows) < 1e-4


# The last two have no effect in numerical order.
@pytest.mark.parametrize(
    "bug", ["no_wait", "swapped", "no_barrier", "same_address", "no_syncwarp", "no_barrier_in_sum"]
)
def test_a_wrong_kernel_is_wrong_in_some_order(bug, emulated, launch):
    def errors(seeds):
        for seed in seeds:
            emulated.seed(seed)
            try:
                yield product(launch, f"product_{bug}", 40)
            except RuntimeError:
                assert bug == "no_wait"  # the thread ends
                yield torch.inf

    assert max(errors(range(1, 6))) > 1
    assert max(errors([0])) > 1 or bug in ("no_syncwarp", "no_barrier_in_sum")


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("no_wait", "ended with 3 copies that it did not wait for"),
        ("pending", "thread 77: ended with 1 copies that it did not wait for"),
        ("misaligned", "misaligned: copy_async of 16 bytes at address % 16 = 8"),
        ("divergent", r"divergent __syncthreads: thread \d+ is at that of kernels.cu:\d+"),
        ("beyond", "wrote beyond its shared memory"),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_bugs_are_errors(bug, message, seed, emulated, launch):
    emulated.seed(seed)
    with pytest.raises(RuntimeError, match=rf"^product_{bug}, block \d, thread \d+: .*") as raised:
        product(launch, f"product_{bug}")
    assert re.search(message, str(raised.value))
    # The next launch is not affected.
    assert product(launch, "product_right") < 1e-4


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some_end", "__syncthreads after thread 2 has ended"),
        ("some_wait", "ended, while thread 40 waits at __syncthreads|after thread 39 has ended"),
        ("lane_missing", "ended, while lane 0 of its warp waits at __shfl_xor_sync"),
        ("lanes_apart", "divergent warp: lane 0 is at __shfl_xor_sync of .*at __syncwarp"),
        ("places_apart", "divergent warp: lane 0 is at ldmatrix of .*this one at ldmatrix"),
        ("some_lanes", "__syncwarp with mask 0000ffff"),
        ("deadlock", "deadlock: waits at __shfl_xor_sync, .*thread 16 at __syncthreads"),
        ("misaligned_load", r"misaligned: a vector of 16 bytes at address % 16 = 8"),
        ("misaligned_store", r"misaligned: a vector of 8 bytes at address % 8 = 4"),
        ("misaligned_number", r"misaligned: __ldg of 4 bytes at address % 4 = 2"),
        ("misaligned_copy", r"misaligned: copy_async of 16 bytes at address % 16 = 8"),
        ("copy_beyond", "copy_async beyond shared memory: at byte 1024 of 1024"),
        ("row_beyond", "ldmatrix beyond shared memory: at byte 1024 of 1024"),
        ("not_shared", "shared_address of what is not in shared memory"),
        ("too_many_copies", "the emulator keeps 512 copies of a thread"),
    ],
)
def test_misuse_is_an_error(kernel, message, launch):
    x = torch.zeros(64)
    with pytest.raises(RuntimeError, match=rf"^{kernel}, block 0, thread \d+: .*{message}"):
        launch(kernel, x, threads=64)


# ---- the GPU


def test_a_launch_that_the_gpu_cannot_run_is_an_error(emulated, launch):
    for options, message in [
        ({"shared": 101377}, "101377 bytes of shared memory, and a block may have 101376"),
        ({"threads": 1056}, "1056 threads a block, and there may be 1024"),
        ({"threads": 33}, "33 threads a block, and the emulator runs only whole warps"),
        ({"grid": 0}, "0 blocks"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            launch("shuffles_of_floats", torch.zeros(32), torch.zeros(128), **options)
    emulated.device(shared=200000)
    launch("shuffles_of_floats", torch.zeros(32), torch.zeros(128), shared=101377)


def test_the_size_of_the_gpu_can_be_set(emulated, launch):
    library, values = emulated.library, (ctypes.c_int64 * 2)()
    library.properties.restype = library.on_device.restype = ctypes.c_char_p
    assert library.properties(ctypes.c_int64(0), values) is None
    assert list(values) == [2, 99 * 1024]
    emulated.device(multiprocessors=132, shared=227 * 1024)
    assert library.properties(ctypes.c_int64(0), values) is None
    assert list(values) == [132, 227 * 1024]
    assert library.properties(ctypes.c_int64(3), values) == b"there is no GPU 3"
    assert library.on_device(ctypes.c_int64(0)) is None
    assert library.on_device(ctypes.c_int64(3)) == b"there is no GPU 3"


def test_launches_can_be_intercepted(emulated, launch):
    x, y, calls = torch.zeros(32), torch.full((32,), torch.nan), []

    def callback(*call):
        calls.append(call)
        return "no such kernel" if call[1] == 2 else None

    with emulated.intercept(callback):
        launch("shuffles_of_floats", x, y, n=3, shared=64)
        with pytest.raises(RuntimeError, match=r"^no such kernel$"):
            launch("shuffles_of_floats", x, y, grid=2)
    arguments = struct.pack("4Qq", x.data_ptr(), y.data_ptr(), 0, 0, 3)
    assert calls[0] == ("shuffles_of_floats", 1, 32, 64, arguments)
    assert y.isnan().all()
    with pytest.raises(ZeroDivisionError), emulated.intercept(lambda *_: 1 // 0):
        launch("shuffles_of_floats", x, y)
    launch("shuffles_of_floats", x, y)
    assert not y.isnan().any()


@pytest.mark.slow
def test_it_runs_where_only_ucontext_changes_stacks(units, emulated, launch):
    kernels, engine = units
    other = emulator.load((kernels, engine._replace(flags="-DKRON_UCONTEXT")))
    emulated.library, before = other.library, emulated.library
    try:
        for seed in range(3):
            other.seed(seed)
            assert product(launch, "product_right") < 1e-4
    finally:
        emulated.library = before


# ---- sanitizers, in a process of their own

SCRIPT = """
import ctypes, struct, sys
library = ctypes.CDLL(sys.argv[1])
library.launch.restype = ctypes.c_char_p
rows = 40
tensors = [(ctypes.c_char * size)() for size in (rows * 128, 32 * 128, rows * 128, rows * 4)]
arguments = struct.pack("4Qq", *map(ctypes.addressof, tensors), rows)
for seed in map(int, sys.argv[4:]):
    library.kron_emulator_seed(ctypes.c_uint64(seed))
    entry = ctypes.cast(library[sys.argv[2]], ctypes.c_void_p)
    print(library.launch(b"kernel", entry, ctypes.c_int64(3), 128, ctypes.c_int64(int(sys.argv[3])),
                         arguments, ctypes.c_size_t(len(arguments))))
"""


def sanitized(sanitizer, units, kernel, seeds=(0,)):
    if reason := emulator.why_not(sanitizer):
        pytest.skip(reason)
    command = [sys.executable, "-c", SCRIPT, emulator.build(sanitizer, units), kernel, SHARED]
    return subprocess.run(
        [*map(str, command), *map(str, seeds)],
        env=emulator.environment(sanitizer),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_a_right_kernel(sanitizer, units):
    done = sanitized(sanitizer, units, "product_right", [0, 1, 2, 3])
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n" * 4, "")


@pytest.mark.parametrize("bug", ["no_barrier", "no_barrier_in_sum", "no_syncwarp", "same_address"])
def test_races_are_found_in_any_order(bug, units):
    for seed in (0, 1):
        done = sanitized("thread", units, f"product_{bug}", [seed])
        assert done.returncode == 66
        assert "WARNING: ThreadSanitizer: data race" in done.stderr
        assert "kernels.cu" in done.stderr


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("no_guard", "AddressSanitizer: heap-buffer-overflow"),
        ("beyond", "AddressSanitizer: use-after-poison"),
    ],
)
def test_accesses_beyond_the_end_are_found(bug, message, units):
    done = sanitized("address", units, f"product_{bug}")
    assert done.returncode == 66
    assert message in done.stderr
    assert "kernels.cu" in done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_an_error_leaves_nothing_for_sanitizers_to_find(sanitizer, units):
    done = sanitized(sanitizer, units, "product_divergent", [0, 1, 2])
    assert done.returncode == 0
    assert done.stdout.count("divergent __syncthreads") == 3


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_tests_run_again_with_a_sanitizer(sanitizer):
    if reason := emulator.why_not(sanitizer):
        pytest.skip(reason)
    test = "tests/gpu/test_emulator.py"
    right = "correct_in_any_order or matrices_of or products_of or copies_arrive"
    done = emulator.run_sanitized(sanitizer, [test, "-k", right])
    assert done.returncode == 0, done.stdout + done.stderr
    if sanitizer == "thread":
        done = emulator.run_sanitized(sanitizer, [test, "-k", "wrong_in_some_order"])
        assert done.returncode == 66
        assert "WARNING: ThreadSanitizer: data race" in done.stdout + done.stderr
