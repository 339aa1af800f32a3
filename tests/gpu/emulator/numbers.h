// 16-bit numbers and tf32, converted like PTX's cvt; every NaN becomes the canonical one.
#pragma once
#include <stdint.h>
#include <string.h>

namespace kron::emulator {

template <class To, class From> inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_bfloat16(uint16_t x) { return bits_of<float>(uint32_t(x) << 16); }

inline float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
  // Rebiasing by a multiplication is right for subnormals as well.
  const float scaled = bits_of<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000 : 0; // infinity and NaN
  return bits_of<float>(bits_of<uint32_t>(scaled) | special | sign);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float x) {
  const uint32_t u = bits_of<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00); // rounds to infinity
  // Below 2^-14, adding 0.5 leaves the rounded bits of the subnormal in the lowest bits.
  if (magnitude < 0x38800000)
    return uint16_t(sign | (bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

// Rounds to 10 bits of fraction, ties away from zero; a carry into the exponent is correct.
inline uint32_t to_tf32(uint32_t x) {
  const uint32_t magnitude = x & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;
  if (magnitude == 0x7f800000) return x;
  return (x + 0x1000) & ~0x1fffu;
}

// The flushing of operands and results of .ftz instructions.
inline float without_subnormals(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  return u & 0x7f800000 ? x : bits_of<float>(u & 0x80000000);
}

} // namespace kron::emulator
