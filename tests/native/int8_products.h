// Products with int8 factors in three arithmetics: that of the kernels, operation by operation; exact numbers
// with a bound of what rounding may change; and the numbers of oracle.h.
#pragma once
#include "oracle.h"

namespace oracle {

// ---- contractions ------------------------------------------------------------------------------

// One term of a factor, or one of two thin matrices. Without scales it is in floating point.
struct Matrix {
  Int rows, cols;
  std::vector<double> entries, scales;
  bool is_int8() const { return !scales.empty(); }
  double operator()(Int r, Int c) const { return entries[size_t(r * cols + c)]; }
};

// A weight as the contractions of its terms: of (pre, cols, post) to (pre, rows, post), in turn.
class Contractions {
public:
  explicit Contractions(const Weight &w) {
    if (w.columns() >= 0) { // x to a number for each term, and these to y
      const Int rank = w.shape.rank, column = w.columns(), row = 1 - column;
      const Int m = w.shape.sides[size_t(column)].rows, n = w.shape.sides[size_t(row)].cols;
      terms = {{{matrix(w, row, rank, n, [](Int r, Int c) { return Place{r, 0, c}; }), 1, 1},
                {matrix(w, column, m, rank, [](Int r, Int c) { return Place{c, r, 0}; }), 1, 1}}};
      return;
    }
    for (Int k = 0; k < w.shape.rank; k++) {
      std::vector<Int> sizes;
      for (const Side &s : w.shape.sides) sizes.push_back(s.cols);
      terms.emplace_back();
      for (Int turn = 0; turn < w.call.n_factors; turn++) {
        const Int at = w.call.turns[turn];
        const Side s = w.shape.sides[size_t(at)];
        Int pre = 1, post = 1;
        for (Int i = 0; i < Int(sizes.size()); i++) (i < at ? pre : post) *= i == at ? 1 : sizes[size_t(i)];
        terms.back().push_back({matrix(w, at, s.rows, s.cols, [=](Int r, Int c) { return Place{k, r, c}; }),
                                pre, post});
        sizes[size_t(at)] = s.rows;
      }
    }
  }

  // Of one token x (n). arithmetic.times(matrix, vector) is called for each vector that a factor multiplies,
  // and arithmetic.plus(sum, number) for each term after the first.
  template <class N, class Arithmetic>
  std::vector<N> multiply(std::vector<N> x, const Arithmetic &arithmetic) const {
    std::vector<N> sum;
    for (const auto &term : terms) {
      std::vector<N> in = x;
      for (const Contraction &c : term) {
        const Int rows = c.matrix.rows, cols = c.matrix.cols;
        std::vector<N> out(size_t(c.pre * rows * c.post)), vector(static_cast<size_t>(cols));
        for (Int i = 0; i < c.pre; i++) {
          for (Int j = 0; j < c.post; j++) {
            for (Int f = 0; f < cols; f++) vector[size_t(f)] = in[size_t((i * cols + f) * c.post + j)];
            const std::vector<N> y = arithmetic.times(c.matrix, vector);
            for (Int r = 0; r < rows; r++) out[size_t((i * rows + r) * c.post + j)] = y[size_t(r)];
          }
        }
        in.swap(out);
      }
      if (sum.empty()) sum = in;
      else
        for (size_t i = 0; i < sum.size(); i++) sum[i] = arithmetic.plus(sum[i], in[i]);
    }
    return sum;
  }

private:
  struct Place {
    Int k, row, col;
  };
  struct Contraction {
    Matrix matrix;
    Int pre, post;
  };
  // Entries as stored: of int8 factors integers, and scales of each row.
  template <class PlaceOf>
  static Matrix matrix(const Weight &w, Int at, Int rows, Int cols, PlaceOf place_of) {
    Matrix all = {rows, cols, {}, {}};
    for (Int r = 0; r < rows; r++) {
      for (Int c = 0; c < cols; c++) {
        const Place p = place_of(r, c);
        all.entries.push_back(w.factors[size_t(at)].get(w.place(at, p.k, p.row, p.col)));
        if (c == 0 && w.is_int8(at)) all.scales.push_back(w.scale(at, p.k, p.row));
      }
    }
    return all;
  }

