// The kernels, compiled once per instruction set and type of computation, which KRON_ISA and KRON_TYPE name.
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

#include "division.h"
#include "hidden.h"
#include "team.h"

namespace {

// act(· + bias) + residual of `in`, rows (tokens, outputs) of p, to y.
template <class T>
void finish_rows(const StoredBlocks<T> &stored, const T *in, Int tokens, const Product<T> &p, const void *residual,
                 void *y) {
  const Int m = p.outputs();
  for (Int at = 0; at < tokens * m; at += m)
    stored.finish[p.activation](in + at, m, p.bias_data(), residual ? stored.at(residual, at) : nullptr,
                                stored.at(y, at));
}

template <class T>
void apply_to_few(const StoredBlocks<T> &stored, const Product<T> &p, Int tokens, const T *in, T *out, T *spare) {
  p.apply_to_few(tokens, in, out, spare);
  finish_rows(stored, out, tokens, p, p.residual, p.y);
}

template <class T>
const char *forward_few(const StoredBlocks<T> &stored, Int tokens, const void *x, const Products<T> &products,
                        Int out_size, Int spare_size) {
  const Int n = products.all[0].inputs();
  T *in, *out, *spare;
  const Scratch<T> scratch(
      {{&in, n * tokens}, {&out, out_size * tokens}, {&spare, spare_size * tokens}});
  if (!scratch) return OUT_OF_MEMORY;
  stored.widen(x, n * tokens, 1, in);
  for (Int i = 0; i < products.count; i++) apply_to_few(stored, products.all[i], tokens, in, out, spare);
  return nullptr;
}

template <class T>
const char *forward(const StoredBlocks<T> &stored, const kron_execution &e, Int tokens, const void *x, Int n_products,
                    const kron_product *calls, kron_division *asked) {
  Products<T> products(stored, n_products, calls);
  const Int units = vectors_of<T>(tokens);
  const Int most = workers_of(e, double(tokens) * products.multiply_adds());
  Division d = divide(most, units, [&](Int parts) { return products.fits(parts); });
  bool few = true;
  for (Int i = 0; i < n_products; i++) few = few && products.all[i].few(tokens, d.workers);
  if (few) d = divide(1, units, [](Int) { return false; });
  const Int parts = d.parts(), lanes = d.lanes<T>(), n = products.all[0].inputs();
  Int out_size = 0, spare_size = 0;
  SpaceSizes sizes;
  for (Int i = 0; i < n_products; i++) {
    const Product<T> &p = products.all[i];
    products.outputs(i, parts).add_sizes(sizes);
    out_size = larger(out_size, p.outputs());
    spare_size = larger(spare_size, few ? 2 * p.middle() + p.longest() : products.outputs(i, parts).spare());
  }
  // Calls body(product, its outputs, the rows of a piece).
  const auto each_rows = [&](Range cells, auto body) {
    for (Int i = 0; i < n_products; i++) {
      const Outputs<T> outputs = products.outputs(i, parts);
      const Range rows = products.rows(i, outputs, cells, d.workers);
      if (rows.size()) body(products.all[i], outputs, rows);
    }
  };
  if (asked) {
    const double share = largest_share(d, products.multiply_adds(), [&](Range cells) {
      double work = 0;
      each_rows(cells, [&](const Product<T> &, const Outputs<T> &outputs, Range rows) {
        work += outputs.work(rows);
      });
      return work;
    });
    const Int own = (n + out_size + spare_size) * (few ? tokens : lanes) + sizes.numbers(lanes);
    const Int scratch = own * Int(sizeof(T));
    *asked = {d.workers * scratch, d.workers, 1, 1, parts, share};
    return nullptr;
  }
  if (!products.widen()) return OUT_OF_MEMORY;
  if (few) return forward_few(stored, tokens, x, products, out_size, spare_size);
  return split(e, d.workers, d.workers, [&](Int worker, Int, Int) {
    T *in, *out, *spare;
    Space<T> space;
    space.bytes = e.bytes, space.halves = false;
    const Scratch<T> scratch({{&in, n * lanes},
                              {&out, out_size * lanes},
                              {&spare, spare_size * lanes},
                              {&space.panel, sizes.panel},
                              {&space.words, sizes.words * lanes},
                              {&space.units, sizes.units * lanes},
                              {&space.starts, sizes.rows}});
    if (!scratch) return false;
    d.each_piece(worker, [&](Int block, Range cells) {
      d.with_block<T>(block, [&](auto nv, Int token) {
        constexpr int NV = decltype(nv)::value;
        stored.template read_block<NV>(x, token, tokens, n, in);
        each_rows(cells, [&](const Product<T> &p, const Outputs<T> &outputs, Range rows) {
          outputs.template apply<NV>(in, out, spare, space, rows);
          stored.template write_block<NV>(out, token, tokens, p.outputs(), p, outputs.runs(rows));
        });
      });
    });
    return true;
  });
}

// The product along the middle axis of x (tokens, n, tail) gives y (tokens, m, tail), with bias
// (m, tail). Lanes run along the tail: nothing is transposed.
template <class T>
const char *forward_along(const StoredBlocks<T> &stored, const kron_execution &e, Int tokens, const void *x, Int tail,
                          const kron_product &call) {
  constexpr int L = LANES<T>;
  Product<T> p;
  if (!p.set(stored, call, tail)) return OUT_OF_MEMORY;
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
          stored.widen(stored.at(x, (token * n + f) * tail + at), width, 1, in + f * TB);
          for (Int l = width; l < TB; l++) in[f * TB + l] = 0;
        }
        p.template apply<NV>(in, out, spare);
        for (Int f = 0; f < m; f++) {
          const Int here = (token * m + f) * tail + at;
          stored.finish[p.activation](out + f * TB, width, p.bias ? p.bias_data() + f * tail + at : nullptr,
                                      p.residual ? stored.at(p.residual, here) : nullptr, stored.at(p.y, here));
        }
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
         up.factors[0].rows == down.factors[0].cols && up.factors[1].rows == down.factors[1].cols &&
         !up.factors[0].scale && !down.factors[0].scale;
}

