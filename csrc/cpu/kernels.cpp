// The kernels, compiled once per instruction set, which KRON_ISA names.
//
// A SIMD lane is a token. A block of tokens is transposed on its way in and back on its way out; in
// between an entry of a factor is a scalar, broadcast against vectors of tokens. So any shape fills
// every lane, whatever its sides; factors are read where they lie, in any layout; and there is no
// packed copy of a weight to keep, or to keep valid.
//
// No standard containers or algorithms: their functions are shared between translation units, and
// the linker might keep the copy whose instructions a machine lacks.
#include "kernels.h"

#include "product.h"

namespace {

// act(in + bias) + residual of rows (tokens, m) of numbers.
template <class S, class Out>
void finish_rows(const Compute<S> *in, Int tokens, Int m, Int activation, const S *bias,
                 const S *residual, Out *y) {
  with_activation(activation, [&](auto kind) {
    for (Int at = 0; at < tokens * m; at += m)
      finish_row<S, Out, decltype(kind)::value>(in + at, m, bias, residual ? residual + at : nullptr,
                                                y + at);
  });
}

template <class S>
const char *forward_few(Int tokens, const S *x, Int n_products, const kron_product *products,
                        const Product<Compute<S>> *maps) {
  typedef Compute<S> T;
  Int out_size = 0, spare_size = 0;
  for (Int i = 0; i < n_products; i++) {
    out_size = larger(out_size, maps[i].outputs());
    spare_size = larger(spare_size, 2 * maps[i].middle() + maps[i].longest());
  }
  const Int n = maps[0].inputs();
  Scratch<T> scratch((n + out_size + spare_size) * tokens, 3);
  if (!scratch) return OUT_OF_MEMORY;
  T *in = scratch.take(n * tokens), *out = scratch.take(out_size * tokens);
  T *spare = scratch.take(spare_size * tokens);
  widen_row(x, n * tokens, 1, in);
  for (Int i = 0; i < n_products; i++) {
    const kron_product &p = products[i];
    maps[i].apply_to_few(tokens, in, out, spare);
    finish_rows<S, S>(out, tokens, maps[i].outputs(), p.activation, static_cast<const S *>(p.bias),
                      static_cast<const S *>(p.residual), static_cast<S *>(p.y));
  }
  return nullptr;
}

template <class S>
const char *forward(const kron_execution &e, Int tokens, const void *x, Int n_products,
                    const kron_product *products) {
  typedef Compute<S> T;
  Product<T> maps[KRON_MAX_PRODUCTS];
  Int out_size = 0, spare_size = 0;
  double work = 0;
  bool few = true;
  for (Int i = 0; i < n_products; i++) {
    if (!maps[i].template set<S>(products[i])) return OUT_OF_MEMORY;
    out_size = larger(out_size, maps[i].outputs());
    spare_size = larger(spare_size, 2 * maps[i].middle());
    work += double(tokens) * double(maps[i].multiply_adds());
    few = few && maps[i].few(tokens);
  }
  if (few)
    return forward_few(tokens, static_cast<const S *>(x), n_products, products, maps);
  const Int n = maps[0].inputs(), units = (tokens + LANES<T> - 1) / LANES<T>;
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    const Int lanes = smaller(MAX_NV, last - first) * LANES<T>;
    Scratch<T> scratch((n + out_size + spare_size) * lanes, 3);
    if (!scratch) return false;
    T *in = scratch.take(n * lanes), *out = scratch.take(out_size * lanes);
    T *spare = scratch.take(spare_size * lanes);
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value;
      const Int here = smaller(NV * LANES<T>, tokens - token);
      read_block<S, NV>(static_cast<const S *>(x) + token * n, here, n, in);
      for (Int i = 0; i < n_products; i++) {
        maps[i].template apply<NV>(in, out, spare);
        write_block<S, NV>(out, token, here, maps[i].outputs(), products[i]);
      }
    });
    return true;
  });
}

