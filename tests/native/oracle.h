// What the checks of the kernels share: numbers in memory, a reference with bounds of the error, random
// weights, threads and counts of cases.
#pragma once
#include "kron.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace oracle {

typedef int64_t Int;
typedef long double Real;

inline std::string doing; // the current call, for the message of a failure
[[noreturn]] inline void fail(const std::string &what) {
  printf("FAILED: %s\n  %s\n", what.c_str(), doing.c_str());
  exit(1);
}

struct Random {
  std::mt19937_64 bits;
  Int below(Int n) { return Int(bits() % uint64_t(n)); }
  double number() { return double(int64_t(bits())) * 0x1p-63; } // -1 to 1
};

// ---- numbers in memory -------------------------------------------------------------------------

struct Dtype {
  Int id;
  const char *name;
  int bytes, digits, least; // bits of the significand, exponent of the smallest normal number
};
const Dtype DTYPES[] = {{KRON_FLOAT32, "float32", 4, 24, -126},
                        {KRON_FLOAT64, "float64", 8, 53, -1022},
                        {KRON_BFLOAT16, "bfloat16", 2, 8, -126},
                        {KRON_FLOAT16, "float16", 2, 11, -14}};
// Of factors with scales; no call is in it.
const Dtype INT8 = {-1, "int8", 1, 8, 0};
inline const Dtype &computed(const Dtype &d) { return d.bytes == 2 ? DTYPES[0] : d; }
inline double epsilon(const Dtype &d) { return ldexp(1, 1 - computed(d).digits); }

inline double decode(const Dtype &d, uint16_t bits) {
  const int fraction_bits = d.digits - 1, top = (1 << (16 - d.digits)) - 1;
  const int exponent = bits >> fraction_bits & top, fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  const int significand = exponent ? fraction + (1 << fraction_bits) : fraction;
  return sign * ldexp(significand, std::max(exponent, 1) - 1 + d.least - fraction_bits);
}
inline uint16_t encode(const Dtype &d, double v) {
  const int sign = signbit(v) ? 0x8000 : 0, fraction_bits = d.digits - 1;
  const int infinity = 0x7fff >> fraction_bits << fraction_bits;
  if (!isfinite(v)) return uint16_t(sign | (isnan(v) ? 0x7fff : infinity));
  // In units in the last place, to nearest even; a carry into the exponent is as it should be.
  const int exponent = v == 0 ? d.least : std::max(d.least, ilogb(v));
  const int units = int(lrint(ldexp(fabs(v), fraction_bits - exponent)));
  return uint16_t(sign | std::min(infinity, (exponent - d.least) * (1 << fraction_bits) + units));
}

// Numbers in memory of exactly their size, aligned to one of them and no better, initially NaN. Without
// ASan more NaNs lie behind them: intact() then finds a write past the end.
class Buffer {
public:
  Buffer(const Dtype &d, Int count)
      : dtype(&d), size(count), memory(static_cast<char *>(malloc(total())), free) {
    reset();
  }
  void reset() { memset(memory.get(), 0xff, total()); }
  char *data() const { return memory.get() + dtype->bytes; }
  std::string bytes(Int first, Int end) const {
    return std::string(data() + first * dtype->bytes, data() + end * dtype->bytes);
  }
  bool intact() const {
    const std::string all(memory.get(), total());
    return all.substr(0, dtype->bytes) == std::string(dtype->bytes, '\xff') &&
           all.substr(total() - BEHIND) == std::string(BEHIND, '\xff');
  }
  double get(Int i) const {
    if (dtype->bytes == 1) return reinterpret_cast<int8_t *>(data())[i];
    if (dtype->bytes == 2) return decode(*dtype, reinterpret_cast<uint16_t *>(data())[i]);
    if (dtype->bytes == 4) return reinterpret_cast<float *>(data())[i];
    return reinterpret_cast<double *>(data())[i];
  }
  void set(Int i, double v) {
    if (dtype->bytes == 1) reinterpret_cast<int8_t *>(data())[i] = int8_t(v);
    else if (dtype->bytes == 2) reinterpret_cast<uint16_t *>(data())[i] = encode(*dtype, v);
    else if (dtype->bytes == 4) reinterpret_cast<float *>(data())[i] = float(v);
    else reinterpret_cast<double *>(data())[i] = v;
  }
  void draw(Random &r, double scale) {
    for (Int i = 0; i < size; i++) set(i, scale * r.number());
  }

