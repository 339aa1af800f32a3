// A block of tokens on its way in and out. Its rows are called (feature)[tokens]: feature f's NV
// vectors of tokens lie behind one another at f * NV * LANES.
#pragma once
#include "activation.h"
#include "contract.h"

namespace {

// Memory (tokens, n), of which `tokens` rows exist, to (n)[tokens]; lanes of no token are zero.
template <class S, int NV> void read_block(const S *x, Int tokens, Int n, Compute<S> *block) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  for (int v = 0; v < NV; v++) {
    const int present = int(larger(0, smaller(tokens - v * L, L)));
    for (Int f = 0; f < n; f += L) {
      const int width = int(smaller(L, n - f));
      const S *p = x + v * L * n + f;
      Vector<T> rows[L];
      if (present == L && width == L) {
        KRON_UNROLL
        for (int l = 0; l < L; l++) rows[l] = fetch(p + l * n);
      } else {
        KRON_UNROLL
        for (int l = 0; l < L; l++)
          rows[l] = l < present ? fetch_some(p + l * n, width) : Vector<T>{};
      }
      transpose<T>(rows);
      T *out = block + (f * NV + v) * L;
      KRON_UNROLL
      for (int l = 0; l < L; l++)
        if (l < width) store(out + l * NV * L, rows[l]);
    }
  }
}

// (m)[tokens] through act(· + bias) + residual to memory (tokens, m); bias and residual may be null.
template <class S, int NV, int ACTIVATION>
void write_block(const Compute<S> *block, Int tokens, Int m, const S *bias, const S *residual,
                 S *y) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  for (int v = 0; v < NV; v++) {
    const int present = int(larger(0, smaller(tokens - v * L, L)));
    if (!present) return;
    for (Int f = 0; f < m; f += L) {
      const int width = int(smaller(L, m - f));
      const T *in = block + (f * NV + v) * L;
      const Int at = v * L * m + f;
      Vector<T> rows[L];
      KRON_UNROLL
      for (int l = 0; l < L; l++) {
        if (l >= width) {
          rows[l] = Vector<T>{};
          continue;
        }
        rows[l] = load(in + l * NV * L);
        if (bias) rows[l] += scalar(bias[f + l]);
      }
      if constexpr (ACTIVATION != KRON_NONE)
        for (int l = 0; l < width; l++) rows[l] = activate<ACTIVATION>(rows[l]);
      transpose<T>(rows);
      if (present == L && width == L) {
        KRON_UNROLL
        for (int l = 0; l < L; l++) {
          if (residual) rows[l] += fetch(residual + at + l * m);
          put(y + at + l * m, rows[l]);
        }
      } else {
        for (int l = 0; l < present; l++) {
          if (residual) rows[l] += fetch_some(residual + at + l * m, width);
          put_some(y + at + l * m, rows[l], width);
        }
      }
    }
  }
}

// `count` numbers of memory, `stride` apart, to the dtype of computation.
template <class S> void widen_row(const S *in, Int count, Int stride, Compute<S> *out) {
  constexpr int L = LANES<Compute<S>>;
  Int i = 0;
  if (stride == 1)
    for (; i + L <= count; i += L) store(out + i, fetch(in + i));
  for (; i < count; i++) out[i] = scalar(in[i * stride]);
}

// act(in + bias) + residual of `count` numbers to memory.
template <class S, class Out, int ACTIVATION>
void finish_row(const Compute<S> *in, Int count, const S *bias, const S *residual, Out *y) {
  constexpr int L = LANES<Compute<S>>;
  for (Int f = 0; f < count; f += L) {
    const int width = int(smaller(L, count - f));
    const bool whole = width == L;
    Vector<Compute<S>> v = whole ? load(in + f) : fetch_some(in + f, width);
    if (bias) v += whole ? fetch(bias + f) : fetch_some(bias + f, width);
    v = activate<ACTIVATION>(v);
    if (residual) v += whole ? fetch(residual + f) : fetch_some(residual + f, width);
    if (whole) put(y + f, v);
    else put_some(y + f, v, width);
  }
}

// body(std::integral_constant<int, activation>()).
template <class Body> void with_activation(Int activation, Body body) {
  switch (activation) {
  case KRON_GELU: return body(std::integral_constant<int, KRON_GELU>());
  case KRON_GELU_TANH: return body(std::integral_constant<int, KRON_GELU_TANH>());
  case KRON_RELU: return body(std::integral_constant<int, KRON_RELU>());
  case KRON_SILU: return body(std::integral_constant<int, KRON_SILU>());
  default: return body(std::integral_constant<int, KRON_NONE>());
  }
}

// Token `token` and the next ones of the product's output.
template <class S, int NV>
void write_block(const Compute<S> *block, Int token, Int tokens, Int m, const kron_product &p) {
  const S *residual = static_cast<const S *>(p.residual);
  with_activation(p.activation, [&](auto activation) {
    write_block<S, NV, decltype(activation)::value>(
        block, tokens, m, static_cast<const S *>(p.bias),
        residual ? residual + token * m : nullptr, static_cast<S *>(p.y) + token * m);
  });
}

} // namespace
