// Reading and writing blocks of tokens. A block of n features is written (n)[tokens]: the NV vectors of
// tokens of feature f are contiguous, at f * NV * LANES.
#pragma once
#include "activation.h"
#include "contract.h"

namespace {

// Vectors of tokens in a block. With 16 registers, three and 4 rows or two and 6 fill them equally well, but
// 384 columns of two fit into a first-level cache of 32 KB: 98 against 88 GFLOP/s.
constexpr int MAX_NV = KRON_ACCUMULATORS >= 24 ? 3 : 2;

// `count` numbers that are `stride` apart to contiguous ones in the dtype of computation.
template <class S> void widen_row(const void *numbers, Int count, Int stride, Compute<S> *out) {
  constexpr int L = LANES<Compute<S>>;
  const S *const in = static_cast<const S *>(numbers);
  Int i = 0;
  if (stride == 1)
    for (; i + L <= count; i += L) store(out + i, fetch(in + i));
  for (; i < count; i++) out[i] = scalar(in[i * stride]);
}

// A type of storage as functions and numbers: kernels are compiled for each of the two types of computation, not
// for each of the four of storage.
template <class T> struct Storage {
  Int size;                 // bytes of a number
  bool narrow, is_bfloat16; // narrow: not T itself
  decltype(&widen_row<T>) widen;

  const void *at(const void *numbers, Int index) const {
    return static_cast<const char *>(numbers) + index * size;
  }
  void *at(void *numbers, Int index) const { return static_cast<char *>(numbers) + index * size; }
};
template <class S>
constexpr Storage<Compute<S>> STORAGE = {sizeof(S), !std::is_same_v<S, Compute<S>>, std::is_same_v<S, bfloat16>,
                                         widen_row<S>};

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

// y = act(in + bias) + residual of `count` numbers; bias and residual may be null.
template <class S, int ACTIVATION>
void finish_row(const Compute<S> *in, Int count, const Compute<S> *bias, const void *residual_numbers,
                void *y_numbers) {
  constexpr int L = LANES<Compute<S>>;
  const S *const residual = static_cast<const S *>(residual_numbers);
  S *const y = static_cast<S *>(y_numbers);
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

// Reads and writes blocks of a type of storage.
template <class T> struct StoredBlocks : Storage<T> {
  decltype(&read_some<T, 1>) read[MAX_NV];
  decltype(&write_run<T, 1>) write[MAX_NV];
  decltype(&finish_row<T, 0>) finish[KRON_SILU + 1];

  template <int NV> void read_block(const void *x, Int token, Int tokens, Int n, T *block) const {
    read[NV - 1](x, token, tokens, n, {0, n}, block);
  }
  // write_run of some runs of features.
  template <int NV>
  void write_block(const T *block, Int token, Int tokens, Int m, const kron_product &p, const Runs &runs) const {
    for (Int i = 0, first = runs.first; i < runs.count; i++, first += runs.step)
      write[NV - 1](block, token, tokens, m, p, first, first + runs.length);
  }
};
template <class S, size_t... i> constexpr StoredBlocks<Compute<S>> stored_blocks(std::index_sequence<i...>) {
  return {STORAGE<S>,
          {read_some<S, int(i) + 1>...},
          {write_run<S, int(i) + 1>...},
          {finish_row<S, KRON_NONE>, finish_row<S, KRON_GELU>, finish_row<S, KRON_GELU_TANH>,
           finish_row<S, KRON_RELU>, finish_row<S, KRON_SILU>}};
}
template <class S>
constexpr StoredBlocks<Compute<S>> STORED_BLOCKS = stored_blocks<S>(std::make_index_sequence<MAX_NV>());

} // namespace