  std::vector<std::vector<Contraction>> terms;
};

// ---- the arithmetic of the kernels ---------------------------------------------------------------

const double LEAST = 0x1p-100; // vectors of smaller numbers count as zeros

// A float32 number. What a kernel finds differs by at most `slack`, which is not 0 where the order of a sum
// or a fused multiply-add changes last bits.
struct Float {
  double value = 0, slack = 0;
  // If it is a sum of products in float32: how many, the sum of their sizes, and a power of two of which all are
  // multiples.
  double terms = 0, size = 0, grain = INFINITY;
};

// Mistakes of kernels, for the self-test.
enum Int8Fault {
  NO_MISTAKE, ROW_SUMS_LOST, SATURATED, ENTRIES_OF_128_CLAMPED, ROUNDED_DOWN, HALVES_ROUNDED_AWAY, ROUNDED_ONCE,
  TAIL_NOT_ZERO, NEXT_ROWS_SCALE, OTHER_VECTORS_UNIT, NAN_TO_NEIGHBOUR, TINY_NOT_ZERO, SUMMED_IN_FLOAT, INT8_FAULTS
};

// Of each operation the float32 result, of sums of int8 products the integer.
struct InFloat {
  Int fault = NO_MISTAKE;
  mutable double unit_before = 1; // of the vector before this one

  static double narrow(double v) { return double(float(v)); } // of one operation in double: rounded once

