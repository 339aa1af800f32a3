// Activations on vectors: float32 by the formulas below, float64 by the C library, lane by lane.
#pragma once
#include <math.h>

#include "../kron.h"
#include "vector.h"

namespace {

typedef As<int32_t, Bits> Ints;

// e^x = p * 2^n, n in the low bits of `shifted`, for x whose n has a float.
struct Power {
  Floats p, shifted;
};
constexpr float MAGIC = 12582912.f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
KRON_INLINE Power power_of_e(Floats x) {
  Floats shifted = x * 1.44269504f + MAGIC;
  Floats n = shifted - MAGIC;
  Floats f = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts
  Floats p = Floats{} + 1.9875691500e-4f; // Cephes' polynomial
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  return {p * f * f + f + 1.f, shifted};
}

// e^x within 2 units in the last place; 0 below -87.3 (no subnormals), infinity above 88.7.
KRON_INLINE Floats exp(Floats x) {
  const Power e = power_of_e(x);
  // Two factors of 2^(n/2), since 2^128 is not a float.
  Bits k = bits_of<Bits>(e.shifted) - bits_of<uint32_t>(MAGIC);
  Bits half = bits_of<Bits>(bits_of<Ints>(k) >> 1);
  Floats y = e.p * bits_of<Floats>((half + 127) << 23) * bits_of<Floats>((k - half + 127) << 23);
  y = x < -87.33f ? Floats{} : y;
  y = x > 88.72f ? Floats{} + __builtin_inff() : y;
  return x != x ? x : y;
}
// The same for x <= 0, with 2^n added to the exponent; about 1e-38 below -87.3.
KRON_INLINE Floats exp_below_zero(Floats x) {
  const Power e = power_of_e(x < -87.33f ? Floats{} - 87.33f : x);
  const Floats y = bits_of<Floats>(bits_of<Bits>(e.p) + (bits_of<Bits>(e.shifted) << 23));
  return x != x ? x : y;
}

// e^(-a²/2) for 0 <= a <= 13.2, as a power of two, of which the least is 2^-125.7. benchmarks/fit_gelu.py
// found the minimax coefficients here and below.
KRON_INLINE Floats gauss(Floats a) {
  const Floats u = -0.72134752f * a;
  const Floats shifted = u * a + MAGIC;
  const Floats f = u * a - (shifted - MAGIC);
  Floats p = Floats{} + 1.32647266e-3f;
  p = p * f + 9.67151295e-3f;
  p = p * f + 5.55073364e-2f;
  p = p * f + 2.40222423e-1f;
  p = p * f + 6.93146980e-1f;
  p = p * f + 1.f;
  return bits_of<Floats>(bits_of<Bits>(p) + (bits_of<Bits>(shifted) << 23));
}

// The normal distribution at -a: e^(-a²/2) times a quotient of polynomials. Measured over [-15, 15],
// the absolute error is below 1.6e-7 (half that of erf; gelu of torch in float32 has 3.8e-7). The
// relative error for a < 5 is below 1e-6, without fused multiply-adds below 1.5e-6.
KRON_INLINE Floats normal_tail(Floats a, Floats gauss) {
  Floats p = Floats{} + 0.0141593196f;
  p = p * a + 0.107057907f;
  p = p * a + 0.339740098f;
  p = p * a + 0.499999969f;
  Floats q = Floats{} + 0.0355070976f;
  q = q * a + 0.267908215f;
  q = q * a + 0.892912006f;
  q = q * a + 1.47736180f;
  q = q * a + 1.f;
  return gauss * p / q;
}

// An activation and its derivative.
template <class V> struct Slope {
  V value, slope;
};

KRON_INLINE Slope<Floats> gelu(Floats x) {
  Floats a = bits_of<Floats>(bits_of<Bits>(x) & 0x7fffffff);
  a = a < 13.2f ? a : Floats{} + 13.2f; // where a * tail is 0
  const Floats e = gauss(a), tail = normal_tail(a, e);
  const Floats positive = 0.f > x ? x * 0.f : x; // NaN stays, and -infinity becomes it, as with torch
  return {positive - a * tail, (x > 0.f ? 1.f - tail : tail) + (x > 0.f ? a : -a) * e * 0.3989422804014327f};
}
KRON_INLINE Slope<Floats> gelu_tanh(Floats x) { // 0.5 x (1 + tanh u) = x / (1 + e^-2u)
  const float c = 0.7978845608028654f;          // sqrt(2 / pi)
  const Floats s = 1.f / (1.f + exp(-2.f * c * (x + 0.044715f * x * x * x)));
  return {x * s, s + x * s * (1.f - s) * (2.f * c) * (1.f + 3 * 0.044715f * x * x)};
}
KRON_INLINE Slope<Floats> silu(Floats x) {
  const Floats s = 1.f / (1.f + exp(-x));
  return {x * s, s + x * s * (1.f - s)};
}

template <int ACTIVATION> KRON_INLINE Slope<Floats> slope(Floats x) {
  switch (ACTIVATION) {
  case KRON_GELU: return gelu(x);
  case KRON_GELU_TANH: return gelu_tanh(x);
  case KRON_RELU: // NaN stays
    return {x < 0.f ? Floats{} : x, x <= 0.f ? Floats{} : Floats{} + 1.f};
  case KRON_SILU: return silu(x);
  default: return {x, Floats{} + 1.f};
  }
}

inline Slope<double> slope(int activation, double x) {
  const double c = 0.7978845608028654, k = 0.044715;
  switch (activation) {
  case KRON_GELU: {
    const double below = 0.5 * erfc(-x * 0.7071067811865476);
    return {x * below, below + x * ::exp(-0.5 * x * x) * 0.3989422804014327};
  }
  case KRON_GELU_TANH: {
    const double t = tanh(c * (x + k * x * x * x));
    return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * k * x * x)};
  }
  case KRON_RELU: return {x < 0 ? 0 : x, x <= 0 ? 0. : 1.};
  case KRON_SILU: {
    const double s = 1 / (1 + ::exp(-x));
    return {x * s, s + x * s * (1 - s)};
  }
  default: return {x, 1};
  }
}
template <int ACTIVATION> KRON_INLINE Slope<Vector<double>> slope(Vector<double> x) {
  Slope<Vector<double>> all;
  for (int l = 0; l < LANES<double>; l++) {
    const Slope<double> one = slope(ACTIVATION, double(x[l]));
    all.value[l] = one.value, all.slope[l] = one.slope;
  }
  return all;
}

