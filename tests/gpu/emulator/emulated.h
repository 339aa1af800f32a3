// The parts of CUDA and of csrc/cuda/device.h that kernels use, for the host's compiler.
//
// Restrictions: blocks have one dimension and whole warps, masks have all lanes, shared memory comes
// from shared_memory(), and there are no atomics.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "engine.h"
#include "numbers.h"
#include "packets.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(BYTES) alignas(BYTES)

// The last parameter of functions that can fail: the caller's position.
#define KRON_PLACE kron::emulator::Place place = kron::emulator::Place::current()

#define threadIdx (kron::emulator::thread_index)
#define blockIdx (kron::emulator::block_index)
#define blockDim (kron::emulator::block_size)
#define gridDim (kron::emulator::grid_size)


// ---- synchronisation ---------------------------------------------------------------------------

__forceinline__ void __syncthreads(KRON_PLACE) {
  kron::emulator::synchronize_block(place);
}
__forceinline__ void __syncwarp(unsigned mask = ~0u, KRON_PLACE) {
  kron::emulator::meet(kron::emulator::SYNC_WARP, mask, nullptr, place);
}

// ---- numbers -----------------------------------------------------------------------------------

// Integers of mixed types, as in CUDA.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  typedef std::common_type_t<A, B> T;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  typedef std::common_type_t<A, B> T;
  return T(a) < T(b) ? T(b) : T(a);
}

// ---- global memory -----------------------------------------------------------------------------

template <class T>
__forceinline__ T __ldg(const T *from, KRON_PLACE) {
  kron::emulator::check_alignment(from, alignof(T), "__ldg", place);
  return *from;
}

// ---- device.h ----------------------------------------------------------------------------------

namespace kron {

__forceinline__ float to_float(float x) { return x; }
__forceinline__ float to_float(Float16 x) { return emulator::from_float16(x.bits); }
__forceinline__ float to_float(Bfloat16 x) { return emulator::from_bfloat16(x.bits); }

__forceinline__ uint32_t pack(float first, float second, Float16) {
  return emulator::to_float16(first) | uint32_t(emulator::to_float16(second)) << 16;
}
__forceinline__ uint32_t pack(float first, float second, Bfloat16) {
  return emulator::to_bfloat16(first) | uint32_t(emulator::to_bfloat16(second)) << 16;
}

__forceinline__ uint32_t to_tf32(uint32_t x) { return emulator::to_tf32(x); }

__forceinline__ float power_of_two(float x) {
  return emulator::without_subnormals(exp2f(emulator::without_subnormals(x)));
}
__forceinline__ float reciprocal(float x) {
  return emulator::without_subnormals(1.f / emulator::without_subnormals(x));
}

__forceinline__ unsigned char *shared_memory() { return emulator::block_memory; }

namespace emulator {
__forceinline__ void check_shared(const void *p, const char *what, Place place) {
  check_alignment(p, 16, what, place);
  const uintptr_t offset = uintptr_t(p) - uintptr_t(block_memory);
  if (offset > block_memory_size || offset + 16 > block_memory_size)
    fail(place, "%s beyond shared memory: at byte %lld of %lld", what, (long long)offset,
         (long long)block_memory_size);
}
} // namespace emulator

__forceinline__ uint32_t shared_address(const void *p, KRON_PLACE) {
  const uintptr_t offset = uintptr_t(p) - uintptr_t(emulator::block_memory);
  if (offset > emulator::block_memory_size)
    emulator::fail(place, "shared_address of what is not in shared memory");
  return uint32_t(offset);
}

// The data arrive as late as possible; until then the target is NaN.
__forceinline__ void copy_async(void *to, const void *from, bool there = true, KRON_PLACE) {
  static const uint32_t zeros[4] = {};
  emulator::check_shared(to, "copy_async", place);
  if (there) emulator::check_alignment(from, 16, "copy_async", place);
  const emulator::Copy copy = {static_cast<uint32_t *>(to),
                               there ? static_cast<const uint32_t *>(from) : zeros};
  for (int i = 0; i < 4; i++) copy.to[i] = ~0u;
  emulator::issue_copy(copy, place);
}
__forceinline__ void copies_commit(KRON_PLACE) {
  emulator::commit_copies(place);
}
template <int KEPT> __forceinline__ void copies_wait() {
  while (const emulator::Copy *copy = emulator::next_copy(KEPT))
    for (int i = 0; i < 4; i++) copy->to[i] = copy->from[i];
}

namespace emulator {
__forceinline__ void load_matrices(const Collective &kind, uint32_t (&r)[4], const void *row,
                                   Place place) {
  check_shared(row, "ldmatrix", place);
  LoadMatrices operands;
  for (int i = 0; i < 4; i++) operands.row[i] = static_cast<const uint32_t *>(row)[i];
  meet(kind, ~0u, &operands, place);
  for (int i = 0; i < 4; i++) r[i] = operands.result[i];
}
__forceinline__ void multiply_add(const Collective &kind, float (&d)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2], Place place) {
  MultiplyAdd operands;
  memcpy(operands.d, d, sizeof d);
  memcpy(operands.a, a, sizeof a);
  memcpy(operands.b, b, sizeof b);
  meet(kind, ~0u, &operands, place);
  memcpy(d, operands.d, sizeof d);
}
} // namespace emulator

__forceinline__ void load_matrices(uint32_t (&r)[4], const void *row, KRON_PLACE) {
  emulator::load_matrices(emulator::LOAD_MATRICES, r, row, place);
}
__forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row, KRON_PLACE) {
  emulator::load_matrices(emulator::LOAD_MATRICES_TRANSPOSED, r, row, place);
}

__forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2], Float16, KRON_PLACE) {
  emulator::multiply_add(emulator::MULTIPLY_FLOAT16, d, a, b, place);
}
__forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2], Bfloat16, KRON_PLACE) {
  emulator::multiply_add(emulator::MULTIPLY_BFLOAT16, d, a, b, place);
}
__forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2], float, KRON_PLACE) {
  emulator::multiply_add(emulator::MULTIPLY_TF32, d, a, b, place);
}

__forceinline__ float shuffle_xor(float x, int lanes, KRON_PLACE) {
  emulator::ShuffleXor operands = {x, lanes};
  emulator::meet(emulator::SHUFFLE_XOR, ~0u, &operands, place);
  return operands.value;
}

} // namespace kron