  const Dtype *dtype;
  Int size;

private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t BEHIND = 0;
#else
  static constexpr size_t BEHIND = 128;
#endif
  size_t total() const { return size_t((size + 1) * dtype->bytes) + BEHIND; }
  std::unique_ptr<char, void (*)(void *)> memory;
};

// ---- the reference, and how far from it a kernel may be ----------------------------------------

// Partial sums of n terms are about as large as the sum, or sqrt(Σ terms²) if that is more. Rounding
// them leaves an error of about eps * sqrt(n) times that. A number carries the square of this error, in
// units of eps², and its own square: during a summation, the sum of its terms' squares.
struct Number {
  Real value = 0;
  double error = 0, square = 0;
  Number() = default;
  Number(Real v, double e = 0) : value(v), error(e), square(double(v * v)) {}
  void add(const Number &p, const Number &q) {
    value += p.value * q.value;
    error += p.error * q.square + q.error * p.square;
    square += p.square * q.square;
  }
  Number rounded(double terms) const {
    return Number(value, error + terms * (square + double(value * value)));
  }
};
typedef std::vector<Number> Numbers;
inline Numbers exact(const Buffer &b) {
  Numbers all;
  for (Int i = 0; i < b.size; i++) all.push_back(Number(b.get(i)));
  return all;
}

// The largest error in units of its bound, beyond the rounding to the dtype of `found`; more than 1 is
// wrong. `d` is the dtype of the operands.
const double MARGIN = LDBL_MANT_DIG > DBL_MANT_DIG ? 2 : 8; // where the reference is no better
inline double worst_error(const Dtype &d, const Buffer &found, const Numbers &expected) {
  const double half = ldexp(1, -found.dtype->digits), tiny = half * ldexp(1, found.dtype->least);
  const double unit = MARGIN * epsilon(d);
  double worst = found.intact() ? 0 : INFINITY;
  for (Int i = 0; i < found.size; i++) {
    const double error = fabs(double(found.get(i) - expected[i].value));
    const double within = unit * sqrt(expected[i].error);
    const double rounding = half * (fabs(double(expected[i].value)) + within) + tiny;
    if (isnan(error)) return INFINITY;
    if (error > rounding) worst = std::max(worst, (error - rounding) / within);
  }
  return worst;
}

// The value and the slope at x. Vectorised ones are within 2 eps |x| and 4 eps. Slopes are at most 1.13
// and change by at most 1 for each unit, except relu's, which may be either one next to 0.
const char *const ACTIVATIONS[] = {"no activation", "gelu", "gelu_tanh", "relu", "silu"};
inline std::pair<Number, Number> activate(const Dtype &d, Int kind, const Number &x) {
  const double v = double(x.value), c = sqrt(2 / M_PI), k = 0.044715, unit = MARGIN * epsilon(d);
  double g, dg; // the value is v g
  switch (kind) {
  case KRON_NONE: return {x, 1};
  case KRON_RELU:
    return {Number(std::max(v, 0.), x.error),
            Number(v > 0, fabs(v) <= unit * sqrt(x.error) ? 1 / (unit * unit) : 0)};
  case KRON_GELU: g = erfc(-v / sqrt(2)) / 2, dg = exp(-v * v / 2) / sqrt(2 * M_PI); break;
  case KRON_SILU: g = 1 / (1 + exp(-v)), dg = g * (1 - g); break;
  default:
    g = (1 + tanh(c * (v + k * v * v * v))) / 2;
    dg = 2 * g * (1 - g) * c * (1 + 3 * k * v * v);
  }
  return {Number(v * g, 1.28 * x.error + 4 * v * v), Number(g + v * dg, x.error + 16)};
}

