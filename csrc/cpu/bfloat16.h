// Products of bfloat16 numbers by an instruction (AVX512_BF16), summed in float32. A word is two features.
#pragma once
#include "words.h"

// KRON_EMULATE_BFLOAT16: tests run this code without the instruction.
#if KRON_BYTES == 64 || defined(KRON_EMULATE_BFLOAT16)
#define KRON_BFLOAT16_PRODUCTS 1
#else
#define KRON_BFLOAT16_PRODUCTS 0
#endif

namespace {

struct Halves {
  typedef Floats Sum;
  static constexpr bool SCALED = false;
  static KRON_INLINE Floats start(const int32_t *, Int) { return Floats{}; }
  static KRON_INLINE Floats finish(Floats sum, Floats) { return sum; }
  static KRON_INLINE Floats add(Floats sum, [[maybe_unused]] Ints x, [[maybe_unused]] Ints w) {
#if defined(KRON_EMULATE_BFLOAT16)
    const auto low = [](Ints v) { return bits_of<Floats>(bits_of<Bits>(v) << 16); };
    const auto high = [](Ints v) { return bits_of<Floats>(bits_of<Bits>(v) & 0xffff0000); };
    sum += low(x) * low(w) + high(x) * high(w);
#elif KRON_BYTES == 64
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
    return sum;
  }
};

// The nearest bfloat16 numbers, in the upper halves.
KRON_INLINE Bits upper_halves(Floats f) {
  const Bits u = bits_of<Bits>(f), is_nan = bits_of<Bits>((u & 0x7fffffff) > 0x7f800000);
  const Bits nearest = u + 0x7fff + ((u >> 16) & 1), quiet = u | 0x400000;
  return ((quiet & is_nan) | (nearest & ~is_nan)) & 0xffff0000;
}
KRON_INLINE Bits pair_of(Floats low, Floats high) { return upper_halves(low) >> 16 | upper_halves(high); }

// `count` vectors that are `step` apart to words that are words_step apart, each of two neighbours.
inline void narrow_features(const float *in, Int step, Int count, int32_t *words, Int words_step) {
  for (Int c = 0; c < count; c += 2, words += words_step) {
    const Bits word = pair_of(load(in + c * step), c + 1 < count ? load(in + (c + 1) * step) : Floats{});
    memcpy(words, &word, sizeof word);
  }
}

// out[r] (+)= Σ_c w[r, c] in[c], by the grid of contract(). `panel` is for KRON_ACCUMULATORS rows.
inline void contract_halves(const Matrix<bfloat16> &w, int nv, const float *in, float *out, const Grid &g,
                            bool accumulate, int32_t *panel, int32_t *words) {
  const Int groups = (w.cols + 1) / 2, count = g.pre * g.post * nv;
  each_vector_of(g, nv, in, words, [&](const float *from, int32_t *to) {
    narrow_features(from, g.in_step, w.cols, to, count * LANES<float>);
  });
  const Narrow x = {words, nullptr, count, nv, out, g, accumulate};
  if (w.col_stride == 1 && w.cols % 2 == 0) { // two entries are a word as they lie in memory
    const char *data = reinterpret_cast<const char *>(w.data);
    return multiply_all<Halves>({data, w.row_stride * 2, 4, groups, nullptr, 0, nullptr}, w.rows, x, 0);
  }
  for (Int first = 0; first < w.rows; first += KRON_ACCUMULATORS) {
    const Int rows = smaller(KRON_ACCUMULATORS, w.rows - first);
    for (Int r = 0; r < rows; r++)
      for (Int c = 0; c < w.cols; c += 2) {
        const bfloat16 *entry = w.data + (first + r) * w.row_stride + c * w.col_stride;
        const uint32_t high = c + 1 < w.cols ? entry[w.col_stride].bits : 0;
        panel[r * groups + c / 2] = int32_t(entry->bits | high << 16);
      }
    const char *data = reinterpret_cast<const char *>(panel);
    multiply_all<Halves>({data, groups * 4, 4, groups, nullptr, 0, nullptr}, rows, x, first);
  }
}

// Words of keys: of two neighbouring features each, (groups of features)[keys], from (features)[keys].
inline void narrow_keys(const float *in, Int step, Int features, Int vectors, int32_t *words) {
  constexpr Int L = LANES<float>;
  for (Int f = 0; f < features; f += 2)
    for (Int v = 0; v < vectors; v++, words += L) {
      const Floats low = load(in + f * step + v * L);
      const Bits word = pair_of(low, f + 1 < features ? load(in + (f + 1) * step + v * L) : Floats{});
      memcpy(words, &word, sizeof word);
    }
}
// Words of values: of two neighbouring keys each, (features)(groups of keys), from (features)[keys]. Behind the
// last key is zero.
inline void narrow_values(const float *in, Int step, Int features, Int keys, Int vectors, int32_t *words) {
  constexpr Int L = LANES<float>;
  for (Int f = 0; f < features; f++) {
    bfloat16 *const row = reinterpret_cast<bfloat16 *>(words) + f * vectors * L;
    for (Int v = 0; v < vectors; v++) put(row + v * L, load(in + f * step + v * L));
    if (keys % 2) row[keys].bits = 0;
  }
}

} // namespace
