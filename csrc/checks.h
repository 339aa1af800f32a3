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

constexpr const char *NO_GRADIENT = "int8 factors have no gradient";
// So many products of two bytes fit into a sum of 32 bits.
constexpr int64_t MOST_COLUMNS_OF_INT8 = 65536;

inline bool has_int8(const kron_product &p) {
  for (int64_t i = 0; i < p.n_factors; i++)
    if (p.factors[i].scale) return true;
  return false;
}
// Checks int8 factors of a product whose shape was checked.
inline const char *check_int8(const kron_product &p, int64_t dtype) {
  if (!has_int8(p)) return nullptr;
  if (dtype == KRON_FLOAT64) return "int8 factors are not for float64";
  if (p.n_factors > 2) return "there are int8 factors for up to two";
  const kron_factor &a = p.factors[0], &b = p.factors[1];
  const bool a_column = p.n_factors == 2 && a.cols == 1 && b.rows == 1;
  const bool b_column = p.n_factors == 2 && !a_column && a.rows == 1 && b.cols == 1;
  for (int64_t i = 0; i < p.n_factors; i++) {
    const kron_factor &f = p.factors[i];
    if (!f.scale) continue;
    if (f.cols > MOST_COLUMNS_OF_INT8) return "an int8 factor has more than 65536 columns";
    if (!(i ? b_column : a_column)) continue;
    if (p.rank > MOST_COLUMNS_OF_INT8) return "an int8 factor has more than 65536 terms";
    if (p.rank > 1 && f.scale_rank_stride) return "int8 columns must share their scales";
  }
  return nullptr;
}

inline const char *check_tokens(const kron_product &p, int64_t tokens) {
  if (tokens < 0) return "the number of tokens must not be negative";
  const double m = double(rows_of(p)), n = double(columns_of(p));
  if (double(tokens) * (m > n ? m : n) > MOST_NUMBERS)
    return "there are more tokens than memory can hold";
  return nullptr;
}
// Checks the number of tokens and, for null, the pointers; `y` says whether the product writes p.y.
inline const char *check_operands(const kron_product &p, int64_t tokens, const void *x, bool y) {
  if (const char *error = check_tokens(p, tokens)) return error;
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
inline const char *check_product_shape(const kron_product *p, int64_t tokens) {
  if (const char *error = check_shape(p)) return error;
  return check_tokens(*p, tokens);
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

// Checks products of the same x, with check(product) for each.
template <class Check>
const char *check_each(int64_t n_products, const kron_product *products, Check check) {
  if (n_products < 1 || n_products > KRON_MAX_PRODUCTS) return "there must be 1 to 4 products";
  if (!products) return "a product is null";
  for (const kron_product *p = products; p < products + n_products; p++) {
    if (const char *error = check(p)) return error;
    if (columns_of(*p) != columns_of(*products)) return "products must share the columns of x";
  }
  return nullptr;
}
inline const char *check_products(int64_t n_products, const kron_product *products, int64_t tokens,
                                  const void *x) {
  return check_each(n_products, products,
                    [=](const kron_product *p) { return check_product(p, tokens, x, true); });
}

// ---- encoders ----------------------------------------------------------------------------------

// One part of a linear layer, or a table, of one or two factors.
inline const char *check_part(const kron_product &p, int64_t dtype) {
  if (const char *error = check_shape(&p)) return error;
  if (p.n_factors > 2) return "a layer's part must have one or two factors";
  if (const char *error = check_int8(p, dtype)) return error;
  for (int64_t i = 0; i < p.n_factors; i++)
    if (!p.factors[i].data) return "a factor is null";
  return nullptr;
}
// A linear layer from `columns` to `rows` features; 0 stands for any, and becomes the layer's number.
inline const char *check_linear(const kron_linear &l, int64_t dtype, int64_t &rows, int64_t &columns) {
  if (l.n_parts < 1 || l.n_parts > MOST_NUMBERS) return "a linear layer has no part";
  if (!l.parts) return "a linear layer's parts are null";
  for (const kron_product *p = l.parts; p < l.parts + l.n_parts; p++) {
    if (const char *error = check_part(*p, dtype)) return error;
    if (!rows) rows = rows_of(*p);
    if (!columns) columns = columns_of(*p);
    if (rows != rows_of(*p) || columns != columns_of(*p)) return "a linear layer's size does not fit";
  }
  return nullptr;
}

inline const char *check_encoder(const kron_encoder *encoder, int64_t dtype) {
  if (!encoder) return "the encoder is null";
  const kron_encoder &e = *encoder;
  if (e.n_tables < 1 || e.n_tables > KRON_MAX_TABLES) return "there must be 1 to 3 tables";
  if (e.n_layers < 1 || e.n_layers > MOST_NUMBERS || !e.layers) return "there must be layers";
  if (e.heads < 1) return "there must be heads";
  int64_t width = 0, table_width = 0, attention = 0;
  for (int64_t t = 0; t < e.n_tables; t++) {
    if (const char *error = check_part(e.tables[t], dtype)) return error;
    if (table_width && table_width != columns_of(e.tables[t])) return "the tables' widths differ";
    table_width = columns_of(e.tables[t]);
  }
  if (e.projection.n_parts) {
    if (const char *error = check_linear(e.projection, dtype, width, table_width)) return error;
  } else {
    width = table_width;
  }
  for (const kron_layer *l = e.layers; l < e.layers + e.n_layers; l++) {
    int64_t hidden = 0;
    if (const char *error = check_linear(l->query, dtype, attention, width)) return error;
    if (const char *error = check_linear(l->key, dtype, attention, width)) return error;
    if (const char *error = check_linear(l->value, dtype, attention, width)) return error;
    if (const char *error = check_linear(l->output, dtype, width, attention)) return error;
    if (const char *error = check_linear(l->up, dtype, hidden, width)) return error;
    if (const char *error = check_linear(l->down, dtype, width, hidden)) return error;
    if (l->activation < KRON_NONE || l->activation > KRON_SILU) return "there is no such activation";
  }
  return attention % e.heads ? "the heads must divide the rows of query, key and value" : nullptr;
}

inline const char *check_batch(const kron_encoder &e, const kron_batch *batch) {
  if (!batch) return "the batch is null";
  const kron_batch &b = *batch;
  if (b.sequences < 0 || b.length < 0) return "a batch's sizes must not be negative";
  if (double(b.sequences) * double(b.length) * double(columns_of(e.layers[0].query.parts[0])) > MOST_NUMBERS)
    return "there are more tokens than memory can hold";
  const bool any = b.sequences > 0 && b.length > 0;
  if (any && (!b.states || !b.states[e.n_layers])) return "the last state is null";
  for (int64_t t = b.embeddings ? 1 : 0; t < e.n_tables; t++)
    if (any && !b.ids[t]) return "the ids of a table are null";
  return nullptr;
}
// Of the positions that are computed: tokens, and a sequence's first one.
inline const char *check_ids(const kron_encoder &e, const kron_batch &b) {
  for (int64_t t = b.embeddings ? 1 : 0; t < e.n_tables; t++) {
    const int64_t rows = rows_of(e.tables[t]);
    for (int64_t i = 0; i < b.sequences * b.length; i++)
      if ((!b.mask || b.mask[i] || i % b.length == 0) && (b.ids[t][i] < 0 || b.ids[t][i] >= rows))
        return "an id is not a row of its table";
  }
  return nullptr;
}

} // namespace kron_checks