// The product along the middle axis of x (tokens, n, tail), which gives y (tokens, m, tail), bias
// (m, tail). Lanes run along the tail: nothing is transposed.
template <class S>
const char *forward_along(const kron_execution &e, Int tokens, const S *x, Int tail,
                          const kron_product &p) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  Product<T> map;
  if (!map.template set<S>(p)) return OUT_OF_MEMORY;
  const Int n = map.inputs(), m = map.outputs(), vectors = (tail + L - 1) / L;
  const Int units = tokens * vectors;
  const double work = double(units) * L * double(map.multiply_adds());
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    const Int lanes = MAX_NV * L, spare_size = 2 * map.middle();
    Scratch<T> scratch((n + m + spare_size) * lanes, 3);
    if (!scratch) return false;
    T *in = scratch.take(n * lanes), *out = scratch.take(m * lanes);
    T *spare = scratch.take(spare_size * lanes);
    while (first < last) { // the rest of a token, or of the part
      const Int token = first / vectors, begin = first % vectors;
      const Int end = smaller(vectors, begin + last - first);
      blocks<T>(begin, end, [&](auto nv, Int at) {
        constexpr int NV = decltype(nv)::value, TB = NV * L;
        const Int width = smaller(TB, tail - at);
        for (Int f = 0; f < n; f++) {
          widen_row(x + (token * n + f) * tail + at, width, 1, in + f * TB);
          for (Int l = width; l < TB; l++) in[f * TB + l] = 0;
        }
        map.template apply<NV>(in, out, spare);
        with_activation(p.activation, [&](auto kind) {
          for (Int f = 0; f < m; f++) {
            const Int here = (token * m + f) * tail + at;
            const S *bias = static_cast<const S *>(p.bias);
            const S *residual = static_cast<const S *>(p.residual);
            finish_row<S, S, decltype(kind)::value>(
                out + f * TB, width, bias ? bias + f * tail + at : nullptr,
                residual ? residual + here : nullptr, static_cast<S *>(p.y) + here);
          }
        });
      });
      first += end - begin;
    }
    return true;
  });
}

// ---- feed-forward ------------------------------------------------------------------------------

// up = (k x l) ⊗ B, contracted from the right, and down = (l' x k) ⊗ B', contracted from the left,
// share the hidden grid (k, width) and can exchange it entry by entry.
template <class T> bool meets(const Product<T> &up, const Product<T> &down) {
  return up.count == 2 && down.count == 2 && up.turns[0] == 1 && down.turns[0] == 0 &&
         up.factors[0].rows == down.factors[0].cols && up.factors[1].rows == down.factors[1].cols;
}

// Columns of the hidden grid, of k entries each, that are in the first-level cache at a time.
inline Int columns_at_a_time(Int k) { return larger(1, 64 / k); }

// u = A' act(A z + bias), a few columns of the hidden grid at a time, for which `hidden` has room.
// z (rank * n1, width)[tokens], u (rank' * m1', width)[tokens], A (rank, k, n1), A' (rank', m1', k).
template <class S, int NV, int ACTIVATION>
void through_hidden(const Product<Compute<S>> &up, const Product<Compute<S>> &down, Int width,
                    const S *bias, const Compute<S> *z, Compute<S> *u, Compute<S> *hidden) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>, TB = NV * L;
  const Int rows = up.factors[0].rows, far = width * TB;
  const Int z_size = up.factors[0].cols * far, u_size = down.factors[0].rows * far;
  for (Int p = 0; p < width; p += columns_at_a_time(rows)) {
    const Int columns = smaller(columns_at_a_time(rows), width - p), near = columns * TB;
    for (Int k = 0; k < up.rank; k++)
      contract_grid<T, NV>(up.matrix(0, k), z + k * z_size + p * TB, hidden,
                           {1, columns, TB, 0, 0, far, near, L, L}, k > 0);
    for (Int i = 0; i < rows; i++) {
      for (Int j = 0; j < columns; j++) {
        const Vector<T> b = Vector<T>{} + (bias ? scalar(bias[i * width + p + j]) : T(0));
        T *h = hidden + (i * columns + j) * TB;
        KRON_UNROLL
        for (int v = 0; v < NV; v++) store(h + v * L, activate<ACTIVATION>(load(h + v * L) + b));
      }
    }
    for (Int k = 0; k < down.rank; k++)
      contract_grid<T, NV>(down.matrix(0, k), hidden, u + k * u_size + p * TB,
                           {1, columns, TB, 0, 0, near, far, L, L}, false);
  }
}