struct Side {
  Int rows, cols;
};
struct Shape {
  Int rank;
  std::vector<Side> sides;
  Int product(Int Side::*side) const {
    Int n = 1;
    for (const Side &s : sides) n *= s.*side;
    return n;
  }
};

// Σ_k F_1k ⊗ F_2k ⊗ … and its factors, in a random layout each.
const char *const LAYOUTS[] = {"", " padded", " transposed", " with gaps", " upside down, shared"};
struct Weight {
  // Entries of the first factor are up to `size`, of others up to 1.
  Weight(const Dtype &d, const Shape &s, Random &r, double size = 1)
      : dtype(d), shape(s), m(s.product(&Side::rows)), n(s.product(&Side::cols)) {
    call.rank = s.rank, call.n_factors = Int(s.sides.size());
    text = ", rank " + std::to_string(s.rank);
    for (Int i = 0; i < call.n_factors; i++)
      draw_factor(i, r.below(2) ? 0 : r.below(5), r, i ? 1 : size);
    set_order(0);
  }
  void draw_factor(Int at, Int layout, Random &r, double size = 1) {
    const Side s = shape.sides[at];
    kron_factor &f = call.factors[at] = {nullptr, s.rows, s.cols, s.rows * s.cols, s.cols, 1, nullptr, 0};
    if (layout == 1) f.row_stride = s.cols + 3, f.rank_stride = s.rows * f.row_stride + 5;
    if (layout == 2) f.row_stride = 1, f.col_stride = s.rows;
    if (layout == 3) f.col_stride = 2, f.row_stride = 2 * s.cols + 1, f.rank_stride *= 3;
    if (layout == 4) f.row_stride = -s.cols, f.rank_stride = 0;
    first[at] = layout == 4 ? (s.rows - 1) * s.cols : 0;
    factors.emplace_back(dtype, 1 + (shape.rank - 1) * f.rank_stride +
                                    (s.rows - 1) * std::abs(f.row_stride) +
                                    (s.cols - 1) * f.col_stride);
    f.data = factors[at].data() + first[at] * dtype.bytes;
    for (Int k = 0; k < shape.rank; k++)
      for (Int i = 0; i < s.rows; i++)
        for (Int j = 0; j < s.cols; j++) factors[at].set(place(at, k, i, j), size * r.number());
    text += ", " + std::to_string(s.rows) + "x" + std::to_string(s.cols) + LAYOUTS[layout];
  }
  // Of two factors of rank r that are two thin matrices (m, r) and (r, n), the one with columns, else -1.
  Int columns() const {
    if (call.n_factors != 2) return -1;
    const Side a = shape.sides[0], b = shape.sides[1];
    return a.cols == 1 && b.rows == 1 ? 0 : a.rows == 1 && b.cols == 1 ? 1 : -1;
  }
  // Makes a factor int8, in the layout that it has: value() gives its numbers, scale() those of its rows.
  // Columns share their scales, others may.
  template <class Value, class Scale> void make_int8(Int at, Random &r, Value value, Scale scale) {
    kron_factor &f = call.factors[at];
    factors[at] = Buffer(INT8, factors[at].size);
    for (Int i = 0; i < factors[at].size; i++) factors[at].set(i, double(value()));
    f.data = factors[at].data() + first[at];
    f.scale_rank_stride = at == columns() || !r.below(3) ? 0 : f.rows + r.below(2);
    scales[at] = std::make_unique<Buffer>(DTYPES[0], (shape.rank - 1) * f.scale_rank_stride + f.rows);
    for (Int i = 0; i < scales[at]->size; i++) scales[at]->set(i, scale());
    f.scale = reinterpret_cast<const float *>(scales[at]->data());
    text += std::string(", int8 ") + (at ? "second" : "first") + (f.scale_rank_stride ? "" : " of shared scales");
  }
  // With values from -128 to 127, for entries of about `size`.
  void make_int8(Int at, Random &r, double size) {
    make_int8(at, r, [&] { return r.below(256) - 128; }, [&] { return size / 127 * (1 + 0.5 * r.number()); });
  }
  bool is_int8(Int at) const { return call.factors[at].scale; }
  bool any_int8() const { return is_int8(0) || (call.n_factors > 1 && is_int8(1)); }
  double scale(Int at, Int k, Int i) const {
    return is_int8(at) ? scales[at]->get(k * call.factors[at].scale_rank_stride + i) : 1;
  }

