// Reading and writing blocks of tokens. A block of n features is written (n)[tokens]: the NV vectors of
// tokens of feature f are contiguous, at f * NV * LANES.
#pragma once
#include "activation.h"
#include "contract.h"

namespace {

// Some features of x (tokens, n) from `token` on to (n)[tokens]; lanes behind the last token
// are zero.
template <class S, int NV>
void read_some(const void *x, Int token, Int tokens, Int n, Range some, Compute<S> *block) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  for (int v = 0; v < NV; v++, token += L) {
    const int present = int(larger(0, smaller(tokens - token, L)));
    for (Int f = some.first; f < some.end; f += L) {
      const int width = int(smaller(L, some.end - f));
      const S *p = static_cast<const S *>(x) + token * n + f;
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

template <class S, int NV>
void read_block(const void *x, Int token, Int tokens, Int n, Compute<S> *block) {
  read_some<S, NV>(x, token, tokens, n, {0, n}, block);
}

// Runs of features: first + i * step to first + i * step + length.
struct Runs {
  Int count, step, first, length;
};

// act(block + bias) + residual of features `first` to `end` of (m)[tokens] to y (tokens, m) from `token`
// on; p names these operands. Its bias is in the dtype of computation.
template <class S, int NV>
void write_run(const Compute<S> *block, Int token, Int tokens, Int m, const kron_product &p, Int first,
               Int end) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  constexpr Int ROWS = 16; // activated at a time: of 64, the activations would not overlap the stores
  T activated[ROWS * L];
  const T *bias = static_cast<const T *>(p.bias);
  for (int v = 0; v < NV; v++, token += L) {
    const int present = int(smaller(tokens - token, L));
    if (present <= 0) return;
    for (Int f = first; f < end; f += L) {
      const int width = int(smaller(L, end - f));
      const T *in = block + (f * NV + v) * L, *b = bias ? bias + f : nullptr;
      Int step = NV * L;
      if (p.activation) {
        const Int done = (f - first) % ROWS;
        if (!done) activate_rows<T, 1>(in, step, activated, L, smaller(ROWS, end - f), p.activation, b);
        in = activated + done * L, step = L, b = nullptr;
      }
      Vector<T> rows[L];
      KRON_UNROLL
      for (int l = 0; l < L; l++) {
        rows[l] = l < width ? load(in + l * step) : Vector<T>{};
        if (b && l < width) rows[l] += b[l];
      }
      transpose<T>(rows);
      S *y = static_cast<S *>(p.y) + token * m + f;
      const S *residual = p.residual ? static_cast<const S *>(p.residual) + token * m + f : nullptr;
      if (present == L && width == L) {
        if (residual) {
          KRON_UNROLL
          for (int l = 0; l < L; l++) rows[l] += fetch(residual + l * m);
        }
        KRON_UNROLL
        for (int l = 0; l < L; l++) put(y + l * m, rows[l]);
      } else {
        for (int l = 0; l < present; l++) {
          if (residual) rows[l] += fetch_some(residual + l * m, width);
          put_some(y + l * m, rows[l], width);
        }
      }
    }
  }
}

// The same of some runs of features.
template <class S, int NV>
void write_block(const Compute<S> *block, Int token, Int tokens, Int m, const kron_product &p,
                 const Runs &runs) {
  for (Int i = 0, first = runs.first; i < runs.count; i++, first += runs.step)
    write_run<S, NV>(block, token, tokens, m, p, first, first + runs.length);
}

// `count` numbers that are `stride` apart to contiguous ones in the dtype of computation.
template <class S> void widen_row(const S *in, Int count, Int stride, Compute<S> *out) {
  constexpr int L = LANES<Compute<S>>;
  Int i = 0;
  if (stride == 1)
    for (; i + L <= count; i += L) store(out + i, fetch(in + i));
  for (; i < count; i++) out[i] = scalar(in[i * stride]);
}

// y = act(in + bias) + residual of `count` numbers; bias and residual may be null.
template <class S, int ACTIVATION>
void finish_row(const Compute<S> *in, Int count, const Compute<S> *bias, const S *residual, S *y) {
  constexpr int L = LANES<Compute<S>>;
  for (Int f = 0; f < count; f += L) {
    const int width = int(smaller(L, count - f));
    const bool whole = width == L;
    Vector<Compute<S>> v = whole ? load(in + f) : fetch_some(in + f, width);
    if (bias) v += whole ? load(bias + f) : fetch_some(bias + f, width);
    v = slope<ACTIVATION>(v).value;
    if (residual) v += whole ? fetch(residual + f) : fetch_some(residual + f, width);
    if (whole) put(y + f, v);
    else put_some(y + f, v, width);
  }
}

} // namespace
