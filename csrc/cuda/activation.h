// Activations and their slopes, in float32. The formulas are those of csrc/cpu/activation.h, except
// for gelu's tail, which avoids a division of polynomials.
#pragma once
#include "../kron.h"
#include "device.h"

namespace kron {

struct None {
  static KRON_DEVICE float value(float x) { return x; }
  static KRON_DEVICE float value(float x, float &slope) { return slope = 1.f, x; }
};

KRON_DEVICE float gauss(float x) { return power_of_two(-0.72134752f * x * x); } // e^(-x²/2)

// The normal distribution at -|x|, given e^(-x²/2): a minimax polynomial in 1 / (1 + 0.3 |x|) with a
// relative error of 1.5e-7 for |x| <= 14.
KRON_DEVICE float normal_tail(float x, float gauss) {
  const float t = reciprocal(1.f + 0.3f * fabsf(x));
  float p = 0.035674778773789155f;
  p = p * t - 0.1572031018997223f;
  p = p * t + 0.20635353870925918f;
  p = p * t - 0.05368367300900895f;
  p = p * t + 0.1285616411245486f;
  p = p * t + 0.0999134879709448f;
  p = p * t + 0.12075395664861333f;
  p = p * t + 0.11962929879253524f;
  return gauss * p * t;
}

struct Gelu {
  static KRON_DEVICE float value(float x) {
    const float tail = normal_tail(x, gauss(x));
    return x * (x > 0.f ? 1.f - tail : tail);
  }
  static KRON_DEVICE float value(float x, float &slope) {
    const float g = gauss(x), tail = normal_tail(x, g);
    const float below = x > 0.f ? 1.f - tail : tail;
    slope = below + x * g * 0.3989422804014327f;
    return x * below;
  }
};

// 0.5 x (1 + tanh w) = x / (1 + e^(-2w))
struct GeluTanh {
  static KRON_DEVICE float sigmoid(float x) {
    // the factor is 2 √(2/π) log2(e)
    return reciprocal(1.f + power_of_two(-2.3022082f * (x + 0.044715f * x * x * x)));
  }
  static KRON_DEVICE float value(float x) { return x * sigmoid(x); }
  static KRON_DEVICE float value(float x, float &slope) {
    const float s = sigmoid(x);
    slope = s + x * s * (1.f - s) * 1.5957691216057308f * (1.f + 0.134145f * x * x);
    return x * s;
  }
};

struct Relu {
  static KRON_DEVICE float value(float x) { return x < 0.f ? 0.f : x; } // NaN stays NaN
  static KRON_DEVICE float value(float x, float &slope) {
    slope = x <= 0.f ? 0.f : 1.f;
    return value(x);
  }
};

struct Silu {
  static KRON_DEVICE float sigmoid(float x) {
    return reciprocal(1.f + power_of_two(-1.44269504f * x));
  }
  static KRON_DEVICE float value(float x) { return x * sigmoid(x); }
  static KRON_DEVICE float value(float x, float &slope) {
    const float s = sigmoid(x);
    slope = s + x * s * (1.f - s);
    return x * s;
  }
};

// Calls f with the activation of enum kron_activation.
template <class F> KRON_DEVICE void with_activation(int activation, F f) {
  switch (activation) {
  case KRON_GELU: return f(Gelu{});
  case KRON_GELU_TANH: return f(GeluTanh{});
  case KRON_RELU: return f(Relu{});
  case KRON_SILU: return f(Silu{});
  default: return f(None{});
  }
}

} // namespace kron