  std::vector<Float> times(const Matrix &m, const std::vector<Float> &x) const {
    return m.is_int8() ? in_integers(m, x) : in_floats(m, x);
  }
  std::vector<Float> in_floats(const Matrix &m, const std::vector<Float> &x) const {
    std::vector<Float> y;
    for (Int r = 0; r < m.rows; r++) {
      double sum = 0, size = 0, slack = 0, grain = INFINITY;
      for (Int c = 0; c < m.cols; c++) {
        const double w = m(r, c), term = w * x[size_t(c)].value;
        sum += term, size += fabs(term), slack += fabs(w) * x[size_t(c)].slack;
        grain = std::min(grain, grain_of(term));
      }
      y.push_back(plus({0, slack}, {narrow(sum), 0, double(m.cols), size, grain}));
      y.back().terms = double(m.cols), y.back().size = size, y.back().grain = grain;
    }
    return y;
  }
  std::vector<Float> in_integers(const Matrix &m, const std::vector<Float> &x) const {
    double largest = 0;
    for (const Float &v : x) {
      if (v.slack != 0 && fault == NO_MISTAKE) fail("this case does not determine what is rounded to integers");
      largest = fabs(v.value) > largest ? fabs(v.value) : largest;
      if (isnan(v.value)) largest = NAN;
    }
    const bool finite = largest < INFINITY, used = finite && largest >= (fault == TINY_NOT_ZERO ? 0x1p-126 : LEAST);
    const double safe = used ? largest : 1, inverse = narrow(127 / safe);
    double unit = finite ? used ? narrow(safe / 127) : 0. : NAN;
    const bool wrong = fault == OTHER_VECTORS_UNIT || (fault == NAN_TO_NEIGHBOUR && isnan(unit_before));
    const double own = unit;
    if (wrong) unit = unit_before;
    unit_before = own;
    std::vector<Int> q;
    for (const Float &v : x) q.push_back(used ? rounded(v.value, inverse) : 0);
    std::vector<Float> y;
    for (Int r = 0; r < m.rows; r++) {
      const double scale = m.scales[size_t(fault == NEXT_ROWS_SCALE ? (r + 1) % m.rows : r)];
      const double size = narrow(unit * scale), sum = narrow(double(sum_of(m, r, q)));
      y.push_back({narrow(sum * size)});
    }
    return y;
  }
  // Products of floats are added to a one by one, in any order, and may be fused with it: that is exact, or each
  // addition and each product is rounded.
  static Float plus(const Float &a, const Float &b) {
    const double sum = a.value + b.value, size = fabs(a.value) + b.size;
    const bool same = b.terms == 0 || !isfinite(sum) || size <= 0x1p24 * std::min(b.grain, grain_of(a.value));
    const double slack = a.slack + b.slack + (same ? 0 : (b.terms + 1) * 0x1p-24 * size);
    return {narrow(sum), isfinite(sum) ? slack : 0};
  }

private:
  // The last place that is not 0.
  static double grain_of(double v) {
    if (v == 0 || !isfinite(v)) return v == 0 ? INFINITY : NAN;
    int exponent = 0;
    const Int digits = Int(ldexp(frexp(fabs(v), &exponent), 53));
    return ldexp(double(digits & -digits), exponent - 53);
  }
  Int rounded(double v, double inverse) const {
    const double product = v * inverse, p = fault == ROUNDED_ONCE ? product : narrow(product);
    if (fault == ROUNDED_DOWN) return Int(floor(p));
    if (fault == HALVES_ROUNDED_AWAY) return Int(round(p));
    return Int(nearbyint(p));
  }
  double sum_of(const Matrix &m, Int r, const std::vector<Int> &q) const {
    Int sum = 0, pair = 0;
    float of_floats = 0;
    for (Int c = 0; c < m.cols; c++) {
      Int w = Int(m(r, c));
      if (fault == ENTRIES_OF_128_CLAMPED) w = std::max<Int>(w, -127);
      const Int product = (q[size_t(c)] + (fault == ROW_SUMS_LOST || fault == SATURATED ? 128 : 0)) * w;
      sum += product, of_floats += float(product);
      // vpmaddubsw: sums of two products in 16 bits.
      pair = c % 2 ? pair + product : product;
      if (fault == SATURATED && c % 2) sum += std::min<Int>(std::max<Int>(pair, -32768), 32767) - pair;
      if (fault == SATURATED) sum -= 128 * w;
    }
    if (fault == TAIL_NOT_ZERO && m.cols % 4) sum += q[0] * Int(m(r, 0));
    return fault == SUMMED_IN_FLOAT ? double(of_floats) : double(sum);
  }
};

// ---- exact numbers, and a bound ------------------------------------------------------------------

// The product without any rounding. Rounding it to float32 and to integers changes it by at most `bound`:
// of each vector that an int8 factor multiplies, entries by half a unit.
struct Real8 {
  Real value = 0;
  double bound = 0;
};
struct Bounded {
  std::vector<Real8> times(const Matrix &m, const std::vector<Real8> &x) const {
    const double eps = 0x1p-23;
    double largest = 0, error = 0;
    for (const Real8 &v : x) largest = std::max(largest, fabs(double(v.value))), error = std::max(error, v.bound);
    // Besides its half, the product with the inverse is rounded: 127 of 2 eps.
    const double unit = (largest + error) / 127, rounding = unit * (0.5 + 2 * 127 * eps);
    std::vector<Real8> y;
    for (Int r = 0; r < m.rows; r++) {
      Real sum = 0;
      double bound = 0, size = 0;
      for (Int c = 0; c < m.cols; c++) {
        const Real8 &v = x[size_t(c)];
        const double w = fabs(m(r, c) * (m.is_int8() ? m.scales[size_t(r)] : 1));
        const double changed = !m.is_int8() ? 0 : largest - error < LEAST ? fabs(double(v.value)) : rounding;
        sum += Real(m(r, c)) * Real(m.is_int8() ? m.scales[size_t(r)] : 1) * v.value;
        bound += w * (v.bound + changed), size += w * (fabs(double(v.value)) + v.bound);
      }
      // In integers the unit, its product with the scale, the sum and the result are rounded.
      const double roundings = m.is_int8() ? 4 : double(m.cols + 1);
      y.push_back({sum, bound + roundings * eps * (size + bound)});
    }
    return y;
  }
  Real8 plus(const Real8 &a, const Real8 &b) const {
    const Real sum = a.value + b.value;
    return {sum, (a.bound + b.bound) * (1 + 0x1p-22) + 0x1p-23 * (fabs(double(sum)) + 2 * fabs(double(b.value)))};
  }
};

} // namespace oracle