template <class T> Int few_spare(const Product<T> &up, const Product<T> &down) { // for a token
  return 2 * larger(up.middle(), down.middle()) + larger(up.longest(), down.longest());
}

template <class T>
const char *feed_forward_few(const StoredBlocks<T> &stored, Int tokens, const void *x, const Product<T> &up,
                             const Product<T> &down) {
  const Int n = up.inputs() * tokens;
  T *in, *h, *out, *spare;
  const Scratch<T> scratch({{&in, n},
                            {&h, up.outputs() * tokens},
                            {&out, down.outputs() * tokens},
                            {&spare, few_spare(up, down) * tokens}});
  if (!scratch) return OUT_OF_MEMORY;
  stored.widen(x, n, 1, in);
  up.apply_to_few(tokens, in, h, spare);
  finish_rows(STORED_BLOCKS<T>, h, tokens, up, nullptr, h);
  apply_to_few(stored, down, tokens, h, out, spare);
  return nullptr;
}

// A block's two stages: from x to what lies in between, `inner`, and from there to y. Where the products
// meet that is u = A' act(A z + bias), otherwise the hidden vector.
template <class T> class FeedForward {
public:
  // Without reading data; widen() does.
  FeedForward(const Storage<T> &stored, const kron_product &up_call, const kron_product &down_call)
      : stored(stored), up_call(up_call), down_call(down_call) {
    up.set_shape(stored, up_call), down.set_shape(stored, down_call);
    meet = meets(up, down) && !Part<T>(up).low_rank && !Part<T>(down).low_rank;
  }
  bool widen() { // returns false if memory ran out
    return up.set(stored, up_call) && down.set(stored, down_call);
  }
  void divide(Int most, Int units) { // among at most so many workers
    const auto divided = [&](bool cut) {
      return ::divide(most, units, [&](Int parts) {
        return cut && (meet ? smaller(width(), down.factors[1].rows) >= 4 * parts
                            : Outputs<T>(up, parts).fits() && Outputs<T>(down, parts).fits());
      });
    };
    d = divided(true);
    // All blocks' inner vectors are in memory then, and a worker waits for the others.
    if (d.cut && d.blocks >= 2 * d.workers) d = divided(false);
    parts = d.parts();
  }

  double multiply_adds() const { // of a token
    return Outputs<T>(up, 1).all_work() + Outputs<T>(down, 1).all_work();
  }
  Int inner() const { return meet ? Part<T>(down).middle() * down.rank : up.outputs(); }
  // Numbers for a token in a worker's memory.
  Int z() const { return meet ? up.rank * up.factors[0].cols * width() : 0; }
  Int columns() const { return meet ? columns_at_a_time(up.factors[0].rows) * up.factors[0].rows : 0; }
  SpaceSizes sizes() const {
    SpaceSizes all;
    all.include(Part<T>(up)), all.include(Part<T>(down));
    return all;
  }
  Int spare() const {
    return meet ? 0 : larger(Outputs<T>(up, parts).spare(), Outputs<T>(down, parts).spare());
  }

  template <int NV>
  void first(const T *in, T *inner, T *z, T *columns, T *spare, const Space<T> &space, Range cells) const {
    constexpr int TB = NV * LANES<T>;
    if (meet) {
      const Range range = rows(width(), cells);
      if (!range.size()) return;
      Part<T>(up).template some_first<NV>(in, z, range, space);
      const Hidden<T> grid = {up.rank, down.rank, up.matrix(0, 0), down.matrix(0, 0), up.factors[0].rank_stride,
                              down.factors[0].rank_stride, up.activation};
      const T *const bias = up.bias ? up.bias_data() + range.first : nullptr;
      return through_hidden<NV>(grid, width(), range, bias, width(), z, inner, columns);
    }
    const Outputs<T> outputs(up, parts);
    const Range range = rows(outputs.rows(), cells);
    if (!range.size()) return;
    outputs.template apply<NV>(in, inner, spare, space, range);
    const Runs runs = outputs.runs(range);
    for (Int i = 0, at = runs.first; i < runs.count; i++, at += runs.step)
      activate_rows<T, NV>(inner + at * TB, TB, inner + at * TB, TB, runs.length, up.activation,
                           up.bias ? up.bias_data() + at : nullptr);
  }
  // Returns the outputs.
  template <int NV>
  Runs second(T *inner, T *out, T *spare, const Space<T> &space, Range cells) const {
    if (meet) {
      const Part<T> part(down);
      const Range range = rows(part.rows(SHARED), cells);
      if (range.size())
        part.template apply<NV>(SHARED, nullptr, inner, out, NV * LANES<T>, range, false, space);
      return part.runs(SHARED, range);
    }
    const Outputs<T> outputs(down, parts);
    const Range range = rows(outputs.rows(), cells);
    if (range.size()) outputs.template apply<NV>(inner, out, spare, space, range);
    return outputs.runs(range);
  }

  // The multiply-adds of a token in the cells of a piece, in both stages.
  double work(Range cells) const {
    if (!meet) {
      const Outputs<T> one(up, parts), two(down, parts);
      return one.work(rows(one.rows(), cells)) + two.work(rows(two.rows(), cells));
    }
    const Part<T> one(up), two(down);
    const auto share = [&](Int count) { return double(rows(count, cells).size()) / double(count); };
    return share(width()) * (one.first_work() + one.second_work() + two.first_work()) +
           share(two.g.rows) * two.second_work();
  }

  Product<T> up, down;
  Division d;
  Int parts;

private:
  Int width() const { return up.factors[1].rows; }
  Range rows(Int count, Range cells) const {
    const double all = double(d.workers);
    return rows_between(count, parts, double(cells.first) / all, double(cells.end) / all);
  }

  const Storage<T> &stored;
  const kron_product &up_call, &down_call;
  bool meet;
};

