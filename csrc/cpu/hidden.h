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

// u = A' act(A z + bias) for a range of the grid's columns, a few at a time, which `hidden` holds.
// z (rank * n1, range)[tokens], u (rank' * m1', width)[tokens], bias (k, width) or null.
template <int NV, class T, class S>
void through_hidden(const Hidden<T> &h, Int width, Range range, const S *bias, const T *z, T *u,
                    T *hidden) {
  constexpr int L = LANES<T>, TB = NV * L;
  const Int k = h.a.rows, z_row = range.size() * TB, u_row = width * TB;
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
                           bias ? bias + i * width + p : nullptr);
    for (Int i = 0; i < h.rank2; i++) {
      Matrix<T> a = h.a2;
      a.data += i * h.a2_step;
      contract<T, NV>(a, hidden, u + i * a.rows * u_row + p * TB,
                           {1, columns, TB, 0, 0, near, u_row, L, L}, false);
    }
  }
}

} // namespace
