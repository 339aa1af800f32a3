// Vectors by the compiler's own extension, as wide as this translation unit's instruction set, and all
// other differences between the sets. A vector holds one number of each of LANES tokens.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

// KRON_ACCUMULATORS: registers for sums, which tests set to run the tiles of another machine.
#if defined(__AVX512F__)
#include <immintrin.h>
#define KRON_BYTES 64
#define KRON_REGISTERS 32
#elif defined(__AVX2__)
#define KRON_BYTES 32
#define KRON_REGISTERS 16
#elif defined(__aarch64__)
#define KRON_BYTES 16
#define KRON_REGISTERS 32
#else
#define KRON_BYTES 16
#define KRON_REGISTERS 16
#endif
#if !defined(KRON_ACCUMULATORS)
#define KRON_ACCUMULATORS (KRON_REGISTERS == 32 ? 24 : 12)
#endif

#define KRON_INLINE inline __attribute__((always_inline))
// On what is not called in a loop over numbers: copied into all its callers, it took a quarter of the time to compile.
#define KRON_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define KRON_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KRON_UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

template <class T, int BYTES> struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T> using Vector = typename VectorOf<T, KRON_BYTES>::type;
template <class T> constexpr int LANES = KRON_BYTES / int(sizeof(T));
template <class T, class Like> using As = typename VectorOf<T, sizeof(Like)>::type;

// The types that are stored; Compute gives the type of the arithmetic.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
template <class S> struct ComputeOf { typedef S type; };
template <> struct ComputeOf<bfloat16> { typedef float type; };
template <> struct ComputeOf<float16> { typedef float type; };
template <class S> using Compute = typename ComputeOf<S>::type;

template <class To, class From> KRON_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T> KRON_INLINE Vector<T> load(const T *p) {
  Vector<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T> KRON_INLINE void store(T *p, Vector<T> v) { memcpy(p, &v, sizeof v); }
// Not `Vector<T>{} + number`: that is a broadcast and an addition, since 0 + -0 is not -0. In contract_rows
// with AVX2 the additions took as long as the products (384 x 384: 63 GFLOP/s with them, 99 without).
template <class T> KRON_INLINE Vector<T> broadcast(T number) { return number - Vector<T>{}; }

// ---- 16-bit storage, widened and rounded to nearest even in registers --------------------------

typedef VectorOf<uint16_t, KRON_BYTES / 2>::type Half; // as many lanes as Floats
typedef VectorOf<uint32_t, KRON_BYTES>::type Bits;
typedef VectorOf<float, KRON_BYTES>::type Floats;

KRON_INLINE Floats widen(Half h, bfloat16) {
  return bits_of<Floats>(__builtin_convertvector(h, Bits) << 16);
}
KRON_INLINE Half narrow(Floats f, bfloat16) {
  Bits u = bits_of<Bits>(f);
  Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  Bits quiet = (u >> 16) | 0x40; // a NaN must not round to infinity
  Bits is_nan = bits_of<Bits>((u & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), Half);
}
KRON_INLINE Floats widen(Half h, float16) {
  Bits u = __builtin_convertvector(h, Bits);
  // Multiplying by 2^112 corrects the exponent, also of subnormals.
  Floats scaled = bits_of<Floats>((u & 0x7fff) << 13) * bits_of<float>(uint32_t((127 + 112) << 23));
  Bits special = bits_of<Bits>((u & 0x7fff) >= 0x7c00); // infinity and NaN
  return bits_of<Floats>(bits_of<Bits>(scaled) | (special & 0x7f800000) | ((u & 0x8000) << 16));
}
KRON_INLINE Half narrow(Floats f, float16) {
  Bits u = bits_of<Bits>(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  Bits normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14, adding 0.5 leaves the rounded bits of the subnormal in the low bits.
  Bits tiny = bits_of<Bits>(bits_of<Floats>(a) + 0.5f) - 0x3f000000;
  Bits is_tiny = bits_of<Bits>(a < 0x38800000);
  Bits is_large = bits_of<Bits>(a >= 0x477ff000); // rounds to infinity
  Bits is_nan = bits_of<Bits>(a > 0x7f800000);
  Bits r = (tiny & is_tiny) | (normal & ~is_tiny);
  r = (r & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x200);
  return __builtin_convertvector(r | sign, Half);
}

template <class S> KRON_INLINE Vector<Compute<S>> fetch(const S *p) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    return load(p);
  } else {
    Half h;
    memcpy(&h, p, sizeof h);
    return widen(h, S());
  }
}
template <class S> KRON_INLINE void put(S *p, Vector<Compute<S>> v) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    store(p, v);
  } else {
    Half h = narrow(v, S());
    memcpy(p, &h, sizeof h);
  }
}