// h = act(h + bias), of (size)[tokens].
template <class S, int NV>
void activate_block(Compute<S> *h, Int size, Int activation, const S *bias) {
  typedef Compute<S> T;
  with_activation(activation, [&](auto kind) {
    for (Int i = 0; i < size; i++) {
      const T b = bias ? scalar(bias[i]) : T(0);
      KRON_UNROLL
      for (int v = 0; v < NV; v++) {
        T *p = h + (i * NV + v) * LANES<T>;
        store(p, activate<decltype(kind)::value>(load(p) + b));
      }
    }
  });
}

template <class S>
const char *feed_forward(const kron_execution &e, Int tokens, const void *x, const kron_product &up,
                         const kron_product &down) {
  typedef Compute<S> T;
  Product<T> first_map, second_map;
  if (!first_map.template set<S>(up) || !second_map.template set<S>(down)) return OUT_OF_MEMORY;
  const Product<T> &w1 = first_map, &w2 = second_map;
  const kron_factor &a1 = w1.factors[0], &a2 = w2.factors[0];
  const bool meet = meets(w1, w2);
  const Int n = w1.inputs(), hidden = w1.outputs(), m = w2.outputs(), width = w1.factors[1].rows;
  const Int z_size = meet ? w1.rank * a1.cols * width : hidden;
  const Int u_size = meet ? w2.rank * a2.rows * width : 2 * larger(w1.middle(), w2.middle());
  const Int units = (tokens + LANES<T> - 1) / LANES<T>;
  const double work = double(tokens) * double(w1.multiply_adds() + w2.multiply_adds());
  const S *bias = static_cast<const S *>(up.bias);
  if (w1.few(tokens) && w2.few(tokens)) {
    const Int spare_size = 2 * larger(w1.middle(), w2.middle()) + larger(w1.longest(), w2.longest());
    Scratch<T> scratch((n + hidden + m + spare_size) * tokens, 4);
    if (!scratch) return OUT_OF_MEMORY;
    T *in = scratch.take(n * tokens), *h = scratch.take(hidden * tokens);
    T *out = scratch.take(m * tokens), *spare = scratch.take(spare_size * tokens);
    widen_row(static_cast<const S *>(x), n * tokens, 1, in);
    w1.apply_to_few(tokens, in, h, spare);
    finish_rows<S, T>(h, tokens, hidden, up.activation, bias, nullptr, h);
    w2.apply_to_few(tokens, h, out, spare);
    finish_rows<S, S>(out, tokens, m, down.activation, static_cast<const S *>(down.bias),
                         static_cast<const S *>(down.residual), static_cast<S *>(down.y));
    return nullptr;
  }
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    const Int lanes = smaller(MAX_NV, last - first) * LANES<T>;
    const Int columns_size = meet ? columns_at_a_time(a1.rows) * a1.rows : 0;
    Scratch<T> scratch((n + m + z_size + u_size + columns_size) * lanes, 5);
    if (!scratch) return false;
    T *in = scratch.take(n * lanes), *out = scratch.take(m * lanes);
    T *z = scratch.take(z_size * lanes), *u = scratch.take(u_size * lanes);
    T *columns = scratch.take(columns_size * lanes);
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value, TB = NV * LANES<T>;
      const Int here = smaller(TB, tokens - token);
      read_block<S, NV>(static_cast<const S *>(x) + token * n, here, n, in);
      if (meet) {
        for (Int k = 0; k < w1.rank; k++)
          contract<T, NV>(w1.matrix(1, k), in, z + k * a1.cols * width * TB, a1.cols, 1);
        with_activation(up.activation, [&](auto kind) {
          through_hidden<S, NV, decltype(kind)::value>(w1, w2, width, bias, z, u, columns);
        });
        for (Int k = 0; k < w2.rank; k++)
          contract<T, NV>(w2.matrix(1, k), u + k * a2.rows * width * TB, out, a2.rows, 1, k > 0);
      } else {
        w1.template apply<NV>(in, z, u);
        activate_block<S, NV>(z, hidden, up.activation, bias);
        w2.template apply<NV>(z, out, u);
      }
      write_block<S, NV>(out, token, here, m, down);
    });
    return true;
  });
}

// ---- backward ----------------------------------------------------------------------------------

