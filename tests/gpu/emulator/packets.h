// CUDA's vector types. A GPU reads and writes them at once and requires alignment, which every copy
// checks here.
#pragma once
#include <stdint.h>

#include "engine.h"

namespace kron::emulator {

inline __attribute__((always_inline)) void
check_alignment(const void *p, unsigned bytes, const char *what, Place place = Place::current()) {
  uintptr_t address = uintptr_t(p);
  asm("" : "+r"(address)); // or the compiler removes the check, because of alignas
  if (address % bytes)
    fail(place, "misaligned: %s of %u bytes at address %% %u = %u", what, bytes, bytes,
         unsigned(address % bytes));
}

template <class T> struct alignas(2 * sizeof(T)) Pair {
  T x, y;
  Pair() = default;
  Pair(T x, T y) : x(x), y(y) {}
  Pair(const Pair &other) : x(checked(other).x), y(other.y) { checked(*this); }
  Pair &operator=(const Pair &other) {
    checked(*this).x = checked(other).x, y = other.y;
    return *this;
  }
  template <class P> static P &checked(P &pair) {
    check_alignment(&pair, sizeof(Pair), "a vector");
    return pair;
  }
};

template <class T> struct alignas(4 * sizeof(T)) Quad {
  T x, y, z, w;
  Quad() = default;
  Quad(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  Quad(const Quad &other) : x(checked(other).x), y(other.y), z(other.z), w(other.w) {
    checked(*this);
  }
  Quad &operator=(const Quad &other) {
    checked(*this).x = checked(other).x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
  template <class P> static P &checked(P &quad) {
    check_alignment(&quad, sizeof(Quad), "a vector");
    return quad;
  }
};

} // namespace kron::emulator

typedef kron::emulator::Pair<uint32_t> uint2;
typedef kron::emulator::Quad<uint32_t> uint4;
typedef kron::emulator::Pair<float> float2;
typedef kron::emulator::Quad<float> float4;

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
