// The register tiles: a factor times rows of tokens, and dot products of rows of tokens.
#pragma once
#include "vector.h"

namespace {

typedef int64_t Int;
KRON_INLINE Int smaller(Int a, Int b) { return a < b ? a : b; }
KRON_INLINE Int larger(Int a, Int b) { return a > b ? a : b; }
template <class T> KRON_INLINE Int vectors_of(Int count) { return (count + LANES<T> - 1) / LANES<T>; }

// The numbers from first to end.
struct Range {
  Int first, end;
  Int size() const { return end - first; }
};

// One term of a factor, (rows, cols), with any strides.
template <class T> struct Matrix {
  const T *data;
  Int rows, cols, row_stride, col_stride;
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Matrix some_rows(Int first, Int count) const {
    return {data + first * row_stride, count, cols, row_stride, col_stride};
  }
};

// Memory layout of a contraction of (pre, cols, post) to (pre, rows, post). An entry is NV vectors.
// Columns of the input are in_step apart, rows of the output out_step, entries along post `width`, and
// the vectors of an entry in_vector and out_vector.
struct Grid {
  Int pre, post, width, in_pre, out_pre, in_step, out_step, in_vector, out_vector;
};

// out[r] = Σ_c w[r, c] in[c] for R rows of a factor from `first` on, with R * NV sums in registers;
// `accumulate` adds them to out.
template <class T, int NV, int R>
void contract_rows(const Matrix<T> &w, Int first, const T *in, T *out, const Grid &g,
                   bool accumulate) {
  const Int rs = w.row_stride, cs = w.col_stride, rs2 = 2 * rs, rs3 = 3 * rs;
  const Int in_step = g.in_step, out_step = g.out_step;
  const Int in_vector = g.in_vector, out_vector = g.out_vector;
  for (Int i = 0; i < g.pre; i++) {
    for (Int j = 0; j < g.post; j++) {
      const T *d = in + i * g.in_pre + j * g.width;
      T *o = out + i * g.out_pre + j * g.width + first * out_step;
      Vector<T> acc[R][NV];
      KRON_UNROLL
      for (int r = 0; r < R; r++) {
        KRON_UNROLL
        for (int v = 0; v < NV; v++)
          acc[r][v] = accumulate ? load(o + r * out_step + v * out_vector) : Vector<T>{};
      }
      // One pointer for four rows: with one each the general registers would not suffice.
      const T *group[(R + 3) / 4];
      KRON_UNROLL
      for (int k = 0; k < (R + 3) / 4; k++) group[k] = w.data + (first + 4 * k) * rs;
      for (Int c = 0; c < w.cols; c++) {
        Vector<T> x[NV];
        KRON_UNROLL
        for (int v = 0; v < NV; v++) x[v] = load(d + v * in_vector);
        KRON_UNROLL
        for (int r = 0; r < R; r++) {
          const T *p = group[r / 4];
          const T entry = r % 4 == 0 ? p[0] : r % 4 == 1 ? p[rs] : r % 4 == 2 ? p[rs2] : p[rs3];
          const Vector<T> b = broadcast(entry);
          KRON_UNROLL
          for (int v = 0; v < NV; v++) acc[r][v] += b * x[v];
        }
        KRON_UNROLL
        for (int k = 0; k < (R + 3) / 4; k++) group[k] += cs;
        d += in_step;
      }
      KRON_UNROLL
      for (int r = 0; r < R; r++) {
        KRON_UNROLL
        for (int v = 0; v < NV; v++) store(o + r * out_step + v * out_vector, acc[r][v]);
      }
    }
  }
}

// The rows from `first` on, in tiles of R rows and then of fewer: half as many instances as one for each
// number of rows, and half the time to compile.
template <class T, int NV, int R>
void contract_tiles(const Matrix<T> &w, Int first, const T *in, T *out, const Grid &g, bool accumulate) {
  for (; first + R <= w.rows; first += R)
    contract_rows<T, NV, R>(w, first, in, out, g, accumulate);
  constexpr int FEWER = R > 16 ? 16 : R > 8 ? 8 : R > 4 ? 4 : R / 2;
  if constexpr (FEWER > 0)
    if (first < w.rows) contract_tiles<T, NV, FEWER>(w, first, in, out, g, accumulate);
}

template <class T, int NV>
void contract_grid(const Matrix<T> &w, const T *in, T *out, const Grid &g, bool accumulate) {
  contract_tiles<T, NV, KRON_ACCUMULATORS / NV>(w, 0, in, out, g, accumulate);
}

// Entries of NV vectors by any grid. Vectors that share a broadcast save loads, so an entry of one vector
// takes two or three neighbours along an axis with it: 83 GFLOP/s with one, 99 with two (AVX2).
template <class T, int NV>
KRON_NOINLINE void contract(const Matrix<T> &w, const T *in, T *out, Grid g, bool accumulate) {
  constexpr int L = LANES<T>;
  if constexpr (NV == 1) {
    const int vectors = g.post % 3 == 0 ? 3 : g.post % 2 == 0 ? 2 : 1;
    if (vectors > 1 && g.width == L) {
      g.post /= vectors, g.width = vectors * L, g.in_vector = g.out_vector = L;
      if (vectors == 3) return contract_grid<T, 3>(w, in, out, g, accumulate);
      return contract_grid<T, 2>(w, in, out, g, accumulate);
    }
    if (g.post == 1 && g.pre > 1) {
      const Int threes = g.pre % 3 == 1 ? g.pre / 3 - 1 : g.pre / 3, twos = (g.pre - 3 * threes) / 2;
      const auto neighbours = [&](Int pre, Int vectors) {
        return Grid{pre,       1,          L,        vectors * g.in_pre, vectors * g.out_pre,
                    g.in_step, g.out_step, g.in_pre, g.out_pre};
      };
      const Int done = 3 * threes;
      contract_grid<T, 3>(w, in, out, neighbours(threes, 3), accumulate);
      return contract_grid<T, 2>(w, in + done * g.in_pre, out + done * g.out_pre, neighbours(twos, 2),
                                 accumulate);
    }
  }
  contract_grid<T, NV>(w, in, out, g, accumulate);
}

// in (pre, w.cols, post)[tokens] to out (pre, w.rows, post)[tokens], of NV vectors of tokens.
template <class T, int NV>
void contract(const Matrix<T> &w, const T *in, T *out, Int pre, Int post, bool accumulate = false) {
  constexpr int L = LANES<T>;
  const Int width = NV * L, step = post * width;
  contract<T, NV>(w, in, out, Grid{pre, post, width, w.cols * step, w.rows * step, step, step, L, L},
                  accumulate);
}

// Operand of dot products: row r is `count` runs of `inner` numbers, run i at data + r * row + i * step.
template <class T> struct Rows {
  const T *data;
  Int rows, row, step;
};

// Dot products of PR rows of p and QR rows of q, from r and s on. Past the end the last row is read
// again and its sums are dropped. The PR * QR sums fill a vector, so a tree of shuffles ends a tile.
template <class T, int QR>
void correlate_tile(const Rows<T> &p, const Rows<T> &q, Int r, Int s, Int count, Int inner, T *c,
                    Int c_row, Int c_col, bool accumulate) {
  constexpr int L = LANES<T>, PR = L < QR ? 1 : L / QR, SUMS = PR * QR;
  const T *pr[PR], *qr[QR];
  KRON_UNROLL
  for (int i = 0; i < PR; i++) pr[i] = p.data + smaller(r + i, p.rows - 1) * p.row;
  KRON_UNROLL
  for (int i = 0; i < QR; i++) qr[i] = q.data + smaller(s + i, q.rows - 1) * q.row;
  Vector<T> acc[SUMS];
  KRON_UNROLL
  for (int i = 0; i < SUMS; i++) acc[i] = Vector<T>{};
  const auto add = [&](Int p_at, Int q_at, auto read) __attribute__((always_inline)) {
    Vector<T> y[QR];
    KRON_UNROLL
    for (int l = 0; l < QR; l++) y[l] = read(qr[l] + q_at);
    KRON_UNROLL
    for (int k = 0; k < PR; k++) {
      const Vector<T> x = read(pr[k] + p_at);
      KRON_UNROLL
      for (int l = 0; l < QR; l++) acc[k * QR + l] += x * y[l];
    }
  };
  const int tail = int(inner % L);
  for (Int i = 0; i < count; i++) {
    Int at = 0;
    for (; at + L <= inner; at += L)
      add(i * p.step + at, i * q.step + at, [](const T *row) { return load(row); });
    if (tail)
      add(i * p.step + at, i * q.step + at, [=](const T *row) { return fetch_some(row, tail); });
  }
  if constexpr (QR == 1) { // one column of results: a single store if they are contiguous
    if (c_row == 1 && r + PR <= p.rows && !accumulate)
      return store(c + r + s * c_col, sums_of_lanes<T>(acc));
  }
  T sums[SUMS];
  KRON_UNROLL
  for (int i = 0; i < SUMS; i += L) store(sums + i, sums_of_lanes<T>(acc + i));
  T *out = c + r * c_row + s * c_col;
  if (r + PR <= p.rows && s + QR <= q.rows && !accumulate) { // most tiles: no test per entry
    KRON_UNROLL
    for (int k = 0; k < PR; k++) {
      KRON_UNROLL
      for (int l = 0; l < QR; l++) out[k * c_row + l * c_col] = sums[k * QR + l];
    }
    return;
  }
  for (int k = 0; k < PR && r + k < p.rows; k++) {
    for (int l = 0; l < QR && s + l < q.rows; l++) {
      T &entry = out[k * c_row + l * c_col];
      entry = sums[k * QR + l] + (accumulate ? entry : T(0));
    }
  }
}

// c[r * c_row + s * c_col] = p's row r · q's row s, for each q and c of a batch, q_batch and c_batch
// apart. Rows of p are read once for the whole batch.
template <class T>
KRON_NOINLINE void correlate(const Rows<T> &p, Rows<T> q, Int count, Int inner, T *c, Int c_row, Int c_col,
                             bool accumulate, Int batch = 1, Int q_batch = 0, Int c_batch = 0) {
  constexpr int L = LANES<T>;
  if (p.step == inner && q.step == inner) inner *= count, count = 1;
  const T *const first = q.data;
  // Storing scattered results dominates short sums: where results are contiguous, store vectors.
  if (inner * count <= 4 * L && !accumulate) {
    if (c_row == 1 && p.rows >= L) {
      for (Int r = 0; r < p.rows; r += L)
        for (Int i = 0; i < batch; i++)
          for (Int s = 0; s < q.rows; s++) {
            q.data = first + i * q_batch;
            correlate_tile<T, 1>(p, q, r, s, count, inner, c + i * c_batch, 1, c_col, false);
          }
      return;
    }
    if (c_col == 1 && q.rows >= L) {
      for (Int i = 0; i < batch; i++) {
        q.data = first + i * q_batch;
        for (Int s = 0; s < q.rows; s += L)
          for (Int r = 0; r < p.rows; r++)
            correlate_tile<T, 1>(q, p, s, r, count, inner, c + i * c_batch, 1, c_row, false);
      }
      return;
    }
  }
  const Int cols = q.rows < 4 ? q.rows < 2 ? 1 : 2 : 4, rows = L < cols ? 1 : L / cols;
  for (Int r = 0; r < p.rows; r += rows) {
    for (Int i = 0; i < batch; i++) {
      q.data = first + i * q_batch;
      T *out = c + i * c_batch;
      for (Int s = 0; s < q.rows; s += cols) {
        const auto tile = cols == 1   ? correlate_tile<T, 1>
                          : cols == 2 ? correlate_tile<T, 2>
                                      : correlate_tile<T, 4>;
        tile(p, q, r, s, count, inner, out, c_row, c_col, accumulate);
      }
    }
  }
}

// in (pre, w.cols, post) to out (pre, w.rows, post) of single numbers, not of rows of tokens. `columns`
// has room for as many numbers as `in`.
template <class T>
void contract_numbers(const Matrix<T> &w, const T *in, T *out, Int pre, Int post, T *columns,
                      bool accumulate) {
  constexpr int L = LANES<T>;
  const Rows<T> rows = {w.data, w.rows, w.row_stride, 0};
  if (post == 1) {
    correlate<T>(rows, {in, pre, w.cols, 0}, 1, w.cols, out, 1, w.rows, accumulate);
  } else if (post % L == 0) {
    contract<T, 1>(w, in, out, pre, post / L, accumulate);
  } else {
    for (Int i = 0; i < pre; i++)
      for (Int c = 0; c < w.cols; c++)
        for (Int j = 0; j < post; j++)
          columns[(i * post + j) * w.cols + c] = in[(i * w.cols + c) * post + j];
    correlate<T>(rows, {columns, post, w.cols, 0}, 1, w.cols, out, post, 1, accumulate, pre,
                 post * w.cols, post * w.rows);
  }
}

// Axis 0 of (size, other)[tokens], or axis 1 of (other, size)[tokens].
enum Axis { FIRST, LAST };

template <class T, int NV>
void contract_along(Axis axis, const Matrix<T> &w, const T *in, T *out, Int other, bool accumulate) {
  contract<T, NV>(w, in, out, axis == FIRST ? 1 : other, axis == FIRST ? other : 1, accumulate);
}

// Some rows of the result of contract_along, for some entries of the other axis.
template <class T, int NV>
void contract_part_along(Axis axis, const Matrix<T> &w, const T *in, T *out, Int other, Range rows,
                         Range entries, bool accumulate) {
  constexpr int L = LANES<T>, TB = NV * L;
  const Int step = axis == FIRST ? other * TB : TB, in_entry = axis == FIRST ? TB : w.cols * TB;
  const Int out_entry = axis == FIRST ? TB : w.rows * TB;
  const Grid grid = axis == FIRST ? Grid{1, entries.size(), TB, 0, 0, step, step, L, L}
                                  : Grid{entries.size(), 1, TB, in_entry, out_entry, TB, TB, L, L};
  contract<T, NV>(w.some_rows(rows.first, rows.size()), in + entries.first * in_entry,
                  out + entries.first * out_entry + rows.first * step, grid, accumulate);
}

// c (p_rows, q_rows) += Σ p[r, o, token] q[s, o, token] over the other axis and all tokens, for some
// rows r of p and all rows s of q along an axis. `turned` has room for q.
template <class T, int NV>
KRON_NOINLINE void sum_over_tokens(Axis axis, const T *p_data, Int p_rows, Range some, const T *q_data, Int q_rows,
                                   Int other, T *c, T *turned) {
  constexpr int L = LANES<T>, TB = NV * L;
  const auto rows_along = [=](const T *data, Int rows) {
    return axis == FIRST ? Rows<T>{data, rows, other * TB, TB} : Rows<T>{data, rows, TB, rows * TB};
  };
  Rows<T> p = rows_along(p_data, p_rows);
  const Rows<T> q = rows_along(q_data, q_rows);
  p.data += some.first * p.row, p.rows = some.size(), c += some.first * q.rows;
  if (!p.rows) return;
  // The tree of sums that ends a dot product takes longer than a short sum itself. Then it is faster
  // to transpose q, so that its rows run along the lanes, and to contract it with p.
  if (q.rows % L || 50 * p_rows < other * TB)
    return correlate<T>(p, q, other, TB, c, q.rows, 1, true);
  for (Int i = 0; i < other; i++) {
    for (Int s = 0; s < q.rows; s += L) {
      for (int v = 0; v < NV; v++) {
        Vector<T> lanes[L];
        KRON_UNROLL
        for (int l = 0; l < L; l++) lanes[l] = load(q.data + (s + l) * q.row + i * q.step + v * L);
        transpose<T>(lanes);
        T *out = turned + (i * TB + v * L) * q.rows + s;
        KRON_UNROLL
        for (int l = 0; l < L; l++) store(out + l * q.rows, lanes[l]);
      }
    }
  }
  for (Int i = 0; i < other; i++) {
    const Matrix<T> w = {p.data + i * p.step, p.rows, TB, p.row, 1};
    contract<T, 1>(w, turned + i * TB * q.rows, c, 1, q.rows / L, true);
  }
}

} // namespace