// Calls body(std::integral_constant<int, activation>()).
template <class Body> KRON_INLINE void with_activation(int64_t activation, Body body) {
  switch (activation) {
  case KRON_GELU: return body(std::integral_constant<int, KRON_GELU>());
  case KRON_GELU_TANH: return body(std::integral_constant<int, KRON_GELU_TANH>());
  case KRON_RELU: return body(std::integral_constant<int, KRON_RELU>());
  case KRON_SILU: return body(std::integral_constant<int, KRON_SILU>());
  default: return body(std::integral_constant<int, KRON_NONE>());
  }
}

// out = act(in + bias) of rows of NV vectors, in_step and out_step numbers apart; out may be in. The bias
// has one number for each row and may be null.
template <class T, int NV>
void activate_rows(const T *in, int64_t in_step, T *out, int64_t out_step, int64_t rows,
                   int64_t activation, const T *bias) {
  with_activation(activation, [=](auto kind) {
    for (int64_t r = 0; r < rows; r++) {
      const T b = bias ? bias[r] : T(0);
      KRON_UNROLL
      for (int v = 0; v < NV; v++) {
        const Vector<T> x = load(in + r * in_step + v * LANES<T>) + b;
        // The derivative is optimised away.
        store(out + r * out_step + v * LANES<T>, slope<decltype(kind)::value>(x).value);
      }
    }
  });
}

} // namespace