// With V_k = A_kᵀ dY and Z_k = X B_kᵀ (B first): dX = Σ V_k B_k, dA_k = Σ_t dY Z_kᵀ,
// dB_k = Σ_t V_kᵀ X. With U_k = dY B_k and Z_k = A_k X (A first): dX = Σ A_kᵀ U_k,
// dA_k = Σ_t U_k Xᵀ, dB_k = Σ_t dYᵀ Z_k. A part of the tokens has its own sums, added in order.
template <class S>
const char *backward(const kron_execution &e, Int tokens, const void *dy, const void *x,
                     const kron_product &product, void *dx, void *da, void *db) {
  typedef Compute<S> T;
  Product<T> map;
  if (!map.template set<S>(product)) return OUT_OF_MEMORY;
  const Int rank = map.rank, m1 = map.factors[0].rows, n1 = map.factors[0].cols;
  const Int m2 = map.factors[1].rows, n2 = map.factors[1].cols, n = n1 * n2, m = m1 * m2;
  const bool b_first = map.turns[0] == 1;
  const Int middle = b_first ? n1 * m2 : m1 * n2, a_size = rank * m1 * n1, b_size = rank * m2 * n2;
  const Int sums_size = (da ? a_size : 0) + (db ? b_size : 0);
  const Int units = (tokens + LANES<T> - 1) / LANES<T>;
  const Int parts = parts_of(e, units, 3.0 * double(tokens) * double(map.multiply_adds()));
  T *sums = static_cast<T *>(calloc(size_t(larger(1, parts * sums_size)), sizeof(T)));
  if (!sums) return OUT_OF_MEMORY;
  const char *error = split(e, units, parts, [&](Int part, Int first, Int last) {
    const Int lanes = smaller(MAX_NV, last - first) * LANES<T>;
    const Int turned_size = da || db ? larger(n, middle) : 0;
    Scratch<T> scratch((m + n + 2 * middle + (dx ? n : 0) + turned_size) * lanes, 6);
    if (!scratch) return false;
    T *dy_in = scratch.take(m * lanes), *x_in = scratch.take(n * lanes);
    T *z = scratch.take(middle * lanes), *v = scratch.take(middle * lanes);
    T *dx_out = scratch.take((dx ? n : 0) * lanes), *turned = scratch.take(turned_size * lanes);
    T *da_sum = sums + part * sums_size, *db_sum = da_sum + (da ? a_size : 0);
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value, TB = NV * LANES<T>;
      const Int here = smaller(TB, tokens - token);
      read_block<S, NV>(static_cast<const S *>(dy) + token * m, here, m, dy_in);
      if (da || db) read_block<S, NV>(static_cast<const S *>(x) + token * n, here, n, x_in);
      for (Int k = 0; k < rank; k++) {
        const Matrix<T> a = map.matrix(0, k), b = map.matrix(1, k);
        T *da_k = da_sum + k * m1 * n1, *db_k = db_sum + k * m2 * n2;
        if (b_first) {
          if (dx || db) contract<T, NV>(a.transposed(), dy_in, v, 1, m2);
          if (dx) contract<T, NV>(b.transposed(), v, dx_out, n1, 1, k > 0);
          if (da) {
            contract<T, NV>(b, x_in, z, n1, 1);
            sum_over_tokens<T, NV>({dy_in, m1, m2 * TB, TB}, {z, n1, m2 * TB, TB}, m2, da_k, turned);
          }
          if (db) sum_over_tokens<T, NV>({v, m2, TB, m2 * TB}, {x_in, n2, TB, n2 * TB}, n1, db_k, turned);
        } else {
          if (dx || da) contract<T, NV>(b.transposed(), dy_in, v, m1, 1);
          if (dx) contract<T, NV>(a.transposed(), v, dx_out, 1, n2, k > 0);
          if (da) sum_over_tokens<T, NV>({v, m1, n2 * TB, TB}, {x_in, n1, n2 * TB, TB}, n2, da_k, turned);
          if (db) {
            contract<T, NV>(a, x_in, z, 1, n2);
            sum_over_tokens<T, NV>({dy_in, m2, TB, m2 * TB}, {z, n2, TB, n2 * TB}, m1, db_k, turned);
          }
        }
      }
      if (dx)
        write_block<S, NV, KRON_NONE>(dx_out, here, n, nullptr, nullptr,
                                      static_cast<S *>(dx) + token * n);
    });
    return true;
  });
  for (Int part = 1; part < parts; part++)
    for (Int i = 0; i < sums_size; i++) sums[i] += sums[part * sums_size + i];
  if (da) memcpy(da, sums, size_t(a_size) * sizeof(T));
  if (db) memcpy(db, sums + (da ? a_size : 0), size_t(b_size) * sizeof(T));
  free(sums);
  return error;
}

