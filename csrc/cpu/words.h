// The register tile of factors whose entries are narrower than 32 bits, in the layout (features)[tokens].
//
// A 32-bit lane holds the neighbouring features of one token that one instruction multiplies, by the same
// number of entries of a factor's row in one broadcast word. A Form says what is in a word, and how it is
// multiplied: int8.h and bfloat16.h have them.
#pragma once
#include "contract.h"

namespace {

typedef VectorOf<int32_t, KRON_BYTES>::type Ints;

KRON_INLINE Ints load_ints(const int32_t *p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Rows of words of a factor. Of each row may be given: its scale, and what its sums start from.
struct Words {
  const char *data;
  Int row, step; // bytes from a row, and from a word of a row, to the next
  Int count;     // in a row
  const float *scale;
  Int scale_step;
  const int32_t *starts;
};

// VT neighbouring vectors of features, and where their outputs go.
template <int VT> struct Vectors {
  const int32_t *words; // words of neighbouring features are `step` apart
  Int step;
  const float *units;
  float *out[VT];
  Int out_step;
  bool accumulate;
};

// R rows of a factor from `first` on.
template <class Form, int VT, int R> void multiply_rows(const Words &w, Int first, const Vectors<VT> &x) {
  constexpr int L = LANES<float>;
  typename Form::Sum sum[R][VT];
  KRON_UNROLL
  for (int r = 0; r < R; r++) {
    const typename Form::Sum start = Form::start(w.starts, first + r);
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
    for (int k = 0; k < (R + 3) / 4; k++) group[k] += w.step;
  }
  Vector<float> units[VT]; // loaded once: the outputs might be in their place
  KRON_UNROLL
  for (int v = 0; v < VT; v++) units[v] = Form::SCALED ? load(x.units + v * L) : Vector<float>{};
  KRON_UNROLL
  for (int r = 0; r < R; r++) {
    const Int at = (first + r) * x.out_step;
    const float scale = Form::SCALED ? w.scale[(first + r) * w.scale_step] : 1;
    KRON_UNROLL
    for (int v = 0; v < VT; v++) {
      const Vector<float> y = Form::finish(sum[r][v], units[v] * scale);
      store(x.out[v] + at, x.accumulate ? load(x.out[v] + at) + y : y);
    }
  }
}

template <class Form, int VT, int R>
void multiply_tiles(const Words &w, Int first, Int rows, const Vectors<VT> &x) {
  for (; first + R <= rows; first += R) multiply_rows<Form, VT, R>(w, first, x);
  constexpr int FEWER = R > 16 ? 16 : R > 8 ? 8 : R > 4 ? 4 : R / 2;
  if constexpr (FEWER > 0)
    if (first < rows) multiply_tiles<Form, VT, FEWER>(w, first, rows, x);
}

// What a factor multiplies: `count` vectors side by side, NV of each entry of the grid; and its outputs.
struct Narrow {
  const int32_t *words;
  const float *units; // of each lane, what 1 stands for; null without units
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
template <class Form> void multiply_all(const Words &w, Int rows, const Narrow &x, Int row) {
  constexpr int L = LANES<float>, MOST = KRON_ACCUMULATORS >= 24 ? 3 : 2;
  const auto tiles = [&](auto vectors, Int at) {
    constexpr int VT = decltype(vectors)::value;
    const float *units = x.units ? x.units + at * L : nullptr;
    Vectors<VT> some = {x.words + at * L, x.count * L, units, {}, x.g.out_step, x.accumulate};
    for (int v = 0; v < VT; v++) some.out[v] = x.out_of(at + v) + row * x.g.out_step;
    multiply_tiles<Form, VT, KRON_ACCUMULATORS / VT>(w, 0, rows, some);
  };
  for (Int at = 0; at < x.count;) {
    const Int left = x.count - at, more = (left + MOST - 1) / MOST, vectors = (left + more - 1) / more;
    if (vectors == 1) tiles(std::integral_constant<int, 1>(), at);
    else if (vectors == 2) tiles(std::integral_constant<int, 2>(), at);
    else if constexpr (MOST == 3) tiles(std::integral_constant<int, 3>(), at);
    at += vectors;
  }
}

// Calls body(features of a vector, where its words begin) for each vector of a contraction's input, whose words
// of neighbouring features are g.pre * g.post * nv vectors apart.
template <class Body> void each_vector_of(const Grid &g, int nv, const float *in, int32_t *words, Body body) {
  Int at = 0;
  for (Int i = 0; i < g.pre; i++)
    for (Int j = 0; j < g.post; j++)
      for (int v = 0; v < nv; v++, at++)
        body(in + i * g.in_pre + j * g.width + v * g.in_vector, words + at * LANES<float>);
}

} // namespace