template <class T>
const char *feed_forward(const StoredBlocks<T> &stored, const kron_execution &e, Int tokens, const void *x,
                         const kron_product &up_call, const kron_product &down_call, kron_division *asked) {
  FeedForward<T> block(stored, up_call, down_call);
  const Int units = vectors_of<T>(tokens);
  block.divide(workers_of(e, double(tokens) * block.multiply_adds()), units);
  const bool few = block.up.few(tokens, block.d.workers) && block.down.few(tokens, block.d.workers);
  if (few) block.divide(1, units);
  const Division &d = block.d;
  const Int n = block.up.inputs(), m = block.down.outputs(), inner_size = block.inner(), lanes = d.lanes<T>();
  const SpaceSizes sizes = block.sizes();
  const Int own_size = d.cut ? 0 : inner_size * lanes;
  const Int shared_size = d.cut ? inner_size * d.units * LANES<T> : 0;
  if (asked) {
    const Int own =
        few ? (n + block.up.outputs() + m + few_spare(block.up, block.down)) * tokens
            : own_size + (n + m + block.z() + block.columns() + block.spare()) * lanes + sizes.numbers(lanes);
    const double share =
        largest_share(d, block.multiply_adds(), [&](Range cells) { return block.work(cells); });
    *asked = {(d.workers * own + shared_size) * Int(sizeof(T)), d.cut ? 1 : d.workers,
              d.cut ? d.workers : 1, d.cut ? 2 : 1, block.parts, share};
    return nullptr;
  }
  if (!block.widen()) return OUT_OF_MEMORY;
  if (few) return feed_forward_few(stored, tokens, x, block.up, block.down);
  T *shared;
  const Scratch<T> all({{&shared, shared_size}});
  if (!all) return OUT_OF_MEMORY;
  Team team;
  const Int starts[] = {0, d.workers, 2 * d.workers};
  return split(e, d.workers, d.workers, [&](Int worker, Int, Int) {
    T *in, *out, *z, *columns, *spare, *own;
    Space<T> space;
    space.bytes = e.bytes, space.halves = false;
    const Scratch<T> scratch({{&in, n * lanes},
                              {&out, m * lanes},
                              {&z, block.z() * lanes},
                              {&columns, block.columns() * lanes},
                              {&spare, block.spare() * lanes},
                              {&own, own_size},
                              {&space.panel, sizes.panel},
                              {&space.words, sizes.words * lanes},
                              {&space.units, sizes.units * lanes},
                              {&space.starts, sizes.rows}});
    if (!scratch) return false;
    const auto compute = [&](Int stage, Int number, Range cells) {
      d.with_block<T>(number, [&](auto nv, Int token) {
        constexpr int NV = decltype(nv)::value;
        T *const inner = d.cut ? shared + token * inner_size : own;
        if (!stage) {
          stored.template read_block<NV>(x, token, tokens, n, in);
          return block.template first<NV>(in, inner, z, columns, spare, space, cells);
        }
        const Runs runs = block.template second<NV>(inner, out, spare, space, cells);
        stored.template write_block<NV>(out, token, tokens, m, block.down, runs);
      });
    };
    if (d.cut) {
      team.work(starts, 2, [&](Int stage, Int item) {
        d.each_piece(item, [&](Int number, Range cells) { compute(stage, number, cells); });
      });
    } else {
      d.each_piece(worker, [&](Int number, Range cells) {
        compute(0, number, cells), compute(1, number, cells);
      });
    }
    return true;
  });
}

