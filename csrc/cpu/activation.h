// Activations on vectors. float32 by the formulas below; float64 by the C library, lane by lane.
#pragma once
#include <math.h>

#include "../kron.h"
#include "vector.h"

namespace {

KRON_INLINE Floats select(Bits where, Floats yes, Floats no) {
  return bits_of<Floats>((where & bits_of<Bits>(yes)) | (~where & bits_of<Bits>(no)));
}
template <class M> KRON_INLINE Bits mask(M comparison) { return bits_of<Bits>(comparison); }

// e^x within 2 units in the last place; 0 below -87.3 (no subnormals), infinity above 88.7.
KRON_INLINE Floats exp(Floats x) {
  const float magic = 12582912.f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Floats shifted = x * 1.44269504f + magic;
  Floats n = shifted - magic;
  Floats f = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts
  Floats p = Floats{} + 1.9875691500e-4f; // Cephes' polynomial
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  // Two factors of 2^(n/2), since 2^128 is no float.
  Bits k = bits_of<Bits>(shifted) - bits_of<uint32_t>(magic);
  Bits half = bits_of<Bits>(bits_of<As<int32_t, Bits>>(k) >> 1);
  Floats y = p * bits_of<Floats>((half + 127) << 23) * bits_of<Floats>((k - half + 127) << 23);
  y = select(mask(x < -87.33f), Floats{}, y);
  y = select(mask(x > 88.72f), Floats{} + __builtin_inff(), y);
  return select(mask(x != x), x, y);
}

// The normal distribution at -|x|, which is e^(-x²/2) times a smooth function of 1 / (1 + 0.3|x|):
// a minimax polynomial (relative error 1.5e-7 for |x| <= 14; found by benchmarks/fit_gelu.py).
// With rounding the distribution's absolute error, half that of erf, is below 2.4e-7 (measured over
// [-15, 15]; torch's float32 gelu has 3.8e-7), its relative error below 1e-6 for |x| < 5.
KRON_INLINE Floats normal_tail(Floats x, Floats gauss) {
  Floats a = bits_of<Floats>(bits_of<Bits>(x) & 0x7fffffff);
  Floats t = 1.f / (1.f + 0.3f * a);
  Floats p = Floats{} + 0.035674778773789155f;
  p = p * t - 0.1572031018997223f;
  p = p * t + 0.20635353870925918f;
  p = p * t - 0.05368367300900895f;
  p = p * t + 0.1285616411245486f;
  p = p * t + 0.0999134879709448f;
  p = p * t + 0.12075395664861333f;
  p = p * t + 0.11962929879253524f;
  return gauss * p * t;
}
// An activation and its derivative.
template <class V> struct Slope {
  V value, slope;
};

KRON_INLINE Slope<Floats> gelu(Floats x) {
  const Floats gauss = exp(-0.5f * x * x), tail = normal_tail(x, gauss);
  const Floats below = select(mask(x > 0.f), 1.f - tail, tail);
  return {x * below, below + x * gauss * 0.3989422804014327f};
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
    return {select(mask(x < 0.f), Floats{}, x), select(mask(x <= 0.f), Floats{}, Floats{} + 1.f)};
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

// The compiler drops the derivative, where it costs anything.
template <int ACTIVATION, class V> KRON_INLINE V activate(V x) {
  return slope<ACTIVATION>(x).value;
}

} // namespace
