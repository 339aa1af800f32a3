// Attention and LayerNorm in the layout (features)[tokens]: a query, or a token, is a lane.
#pragma once
#include "block.h"

namespace {

KRON_INLINE Vector<double> exp_below_zero(Vector<double> x) {
  for (int l = 0; l < LANES<double>; l++) x[l] = ::exp(x[l]);
  return x;
}

// Columns of scores (keys)[queries] become e^(score - their largest); returns 1 / their sum.
template <class T, int NV> void soften(T *scores, Int keys, Vector<T> *factor) {
  constexpr int L = LANES<T>, TB = NV * L;
  Vector<T> most[NV], sum[NV];
  KRON_UNROLL
  for (int v = 0; v < NV; v++) most[v] = load(scores + v * L), sum[v] = Vector<T>{};
  for (Int k = 1; k < keys; k++) {
    KRON_UNROLL
    for (int v = 0; v < NV; v++) {
      const Vector<T> s = load(scores + k * TB + v * L);
      most[v] = s > most[v] ? s : most[v];
    }
  }
  for (Int k = 0; k < keys; k++) {
    KRON_UNROLL
    for (int v = 0; v < NV; v++) {
      T *const s = scores + k * TB + v * L;
      const Vector<T> p = exp_below_zero(load(s) - most[v]);
      sum[v] += p;
      store(s, p);
    }
  }
  KRON_UNROLL
  for (int v = 0; v < NV; v++) factor[v] = T(1) / sum[v];
}

template <class T> KRON_INLINE Vector<T> inverse_root(Vector<T> v) {
  if constexpr (sizeof(T) == 4) {
    for (int l = 0; l < LANES<T>; l++) v[l] = 1 / sqrtf(v[l]);
  } else {
    for (int l = 0; l < LANES<T>; l++) v[l] = 1 / sqrt(v[l]);
  }
  return v;
}

// x = norm(x + bias) of a vector of tokens, whose `width` features are `step` apart, in place. One copy
// for all callers: inlined into each, additions and multiplications are fused here and not there, and
// results depend on the number of threads.
template <class S>
__attribute__((noinline)) void
normalise(Compute<S> *x, Int step, Int width, const void *bias_numbers, const kron_norm &norm) {
  typedef Compute<S> T;
  constexpr int PARTS = 4; // sums that do not wait for each other, and round less than one
  const S *const bias = static_cast<const S *>(bias_numbers);
  const S *const weight = static_cast<const S *>(norm.weight), *shift = static_cast<const S *>(norm.bias);
  const auto sum_of = [=](auto term) __attribute__((always_inline)) {
    Vector<T> sums[PARTS] = {};
    Int f = 0;
    for (; f + PARTS <= width; f += PARTS) {
      KRON_UNROLL
      for (int i = 0; i < PARTS; i++) sums[i] += term(f + i);
    }
    for (; f < width; f++) sums[0] += term(f);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  const Vector<T> mean = sum_of([=](Int f) {
    Vector<T> v = load(x + f * step);
    if (bias) {
      v += scalar(bias[f]);
      store(x + f * step, v);
    }
    return v;
  }) / T(width);
  const Vector<T> variance = sum_of([=](Int f) {
    const Vector<T> v = load(x + f * step) - mean;
    return v * v;
  }) / T(width);
  const Vector<T> scale = inverse_root<T>(variance + T(norm.epsilon));
  for (Int f = 0; f < width; f++) {
    Vector<T> v = (load(x + f * step) - mean) * scale;
    if (weight) v *= scalar(weight[f]);
    if (shift) v += scalar(shift[f]);
    store(x + f * step, v);
  }
}

} // namespace
