// Linear layers in the layout (features)[tokens]: parts that are added, and the division of a part's
// outputs among threads.
#pragma once
#include "bfloat16.h"
#include "block.h"
#include "int8.h"

namespace {

// The range of [0, count) for one of `parts` equal parts.
inline Range range_of(Int count, Int part, Int parts) {
  const Int unit = count >= 16 * parts ? 4 : 1; // rows of a tile
  const Int units = (count + unit - 1) / unit;
  return {smaller(count, part * units / parts * unit), smaller(count, (part + 1) * units / parts * unit)};
}
// The size of the largest of these ranges.
inline Int largest_range(Int count, Int parts) {
  const Int unit = count >= 16 * parts ? 4 : 1, units = (count + unit - 1) / unit;
  return smaller(count, (units + parts - 1) / parts * unit);
}

// How the outputs of a product of two factors are divided: by rows of the factor that is contracted
// first; by rows of the second, each part with its own first contraction; or by rows of the second, after
// a first contraction that all parts share.
enum Way { BY_FIRST, BY_SECOND, SHARED };

template <class T, bool NARROW = false> class Part;

// A worker's memory for weights and features that are not in the type of computation.
template <class T> struct Space {
  T *panel, *words, *units; // KRON_ACCUMULATORS rows of a weight; rounded features, and their units
  T *starts;                // a number of each row of a weight
  bool bytes, halves;       // whether to multiply bytes, and bfloat16 numbers
  explicit operator Space8() const {
    return {reinterpret_cast<int32_t *>(panel), reinterpret_cast<int32_t *>(words), units,
            reinterpret_cast<int32_t *>(starts)};
  }
};
// Its sizes: in numbers, of words and units for each token.
struct SpaceSizes {
  Int panel = 0, words = 0, units = 0, rows = 0;
  Int numbers(Int tokens) const { return panel + (words + units) * tokens + rows; }
  template <class T, bool NARROW> void include(const Part<T, NARROW> &part);
};

// One part of a linear layer, Σ_k F_k and G_k contracted in turn: of x (n1, n2)[tokens] along one axis
// each; or a dense weight G; or two thin matrices, low rank. Factors may be int8; if NARROW, 16-bit, too.
template <class T, bool NARROW> class Part {
public:
  KRON_NOINLINE explicit Part(const kron_product &p, const Storage<T> &stored = STORAGE<T>)
      : stored(stored), rank(p.rank) {
    const kron_factor &a = p.factors[0], &b = p.factors[1];
    if (p.n_factors == 1) {
      g = a, f = {};
    } else if (a.cols == 1 && b.rows == 1) {
      thin(a, b);
    } else if (a.rows == 1 && b.cols == 1) {
      thin(b, a);
    } else {
      last = p.turns[0] == 1;
      f = last ? b : a, g = last ? a : b;
      f_pre = last ? a.cols : 1, f_post = last ? 1 : b.cols;
      g_pre = last ? 1 : a.rows, g_post = last ? b.rows : 1;
    }
  }

  bool dense() const { return f.rows == 0; }
  Int inputs() const { return dense() ? g.cols : f_pre * f.cols * f_post; }
  Int outputs() const { return g_pre * g.rows * g_post; }
  // Of one term.
  Int middle() const { return f_pre * f.rows * f_post; }
  double first_work() const { return double(rank) * double(middle()) * double(f.cols) * price(f); }
  double second_work() const { return double(rank) * double(outputs()) * double(g.cols) * price(g); }
  Int longest_row() const { return larger(f.cols, g.cols); }
  // How many vectors of a token each factor multiplies.
  Int first_slices() const { return f_pre * f_post; }
  Int second_slices() const { return dense() || low_rank ? 1 : last ? f.rows : f_pre * f.rows; }

  // The way that repeats little work and leaves enough rows for each part.
  KRON_NOINLINE Way way(Int parts) const {
    if (dense()) return BY_SECOND;
    if (!low_rank && (parts == 1 || f.rows >= larger(g.rows, 4 * parts))) return BY_FIRST;
    const double repeated = double(parts - 1) * first_work();
    return repeated > 0.1 * (first_work() + second_work()) ? SHARED : BY_SECOND;
  }
  // The same without a stage that all parts share, where that is possible.
  Way way_alone(Int parts) const {
    const Way best = way(parts);
    return best == SHARED && !low_rank && f.rows >= 4 * parts ? BY_FIRST : best;
  }
  Int rows(Way way) const { return way == BY_FIRST ? f.rows : g.rows; }
  // Along which a shared first contraction is divided.
  Int first_rows() const { return low_rank ? f.rows : last ? f_pre : f_post; }

  // The outputs of one part.
  KRON_NOINLINE Runs runs(Way way, Range r) const {
    if (r.size() == rows(way)) return {1, 0, 0, outputs()};
    if (way == BY_FIRST && last) return {g.rows, f.rows, r.first, r.size()};
    if (way == BY_FIRST) return {1, 0, r.first * g.rows, r.size() * g.rows};
    if (g_pre > 1) return {g_pre, g.rows, r.first, r.size()};
    return {1, 0, r.first * g_post, r.size() * g_post};
  }

  // A shared first contraction: in to middle (rank, middle())[tokens], for a range of first_rows().
  template <int NV> KRON_NOINLINE void first(const T *in, T *middle_all, Range r, const Space<T> &space) const {
    constexpr int L = LANES<T>, TB = NV * L;
    const Int step = f_post * TB, in_pre = f.cols * step, out_pre = f.rows * step;
    for (Int k = 0; k < rank; k++) {
      T *to = middle_all + k * middle() * TB;
      if (low_rank)
        contract_weight<NV>(weight(f, k).some_rows(r.first, r.size()), in, to + r.first * TB,
                            {1, 1, TB, 0, 0, TB, TB, L, L}, false, space);
      else if (last)
        contract_weight<NV>(weight(f, k), in + r.first * in_pre, to + r.first * out_pre,
                            {r.size(), 1, TB, in_pre, out_pre, step, step, L, L}, false, space);
      else
        contract_weight<NV>(weight(f, k), in + r.first * TB, to + r.first * TB,
                            {1, r.size(), TB, 0, 0, step, step, L, L}, false, space);
    }
  }

  // The first contraction for a range of its rows, of a factor along the last axis: in to
  // out (rank, f_pre, range)[tokens].
  template <int NV> KRON_NOINLINE void some_first(const T *in, T *out, Range r, const Space<T> &space) const {
    constexpr int L = LANES<T>, TB = NV * L;
    const Int in_pre = f.cols * TB, out_pre = r.size() * TB;
    for (Int k = 0; k < rank; k++)
      contract_weight<NV>(weight(f, k).some_rows(r.first, r.size()), in, out + k * f_pre * out_pre,
                          {f_pre, 1, TB, in_pre, out_pre, TB, TB, L, L}, false, space);
  }

  // The outputs of a range of rows(way), whose features are `row` apart, from `in`, or for SHARED from
  // `middle`, to which other ways write a term's share of the first contraction.
  template <int NV>
  KRON_NOINLINE void apply(Way way, const T *in, T *middle_all, T *out, Int row, Range r, bool accumulate,
                           const Space<T> &space) const {
    constexpr int L = LANES<T>, TB = NV * L;
    const Int f_step = f_post * TB, f_rows = way == BY_FIRST ? r.size() : f.rows;
    const Grid one = {f_pre, f_post, TB, f.cols * f_step, f_rows * f_step, f_step, f_step, L, L};
    // The second contraction's entries along its other axis, in and out; by first rows a range of them.
    const bool by_first = way == BY_FIRST;
    const Int entries = by_first ? r.size() : larger(g_pre, g_post);
    const Grid two = last ? Grid{entries, 1, TB, TB, row, entries * TB, g_post * row, L, L}
                          : Grid{entries, 1, TB, g.cols * TB, g.rows * row, TB, row, L, L};
    const Int g_first = by_first ? 0 : r.first, g_rows = by_first ? g.rows : r.size();
    T *const to = out + row * (!by_first ? r.first * (last ? g_post : 1) : last ? r.first : r.first * g.rows);
    for (Int k = 0; k < rank; k++, accumulate = true) {
      const T *from = in;
      if (way == SHARED) {
        from = middle_all + k * middle() * TB;
      } else if (!dense()) {
        contract_weight<NV>(weight(f, k).some_rows(by_first ? r.first : 0, f_rows), in, middle_all, one,
                            false, space);
        from = middle_all;
      }
      contract_weight<NV>(weight(g, k).some_rows(g_first, g_rows), from, to, two, accumulate, space);
    }
  }

private:
  // What a multiply-add costs. In int8 it takes a half to a quarter of the time, besides the rounding.
  static double price(const kron_factor &f) { return f.scale ? 0.4 : 1; }

  void thin(const kron_factor &column, const kron_factor &row) {
    low_rank = true;
    f = {row.data, rank, row.cols, 0, row.rank_stride, row.col_stride, row.scale, 0};
    g = {column.data, column.rows, rank, 0, column.row_stride, column.rank_stride, column.scale, 0};
    f_scale_step = row.scale_rank_stride;
    rank = 1;
  }

  // Some rows of a term of a factor, and the scales of int8 ones.
  struct Weight {
    const void *data;
    Int rows, cols, row_stride, col_stride;
    const float *scale;
    Int scale_step;
    Int size; // bytes of an entry
    const void *at(Int index) const { return static_cast<const char *>(data) + index * size; }
    Weight some_rows(Int first, Int count) const {
      return {at(first * row_stride), count, cols, row_stride, col_stride,
              scale ? scale + first * scale_step : nullptr, scale_step, size};
    }
    template <class S> Matrix<S> matrix() const {
      return {static_cast<const S *>(data), rows, cols, row_stride, col_stride};
    }
    Matrix8 matrix8() const {
      return {static_cast<const int8_t *>(data), rows, cols, row_stride, col_stride, scale, scale_step};
    }
  };
  Weight weight(const kron_factor &x, Int k) const {
    const Int size = x.scale ? 1 : NARROW ? stored.size : Int(sizeof(T));
    return {static_cast<const char *>(x.data) + k * x.rank_stride * size, x.rows, x.cols, x.row_stride, x.col_stride,
            x.scale ? x.scale + k * x.scale_rank_stride : nullptr, &x == &f ? f_scale_step : 1, size};
  }
  // Of a small factor, rounding x to bfloat16 would take longer than the product.
  static bool worth_halves(Int rows, Int cols) { return smaller(rows, cols) >= 16; }
  // Weights in 16 bits are widened a few rows at a time, to the panel.
  template <int NV>
  KRON_NOINLINE void contract_weight(const Weight &w, const T *in, T *out, const Grid &grid, bool accumulate,
                                     const Space<T> &space) const {
    if constexpr (sizeof(T) == 4) {
      if (w.scale && space.bytes && KRON_BYTE_PRODUCTS)
        return contract8<Quads>(w.matrix8(), NV, in, out, grid, accumulate, Space8(space));
      if (w.scale) return contract8<Pairs>(w.matrix8(), NV, in, out, grid, accumulate, Space8(space));
    }
    if constexpr (NARROW) {
      if constexpr (KRON_BFLOAT16_PRODUCTS) {
        if (space.halves && stored.is_bfloat16 && worth_halves(w.rows, w.cols)) {
          const Space8 room(space);
          return contract_halves(w.template matrix<bfloat16>(), NV, in, out, grid, accumulate, room.panel, room.words);
        }
      }
      if (stored.narrow) {
        for (Int first = 0; first < w.rows; first += KRON_ACCUMULATORS) {
          const Int rows = smaller(KRON_ACCUMULATORS, w.rows - first);
          for (Int r = 0; r < rows; r++)
            stored.widen(w.at((first + r) * w.row_stride), w.cols, w.col_stride, space.panel + r * w.cols);
          contract<T, NV>({space.panel, rows, w.cols, w.cols, 1}, in, out + first * grid.out_step, grid, accumulate);
        }
        return;
      }
    }
    contract<T, NV>(w.template matrix<T>(), in, out, grid, accumulate);
  }

public:
  const Storage<T> &stored;
  Int rank;
  kron_factor f, g; // contracted first and second
  Int f_pre = 1, f_post = 1, g_pre = 1, g_post = 1;
  bool last = false; // f is contracted along the last axis
  bool low_rank = false;

private:
  Int f_scale_step = 1;
};

template <class T, bool NARROW> KRON_NOINLINE void SpaceSizes::include(const Part<T, NARROW> &part) {
  const bool narrow = NARROW && part.stored.narrow, is_bfloat16 = NARROW && part.stored.is_bfloat16;
  if (narrow || part.f.scale || part.g.scale) panel = larger(panel, KRON_ACCUMULATORS * (part.longest_row() + 1));
  const auto rounds = [&](const kron_factor &x, Int slices) {
    if (!x.scale && !is_bfloat16) return;
    words = larger(words, slices * ((x.cols + 1) / 2)), units = larger(units, slices);
    rows = larger(rows, x.rows);
  };
  rounds(part.f, part.first_slices()), rounds(part.g, part.second_slices());
}

} // namespace