// ---- feed-forward, backward --------------------------------------------------------------------

// Sums over lanes, one (T) for each vector of `lanes`, in place of as many numbers of `sums`.
template <class T> void add_lanes(const T *lanes, Int count, T *sums) {
  constexpr int L = LANES<T>;
  for (Int i = 0; i < count; i += L) {
    const int width = int(smaller(L, count - i));
    Vector<T> v[L];
    KRON_UNROLL
    for (int l = 0; l < L; l++) v[l] = l < width ? load(lanes + (i + l) * L) : Vector<T>{};
    const Vector<T> total = sums_of_lanes<T>(v);
    for (int l = 0; l < width; l++) sums[i + l] += total[l];
  }
}

// Column by column of the hidden grid, with h = A z + bias and its gradient
// dh = (A'ᵀ du) * act'(h): u = A' act(h), dz = Aᵀ dh, and the sums over tokens dA += dh zᵀ and
// dA' += du act(h)ᵀ, a vector of lanes for each entry, and dbias += dh. Shapes as in
// through_hidden; `hidden` is room for k vectors of lanes.
template <class S, int NV, int ACTIVATION>
void back_through_hidden(const kron_factor &a, Int rank, const kron_factor &a2, Int rank2,
                         Int width, const S *bias, const Compute<S> *z, const Compute<S> *du,
                         Compute<S> *u, Compute<S> *dz, Compute<S> *da, Compute<S> *da2,
                         Compute<S> *dbias, Compute<S> *hidden) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>, TB = NV * L;
  const Int step = width * TB;
  for (Int p = 0; p < width; p++) {
    for (Int i = 0; i < a.rows; i++) {
      Vector<T> h[NV], dh[NV];
      KRON_UNROLL
      for (int v = 0; v < NV; v++) {
        h[v] = Vector<T>{} + (bias ? scalar(bias[i * width + p]) : T(0));
        dh[v] = Vector<T>{};
      }
      for (Int k = 0, at = p * TB; k < rank; k++) {
        const T *w = static_cast<const T *>(a.data) + k * a.rank_stride + i * a.row_stride;
        for (Int j = 0; j < a.cols; j++, w += a.col_stride, at += step) {
          KRON_UNROLL
          for (int v = 0; v < NV; v++) h[v] += *w * load(z + at + v * L);
        }
      }
      for (Int k = 0, at = p * TB; k < rank2; k++) {
        const T *w = static_cast<const T *>(a2.data) + k * a2.rank_stride + i * a2.col_stride;
        for (Int o = 0; o < a2.rows; o++, w += a2.row_stride, at += step) {
          KRON_UNROLL
          for (int v = 0; v < NV; v++) dh[v] += *w * load(du + at + v * L);
        }
      }
      Vector<T> dh_sum = {};
      KRON_UNROLL
      for (int v = 0; v < NV; v++) {
        const Slope<Vector<T>> s = slope<ACTIVATION>(h[v]);
        h[v] = s.value;
        dh[v] *= s.slope;
        dh_sum += dh[v];
      }
      store(hidden + i * L, dh_sum);
      for (Int k = 0, at = p * TB, entry = i; k < rank2; k++) {
        const T *w = static_cast<const T *>(a2.data) + k * a2.rank_stride + i * a2.col_stride;
        for (Int o = 0; o < a2.rows; o++, w += a2.row_stride, at += step, entry += a.rows) {
          Vector<T> sum = load(da2 + entry * L);
          KRON_UNROLL
          for (int v = 0; v < NV; v++) {
            sum += load(du + at + v * L) * h[v];
            store(u + at + v * L, (i ? load(u + at + v * L) : Vector<T>{}) + *w * h[v]);
          }
          store(da2 + entry * L, sum);
        }
      }
      for (Int k = 0, at = p * TB; k < rank; k++) {
        const T *w = static_cast<const T *>(a.data) + k * a.rank_stride + i * a.row_stride;
        T *entry = da + ((k * a.rows + i) * a.cols) * L;
        for (Int j = 0; j < a.cols; j++, w += a.col_stride, at += step, entry += L) {
          Vector<T> sum = load(entry);
          KRON_UNROLL
          for (int v = 0; v < NV; v++) {
            sum += dh[v] * load(z + at + v * L);
            store(dz + at + v * L, (i ? load(dz + at + v * L) : Vector<T>{}) + *w * dh[v]);
          }
          store(entry, sum);
        }
      }
    }
    if (dbias) add_lanes<T>(hidden, a.rows, dbias + p * a.rows);
  }
}

