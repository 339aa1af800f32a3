// Products of int8 factors: rounded vectors of tokens, summed in integers, in the layout (features)[tokens].
//
// A 32-bit lane holds the neighbouring features of one token that one instruction multiplies: two in 16
// bits, or four in 8, by the same number of entries of a factor's row in one broadcast word. Both give the
// same sums.
#pragma once
#include "contract.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

// KRON_EMULATE_BYTES: tests run the code for instructions that no machine at hand has.
#if defined(KRON_EMULATE_BYTES)
#define KRON_BYTE_PRODUCTS 1
#elif KRON_BYTES == 64
#define KRON_BYTE_PRODUCTS 1
#elif KRON_BYTES == 32 && (defined(__clang__) || __GNUC__ >= 11) // its assembler knows AVX-VNNI
#define KRON_BYTE_PRODUCTS 1
#elif defined(__aarch64__)
#define KRON_BYTE_PRODUCTS 1
#else
#define KRON_BYTE_PRODUCTS 0
#endif

namespace {

typedef VectorOf<int32_t, KRON_BYTES>::type Ints;

KRON_INLINE Ints load_ints(const int32_t *p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Keeps the compiler from fusing the operations before and after it, which would round once.
KRON_INLINE Vector<float> rounded(Vector<float> v) {
#if KRON_BYTES == 64
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// Two features a lane.
struct Pairs {
  static constexpr int COUNT = 2, OFFSET = 0;

  static KRON_INLINE Ints add(Ints sum, Ints x, Ints w) {
#if KRON_BYTES == 64
    return sum + bits_of<Ints>(_mm512_madd_epi16(bits_of<__m512i>(x), bits_of<__m512i>(w)));
#elif KRON_BYTES == 32
    return sum + bits_of<Ints>(_mm256_madd_epi16(bits_of<__m256i>(x), bits_of<__m256i>(w)));
#elif defined(__SSE2__)
    return sum + bits_of<Ints>(_mm_madd_epi16(bits_of<__m128i>(x), bits_of<__m128i>(w)));
#else
    const auto low = [](Ints v) { return bits_of<Ints>(bits_of<Bits>(v) << 16) >> 16; };
    return sum + low(x) * low(w) + (x >> 16) * (w >> 16);
#endif
  }
  static KRON_INLINE int32_t word(const int8_t *entries, Int step, Int count) {
    return int32_t(uint32_t(uint16_t(entries[0])) | uint32_t(count > 1 ? uint16_t(entries[step]) : 0) << 16);
  }
};

// Four features a lane. x86 multiplies unsigned features by signed entries: OFFSET is added to features,
// and its products are subtracted from the sums.
struct Quads {
  static constexpr int COUNT = 4;
#if defined(__aarch64__) && !defined(KRON_EMULATE_BYTES)
  static constexpr int OFFSET = 0;
#else
  static constexpr int OFFSET = 128;
#endif

  static KRON_INLINE Ints add(Ints sum, Ints x, Ints w) {
#if defined(KRON_EMULATE_BYTES)
    for (int i = 0; i < 4; i++)
      sum += bits_of<Ints>(bits_of<Bits>(x) >> (8 * i) & 255) * (bits_of<Ints>(bits_of<Bits>(w) << (24 - 8 * i)) >> 24);
#elif KRON_BYTES == 64
    // Not _mm512_dpbusd_epi32, for whose sums GCC 12 uses the stack: 40 % of the rate.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#elif KRON_BYTES == 32 && KRON_BYTE_PRODUCTS
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#elif defined(__aarch64__)
    __asm__(".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(w));
#else
    (void)x, (void)w;
#endif
    return sum;
  }
  static KRON_INLINE int32_t word(const int8_t *entries, Int step, Int count) {
    uint32_t bits = 0;
    for (Int i = 0; i < 4 && i < count; i++) bits |= uint32_t(uint8_t(entries[i * step])) << (8 * i);
    return int32_t(bits);
  }
};

// Rounds `cols` features of a vector of tokens, `step` apart, to words that are `words_step` apart. Returns
// what a unit of each token stands for: 0 if all are below 2^-100, NaN if one is not finite.
template <class Form>
Vector<float> round_features(const float *in, Int step, Int cols, int32_t *words, Int words_step) {
  constexpr int COUNT = Form::COUNT;
  Ints most = {}; // numbers that are not negative are ordered like their bits, infinity and NaN last
  for (Int c = 0; c < cols; c++) {
    const Ints bits = bits_of<Ints>(load(in + c * step)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const Ints finite = most < 0x7f800000, used = finite & (most >= 0x0d800000); // 2^-100
  const Vector<float> largest = bits_of<Vector<float>>((most & used) | (0x3f800000 & ~used));
  const Vector<float> inverse = 127.f / largest;
  // Adding 1.5 * 2^23 rounds to the nearest integer, which is in the low bits then.
  const Vector<float> magic = broadcast(12582912.f + Form::OFFSET);
  const auto feature = [&](Int c) __attribute__((always_inline)) {
    const Vector<float> x = bits_of<Vector<float>>(bits_of<Ints>(load(in + c * step)) & used);
    return bits_of<Bits>(rounded(x * inverse) + magic);
  };
  Int c = 0;
  for (; c + COUNT <= cols; c += COUNT, words += words_step) {
    Bits word;
    if constexpr (COUNT == 2)
      word = (feature(c) & 0xffff) | feature(c + 1) << 16;
    else
      word = (feature(c) & 255) | (feature(c + 1) & 255) << 8 | (feature(c + 2) & 255) << 16 | feature(c + 3) << 24;
    memcpy(words, &word, sizeof word);
  }
  if (c < cols) { // the entries that meet what is missing are 0
    Bits word = {};
    for (int i = 0; c + i < cols; i++) word |= (feature(c + i) & (COUNT == 2 ? 0xffff : 255)) << (i * 32 / COUNT);
    memcpy(words, &word, sizeof word);
  }
  const Ints nan = ~finite & 0x7fc00000;
  return bits_of<Vector<float>>(bits_of<Ints>(bits_of<Vector<float>>(bits_of<Ints>(largest / 127.f) & used)) | nan);
}

// One term of an int8 factor, (rows, cols), and the scales of its rows.
struct Matrix8 {
  const int8_t *data;
  Int rows, cols, row_stride, col_stride;
  const float *scale;
  Int scale_step;
};

// A vector of words for Pairs from neighbouring bytes.
KRON_INLINE void widen_bytes(const int8_t *bytes, int32_t *words) {
  VectorOf<int8_t, KRON_BYTES / 2>::type narrow;
  memcpy(&narrow, bytes, sizeof narrow);
#if KRON_BYTES == 64
  const __m512i wide = _mm512_cvtepi8_epi16(bits_of<__m256i>(narrow));
#elif KRON_BYTES == 32
  const __m256i wide = _mm256_cvtepi8_epi16(bits_of<__m128i>(narrow)); // convertvector takes four instructions
#else
  const auto wide = __builtin_convertvector(narrow, VectorOf<int16_t, KRON_BYTES>::type);
#endif
  memcpy(words, &wide, sizeof wide);
}

// Rows of words of a factor.
struct Words {
  const char *data;
  Int row; // bytes from a row to the next
  Int count;
};

// The sum of a row's bytes times OFFSET.
template <class Form> Int offset_of([[maybe_unused]] const Words &w, [[maybe_unused]] Int r) {
  if constexpr (Form::OFFSET == 0) {
    return 0;
  } else {
    constexpr Int PER_VECTOR = KRON_BYTES / 4;
    const char *row = w.data + r * w.row;
    const Ints ones = 0x01010101 - Ints{};
    Ints sums = {};
    Int c = 0, sum = 0;
    for (; c + PER_VECTOR <= w.count; c += PER_VECTOR) {
      Ints words;
      memcpy(&words, row + c * 4, sizeof words);
      sums = Form::add(sums, ones, words);
    }
    for (int l = 0; l < PER_VECTOR; l++) sum += sums[l];
    for (c *= 4; c < w.count * 4; c++) sum += reinterpret_cast<const int8_t *>(row)[c];
    return sum * Form::OFFSET;
  }
}

// VT neighbouring vectors of rounded features, and where their outputs go.
template <int VT> struct Vectors {
  const int32_t *words; // words of neighbouring features are `step` apart
  Int step;
  const float *units;
  float *out[VT];
  Int out_step;
  bool accumulate;
};

// R rows of a factor from `first` on.
template <class Form, int VT, int R>
void multiply_rows(const Words &w, Int first, const float *scale, Int scale_step, const Vectors<VT> &x) {
  constexpr int L = LANES<float>;
  Ints sum[R][VT];
  KRON_UNROLL
  for (int r = 0; r < R; r++) {
    const Ints start = -int32_t(offset_of<Form>(w, first + r)) - Ints{};
    KRON_UNROLL
    for (int v = 0; v < VT; v++) sum[r][v] = start;
  }
  const int32_t *p = x.words;
  const Int rs = w.row, rs2 = 2 * rs, rs3 = 3 * rs;
  const char *group[(R + 3) / 4]; // as in contract_rows
  KRON_UNROLL
  for (int k = 0; k < (R + 3) / 4; k++) group[k] = w.data + (first + 4 * k) * rs;
  for (Int c = 0; c < w.count; c++, p += x.step) {
    Ints words[VT];
    KRON_UNROLL
    for (int v = 0; v < VT; v++) words[v] = load_ints(p + v * L);
    KRON_UNROLL
    for (int r = 0; r < R; r++) {
      const char *q = group[r / 4];
      int32_t entries;
      memcpy(&entries, r % 4 == 0 ? q : r % 4 == 1 ? q + rs : r % 4 == 2 ? q + rs2 : q + rs3, 4);
      const Ints b = entries - Ints{};
      KRON_UNROLL
      for (int v = 0; v < VT; v++) sum[r][v] = Form::add(sum[r][v], words[v], b);
    }
    KRON_UNROLL
    for (int k = 0; k < (R + 3) / 4; k++) group[k] += 4;
  }
  Vector<float> unit[VT];
  KRON_UNROLL
  for (int v = 0; v < VT; v++) unit[v] = load(x.units + v * L);
  KRON_UNROLL
  for (int r = 0; r < R; r++) {
    const float of_row = scale[(first + r) * scale_step];
    const Int at = (first + r) * x.out_step;
    KRON_UNROLL
    for (int v = 0; v < VT; v++) {
      const Vector<float> y = __builtin_convertvector(sum[r][v], Vector<float>) * (unit[v] * of_row);
      store(x.out[v] + at, x.accumulate ? load(x.out[v] + at) + y : y);
    }
  }
}

template <class Form, int VT, int R>
void multiply_tiles(const Words &w, Int first, Int rows, const float *scale, Int scale_step, const Vectors<VT> &x) {
  for (; first + R <= rows; first += R) multiply_rows<Form, VT, R>(w, first, scale, scale_step, x);
  constexpr int FEWER = R > 16 ? 16 : R > 8 ? 8 : R > 4 ? 4 : R / 2;
  if constexpr (FEWER > 0)
    if (first < rows) multiply_tiles<Form, VT, FEWER>(w, first, rows, scale, scale_step, x);
}

// What a factor multiplies: `count` rounded vectors side by side, NV of each entry of the grid.
struct Rounded {
  const int32_t *words;
  const float *units;
  Int count, nv;
  float *out;
  const Grid &g;
  bool accumulate;

  float *out_of(Int vector) const {
    const Int entry = vector / nv;
    return out + entry / g.post * g.out_pre + entry % g.post * g.width + vector % nv * g.out_vector;
  }
};

// Rows of a factor, of which the first is row `row` of the outputs.
template <class Form>
void multiply_all(const Words &w, Int rows, const float *scale, Int scale_step, const Rounded &x, Int row) {
  constexpr int L = LANES<float>, MOST = KRON_ACCUMULATORS >= 24 ? 3 : 2;
  const auto tiles = [&](auto vectors, Int at) {
    constexpr int VT = decltype(vectors)::value;
    Vectors<VT> some = {x.words + at * L, x.count * L, x.units + at * L, {}, x.g.out_step, x.accumulate};
    for (int v = 0; v < VT; v++) some.out[v] = x.out_of(at + v) + row * x.g.out_step;
    multiply_tiles<Form, VT, KRON_ACCUMULATORS / VT>(w, 0, rows, scale, scale_step, some);
  };
  for (Int at = 0; at < x.count;) {
    const Int left = x.count - at, more = (left + MOST - 1) / MOST, vectors = (left + more - 1) / more;
    if (vectors == 1) tiles(std::integral_constant<int, 1>(), at);
    else if (vectors == 2) tiles(std::integral_constant<int, 2>(), at);
    else if constexpr (MOST == 3) tiles(std::integral_constant<int, 3>(), at);
    at += vectors;
  }
}

// Memory for a contraction: `panel` for KRON_ACCUMULATORS rows of a factor, `words` and `units` for the
// rounded vectors.
struct Space8 {
  int32_t *panel, *words;
  float *units;
};

// out[r] (+)= Σ_c w[r, c] in[c], by the grid of contract(), in integers.
template <class Form>
void contract8(const Matrix8 &w, int nv, const float *in, float *out, const Grid &g, bool accumulate,
               const Space8 &space) {
  constexpr int L = LANES<float>, COUNT = Form::COUNT;
  const Int groups = (w.cols + COUNT - 1) / COUNT, count = g.pre * g.post * nv;
  for (Int i = 0, at = 0; i < g.pre; i++)
    for (Int j = 0; j < g.post; j++)
      for (int v = 0; v < nv; v++, at++) {
        const float *from = in + i * g.in_pre + j * g.width + v * g.in_vector;
        store(space.units + at * L,
              round_features<Form>(from, g.in_step, w.cols, space.words + at * L, count * L));
      }
  const Rounded x = {space.words, space.units, count, nv, out, g, accumulate};
  // Four bytes are a word as they lie in memory; others are copied a few rows at a time.
  if (COUNT == 4 && w.col_stride == 1 && w.cols % 4 == 0) {
    const Words all = {reinterpret_cast<const char *>(w.data), w.row_stride, groups};
    return multiply_all<Form>(all, w.rows, w.scale, w.scale_step, x, 0);
  }
  const Words some = {reinterpret_cast<const char *>(space.panel), groups * 4, groups};
  for (Int first = 0; first < w.rows; first += KRON_ACCUMULATORS) {
    const Int rows = smaller(KRON_ACCUMULATORS, w.rows - first);
    for (Int r = 0; r < rows; r++) {
      const int8_t *row = w.data + (first + r) * w.row_stride;
      int32_t *const words = space.panel + r * groups;
      Int c = 0;
      if (COUNT == 2 && w.col_stride == 1)
        for (; c + 2 * L <= w.cols; c += 2 * L) widen_bytes(row + c, words + c / 2);
      for (; c < w.cols; c += COUNT) words[c / COUNT] = Form::word(row + c * w.col_stride, w.col_stride, w.cols - c);
    }
    multiply_all<Form>(some, rows, w.scale + first * w.scale_step, w.scale_step, x, first);
  }
}

} // namespace
