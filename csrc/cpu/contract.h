// The register tiles: a factor against rows of tokens, and rows of tokens against one another.
#pragma once
#include "vector.h"

namespace {

typedef int64_t Int;
KRON_INLINE Int smaller(Int a, Int b) { return a < b ? a : b; }
KRON_INLINE Int larger(Int a, Int b) { return a > b ? a : b; }

// One term of a factor, with any strides.
template <class T> struct Matrix {
  const T *data;
  Int rows, cols, row_stride, col_stride;
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

// Where the vectors of a contraction lie: in (pre, cols, post) to out (pre, rows, post), whose rows
// and columns lie `in_step` and `out_step` apart, and whose entries are `width` numbers, NV vectors
// that lie `in_vector` and `out_vector` apart.
struct Grid {
  Int pre, post, width, in_pre, out_pre, in_step, out_step, in_vector, out_vector;
};

// out[r] = Σ_c w[r, c] in[c] for R rows of a factor from `first` on, added to what is there if asked
// for, with R * NV sums in registers.
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
      // One pointer for four rows: a pointer each would not fit the general registers.
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
          const Vector<T> b = Vector<T>{} + entry;
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

template <class T, int NV, int R>
void contract_last_rows(const Matrix<T> &w, Int first, const T *in, T *out, const Grid &g,
                        bool accumulate) {
  if constexpr (R > 0) {
    if (w.rows - first == R) contract_rows<T, NV, R>(w, first, in, out, g, accumulate);
    else contract_last_rows<T, NV, R - 1>(w, first, in, out, g, accumulate);
  }
}

template <class T, int NV>
void contract_grid(const Matrix<T> &w, const T *in, T *out, const Grid &g, bool accumulate) {
  constexpr int R = KRON_ACCUMULATORS / NV;
  Int first = 0;
  for (; first + R <= w.rows; first += R)
    contract_rows<T, NV, R>(w, first, in, out, g, accumulate);
  contract_last_rows<T, NV, R - 1>(w, first, in, out, g, accumulate);
}

// in (pre, w.cols, post)[tokens] to out (pre, w.rows, post)[tokens], of NV vectors of tokens. The
// more vectors share a broadcast, the fewer loads: 105 GFLOP/s with three, 74 with one. So of a
// block of one vector two or three neighbours along an axis go together.
template <class T, int NV>
void contract(const Matrix<T> &w, const T *in, T *out, Int pre, Int post, bool accumulate = false) {
  constexpr int L = LANES<T>;
  if constexpr (NV == 1) {
    if (post % 3 == 0) return contract<T, 3>(w, in, out, pre, post / 3, accumulate);
    if (post % 2 == 0) return contract<T, 2>(w, in, out, pre, post / 2, accumulate);
    if (post == 1 && pre > 1) {
      const Int in_step = w.cols * L, out_step = w.rows * L;
      const Int threes = pre % 3 == 1 ? pre / 3 - 1 : pre / 3, twos = (pre - 3 * threes) / 2;
      const Grid three = {threes, 1, L, 3 * in_step, 3 * out_step, L, L, in_step, out_step};
      const Grid two = {twos, 1, L, 2 * in_step, 2 * out_step, L, L, in_step, out_step};
      contract_grid<T, 3>(w, in, out, three, accumulate);
      contract_grid<T, 2>(w, in + 3 * threes * in_step, out + 3 * threes * out_step, two, accumulate);
      return;
    }
  }
  const Int width = NV * L, step = post * width;
  const Grid g = {pre, post, width, w.cols * step, w.rows * step, step, step, L, L};
  contract_grid<T, NV>(w, in, out, g, accumulate);
}

// Rows whose dot products are wanted: row r is `count` runs of `inner` numbers, run i at
// data + r * row + i * step.
template <class T> struct Rows {
  const T *data;
  Int rows, row, step;
};

// PR rows of p against QR rows of q from (r, s) on; past the end the last row again, its sums
// dropped. As many sums as lanes (or QR, if that is more), so that a tree of shuffles ends a tile.
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
  const int tail = int(inner % L);
  for (Int i = 0; i < count; i++) {
    for (Int at = 0; at + L <= inner; at += L) {
      Vector<T> y[QR];
      KRON_UNROLL
      for (int k = 0; k < QR; k++) y[k] = load(qr[k] + i * q.step + at);
      KRON_UNROLL
      for (int k = 0; k < PR; k++) {
        const Vector<T> x = load(pr[k] + i * p.step + at);
        KRON_UNROLL
        for (int l = 0; l < QR; l++) acc[k * QR + l] += x * y[l];
      }
    }
    if (tail) {
      const Int at = inner - tail;
      Vector<T> y[QR];
      KRON_UNROLL
      for (int k = 0; k < QR; k++) y[k] = fetch_some(qr[k] + i * q.step + at, tail);
      KRON_UNROLL
      for (int k = 0; k < PR; k++) {
        const Vector<T> x = fetch_some(pr[k] + i * p.step + at, tail);
        KRON_UNROLL
        for (int l = 0; l < QR; l++) acc[k * QR + l] += x * y[l];
      }
    }
  }
  if constexpr (QR == 1) { // one column of results, whole if nothing is in its way
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

// c[r * c_row + s * c_col] = p's row r · q's row s, added to what is there if asked for; `batch`
// times, with q and c their steps further on. Rows of p are read once for all of the batch.
template <class T>
void correlate(const Rows<T> &p, Rows<T> q, Int count, Int inner, T *c, Int c_row, Int c_col,
               bool accumulate, Int batch = 1, Int q_batch = 0, Int c_batch = 0) {
  constexpr int L = LANES<T>;
  if (p.step == inner && q.step == inner) inner *= count, count = 1;
  const T *const first = q.data;
  // Of short sums the scattered results take longest: a vector of them at a time, if they lie so.
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
        if (cols == 1) correlate_tile<T, 1>(p, q, r, s, count, inner, out, c_row, c_col, accumulate);
        else if (cols == 2)
          correlate_tile<T, 2>(p, q, r, s, count, inner, out, c_row, c_col, accumulate);
        else correlate_tile<T, 4>(p, q, r, s, count, inner, out, c_row, c_col, accumulate);
      }
    }
  }
}