enum { DX, DA_UP, DB_UP, DBIAS, DA_DOWN, DB_DOWN, GRADIENTS };

template <class S>
const char *feed_forward_backward(const kron_execution &e, Int tokens, const void *dy,
                                  const void *x, const kron_product &up, const kron_product &down,
                                  void *const *gradients) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  Product<T> w1, w2;
  if (!w1.template set<S>(up) || !w2.template set<S>(down)) return OUT_OF_MEMORY;
  if (!meets(w1, w2)) return "these factors do not meet entry by entry";
  const kron_factor &a1 = w1.factors[0], &a2 = w2.factors[0];
  const Int k = a1.rows, width = w1.factors[1].rows, n2 = w1.factors[1].cols;
  const Int m2 = w2.factors[1].rows, n = w1.inputs(), m = w2.outputs();
  const Int z_rows = w1.rank * a1.cols, u_rows = w2.rank * a2.rows;
  // A part's sums: those of the large factors and of the bias, (width, k), and lanes of the small.
  const Int sizes[GRADIENTS] = {0,         z_rows * k,           w1.rank * width * n2,
                                k * width, u_rows * k, w2.rank * m2 * width};
  const Int sums_size = sizes[DB_UP] + sizes[DBIAS] + sizes[DB_DOWN] + sizes[DA_UP] + sizes[DA_DOWN];
  const Int units = (tokens + L - 1) / L;
  const double work = 3.0 * double(tokens) * double(w1.multiply_adds() + w2.multiply_adds());
  const Int parts = parts_of(e, units, work);
  T *const sums = static_cast<T *>(calloc(size_t(parts * sums_size), sizeof(T)));
  if (!sums) return OUT_OF_MEMORY;
  struct Sums {
    T *db_up, *dbias, *db_down, *da_up, *da_down;
  };
  const auto sums_of = [&](Int part) {
    T *s = sums + part * sums_size;
    Sums r;
    r.db_up = s, r.dbias = r.db_up + sizes[DB_UP], r.db_down = r.dbias + sizes[DBIAS];
    r.da_up = r.db_down + sizes[DB_DOWN], r.da_down = r.da_up + sizes[DA_UP];
    return r;
  };
  const S *bias = static_cast<const S *>(up.bias);
  const char *error = split(e, units, parts, [&](Int part, Int first, Int last) {
    const Int lanes = smaller(MAX_NV, last - first) * L;
    const Int z_size = z_rows * width * lanes, u_size = u_rows * width * lanes;
    const Int small_size = (sizes[DA_UP] + sizes[DA_DOWN]) * L;
    const Int turned_size = larger(n * lanes, a2.rows * width * lanes);
    Scratch<T> scratch((m + 2 * n) * lanes + 2 * (z_size + u_size) + turned_size + small_size +
                           k * L, 10);
    if (!scratch) return false;
    T *dy_in = scratch.take(m * lanes), *x_in = scratch.take(n * lanes);
    T *dx_out = scratch.take(n * lanes), *z = scratch.take(z_size), *dz = scratch.take(z_size);
    T *u = scratch.take(u_size), *du = scratch.take(u_size);
    T *turned = scratch.take(turned_size);
    T *small = scratch.take(small_size), *hidden = scratch.take(k * L);
    memset(small, 0, size_t(small_size) * sizeof(T));
    const Sums s = sums_of(part);
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value, TB = NV * L;
      const Int here = smaller(TB, tokens - token);
      read_block<S, NV>(static_cast<const S *>(x) + token * n, here, n, x_in);
      read_block<S, NV>(static_cast<const S *>(dy) + token * m, here, m, dy_in);
      const Int z_step = a1.cols * width * TB, u_step = a2.rows * width * TB;
      for (Int i = 0; i < w1.rank; i++)
        contract<T, NV>(w1.matrix(1, i), x_in, z + i * z_step, a1.cols, 1);
      for (Int i = 0; i < w2.rank; i++)
        contract<T, NV>(w2.matrix(1, i).transposed(), dy_in, du + i * u_step, a2.rows, 1);
      with_activation(up.activation, [&](auto kind) {
        back_through_hidden<S, NV, decltype(kind)::value>(
            a1, w1.rank, a2, w2.rank, width, bias, z, du, u, dz, small, small + sizes[DA_UP] * L,
            gradients[DBIAS] ? s.dbias : nullptr, hidden);
      });
      for (Int i = 0; i < w1.rank; i++) {
        const T *dz_i = dz + i * z_step;
        if (gradients[DX])
          contract<T, NV>(w1.matrix(1, i).transposed(), dz_i, dx_out, a1.cols, 1, i > 0);
        if (gradients[DB_UP])
          sum_over_tokens<T, NV>({dz_i, width, TB, width * TB}, {x_in, n2, TB, n2 * TB}, a1.cols,
                                 s.db_up + i * width * n2, turned);
      }
      if (gradients[DB_DOWN])
        for (Int i = 0; i < w2.rank; i++)
          sum_over_tokens<T, NV>({dy_in, m2, TB, m2 * TB}, {u + i * u_step, width, TB, width * TB},
                                 a2.rows, s.db_down + i * m2 * width, turned);
      if (gradients[DX])
        write_block<S, NV, KRON_NONE>(dx_out, here, n, nullptr, nullptr,
                                      static_cast<S *>(gradients[DX]) + token * n);
    });
    add_lanes<T>(small, sizes[DA_UP], s.da_up);
    add_lanes<T>(small + sizes[DA_UP] * L, sizes[DA_DOWN], s.da_down);
    return true;
  });
  for (Int part = 1; part < parts; part++)
    for (Int i = 0; i < sums_size; i++) sums[i] += sums[part * sums_size + i];
  const Sums s = sums_of(0);
  const T *const totals[GRADIENTS] = {nullptr, s.da_up, s.db_up, nullptr, s.da_down, s.db_down};
  for (int g = DA_UP; g < GRADIENTS; g++)
    if (gradients[g] && totals[g]) memcpy(gradients[g], totals[g], size_t(sizes[g]) * sizeof(T));
  if (T *dbias = static_cast<T *>(gradients[DBIAS]))
    for (Int i = 0; i < k; i++)
      for (Int p = 0; p < width; p++) dbias[i * width + p] = s.dbias[p * k + i];
  free(sums);
  return error;
}

