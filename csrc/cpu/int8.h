// Products of int8 factors: rounded vectors of tokens, summed in integers. A word is two features in 16 bits,
// or four in 8; both give the same sums.
#pragma once
#include "words.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
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

// What all forms of int8 share: a sum of integers stands for multiples of the token's unit times the row's
// scale. It is not fused with what it is added to: some instances of the code were and others not, so that last
// bits depended on the number of threads.
struct Integers {
  typedef Ints Sum;
  static constexpr bool SCALED = true;
  static KRON_INLINE Vector<float> finish(Ints sum, Vector<float> one) {
    return rounded(__builtin_convertvector(sum, Vector<float>) * one);
  }
};

// Two features a lane.
struct Pairs : Integers {
  static constexpr int COUNT = 2, OFFSET = 0;

  static KRON_INLINE Ints start(const int32_t *, Int) { return Ints{}; }
  static void prepare(const Words &, Int, int32_t *) {}
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
struct Quads : Integers {
  static constexpr int COUNT = 4;
#if defined(__aarch64__) && !defined(KRON_EMULATE_BYTES)
  static constexpr int OFFSET = 0;
#else
  static constexpr int OFFSET = 128;
#endif

  static KRON_INLINE Ints start(const int32_t *starts, Int row) {
    return OFFSET ? starts[row] - Ints{} : Ints{};
  }
  // What the sums of each row start from: minus the sum of its entries times OFFSET.
  static void prepare(const Words &w, Int rows, int32_t *starts) {
    constexpr Int L = LANES<float>;
    const Ints ones = 0x01010101 - Ints{};
    if (w.step != 4) { // rows side by side
      for (Int first = 0; OFFSET && first < rows; first += L) {
        Ints sum = {}, words;
        for (Int c = 0; c < w.count; c++) {
          memcpy(&words, w.data + c * w.step + first * 4, sizeof words);
          sum = add(sum, ones, words);
        }
        sum *= -OFFSET;
        memcpy(starts + first, &sum, size_t(smaller(L, rows - first)) * 4);
      }
      return;
    }
    for (Int first = 0; OFFSET && first < rows; first += L) {
      Ints sums[L];
      for (Int l = 0; l < L; l++) {
        const char *row = w.data + smaller(first + l, rows - 1) * w.row;
        Ints sum = {}, words;
        Int c = 0;
        for (; c + L <= w.count; c += L) {
          memcpy(&words, row + c * 4, sizeof words);
          sum = add(sum, ones, words);
        }
        words = Ints{};
        memcpy(&words, row + c * 4, size_t(w.count - c) * 4);
        sums[l] = add(sum, ones, words);
      }
      const Ints all = sums_of_lanes<int32_t>(sums) * -OFFSET;
      memcpy(starts + first, &all, size_t(smaller(L, rows - first)) * 4);
    }
  }
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

// Lanes of a and b in turn, of their lower or upper halves.
template <bool UPPER, class V, size_t... l>
KRON_INLINE V interleaved(V a, V b, std::index_sequence<l...>) {
  constexpr int n = sizeof...(l);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (int(l) / 2 + UPPER * n / 2 + int(l) % 2 * n)...);
#else
  typedef std::remove_reference_t<decltype(a[0])> Index;
  return __builtin_shuffle(a, b, V{Index(int(l) / 2 + UPPER * n / 2 + int(l) % 2 * n)...});
#endif
}
template <bool UPPER, int n, class V> KRON_INLINE V interleaved(V a, V b) {
  return interleaved<UPPER>(a, b, std::make_index_sequence<n>());
}

// Of a factor whose rows lie side by side, as the columns of low rank do: the words of `rows` rows, at most
// SIDE_BY_SIDE, from `first` on, (groups of columns)[SIDE_BY_SIDE rows].
constexpr Int SIDE_BY_SIDE = 2 * LANES<float>;
template <class Form> void pack_rows(const Matrix8 &w, Int first, Int rows, int32_t *words) {
  constexpr int N = SIDE_BY_SIDE, L = LANES<float>;
  typedef typename VectorOf<int8_t, N>::type Bytes;
  typedef typename VectorOf<int16_t, N>::type Pairs16; // half as many
  const auto column = [&](Int c) __attribute__((always_inline)) {
    Bytes bytes = {};
    const int8_t *from = w.data + first + c * w.col_stride;
    if (c < w.cols && rows == N) memcpy(&bytes, from, sizeof bytes);
    else if (c < w.cols) memcpy(&bytes, from, size_t(rows));
    return bytes;
  };
  const auto put = [&](auto v, Int at) __attribute__((always_inline)) { memcpy(words + at, &v, sizeof v); };
  for (Int c = 0; c < w.cols; c += Form::COUNT, words += N) {
    const Bytes a = column(c), b = column(c + 1);
    const Bytes low = interleaved<false, N>(a, b), high = interleaved<true, N>(a, b);
    if constexpr (Form::COUNT == 2) {
      int8_t bytes[2 * N];
      memcpy(bytes, &low, sizeof low), memcpy(bytes + N, &high, sizeof high);
      widen_bytes(bytes, words), widen_bytes(bytes + N, words + L);
    } else {
      const Bytes d = column(c + 2), e = column(c + 3);
      const auto pairs = [](Bytes v) { return bits_of<Pairs16>(v); };
      const Pairs16 low2 = pairs(interleaved<false, N>(d, e)), high2 = pairs(interleaved<true, N>(d, e));
      put(interleaved<false, N / 2>(pairs(low), low2), 0), put(interleaved<true, N / 2>(pairs(low), low2), L / 2);
      put(interleaved<false, N / 2>(pairs(high), high2), L), put(interleaved<true, N / 2>(pairs(high), high2), L + L / 2);
    }
  }
}

// Memory for a contraction: `panel` for KRON_ACCUMULATORS rows of a factor, `words` and `units` for the
// rounded vectors, `starts` for a number of each row.
struct Space8 {
  int32_t *panel, *words;
  float *units;
  int32_t *starts;
};

// out[r] (+)= Σ_c w[r, c] in[c], by the grid of contract(), in integers.
template <class Form>
void contract8(const Matrix8 &w, int nv, const float *in, float *out, const Grid &g, bool accumulate,
               const Space8 &space) {
  constexpr int L = LANES<float>, COUNT = Form::COUNT;
  const Int groups = (w.cols + COUNT - 1) / COUNT, count = g.pre * g.post * nv;
  each_vector_of(g, nv, in, space.words, [&](const float *from, int32_t *words) {
    store(space.units + (words - space.words),
          round_features<Form>(from, g.in_step, w.cols, words, count * L));
  });
  const Narrow x = {space.words, space.units, count, nv, out, g, accumulate};
  // Four bytes are a word as they lie in memory; others are copied a few rows at a time.
  if (COUNT == 4 && w.col_stride == 1 && w.cols % 4 == 0) {
    const char *data = reinterpret_cast<const char *>(w.data);
    const Words all = {data, w.row_stride, 4, groups, w.scale, w.scale_step, space.starts};
    Form::prepare(all, w.rows, space.starts);
    return multiply_all<Form>(all, w.rows, x, 0);
  }
  if (w.row_stride == 1 && w.col_stride != 1) {
    constexpr Int ROWS = SIDE_BY_SIDE;
    static_assert(ROWS <= 2 * KRON_ACCUMULATORS, "the panel holds them");
    const char *data = reinterpret_cast<const char *>(space.panel);
    for (Int first = 0; first < w.rows; first += ROWS) {
      const Int rows = smaller(ROWS, w.rows - first);
      pack_rows<Form>(w, first, rows, space.panel);
      const Words some = {data, 4, ROWS * 4, groups, w.scale + first * w.scale_step, w.scale_step, space.starts};
      Form::prepare(some, rows, space.starts);
      multiply_all<Form>(some, rows, x, first);
    }
    return;
  }
  Words some = {reinterpret_cast<const char *>(space.panel), groups * 4, 4, groups, w.scale, w.scale_step, space.starts};
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
    some.scale = w.scale + first * w.scale_step;
    Form::prepare(some, rows, space.starts);
    multiply_all<Form>(some, rows, x, first);
  }
}

} // namespace