  Int place(Int at, Int k, Int i, Int j) const {
    const kron_factor &f = call.factors[at];
    return first[at] + k * f.rank_stride + i * f.row_stride + j * f.col_stride;
  }
  double factor(Int at, Int k, Int i, Int j) const {
    return scale(at, k, i) * factors[at].get(place(at, k, i, j));
  }

  void set_order(Int index) {
    turns = ", turns";
    for (Int i = 0; i < call.n_factors; i++) call.turns[i] = i;
    while (index--) std::next_permutation(call.turns, call.turns + call.n_factors);
    for (Int i = 0; i < call.n_factors; i++) turns += " " + std::to_string(call.turns[i]);
  }

  // The matrix (m, n), entry by entry.
  Numbers whole() const {
    Numbers all(m * n);
    for (Int o = 0; o < m; o++) {
      for (Int i = 0; i < n; i++) {
        for (Int k = 0; k < shape.rank; k++) {
          Real w = 1;
          Int rows = m, cols = n;
          for (Int f = 0; f < call.n_factors; f++) {
            const Side s = shape.sides[f];
            rows /= s.rows, cols /= s.cols;
            w *= factor(f, k, o / rows % s.rows, i / cols % s.cols);
          }
          all[o * n + i].add(w, 1);
        }
      }
    }
    return all;
  }

  const Dtype &dtype;
  Shape shape;
  const Int m, n;
  std::vector<Buffer> factors;
  std::unique_ptr<Buffer> scales[KRON_MAX_FACTORS]; // float32
  Int first[KRON_MAX_FACTORS];
  kron_product call = {};
  std::string text, turns;
};

// ---- calls and counts ---------------------------------------------------------------------------

// A thread for each range of one or two parts; the last ones start first.
inline Int most_ranges = 0;
inline int32_t parallel_for(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
  std::vector<std::thread> threads;
  for (Int last = end, start; last > begin; last = start) {
    start = std::max(begin, last - 1 - Int(threads.size() % 2));
    threads.emplace_back([=] { fn(start, last, context); });
  }
  for (std::thread &t : threads) t.join();
  most_ranges = std::max(most_ranges, Int(threads.size()));
  return 0;
}

// The options of both programs; `first` is one that only one of them has.
struct Options {
  Int seed = 1, draws, every = 1;
  double work;
  std::string first;
  Options(int count, char **arguments, Int draws, double work) : draws(draws), work(work) {
    for (int i = 1; i < count; i++) {
      const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "0";
      if (name == "--seed") seed = std::stoll(value), i++;
      else if (name == "--draws") this->draws = std::stoll(value), i++;
      else if (name == "--every") every = std::stoll(value), i++;
      else if (name == "--work") this->work = std::stod(value), i++;
      else first = name;
    }
  }
};
inline int no_such(const std::string &option) { return printf("no such option: %s\n", option.c_str()), 2; }

// Every n-th of some cases.
template <class Case> std::vector<Case> each(Int n, const std::vector<Case> &cases) {
  std::vector<Case> some;
  for (size_t i = 0; i < cases.size(); i += size_t(n)) some.push_back(cases[i]);
  return some;
}

const char *const ISAS[] = {"portable", "avx2", "avx512"};

struct Group {
  std::string name;
  Int cases = 0;
  double worst = 0;
  void note(double error) {
    cases++, worst = std::max(worst, error);
    if (!(error <= 1)) fail("an error of " + std::to_string(error) + " times its bound");
  }
  void require(bool holds, const char *otherwise) {
    cases++;
    if (!holds) fail(otherwise);
  }
  void print() const {
    printf("%-28s%9lld cases", name.c_str(), (long long)cases);
    if (worst > 0) printf(", worst error %.2f of its bound", worst);
    printf("\n"), fflush(stdout);
  }
};

} // namespace oracle