// ---- backward ----------------------------------------------------------------------------------

// The gradients do not depend on the bias, which the caller of kron_cpu_backward need not set.
inline kron_product without_bias(kron_product p) {
  p.bias = nullptr;
  return p;
}

// Writes runs of features of a block of dx (tokens, n), if it is wanted.
template <int NV, class T>
void write_gradient(const StoredBlocks<T> &stored, T *block, Int token, Int tokens, Int n, void *dx, const Runs &runs) {
  kron_product gradient = {};
  gradient.y = dx;
  if (dx) stored.template write_block<NV>(block, token, tokens, n, gradient, runs);
}

// Let F be the factor that is contracted first, along its axis, and G the other. With Z = F X and
// V = Gᵀ dY, summed over terms: dX = Fᵀ V, dG = Σ_t dY Zᵀ, dF = Σ_t V Xᵀ.
template <class T> class Backward {
  static constexpr int L = LANES<T>;

public:
  // Without reading data; widen() does. Pointers tell only which gradients are wanted.
  Backward(const StoredBlocks<T> &stored, const kron_product &call, const void *dx, const void *da, const void *db)
      : stored(stored), call(without_bias(call)), wants_dx(dx) {
    product.set_shape(stored, this->call);
    n = product.inputs(), m = product.outputs(), middle = product.middle(), rank = product.rank;
    f_axis = product.turns[0] ? LAST : FIRST, g_axis = f_axis == LAST ? FIRST : LAST;
    f_rows = product.factors[f_axis].rows, f_cols = product.factors[f_axis].cols;
    g_rows = product.factors[g_axis].rows, g_cols = product.factors[g_axis].cols;
    wants_df = f_axis == FIRST ? da : db, wants_dg = f_axis == FIRST ? db : da;
    const double term = double(rank) * double(middle);
    v_work = wants_dx || wants_df ? term * double(g_rows) : 0, z_work = wants_dg ? term * double(f_cols) : 0;
    dx_work = wants_dx ? term * double(f_cols) : 0, df_work = wants_df ? term * double(f_cols) : 0;
    dg_work = wants_dg ? term * double(g_rows) : 0;
  }
  bool widen() { return product.set(stored, call); } // returns false if memory ran out

  // ---- divided by tokens

  const char *by_tokens(const kron_execution &e, Int tokens, Int parts, const void *dy, const void *x,
                        void *dx, T *df, T *dg) const {
    const Int df_size = df ? rank * f_rows * f_cols : 0, dg_size = dg ? rank * g_rows * g_cols : 0;
    const PartialSums<T> sums(parts, df_size + dg_size);
    if (!sums) return OUT_OF_MEMORY;
    const char *error = split(e, vectors_of<T>(tokens), parts, [&](Int part, Int first, Int last) {
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
        stored.template read_block<NV>(dy, token, tokens, m, dy_in);
        if (df || dg) stored.template read_block<NV>(x, token, tokens, n, x_in);
        for (Int k = 0; k < rank; k++) {
          const Matrix<T> f = product.matrix(f_axis, k), g = product.matrix(g_axis, k);
          if (dx || df) contract_along<T, NV>(g_axis, g.transposed(), dy_in, v, f_rows, false);
          if (dx) contract_along<T, NV>(f_axis, f.transposed(), v, dx_out, g_cols, k > 0);
          if (df)
            sum_over_tokens<T, NV>(f_axis, v, f_rows, {0, f_rows}, x_in, f_cols, g_cols,
                                   df_sum + k * f_rows * f_cols, turned);
          if (dg) {
            contract_along<T, NV>(f_axis, f, x_in, z, g_cols, false);
            sum_over_tokens<T, NV>(g_axis, dy_in, g_rows, {0, g_rows}, z, g_cols, f_rows,
                                   dg_sum + k * g_rows * g_cols, turned);
          }
        }
        write_gradient<NV>(stored, dx_out, token, tokens, n, dx, {1, 0, 0, n});
      });
      return true;
    });
    const T *total = sums.total();
    if (df) memcpy(df, total, size_t(df_size) * sizeof(T));
    if (dg) memcpy(dg, total + df_size, size_t(dg_size) * sizeof(T));
    return error;
  }

  // ---- divided by rows and columns of the factors, for fewer blocks of tokens than threads

  // The workers of few blocks, or 0 if rows and columns do not divide the work evenly.
  Int workers_of_few(Int most, Int blocks) const {
    while (most > blocks && !(shortest_side() >= 4 * most && share_of_few(most) * double(most) < 1.25)) most--;
    return most > blocks ? most : 0;
  }
  // At most, of the worker that has most in each stage.
  double share_of_few(Int workers) const {
    const auto share = [=](Int count) { return double(largest_range(count, workers)) / double(count); };
    return (share(larger(f_rows, g_cols)) * (v_work + z_work) + share(larger(f_cols, g_cols)) * dx_work +
            share(f_rows) * df_work + share(g_rows) * dg_work) /
           (v_work + z_work + dx_work + df_work + dg_work);
  }
  Int scratch_of_few(Int units, Int workers) const { // numbers
    return (m + n + 2 * rank * middle) * units * L + workers * (n + larger(n, middle)) * smaller(MAX_NV, units) * L;
  }

  // First all blocks are read, then V and Z are computed for all of them, then gradients. A worker adds
  // its rows of dF and dG block after block, in the order of one thread.
  const char *by_rows(const kron_execution &e, Int tokens, Int workers, const void *dy, const void *x,
                      void *dx, T *df, T *dg) const {
    const Int units = vectors_of<T>(tokens), all_lanes = units * L, lanes = smaller(MAX_NV, units) * L;
    T *dy_all, *x_all, *v_all, *z_all;
    const Scratch<T> shared({{&dy_all, m * all_lanes},
                             {&x_all, n * all_lanes},
                             {&v_all, rank * middle * all_lanes},
                             {&z_all, rank * middle * all_lanes}});
    if (!shared) return OUT_OF_MEMORY;
    Team team;
    const Int starts[] = {0, workers, 2 * workers, 3 * workers};
    return split(e, workers, workers, [&](Int, Int, Int) {
      T *dx_out, *turned;
      const Scratch<T> scratch({{&dx_out, n * lanes}, {&turned, larger(n, middle) * lanes}});
      if (!scratch) return false;
      team.work(starts, 3, [&](Int stage, Int item) {
        // Rows of F and columns of G for V and Z, columns of F and G for dX: the longer ones are divided.
        const auto part = [=](Int count) { return range_of(count, item, workers); };
        const bool by_f = f_rows >= g_cols, dx_by_f = f_cols >= g_cols;
        const Range v_rows = by_f ? part(f_rows) : Range{0, f_rows};
        const Range v_cols = by_f ? Range{0, g_cols} : part(g_cols);
        const Range dx_rows = dx_by_f ? part(f_cols) : Range{0, f_cols};
        const Range dx_cols = dx_by_f ? Range{0, g_cols} : part(g_cols);
        if (stage == 2) {
          for (Int k = 0; k < rank; k++) {
            clear_rows(df, k * f_rows, part(f_rows), f_cols);
            clear_rows(dg, k * g_rows, part(g_rows), g_cols);
          }
        }
        blocks<T>(0, units, [&](auto nv, Int token) {
          constexpr int NV = decltype(nv)::value, TB = NV * L;
          T *const dy_in = dy_all + token * m, *const x_in = x_all + token * n;
          if (stage == 0) {
            stored.read[NV - 1](dy, token, tokens, m, part(m), dy_in);
            if (df || dg) stored.read[NV - 1](x, token, tokens, n, part(n), x_in);
            return;
          }
          for (Int k = 0; k < rank; k++) {
            const Matrix<T> f = product.matrix(f_axis, k), g = product.matrix(g_axis, k);
            T *const v = v_all + rank * middle * token + k * middle * TB;
            T *const z = z_all + rank * middle * token + k * middle * TB;
            if (stage == 1) {
              if (dx || df)
                contract_part_along<T, NV>(g_axis, g.transposed(), dy_in, v, f_rows, v_cols, v_rows, false);
              if (dg) contract_part_along<T, NV>(f_axis, f, x_in, z, g_cols, v_rows, v_cols, false);
              continue;
            }
            if (dx)
              contract_part_along<T, NV>(f_axis, f.transposed(), v, dx_out, g_cols, dx_rows, dx_cols, k > 0);
            if (df)
              sum_over_tokens<T, NV>(f_axis, v, f_rows, part(f_rows), x_in, f_cols, g_cols,
                                     df + k * f_rows * f_cols, turned);
            if (dg)
              sum_over_tokens<T, NV>(g_axis, dy_in, g_rows, part(g_rows), z, g_cols, f_rows,
                                     dg + k * g_rows * g_cols, turned);
          }
          if (stage < 2) return;
          // dX is (rows, cols) of F's and G's columns, or the other way round.
          const bool rows_first = f_axis == FIRST, along_rows = dx_by_f == rows_first;
          const Range r = dx_by_f ? dx_rows : dx_cols;
          const Int inner = rows_first ? g_cols : f_cols;
          write_gradient<NV>(stored, dx_out, token, tokens, n, dx,
                             along_rows ? Runs{1, 0, r.first * inner, r.size() * inner}
                                        : Runs{n / inner, inner, r.first, r.size()});
        });
      });
      return true;
    });
  }

  bool f_is_first() const { return f_axis == FIRST; }
  double multiply_adds() const { return 3.0 * double(product.multiply_adds()); } // of a token
  Int scratch_by_tokens(Int units, Int parts) const { // numbers
    const Int lanes = smaller(MAX_NV, (units + parts - 1) / parts) * L;
    return parts * ((m + 2 * n + 2 * middle + larger(n, middle)) * lanes +
                    rank * (f_rows * f_cols + g_rows * g_cols));
  }

