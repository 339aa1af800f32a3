// Reads and writes a token's vectors, 16 bytes at a time: see Layout.
#pragma once
#include "arguments.h"
#include "device.h"

namespace kron {

template <class N> inline constexpr int PACKET = 16 / sizeof(N); // numbers in 16 bytes

template <int N> inline constexpr int LOG2 = 1 + LOG2<N / 2>;
template <> inline constexpr int LOG2<1> = 0;

template <int E, int RUN> struct Access {
  static constexpr int NUMBERS = E, ENTRIES = RUN, VECTORS = E / RUN;
};

// Calls f with the Access for a layout.
template <class N, class F> KRON_DEVICE void with_access(int run, F f) {
  constexpr int E = PACKET<N>;
  if (run == E) return f(Access<E, E>{});
  if (run == E / 2) return f(Access<E, E / 2>{});
  if (run == 1) return f(Access<E, 1>{});
  f(Access<1, 1>{});
}

// The position of entry c of vector u of a token.
KRON_DEVICE int offset_of(const Layout &l, int u, int c) {
  return l.interleaved ? c * l.vectors + u : u * l.length + c;
}

template <class N, int COUNT> KRON_DEVICE void unpack(float (&values)[COUNT], const void *from) {
  const N *numbers = static_cast<const N *>(from);
#pragma unroll
  for (int i = 0; i < COUNT; i++) values[i] = to_float(numbers[i]);
}

// Reads COUNT contiguous numbers of global memory, aligned to their total size, a power of two.
template <int COUNT, class N> KRON_DEVICE void load(float (&values)[COUNT], const N *from) {
  constexpr int BYTES = COUNT * sizeof(N);
  if constexpr (BYTES >= 16) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const uint4 packet = __ldg(reinterpret_cast<const uint4 *>(from) + i);
      float part[PACKET<N>];
      unpack<N>(part, &packet);
#pragma unroll
      for (int j = 0; j < PACKET<N>; j++) values[i * PACKET<N> + j] = part[j];
    }
  } else if constexpr (BYTES == 8) {
    const uint2 packet = __ldg(reinterpret_cast<const uint2 *>(from));
    unpack<N>(values, &packet);
  } else if constexpr (BYTES == 4) {
    const uint32_t packet = __ldg(reinterpret_cast<const uint32_t *>(from));
    unpack<N>(values, &packet);
  } else {
    unpack<N>(values, from);
  }
}

// Writes COUNT contiguous numbers to global or shared memory, with the same alignment.
template <int COUNT, class N> KRON_DEVICE void store(N *to, const float (&values)[COUNT]) {
  if constexpr (sizeof(N) == 2 && COUNT > 1) {
    uint32_t words[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) words[i] = pack(values[2 * i], values[2 * i + 1], N{});
    if constexpr (COUNT == 8)
      *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    else if constexpr (COUNT == 4)
      *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
    else
      *reinterpret_cast<uint32_t *>(to) = words[0];
  } else if constexpr (COUNT == 4) {
    *reinterpret_cast<float4 *>(to) = make_float4(values[0], values[1], values[2], values[3]);
  } else if constexpr (COUNT == 2) {
    *reinterpret_cast<float2 *>(to) = make_float2(values[0], values[1]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = from_float(values[i], N{});
  }
}

// Reads COUNT floats of shared memory.
template <int COUNT> KRON_DEVICE void load_floats(float (&values)[COUNT], const float *from) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
      const float4 v = reinterpret_cast<const float4 *>(from)[i];
      values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
    }
  } else if constexpr (COUNT == 2) {
    const float2 v = *reinterpret_cast<const float2 *>(from);
    values[0] = v.x, values[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = from[i];
  }
}

} // namespace kron