// in (pre, w.cols, post) to out (pre, w.rows, post), numbers instead of rows of tokens. `columns` is
// room for as many numbers as `in`.
template <class T>
void contract_numbers(const Matrix<T> &w, const T *in, T *out, Int pre, Int post, T *columns,
                      bool accumulate) {
  constexpr int L = LANES<T>;
  const Rows<T> rows = {w.data, w.rows, w.row_stride, 0};
  if (post == 1) {
    correlate<T>(rows, {in, pre, w.cols, 0}, 1, w.cols, out, 1, w.rows, accumulate);
  } else if (post % (3 * L) == 0) {
    contract<T, 3>(w, in, out, pre, post / (3 * L), accumulate);
  } else if (post % (2 * L) == 0) {
    contract<T, 2>(w, in, out, pre, post / (2 * L), accumulate);
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

// c (p.rows, q.rows) += Σ over i < count and all tokens of p[r, i] q[s, i], of rows of tokens whose
// runs lie `step` apart. `spare` has room for q.
template <class T, int NV>
void sum_over_tokens(const Rows<T> &p, const Rows<T> &q, Int count, T *c, T *spare) {
  constexpr int L = LANES<T>, TB = NV * L;
  // Dot products end in a tree of sums, which takes longer than they if they are short. Then it is
  // faster to turn q, so that its rows run along the lanes, and to contract p with it.
  if (q.rows % L || 50 * p.rows < count * TB)
    return correlate<T>(p, q, count, TB, c, q.rows, 1, true);
  for (Int i = 0; i < count; i++) {
    for (Int s = 0; s < q.rows; s += L) {
      for (int v = 0; v < NV; v++) {
        Vector<T> lanes[L];
        KRON_UNROLL
        for (int l = 0; l < L; l++) lanes[l] = load(q.data + (s + l) * q.row + i * q.step + v * L);
        transpose<T>(lanes);
        T *out = spare + (i * TB + v * L) * q.rows + s;
        KRON_UNROLL
        for (int l = 0; l < L; l++) store(out + l * q.rows, lanes[l]);
      }
    }
  }
  for (Int i = 0; i < count; i++) {
    const Matrix<T> w = {p.data + i * p.step, p.rows, TB, p.row, 1};
    contract_numbers<T>(w, spare + i * TB * q.rows, c, 1, q.rows, nullptr, true);
  }
}

} // namespace