// body(S()) for the storage type of a dtype.
template <class Body> const char *with_dtype(Int dtype, Body body) {
  switch (dtype) {
  case KRON_FLOAT32: return body(float());
  case KRON_FLOAT64: return body(double());
  case KRON_BFLOAT16: return body(bfloat16());
  case KRON_FLOAT16: return body(float16());
  default: return "no such dtype";
  }
}

} // namespace

#define KRON_JOIN(a, b) a##b
#define KRON_TABLE(isa) KRON_JOIN(kron_kernels_, isa)

const Kernels KRON_TABLE(KRON_ISA) = {
    [](const kron_execution &e, Int dtype, Int tokens, const void *x, Int n_products,
       const kron_product *products) {
      return with_dtype(dtype, [&](auto s) {
        return forward<decltype(s)>(e, tokens, x, n_products, products);
      });
    },
    [](const kron_execution &e, Int dtype, Int tokens, const void *x, Int tail,
       const kron_product &product) {
      return with_dtype(dtype, [&](auto s) {
        return forward_along(e, tokens, static_cast<const decltype(s) *>(x), tail, product);
      });
    },
    [](const kron_execution &e, Int dtype, Int tokens, const void *x, const kron_product &up,
       const kron_product &down) {
      return with_dtype(
          dtype, [&](auto s) { return feed_forward<decltype(s)>(e, tokens, x, up, down); });
    },
    [](const kron_execution &e, Int dtype, Int tokens, const void *dy, const void *x,
       const kron_product &product, void *dx, void *da, void *db) {
      return with_dtype(dtype, [&](auto s) {
        return backward<decltype(s)>(e, tokens, dy, x, product, dx, da, db);
      });
    },
    [](const kron_execution &e, Int dtype, Int tokens, const void *dy, const void *x,
       const kron_product &up, const kron_product &down, void *const *gradients) {
      return with_dtype(dtype, [&](auto s) {
        return feed_forward_backward<decltype(s)>(e, tokens, dy, x, up, down, gradients);
      });
    },
};