// The first `count` lanes only: the others are zero, and memory behind is neither read nor written.
template <class S> KRON_INLINE Vector<Compute<S>> fetch_some(const S *p, int count) {
  S some[LANES<Compute<S>>] = {};
  memcpy(some, p, size_t(count) * sizeof(S));
  return fetch(some);
}
template <class S> KRON_INLINE void put_some(S *p, Vector<Compute<S>> v, int count) {
  S some[LANES<Compute<S>>];
  put(some, v);
  memcpy(p, some, size_t(count) * sizeof(S));
}
#if defined(__AVX512F__)
template <> KRON_INLINE Vector<float> fetch_some(const float *p, int count) {
  return bits_of<Vector<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
}
template <> KRON_INLINE void put_some(float *p, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), bits_of<__m512>(v));
}
#endif

template <class S> KRON_INLINE Compute<S> scalar(S s) {
  if constexpr (std::is_same_v<S, Compute<S>>) return s;
  else return widen(Half{} + s.bits, S())[0];
}

// ---- transposing a square of registers ---------------------------------------------------------

// Lane l of the result is lane Pick::of(l) of a followed by b. Pick::of is evaluated at compile time.
template <class T, class Pick, size_t... l>
KRON_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, Pick, std::index_sequence<l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::of(l)...);
#else
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  return __builtin_shuffle(a, b, typename VectorOf<Index, KRON_BYTES>::type{Pick::of(l)...});
#endif
}
template <class T, class Pick> KRON_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  return shuffle<T>(a, b, Pick(), std::make_index_sequence<LANES<T>>());
}

// Within blocks of 2h lanes: {a's lower half, b's lower half}, {a's upper half, b's upper half}.
template <int n, int h> struct LowHalves {
  static constexpr int of(int l) { return l % (2 * h) < h ? l : l - h + n; }
};
template <int n, int h> struct HighHalves {
  static constexpr int of(int l) { return l % (2 * h) < h ? l + h : l + n; }
};
// For h = 1 within blocks of four lanes: the lanes of a and b interleaved, as by unpack instructions.
template <int n> struct UnpackLow {
  static constexpr int of(int l) { return l / 4 * 4 + l % 4 / 2 + (l % 2) * n; }
};
template <int n> struct UnpackHigh {
  static constexpr int of(int l) { return UnpackLow<n>::of(l) + 2; }
};

template <class T, int h> KRON_INLINE void exchange(Vector<T> *v) {
  constexpr int n = LANES<T>;
  if constexpr (h < n) {
    KRON_UNROLL
    for (int i = 0; i < n; i++) {
      if (i & h) continue;
      Vector<T> a = v[i], b = v[i + h];
      v[i] = shuffle<T, LowHalves<n, h>>(a, b);
      v[i + h] = shuffle<T, HighHalves<n, h>>(a, b);
    }
    exchange<T, 2 * h>(v);
  }
}

// v[i][l] becomes v[l][i], for as many vectors as lanes.
template <class T> KRON_INLINE void transpose(Vector<T> *v) {
  constexpr int n = LANES<T>;
  if constexpr (sizeof(T) == 4) { // 4 x 4 blocks by unpack instructions, one a shuffle
    KRON_UNROLL
    for (int i = 0; i < n; i += 4) {
      Vector<T> a = shuffle<T, UnpackLow<n>>(v[i], v[i + 1]);
      Vector<T> b = shuffle<T, UnpackHigh<n>>(v[i], v[i + 1]);
      Vector<T> c = shuffle<T, UnpackLow<n>>(v[i + 2], v[i + 3]);
      Vector<T> d = shuffle<T, UnpackHigh<n>>(v[i + 2], v[i + 3]);
      v[i] = shuffle<T, LowHalves<n, 2>>(a, c);
      v[i + 1] = shuffle<T, HighHalves<n, 2>>(a, c);
      v[i + 2] = shuffle<T, LowHalves<n, 2>>(b, d);
      v[i + 3] = shuffle<T, HighHalves<n, 2>>(b, d);
    }
    exchange<T, 4>(v);
  } else {
    exchange<T, 1>(v);
  }
}

// Lane i of the result is the sum of the lanes of v[i], by a tree of pairs.
template <class T, int h = LANES<T> / 2> KRON_INLINE Vector<T> sums_of_lanes(Vector<T> *v) {
  constexpr int n = LANES<T>;
  KRON_UNROLL
  for (int i = 0; i < h; i++)
    v[i] = shuffle<T, LowHalves<n, h>>(v[i], v[i + h]) + shuffle<T, HighHalves<n, h>>(v[i], v[i + h]);
  if constexpr (h > 1) return sums_of_lanes<T, h / 2>(v);
  else return v[0];
}

} // namespace
