// The hidden vector of a feed-forward block, entry by entry, where its two products meet in a grid.
#pragma once
#include "linear.h"

namespace {

// Columns of the hidden grid, of k entries each, that the first-level cache holds at a time.
inline Int columns_at_a_time(Int k) { return larger(1, 64 / k); }

// The factors that meet: up = A ⊗ B, contracted by B first, and down = A' ⊗ B', by A' first. The hidden
// vector is a grid (k, width), of which A makes each column and A' reads each column.
template <class T> struct Hidden {
  Int rank, rank2;
  Matrix<T> a, a2; // (k, n1), (m1', k), the first of each rank
  Int a_step, a2_step;
  int64_t activation;
};

// One column at a time with its hidden entries in registers, for two rows of z and two of u: as in the
// paper's layers. Storing them between three loops took twice as long as the rest without the activation.
template <int NV, int ACTIVATION, class T>
void through_registers(const Hidden<T> &h, Int width, Range range, const T *bias, Int bias_row, const T *z, T *u) {
  constexpr int L = LANES<T>, TB = NV * L;
  const Int z_row = range.size() * TB, u_row = width * TB;
  // The steps from a row of z, or of u, to the other.
  const Int a_other = h.rank == 2 ? h.a_step : h.a.col_stride;
  const Int a2_other = h.rank2 == 2 ? h.a2_step : h.a2.row_stride;
  for (Int p = range.first; p < range.end; p++) {
    const T *const z0 = z + (p - range.first) * TB;
    T *const u0 = u + p * TB;
    Vector<T> first[NV], second[NV], sum[NV] = {}, sum2[NV] = {};
    KRON_UNROLL
    for (int v = 0; v < NV; v++) first[v] = load(z0 + v * L), second[v] = load(z0 + z_row + v * L);
    for (Int i = 0; i < h.a.rows; i++) {
      const T *const a = h.a.data + i * h.a.row_stride, *const a2 = h.a2.data + i * h.a2.col_stride;
      const T b = bias ? bias[i * bias_row + p - range.first] : T(0);
      Vector<T> x[NV];
      KRON_UNROLL
      for (int v = 0; v < NV; v++) x[v] = slope<ACTIVATION>(first[v] * *a + second[v] * a[a_other] + b).value;
      KRON_UNROLL
      for (int v = 0; v < NV; v++) sum[v] += x[v] * *a2, sum2[v] += x[v] * a2[a2_other];
    }
    KRON_UNROLL
    for (int v = 0; v < NV; v++) store(u0 + v * L, sum[v]), store(u0 + u_row + v * L, sum2[v]);
  }
}

// u = A' act(A z + bias) for a range of the grid's columns, a few at a time, which `hidden` holds.
// z (rank * n1, range)[tokens], u (rank' * m1', width)[tokens], bias (k, range) or null, with rows `bias_row` apart.
template <int NV, class T>
void through_hidden(const Hidden<T> &h, Int width, Range range, const T *bias, Int bias_row, const T *z, T *u,
                    T *hidden) {
  constexpr int L = LANES<T>, TB = NV * L;
  const Int k = h.a.rows, z_row = range.size() * TB, u_row = width * TB;
  if (h.rank * h.a.cols == 2 && h.rank2 * h.a2.rows == 2)
    return with_activation(h.activation, [&](auto kind) {
      through_registers<NV, decltype(kind)::value>(h, width, range, bias, bias_row, z, u);
    });
  for (Int p = range.first; p < range.end; p += columns_at_a_time(k)) {
    const Int columns = smaller(columns_at_a_time(k), range.end - p), near = columns * TB;
    for (Int i = 0; i < h.rank; i++) {
      Matrix<T> a = h.a;
      a.data += i * h.a_step;
      contract<T, NV>(a, z + i * a.cols * z_row + (p - range.first) * TB, hidden,
                           {1, columns, TB, 0, 0, z_row, near, L, L}, i > 0);
    }
    for (Int i = 0; i < k; i++)
      activate_rows<T, NV>(hidden + i * near, TB, hidden + i * near, TB, columns, h.activation,
                           bias ? bias + i * bias_row + p - range.first : nullptr);
    for (Int i = 0; i < h.rank2; i++) {
      Matrix<T> a = h.a2;
      a.data += i * h.a2_step;
      contract<T, NV>(a, hidden, u + i * a.rows * u_row + p * TB,
                           {1, columns, TB, 0, 0, near, u_row, L, L}, false);
    }
  }
}

} // namespace
