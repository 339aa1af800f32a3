// The kernels, compiled once per instruction set, which KRON_ISA names.
//
// A SIMD lane is a token. Blocks of tokens are transposed as they are read and written. In between, an
// entry of a factor is a scalar, broadcast against vectors of tokens. Every shape fills every lane, and
// factors are read in place, with any strides: there is no packed copy of a weight to keep valid.
// docs/kernels/cpu.md has the derivations.
//
// Everything here is in anonymous namespaces, and no standard containers or algorithms are used: the
// linker merges functions that translation units share, and might keep one with instructions that the
// machine lacks.
#include "kernels.h"

#include "hidden.h"
#include "product.h"

namespace {

// act(· + bias) + residual of `in`, rows (tokens, outputs) of p, to y.
template <class S>
void finish_rows(const Compute<S> *in, Int tokens, const Product<Compute<S>> &p, const S *residual,
                 S *y) {
  const Int m = p.outputs();
  with_activation(p.activation, [=, &p](auto kind) {
    for (Int at = 0; at < tokens * m; at += m)
      finish_row<S, decltype(kind)::value>(in + at, m, p.bias_data(),
                                           residual ? residual + at : nullptr, y + at);
  });
}

template <class S>
void apply_to_few(const Product<Compute<S>> &p, Int tokens, const Compute<S> *in, Compute<S> *out,
                  Compute<S> *spare) {
  p.apply_to_few(tokens, in, out, spare);
  finish_rows<S>(out, tokens, p, static_cast<const S *>(p.residual), static_cast<S *>(p.y));
}

template <class S>
const char *forward_few(Int tokens, const S *x, Int n_products, const Product<Compute<S>> *products) {
  typedef Compute<S> T;
  Int out_size = 0, spare_size = 0;
  for (const Product<T> *p = products; p < products + n_products; p++) {
    out_size = larger(out_size, p->outputs());
    spare_size = larger(spare_size, 2 * p->middle() + p->longest());
  }
  const Int n = products[0].inputs();
  T *in, *out, *spare;
  const Scratch<T> scratch(
      {{&in, n * tokens}, {&out, out_size * tokens}, {&spare, spare_size * tokens}});
  if (!scratch) return OUT_OF_MEMORY;
  widen_row(x, n * tokens, 1, in);
  for (const Product<T> *p = products; p < products + n_products; p++)
    apply_to_few<S>(*p, tokens, in, out, spare);
  return nullptr;
}

template <class S>
const char *forward(const kron_execution &e, Int tokens, const void *x, Int n_products,
                    const kron_product *calls) {
  typedef Compute<S> T;
  Product<T> products[KRON_MAX_PRODUCTS];
  const Product<T> *const end = products + n_products;
  Int out_size = 0, spare_size = 0;
  double work = 0;
  bool few = true;
  for (Product<T> *p = products; p < end; p++) {
    if (!p->template set<S>(calls[p - products])) return OUT_OF_MEMORY;
    out_size = larger(out_size, p->outputs());
    spare_size = larger(spare_size, 2 * p->middle());
    work += double(tokens) * double(p->multiply_adds());
    few = few && p->few(tokens);
  }
  if (few) return forward_few<S>(tokens, static_cast<const S *>(x), n_products, products);
  const Int n = products[0].inputs(), units = vectors_of<T>(tokens);
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    const Int lanes = lanes_of<T>(first, last);
    T *in, *out, *spare;
    const Scratch<T> scratch(
        {{&in, n * lanes}, {&out, out_size * lanes}, {&spare, spare_size * lanes}});
    if (!scratch) return false;
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value;
      read_block<S, NV>(x, token, tokens, n, in);
      for (const Product<T> *p = products; p < end; p++) {
        p->template apply<NV>(in, out, spare);
        write_block<S, NV>(out, token, tokens, p->outputs(), *p);
      }
    });
    return true;
  });
}

