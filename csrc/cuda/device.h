// The kernels' language: CUDA, and functions for instructions without an intrinsic. With KRON_EMULATED
// the same sources are compiled for the host, where tests/gpu/emulator runs them.
#pragma once
#include <stdint.h>

namespace kron {
struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
} // namespace kron

// Defines a kernel, a function of one struct, with a readable name:
//   KRON_KERNEL(kron_forward_float16, ForwardArguments, THREADS, BLOCKS, forward<Float16>)
// Registers are limited so that BLOCKS blocks of THREADS fit on a multiprocessor.
#if defined(KRON_EMULATED)
#include "emulated.h"
#define KRON_KERNEL(NAME, ARGUMENTS, THREADS, BLOCKS, ...)                                         \
  extern "C" void NAME(const void *arguments) {                                                    \
    __VA_ARGS__(*static_cast<const ARGUMENTS *>(arguments));                                       \
  }
#else
#define KRON_KERNEL(NAME, ARGUMENTS, THREADS, BLOCKS, ...)                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                    \
      NAME(const __grid_constant__ ARGUMENTS arguments) {                                          \
    __VA_ARGS__(arguments);                                                                        \
  }
#endif

#define KRON_DEVICE __device__ __forceinline__

namespace kron {

#if !defined(KRON_EMULATED)

KRON_DEVICE float to_float(float x) { return x; }
KRON_DEVICE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
KRON_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// Two numbers, rounded to nearest, with the first in the lower half.
KRON_DEVICE uint32_t pack(float first, float second, Float16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
KRON_DEVICE uint32_t pack(float first, float second, Bfloat16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

// Rounded to 10 bits of fraction, ties away from zero, as tensor cores require.
KRON_DEVICE uint32_t to_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

// 2^x and 1 / x within 2 units in the last place; subnormals are flushed.
KRON_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KRON_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KRON_DEVICE uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory, aligned to 16 bytes.
KRON_DEVICE unsigned char *shared_memory() {
  extern __shared__ __align__(16) unsigned char kron_shared[];
  return kron_shared;
}

// Copies 16 aligned bytes from global to shared memory; if not `there`, writes zeros and reads nothing.
// They arrive at copies_wait, and for other threads at a barrier after it.
KRON_DEVICE void copy_async(void *to, const void *from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
KRON_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last KEPT groups committed by this thread have arrived.
template <int KEPT> KRON_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(KEPT) : "memory");
}

// Loads four matrices of 8 rows of 16 bytes: lane l passes the address of row l % 8 of matrix l / 8,
// and r[i] gets word l % 4 of row l / 4 of matrix i.
KRON_DEVICE void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same for the transposes, as matrices of 16-bit numbers: numbers l / 4 of rows 2 (l % 4) and
// 2 (l % 4) + 1.
KRON_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 32 bytes) bᵀ (8 x 32 bytes) on tensor cores, with sums in float32. With
// g = lane / 4 and t = lane % 4 a lane holds
//   d: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
//   a: 4 bytes each of rows g, g + 8, g, g + 8, from byte 4t, 4t, 16 + 4t, 16 + 4t on
//   b: 4 bytes each of row g, from byte 4t and 16 + 4t on
KRON_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KRON_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// float32 numbers that to_tf32 has rounded.
KRON_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              float) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

KRON_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

#endif

KRON_DEVICE Float16 from_float(float x, Float16) { return {uint16_t(pack(x, x, Float16{}))}; }
KRON_DEVICE Bfloat16 from_float(float x, Bfloat16) { return {uint16_t(pack(x, x, Bfloat16{}))}; }
KRON_DEVICE float from_float(float x, float) { return x; }

} // namespace kron
