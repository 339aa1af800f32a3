// Checks of a call's arguments, for all devices. No data pointer is dereferenced.
#pragma once
#include "kron.h"

namespace kron_checks {

// More numbers than fit into any memory; 64 bits can still count the partial sums of 65,536 threads.
constexpr double MOST_NUMBERS = double(int64_t(1) << 44);
// Multiply-adds of one factor and token; 64 bits can count those of 8 factors.
constexpr double MOST_WORK = double(int64_t(1) << 59);

inline int64_t rows_of(const kron_product &p) {
  int64_t m = 1;
  for (int64_t i = 0; i < p.n_factors; i++) m *= p.factors[i].rows;
  return m;
}
inline int64_t columns_of(const kron_product &p) {
  int64_t n = 1;
  for (int64_t i = 0; i < p.n_factors; i++) n *= p.factors[i].cols;
  return n;
}

// Checks rank, sides, strides, turns and the activation. Sizes are doubles, which do not overflow.
inline const char *check_shape(const kron_product *product) {
  if (!product) return "a product is null";
  const kron_product &p = *product;
  if (p.rank < 1) return "the rank must be at least 1";
  if (p.n_factors < 1 || p.n_factors > KRON_MAX_FACTORS) return "there must be 1 to 8 factors";
  if (p.activation < KRON_NONE || p.activation > KRON_SILU) return "there is no such activation";
  double width = 1, longest = 1; // the width of x, the longest side
  int64_t seen = 0, by_turn[KRON_MAX_FACTORS] = {};
  for (int64_t i = 0; i < p.n_factors; i++) {
    const kron_factor &f = p.factors[i];
    if (f.rows < 1 || f.cols < 1) return "a factor has an empty side";
    if (p.turns[i] < 0 || p.turns[i] >= p.n_factors) return "a turn is out of range";
    seen |= int64_t(1) << p.turns[i];
    by_turn[i] = p.turns[i];
    const double side = double(f.rows > f.cols ? f.rows : f.cols);
    width *= double(f.cols);
    longest = side > longest ? side : longest;
    double extent = 0;
    const int64_t sizes[] = {p.rank, f.rows, f.cols};
    const int64_t strides[] = {f.rank_stride, f.row_stride, f.col_stride};
    for (int axis = 0; axis < 3; axis++)
      extent += double(sizes[axis] - 1) * (strides[axis] < 0 ? -1. : 1.) * double(strides[axis]);
    if (extent > MOST_NUMBERS || double(p.rank) * double(f.rows) * double(f.cols) > MOST_NUMBERS)
      return "a factor is larger than memory can be";
  }
  if (seen != (int64_t(1) << p.n_factors) - 1) return "a factor has no turn";
  double widest = width;
  for (int64_t turn = 0; turn < p.n_factors; turn++) {
    const kron_factor &f = p.factors[by_turn[turn]];
    width = width / double(f.cols) * double(f.rows);
    widest = width > widest ? width : widest;
  }
  widest *= double(p.rank);
  if (widest > MOST_NUMBERS || widest * longest > MOST_WORK)
    return "a product is larger than memory can be";
  return nullptr;
}

// Checks the number of tokens and, for null, the pointers; `y` says whether the product writes p.y.
inline const char *check_operands(const kron_product &p, int64_t tokens, const void *x, bool y) {
  if (tokens < 0) return "the number of tokens must not be negative";
  const double m = double(rows_of(p)), n = double(columns_of(p));
  if (double(tokens) * (m > n ? m : n) > MOST_NUMBERS)
    return "there are more tokens than memory can hold";
  for (int64_t i = 0; i < p.n_factors; i++)
    if (!p.factors[i].data) return "a factor is null";
  if (tokens && !x) return "x or dy is null";
  if (tokens && y && !p.y) return "y is null";
  return nullptr;
}

inline const char *check_product(const kron_product *p, int64_t tokens, const void *x, bool y) {
  if (const char *error = check_shape(p)) return error;
  return check_operands(*p, tokens, x, y);
}

// Checks two products, of which down takes the result of up.
inline const char *check_shapes(const kron_product *up, const kron_product *down) {
  if (const char *error = check_shape(up)) return error;
  if (const char *error = check_shape(down)) return error;
  return rows_of(*up) == columns_of(*down) ? nullptr : "down must have as many columns as up has rows";
}
inline const char *check_feed_forward(const kron_product *up, const kron_product *down,
                                      int64_t tokens, const void *x, bool y) {
  if (const char *error = check_shapes(up, down)) return error;
  if (const char *error = check_operands(*up, tokens, x, false)) return error;
  return check_operands(*down, tokens, x, y);
}

// Checks products of the same x.
inline const char *check_products(int64_t n_products, const kron_product *products, int64_t tokens,
                                  const void *x) {
  if (n_products < 1 || n_products > KRON_MAX_PRODUCTS) return "there must be 1 to 4 products";
  if (!products) return "a product is null";
  for (const kron_product *p = products; p < products + n_products; p++) {
    if (const char *error = check_product(p, tokens, x, true)) return error;
    if (columns_of(*p) != columns_of(*products)) return "products must share the columns of x";
  }
  return nullptr;
}

} // namespace kron_checks