// The product along the middle axis of x (tokens, n, tail) gives y (tokens, m, tail), with bias
// (m, tail). Lanes run along the tail: nothing is transposed.
template <class S>
const char *forward_along(const kron_execution &e, Int tokens, const void *x, Int tail,
                          const kron_product &call) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  Product<T> p;
  if (!p.template set<S>(call, tail)) return OUT_OF_MEMORY;
  const Int n = p.inputs(), m = p.outputs(), middle = p.middle(), vectors = vectors_of<T>(tail);
  const Int units = tokens * vectors;
  const double work = double(units) * L * double(p.multiply_adds());
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    constexpr Int lanes = MAX_NV * L;
    T *in, *out, *spare;
    const Scratch<T> scratch({{&in, n * lanes}, {&out, m * lanes}, {&spare, 2 * middle * lanes}});
    if (!scratch) return false;
    while (first < last) { // the rest of a token, or of the part
      const Int token = first / vectors, begin = first % vectors;
      const Int end = smaller(vectors, begin + last - first);
      blocks<T>(begin, end, [&](auto nv, Int at) {
        constexpr int NV = decltype(nv)::value, TB = NV * L;
        const Int width = smaller(TB, tail - at);
        for (Int f = 0; f < n; f++) {
          const S *row = static_cast<const S *>(x) + (token * n + f) * tail + at;
          widen_row(row, width, 1, in + f * TB);
          for (Int l = width; l < TB; l++) in[f * TB + l] = 0;
        }
        p.template apply<NV>(in, out, spare);
        const S *residual = static_cast<const S *>(p.residual);
        with_activation(p.activation, [&](auto kind) {
          for (Int f = 0; f < m; f++) {
            const Int here = (token * m + f) * tail + at;
            finish_row<S, decltype(kind)::value>(
                out + f * TB, width, p.bias ? p.bias_data() + f * tail + at : nullptr,
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

// Whether up = (k x l) ⊗ B, contracted from the right, and down = (l' x k) ⊗ B', contracted from the
// left, can exchange their hidden grid (k, width) entry by entry.
template <class T> bool meets(const Product<T> &up, const Product<T> &down) {
  return up.n_factors == 2 && down.n_factors == 2 && up.turns[0] == 1 && down.turns[0] == 0 &&
         up.factors[0].rows == down.factors[0].cols && up.factors[1].rows == down.factors[1].cols;
}

template <class S>
const char *feed_forward_few(Int tokens, const void *x, const Product<Compute<S>> &up,
                             const Product<Compute<S>> &down) {
  typedef Compute<S> T;
  const Int n = up.inputs() * tokens;
  const Int spare_size = 2 * larger(up.middle(), down.middle()) + larger(up.longest(), down.longest());
  T *in, *h, *out, *spare;
  const Scratch<T> scratch({{&in, n},
                            {&h, up.outputs() * tokens},
                            {&out, down.outputs() * tokens},
                            {&spare, spare_size * tokens}});
  if (!scratch) return OUT_OF_MEMORY;
  widen_row(static_cast<const S *>(x), n, 1, in);
  up.apply_to_few(tokens, in, h, spare);
  finish_rows<T>(h, tokens, up, nullptr, h);
  apply_to_few<S>(down, tokens, h, out, spare);
  return nullptr;
}

template <class S>
const char *feed_forward(const kron_execution &e, Int tokens, const void *x,
                         const kron_product &up_call, const kron_product &down_call) {
  typedef Compute<S> T;
  Product<T> up, down;
  if (!up.template set<S>(up_call) || !down.template set<S>(down_call)) return OUT_OF_MEMORY;
  if (up.few(tokens) && down.few(tokens)) return feed_forward_few<S>(tokens, x, up, down);
  const bool meet = meets(up, down);
  const Int n = up.inputs(), hidden = up.outputs(), m = down.outputs();
  const Int k = up.factors[0].rows, width = up.factors[1].rows;
  const Int z_rows = up.factors[0].cols, u_rows = down.factors[0].rows;
  const Int z_size = meet ? up.rank * z_rows * width : hidden;
  const Int u_size = meet ? down.rank * u_rows * width : 2 * larger(up.middle(), down.middle());
  const Int columns_size = meet ? columns_at_a_time(k) * k : 0;
  const Int units = vectors_of<T>(tokens);
  const double work = double(tokens) * double(up.multiply_adds() + down.multiply_adds());
  return split(e, units, parts_of(e, units, work), [&](Int, Int first, Int last) {
    const Int lanes = lanes_of<T>(first, last);
    T *in, *out, *z, *u, *columns;
    const Scratch<T> scratch({{&in, n * lanes},
                              {&out, m * lanes},
                              {&z, z_size * lanes},
                              {&u, u_size * lanes},
                              {&columns, columns_size * lanes}});
    if (!scratch) return false;
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value, TB = NV * LANES<T>;
      read_block<S, NV>(x, token, tokens, n, in);
      if (meet) {
        for (Int i = 0; i < up.rank; i++)
          contract<T, NV>(up.matrix(1, i), in, z + i * z_rows * width * TB, z_rows, 1);
        const Hidden<T> grid = {up.rank, down.rank, up.matrix(0, 0), down.matrix(0, 0), up.factors[0].rank_stride,
                                down.factors[0].rank_stride, up.activation};
        through_hidden<NV>(grid, width, {0, width}, up.bias_data(), z, u, columns);
        for (Int i = 0; i < down.rank; i++)
          contract<T, NV>(down.matrix(1, i), u + i * u_rows * width * TB, out, u_rows, 1, i > 0);
      } else {
        up.template apply<NV>(in, z, u);
        activate_rows<T, NV>(z, TB, z, TB, hidden, up.activation, up.bias_data());
        down.template apply<NV>(z, out, u);
      }
      write_block<S, NV>(out, token, tokens, m, down);
    });
    return true;
  });
}

// ---- backward ----------------------------------------------------------------------------------

// The gradients do not depend on the bias, which the caller of kron_cpu_backward need not set.
inline kron_product without_bias(kron_product p) {
  p.bias = nullptr;
  return p;
}

// Writes a block of dx (tokens, n), if it is wanted.
template <class S, int NV>
void write_gradient(Compute<S> *block, Int token, Int tokens, Int n, void *dx) {
  kron_product gradient = {};
  gradient.y = dx;
  if (dx) write_block<S, NV>(block, token, tokens, n, gradient);
}

// Let F be the factor that is contracted first, along its axis, and G the other. With Z = F X and
// V = Gᵀ dY, summed over terms: dX = Fᵀ V, dG = Σ_t dY Zᵀ, dF = Σ_t V Xᵀ.
template <class S>
const char *backward(const kron_execution &e, Int tokens, const void *dy, const void *x,
                     const kron_product &call, void *dx, void *da, void *db) {
  typedef Compute<S> T;
  Product<T> product;
  if (!product.template set<S>(without_bias(call))) return OUT_OF_MEMORY;
  const Int n = product.inputs(), m = product.outputs(), middle = product.middle();
  const Axis f_axis = product.turns[0] ? LAST : FIRST, g_axis = f_axis == LAST ? FIRST : LAST;
  const Int rank = product.rank;
  const Int f_rows = product.factors[f_axis].rows, f_cols = product.factors[f_axis].cols;
  const Int g_rows = product.factors[g_axis].rows, g_cols = product.factors[g_axis].cols;
  void *const df = f_axis == FIRST ? da : db, *const dg = f_axis == FIRST ? db : da;
  const Int df_size = df ? rank * f_rows * f_cols : 0, dg_size = dg ? rank * g_rows * g_cols : 0;
  const Int units = vectors_of<T>(tokens);
  const Int parts = parts_of(e, units, 3.0 * double(tokens) * double(product.multiply_adds()));
  const PartialSums<T> sums(parts, df_size + dg_size);
  if (!sums) return OUT_OF_MEMORY;
  const char *error = split(e, units, parts, [&](Int part, Int first, Int last) {
    const Int lanes = lanes_of<T>(first, last);
    T *dy_in, *x_in, *z, *v, *dx_out, *turned;
    const Scratch<T> scratch({{&dy_in, m * lanes},
                              {&x_in, n * lanes},
                              {&z, middle * lanes},
                              {&v, middle * lanes},
                              {&dx_out, dx ? n * lanes : 0},
                              {&turned, df || dg ? larger(n, middle) * lanes : 0}});
    if (!scratch) return false;
    T *const df_sum = sums.of(part), *const dg_sum = df_sum + df_size;
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value;
      read_block<S, NV>(dy, token, tokens, m, dy_in);
      if (df || dg) read_block<S, NV>(x, token, tokens, n, x_in);
      for (Int k = 0; k < rank; k++) {
        const Matrix<T> f = product.matrix(f_axis, k), g = product.matrix(g_axis, k);
        if (dx || df) contract_along<T, NV>(g_axis, g.transposed(), dy_in, v, f_rows, false);
        if (dx) contract_along<T, NV>(f_axis, f.transposed(), v, dx_out, g_cols, k > 0);
        if (df)
          sum_over_tokens<T, NV>(f_axis, v, f_rows, x_in, f_cols, g_cols,
                                 df_sum + k * f_rows * f_cols, turned);
        if (dg) {
          contract_along<T, NV>(f_axis, f, x_in, z, g_cols, false);
          sum_over_tokens<T, NV>(g_axis, dy_in, g_rows, z, g_cols, f_rows,
                                 dg_sum + k * g_rows * g_cols, turned);
        }
      }
      write_gradient<S, NV>(dx_out, token, tokens, n, dx);
    });
    return true;
  });
  const T *total = sums.total();
  if (df) memcpy(df, total, size_t(df_size) * sizeof(T));
  if (dg) memcpy(dg, total + df_size, size_t(dg_size) * sizeof(T));
  return error;
}

// ---- feed-forward, backward --------------------------------------------------------------------

// sums[i] += the sum of the lanes of vector i of `lanes`.
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

// Entry by entry of the hidden grid, with h = A z + bias and dh = (A'ᵀ du) * act'(h): u = A' act(h),
// dz = Aᵀ dh, and the sums over tokens dA += dh zᵀ, dA' += du act(h)ᵀ, dbias += dh (width, k). Shapes as
// in through_hidden; an entry of dA and dA' is a vector of lanes. `hidden` holds k vectors of lanes.
template <class T, int NV>
void back_through_hidden(const Product<T> &up, const Product<T> &down, const T *z, const T *du, T *u,
                         T *dz, T *da, T *da2, T *dbias, T *hidden) {
  constexpr int L = LANES<T>, TB = NV * L;
  const kron_factor &a = up.factors[0], &a2 = down.factors[0];
  const Int width = up.factors[1].rows, step = width * TB;
  const T *bias = up.bias_data();
  for (Int p = 0; p < width; p++) {
    for (Int i = 0; i < a.rows; i++) {
      Vector<T> h[NV], dh[NV];
      KRON_UNROLL
      for (int v = 0; v < NV; v++) {
        h[v] = Vector<T>{} + (bias ? bias[i * width + p] : T(0));
        dh[v] = Vector<T>{};
      }
      for (Int k = 0, at = p * TB; k < up.rank; k++) {
        const T *w = static_cast<const T *>(a.data) + k * a.rank_stride + i * a.row_stride;
        for (Int j = 0; j < a.cols; j++, w += a.col_stride, at += step) {
          KRON_UNROLL
          for (int v = 0; v < NV; v++) h[v] += *w * load(z + at + v * L);
        }
      }
      for (Int k = 0, at = p * TB; k < down.rank; k++) {
        const T *w = static_cast<const T *>(a2.data) + k * a2.rank_stride + i * a2.col_stride;
        for (Int o = 0; o < a2.rows; o++, w += a2.row_stride, at += step) {
          KRON_UNROLL
          for (int v = 0; v < NV; v++) dh[v] += *w * load(du + at + v * L);
        }
      }
      Vector<T> dh_sum = {};
      with_activation(up.activation, [&](auto kind) {
        KRON_UNROLL
        for (int v = 0; v < NV; v++) {
          const Slope<Vector<T>> s = slope<decltype(kind)::value>(h[v]);
          h[v] = s.value;
          dh[v] *= s.slope;
          dh_sum += dh[v];
        }
      });
      store(hidden + i * L, dh_sum);
      for (Int k = 0, at = p * TB, entry = i; k < down.rank; k++) {
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
      for (Int k = 0, at = p * TB; k < up.rank; k++) {
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
                                  const void *x, const kron_product &up_call,
                                  const kron_product &down_call, void *const *gradients) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  Product<T> up, down;
  if (!up.template set<S>(up_call) || !down.template set<S>(without_bias(down_call)))
    return OUT_OF_MEMORY;
  if (!meets(up, down)) return "these factors do not meet entry by entry";
  const Int k = up.factors[0].rows, width = up.factors[1].rows, n2 = up.factors[1].cols;
  const Int m2 = down.factors[1].rows, n = up.inputs(), m = down.outputs();
  const Int z_rows = up.factors[0].cols, u_rows = down.factors[0].rows;
  const Int da_up_size = up.rank * k * z_rows, da_down_size = down.rank * u_rows * k;
  const Int sizes[GRADIENTS] = {0,         da_up_size,   up.rank * width * n2,
                                k * width, da_down_size, down.rank * m2 * width};
  Int starts[GRADIENTS], sums_size = 0;
  for (int g = 0; g < GRADIENTS; g++) starts[g] = sums_size, sums_size += sizes[g];
  const Int units = vectors_of<T>(tokens);
  const double work = 3.0 * double(tokens) * double(up.multiply_adds() + down.multiply_adds());
  const Int parts = parts_of(e, units, work);
  const PartialSums<T> sums(parts, sums_size);
  if (!sums) return OUT_OF_MEMORY;
  const char *error = split(e, units, parts, [&](Int part, Int first, Int last) {
    const Int lanes = lanes_of<T>(first, last);
    const Int z_size = up.rank * z_rows * width * lanes, u_size = down.rank * u_rows * width * lanes;
    const Int small_size = (da_up_size + da_down_size) * L; // sums for each lane
    T *dy_in, *x_in, *dx_out, *z, *dz, *u, *du, *turned, *small, *hidden;
    const Scratch<T> scratch({{&dy_in, m * lanes},
                              {&x_in, n * lanes},
                              {&dx_out, n * lanes},
                              {&z, z_size},
                              {&dz, z_size},
                              {&u, u_size},
                              {&du, u_size},
                              {&turned, larger(n, u_rows * width) * lanes},
                              {&small, small_size},
                              {&hidden, k * L}});
    if (!scratch) return false;
    memset(small, 0, size_t(small_size) * sizeof(T));
    T *const da_up = small, *const da_down = small + da_up_size * L, *const sum = sums.of(part);
    blocks<T>(first, last, [&](auto nv, Int token) {
      constexpr int NV = decltype(nv)::value, TB = NV * L;
      read_block<S, NV>(x, token, tokens, n, x_in);
      read_block<S, NV>(dy, token, tokens, m, dy_in);
      const Int z_step = z_rows * width * TB, u_step = u_rows * width * TB;
      for (Int i = 0; i < up.rank; i++)
        contract<T, NV>(up.matrix(1, i), x_in, z + i * z_step, z_rows, 1);
      for (Int i = 0; i < down.rank; i++)
        contract<T, NV>(down.matrix(1, i).transposed(), dy_in, du + i * u_step, u_rows, 1);
      back_through_hidden<T, NV>(up, down, z, du, u, dz, da_up, da_down,
                                 gradients[DBIAS] ? sum + starts[DBIAS] : nullptr, hidden);
      for (Int i = 0; i < up.rank; i++) {
        const T *dz_i = dz + i * z_step;
        if (gradients[DX])
          contract<T, NV>(up.matrix(1, i).transposed(), dz_i, dx_out, z_rows, 1, i > 0);
        if (gradients[DB_UP])
          sum_over_tokens<T, NV>(LAST, dz_i, width, x_in, n2, z_rows,
                                 sum + starts[DB_UP] + i * width * n2, turned);
      }
      if (gradients[DB_DOWN])
        for (Int i = 0; i < down.rank; i++)
          sum_over_tokens<T, NV>(LAST, dy_in, m2, u + i * u_step, width, u_rows,
                                 sum + starts[DB_DOWN] + i * m2 * width, turned);
      write_gradient<S, NV>(dx_out, token, tokens, n, gradients[DX]);
    });
    add_lanes<T>(da_up, da_up_size, sum + starts[DA_UP]);
    add_lanes<T>(da_down, da_down_size, sum + starts[DA_DOWN]);
    return true;
  });
  const T *total = sums.total();
  for (int g = DA_UP; g < GRADIENTS; g++)
    if (gradients[g] && g != DBIAS) memcpy(gradients[g], total + starts[g], size_t(sizes[g]) * sizeof(T));
  if (T *dbias = static_cast<T *>(gradients[DBIAS]))
    for (Int i = 0; i < k; i++)
      for (Int p = 0; p < width; p++) dbias[i * width + p] = total[starts[DBIAS] + p * k + i];
  return error;
}

template <class S>
constexpr Kernels KERNELS = {forward<S>, forward_along<S>, feed_forward<S>, backward<S>,
                             feed_forward_backward<S>};

} // namespace

#define KRON_JOIN(a, b) a##b
#define KRON_TABLE(isa) KRON_JOIN(kron_kernels_, isa)

const Kernels KRON_TABLE(KRON_ISA)[] = {KERNELS<float>, KERNELS<double>, KERNELS<bfloat16>,
                                        KERNELS<float16>};