private:
  Int shortest_side() const { return smaller(larger(f_rows, g_cols), larger(f_cols, g_cols)); }
  static void clear_rows(T *sums, Int before, Range rows, Int cols) {
    if (sums) memset(sums + (before + rows.first) * cols, 0, size_t(rows.size() * cols) * sizeof(T));
  }

  const StoredBlocks<T> &stored;
  const kron_product call;
  Product<T> product;
  const bool wants_dx;
  bool wants_df, wants_dg;
  Int n, m, middle, rank, f_rows, f_cols, g_rows, g_cols;
  Axis f_axis, g_axis;
  double v_work, z_work, dx_work, df_work, dg_work;
};

template <class T>
const char *backward(const StoredBlocks<T> &stored, const kron_execution &e, Int tokens, const void *dy, const void *x,
                     const kron_product &call, void *dx, void *da, void *db, kron_division *asked) {
  Backward<T> b(stored, call, dx, da, db);
  const Int units = vectors_of<T>(tokens), blocks = (units + MAX_NV - 1) / MAX_NV;
  const double work = double(tokens) * b.multiply_adds();
  const Int parts = parts_of(e, units, work), few = b.workers_of_few(workers_of(e, work), blocks);
  const bool by_rows = units && few >= parts;
  if (asked) {
    if (by_rows)
      *asked = {b.scratch_of_few(units, few) * Int(sizeof(T)), 1, few, 3, few, b.share_of_few(few)};
    else
      *asked = {b.scratch_by_tokens(units, parts) * Int(sizeof(T)), parts, 1, 1, 1,
                double((units + parts - 1) / parts) / double(units)};
    return nullptr;
  }
  if (!b.widen()) return OUT_OF_MEMORY;
  T *const df = static_cast<T *>(b.f_is_first() ? da : db), *const dg = static_cast<T *>(b.f_is_first() ? db : da);
  return by_rows ? b.by_rows(e, tokens, few, dy, x, dx, df, dg)
                 : b.by_tokens(e, tokens, parts, dy, x, dx, df, dg);
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
// in through_hidden, for a range of the grid's columns; an entry of dA and dA' is a vector of lanes.
// `hidden` holds k vectors of lanes.
template <class T, int NV>
void back_through_hidden(const Product<T> &up, const Product<T> &down, Range range, const T *z, const T *du,
                         T *u, T *dz, T *da, T *da2, T *dbias, T *hidden) {
  constexpr int L = LANES<T>, TB = NV * L;
  const kron_factor &a = up.factors[0], &a2 = down.factors[0];
  const Int width = up.factors[1].rows, step = width * TB;
  const T *bias = up.bias_data();
  for (Int p = range.first; p < range.end; p++) {
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

template <class T>
const char *feed_forward_backward(const StoredBlocks<T> &stored, const kron_execution &e, Int tokens, const void *dy,
                                  const void *x, const kron_product &up_call, const kron_product &down_call,
                                  void *const *gradients, kron_division *asked) {
  constexpr int L = LANES<T>;
  Product<T> up, down;
  up.set_shape(stored, up_call), down.set_shape(stored, down_call);
  if (!meets(up, down)) return "these factors do not meet entry by entry";
  const Int k = up.factors[0].rows, width = up.factors[1].rows, n2 = up.factors[1].cols;
  const Int m2 = down.factors[1].rows, n = up.inputs(), m = down.outputs();
  const Int z_rows = up.factors[0].cols, u_rows = down.factors[0].rows;
  const Int z_size = up.rank * z_rows * width, u_size = down.rank * u_rows * width;
  const Int da_up_size = up.rank * k * z_rows, da_down_size = down.rank * u_rows * k;
  const Int small_size = (da_up_size + da_down_size) * L; // sums for each lane
  const Int units = vectors_of<T>(tokens), blocks_of_all = (units + MAX_NV - 1) / MAX_NV;
  const double work = 3.0 * double(tokens) * double(up.multiply_adds() + down.multiply_adds());
  // With fewer blocks than threads, columns of the hidden grid and rows of the large factors are divided.
  Int parts = parts_of(e, units, work);
  const Int few = smaller(workers_of(e, work), smaller(width, smaller(n2, m2)) / 4);
  const bool by_rows = few > blocks_of_all && few >= parts && units;
  if (by_rows) parts = few;
  const Int block_size = n + m + 2 * z_size + 2 * u_size; // numbers for a token
  if (asked) {
    const Int lanes = smaller(MAX_NV, by_rows ? units : (units + parts - 1) / parts) * L;
    const Int own = (n + larger(n, u_rows * width)) * lanes + small_size + k * L + da_up_size + da_down_size;
    const Int large = up.rank * width * n2 + k * width + down.rank * m2 * width; // sums
    const auto share = [=](Int count) { return double(largest_range(count, parts)) / double(count); };
    if (by_rows)
      *asked = {(parts * own + large + block_size * units * L) * Int(sizeof(T)), 1, parts, 3, parts,
                fmax(share(width), fmax(share(n2), share(m2)))};
    else
      *asked = {parts * (own + large + block_size * lanes) * Int(sizeof(T)), parts, 1, 1, 1,
                double((units + parts - 1) / parts) / double(units)};
    return nullptr;
  }
  if (!up.set(stored, up_call) || !down.set(stored, without_bias(down_call))) return OUT_OF_MEMORY;
  // The small factors' sums of each part; then each row of the others has one part.
  const Int sizes[GRADIENTS] = {0,         da_up_size,   up.rank * width * n2,
                                k * width, da_down_size, down.rank * m2 * width};
  const PartialSums<T> a_sums(parts, da_up_size + da_down_size);
  const PartialSums<T> sums(by_rows ? 1 : parts, sizes[DB_UP] + sizes[DBIAS] + sizes[DB_DOWN]);
  if (!a_sums || !sums) return OUT_OF_MEMORY;
  const auto db_up = [&](Int part) { return sums.of(part); };
  const auto dbias = [&](Int part) { return sums.of(part) + sizes[DB_UP]; };
  const auto db_down = [&](Int part) { return sums.of(part) + sizes[DB_UP] + sizes[DBIAS]; };

  // What the steps below read and write: of a block of tokens.
  struct Block {
    T *x, *dy, *z, *dz, *u, *du;
  };
  const auto place = [=](T *start, Int lanes) {
    Block b;
    b.x = start, b.dy = b.x + n * lanes;
    b.z = b.dy + m * lanes, b.dz = b.z + z_size * lanes;
    b.u = b.dz + z_size * lanes, b.du = b.u + u_size * lanes;
    return b;
  };
  const auto through = [&](auto nv, const Block &b, Int part, Range columns, T *small, T *hidden) {
    constexpr int NV = decltype(nv)::value, TB = NV * L;
    for (Int i = 0; i < up.rank; i++)
      contract_part_along<T, NV>(LAST, up.matrix(1, i), b.x, b.z + i * z_rows * width * TB, z_rows, columns,
                                 {0, z_rows}, false);
    for (Int i = 0; i < down.rank; i++)
      contract_part_along<T, NV>(LAST, down.matrix(1, i).transposed(), b.dy, b.du + i * u_rows * width * TB,
                                 u_rows, columns, {0, u_rows}, false);
    back_through_hidden<T, NV>(up, down, columns, b.z, b.du, b.u, b.dz, small, small + da_up_size * L,
                               gradients[DBIAS] ? dbias(part) : nullptr, hidden);
  };
  const auto finish = [&](auto nv, const Block &b, Int token, Int part, Range x_cols, Range up_rows,
                          Range down_rows, T *dx_out, T *turned) {
    constexpr int NV = decltype(nv)::value, TB = NV * L;
    for (Int i = 0; i < up.rank; i++) {
      const T *dz_i = b.dz + i * z_rows * width * TB;
      if (gradients[DX])
        contract_part_along<T, NV>(LAST, up.matrix(1, i).transposed(), dz_i, dx_out, z_rows, x_cols,
                                   {0, z_rows}, i > 0);
      if (gradients[DB_UP])
        sum_over_tokens<T, NV>(LAST, dz_i, width, up_rows, b.x, n2, z_rows, db_up(part) + i * width * n2,
                               turned);
    }
    if (gradients[DB_DOWN])
      for (Int i = 0; i < down.rank; i++)
        sum_over_tokens<T, NV>(LAST, b.dy, m2, down_rows, b.u + i * u_rows * width * TB, width, u_rows,
                               db_down(part) + i * m2 * width, turned);
    const Runs runs =
        x_cols.size() == n2 ? Runs{1, 0, 0, n} : Runs{z_rows, n2, x_cols.first, x_cols.size()};
    write_gradient<NV>(stored, dx_out, token, tokens, n, gradients[DX], runs);
  };
  const auto add_small = [&](const T *small, Int part) {
    add_lanes<T>(small, da_up_size, a_sums.of(part));
    add_lanes<T>(small + da_up_size * L, da_down_size, a_sums.of(part) + da_up_size);
  };

  T *all;
  const Scratch<T> shared({{&all, by_rows ? block_size * units * L : 0}});
  if (!shared) return OUT_OF_MEMORY;
  Team team;
  const Int stages[] = {0, parts, 2 * parts, 3 * parts};
  const char *error = split(e, units, parts, [&](Int part, Int first, Int last) {
    const Int lanes = by_rows ? smaller(MAX_NV, units) * L : lanes_of<T>(first, last);
    T *own, *dx_out, *turned, *small, *hidden;
    const Scratch<T> scratch({{&own, by_rows ? 0 : block_size * lanes},
                              {&dx_out, n * lanes},
                              {&turned, larger(n, u_rows * width) * lanes},
                              {&small, small_size},
                              {&hidden, k * L}});
    if (!scratch) return false;
    if (!by_rows) {
      memset(small, 0, size_t(small_size) * sizeof(T));
      blocks<T>(first, last, [&](auto nv, Int token) {
        constexpr int NV = decltype(nv)::value;
        const Block b = place(own, NV * L);
        stored.template read_block<NV>(x, token, tokens, n, b.x);
        stored.template read_block<NV>(dy, token, tokens, m, b.dy);
        through(nv, b, part, {0, width}, small, hidden);
        finish(nv, b, token, part, {0, n2}, {0, width}, {0, m2}, dx_out, turned);
      });
      add_small(small, part);
      return true;
    }
    // All blocks are read, then go through the hidden grid, then give the rest.
    team.work(stages, 3, [&](Int stage, Int item) {
      const auto range = [=](Int count) { return range_of(count, item, parts); };
      if (stage == 1) memset(small, 0, size_t(small_size) * sizeof(T));
      blocks<T>(0, units, [&](auto nv, Int token) {
        constexpr int NV = decltype(nv)::value;
        const Block b = place(all + token * block_size, NV * L);
        if (stage == 0) {
          stored.read[NV - 1](x, token, tokens, n, range(n), b.x);
          stored.read[NV - 1](dy, token, tokens, m, range(m), b.dy);
        } else if (stage == 1) {
          through(nv, b, 0, range(width), small, hidden);
        } else {
          finish(nv, b, token, 0, range(n2), range(width), range(m2), dx_out, turned);
        }
      });
      if (stage == 1) add_small(small, item);
    });
    return true;
  });
  const T *a_total = a_sums.total();
  sums.total(); // in part 0
  const T *totals[GRADIENTS] = {nullptr, a_total, db_up(0), nullptr, a_total + da_up_size, db_down(0)};
  for (int g = DA_UP; g < GRADIENTS; g++)
    if (gradients[g] && g != DBIAS) memcpy(gradients[g], totals[g], size_t(sizes[g]) * sizeof(T));
  if (T *out = static_cast<T *>(gradients[DBIAS]))
    for (Int i = 0; i < k; i++)
      for (Int p = 0; p < width; p++) out[i * width + p] = dbias(0)[p * k + i];
  return error;
}

// A kernel for a type of storage.
template <class S, auto kernel, class... Arguments> const char *of_stored(Arguments... arguments) {
  return kernel(STORED_BLOCKS<S>, arguments...);
}
template <class S> constexpr Kernels kernels_of() {
  typedef Compute<S> T;
  if constexpr (std::is_same_v<T, KRON_TYPE>)
    return {of_stored<S, forward<T>>, of_stored<S, forward_along<T>>, of_stored<S, feed_forward<T>>,
            of_stored<S, backward<T>>, of_stored<S, feed_forward_backward<T>>};
  else
    return {};
}

} // namespace

#define KRON_JOIN(isa, type) kron_kernels_##isa##_##type
#define KRON_TABLE(isa, type) KRON_JOIN(isa, type)

const Kernels KRON_TABLE(KRON_ISA, KRON_TYPE)[] = {kernels_of<float>(), kernels_of<double>(), kernels_of<bfloat16>(),
                                                   kernels_of<float16>()};
