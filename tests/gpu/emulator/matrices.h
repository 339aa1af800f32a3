// ldmatrix, mma and shuffles, for all 32 lanes of a warp at once.
#pragma once
#include <string.h>

#include "engine.h"
#include "numbers.h"

namespace kron::emulator {

typedef void *const (&Lanes)[32];
template <class T> T &operands(Lanes lanes, int lane) { return *static_cast<T *>(lanes[lane]); }

inline void exchange_between_lanes(Lanes lanes) {
  float values[32];
  for (int lane = 0; lane < 32; lane++) values[lane] = operands<ShuffleXor>(lanes, lane).value;
  for (int lane = 0; lane < 32; lane++) {
    ShuffleXor &shuffle = operands<ShuffleXor>(lanes, lane);
    shuffle.value = values[(lane ^ shuffle.lanes) & 31];
  }
}

template <bool TRANSPOSED> void distribute_matrices(Lanes lanes) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t numbers[8][8];
    for (int row = 0; row < 8; row++)
      memcpy(numbers[row], operands<LoadMatrices>(lanes, 8 * matrix + row).row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = TRANSPOSED ? numbers[minor][major] : numbers[major][minor];
      const uint32_t high = TRANSPOSED ? numbers[minor + 1][major] : numbers[major][minor + 1];
      operands<LoadMatrices>(lanes, lane).result[matrix] = low | high << 16;
    }
  }
}

// The numbers in 4 bytes, for 8 rows or columns at a time.
typedef uint32_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

struct OfFloat16 {
  static constexpr int COUNT = 2;
  static Floats numbers(const Words &words, int i) {
    const Words x = words >> 16 * i, magnitude = x & 0x7fff;
    const Words special = Words(magnitude >= 0x7c00) & 0x7f800000; // as in from_float16
    return Floats(Words(Floats(magnitude << 13) * 0x1p112f) | special | (x & 0x8000) << 16);
  }
};
struct OfBfloat16 {
  static constexpr int COUNT = 2;
  static Floats numbers(const Words &words, int i) {
    return Floats(i ? words & 0xffff0000 : words << 16);
  }
};
struct OfTf32 { // the multiplier ignores the lower 13 bits
  static constexpr int COUNT = 1;
  static Floats numbers(const Words &words, int) { return Floats(words & ~0x1fffu); }
};

template <class Of> void multiply_matrices(Lanes lanes) {
  Words a[2][8], b[8]; // indexed by 4-byte words; a: upper and lower rows
  for (int lane = 0; lane < 32; lane++) {
    const MultiplyAdd &o = operands<MultiplyAdd>(lanes, lane);
    const int group = lane / 4, word = lane % 4;
    for (int i = 0; i < 4; i++) a[i % 2][word + i / 2 * 4][group] = o.a[i];
    for (int i = 0; i < 2; i++) b[word + i * 4][group] = o.b[i];
  }
  Floats d[2][8] = {}; // by rows
  for (int word = 0; word < 8; word++)
    for (int i = 0; i < Of::COUNT; i++) {
      const Floats right = Of::numbers(b[word], i);
      for (int half = 0; half < 2; half++) {
        const Floats left = Of::numbers(a[half][word], i);
        for (int row = 0; row < 8; row++) d[half][row] += left[row] * right;
      }
    }
  for (int lane = 0; lane < 32; lane++) {
    MultiplyAdd &o = operands<MultiplyAdd>(lanes, lane);
    for (int i = 0; i < 4; i++) o.d[i] += d[i / 2][lane / 4][lane % 4 * 2 + i % 2];
  }
}

} // namespace kron::emulator
