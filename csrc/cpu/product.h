// A product on blocks of tokens, and the division of tokens into blocks and among threads.
#pragma once
#include <stdlib.h>

#include "block.h"

namespace {

const char *const OUT_OF_MEMORY = "out of memory for a block of tokens";

// A product's factors in the dtype of computation; 16-bit ones are widened, once a call.
template <class T> struct Product {
  Int rank = 0, count = 0;
  kron_factor factors[KRON_MAX_FACTORS];
  Int turns[KRON_MAX_FACTORS];

  Product() = default;
  Product(const Product &) = delete;
  ~Product() { free(widened); }

  // False if memory ran out.
  template <class S> bool set(const kron_product &p) {
    rank = p.rank, count = p.n_factors;
    memcpy(factors, p.factors, sizeof factors);
    memcpy(turns, p.turns, sizeof turns);
    if constexpr (std::is_same_v<S, T>) return true;
    Int total = 0;
    for (Int i = 0; i < count; i++) total += rank * factors[i].rows * factors[i].cols;
    T *out = widened = static_cast<T *>(malloc(size_t(total) * sizeof(T)));
    if (!out) return false;
    for (Int i = 0; i < count; i++) {
      kron_factor &f = factors[i];
      const S *in = static_cast<const S *>(f.data);
      f.data = out;
      for (Int k = 0; k < rank; k++)
        for (Int r = 0; r < f.rows; r++, out += f.cols)
          widen_row(in + k * f.rank_stride + r * f.row_stride, f.cols, f.col_stride, out);
      f.rank_stride = f.rows * f.cols, f.row_stride = f.cols, f.col_stride = 1;
    }
    return true;
  }

  Matrix<T> matrix(Int i, Int k) const {
    const kron_factor &f = factors[i];
    return {static_cast<const T *>(f.data) + k * f.rank_stride, f.rows, f.cols, f.row_stride,
            f.col_stride};
  }

  Int inputs() const {
    Int n = 1;
    for (Int i = 0; i < count; i++) n *= factors[i].cols;
    return n;
  }
  Int outputs() const {
    Int m = 1;
    for (Int i = 0; i < count; i++) m *= factors[i].rows;
    return m;
  }
  // The longest vector between two contractions.
  Int middle() const {
    Int longest = 0, now = inputs();
    for (Int turn = 0; turn + 1 < count; turn++) {
      now = now / factors[turns[turn]].cols * factors[turns[turn]].rows;
      longest = larger(longest, now);
    }
    return longest;
  }
  Int multiply_adds() const {
    Int sum = 0, now = inputs();
    for (Int turn = 0; turn < count; turn++) {
      const kron_factor &f = factors[turns[turn]];
      sum += now * f.rows;
      now = now / f.cols * f.rows;
    }
    return rank * sum;
  }

  // in (n)[tokens] to out (m)[tokens]; `spare` holds two vectors of middle()[tokens].
  template <int NV> void apply(const T *in, T *out, T *spare) const {
    T *spares[2] = {spare, spare + middle() * NV * LANES<T>};
    for (Int k = 0; k < rank; k++) {
      Int sizes[KRON_MAX_FACTORS];
      for (Int i = 0; i < count; i++) sizes[i] = factors[i].cols;
      const T *from = in;
      for (Int turn = 0; turn < count; turn++) {
        const Int i = turns[turn];
        Int pre = 1, post = 1;
        for (Int j = 0; j < i; j++) pre *= sizes[j];
        for (Int j = i + 1; j < count; j++) post *= sizes[j];
        const bool last = turn + 1 == count;
        T *to = last ? out : spares[turn % 2];
        contract<T, NV>(matrix(i, k), from, to, pre, post, last && k > 0);
        sizes[i] = factors[i].rows;
        from = to;
      }
    }
  }

  // The same for a few tokens, where lanes that are tokens would stay empty: in the layout of
  // memory, in (tokens, n) to out (tokens, m). Lanes run along the axes behind the contracted one,
  // or along that one itself. `spare` holds two vectors of middle() a token, and longest() more.
  void apply_to_few(Int tokens, const T *in, T *out, T *spare) const {
    T *spares[2] = {spare, spare + tokens * middle()}, *columns = spare + 2 * tokens * middle();
    for (Int k = 0; k < rank; k++) {
      Int sizes[KRON_MAX_FACTORS];
      for (Int i = 0; i < count; i++) sizes[i] = factors[i].cols;
      const T *from = in;
      for (Int turn = 0; turn < count; turn++) {
        const Int i = turns[turn];
        Int pre = tokens, post = 1;
        for (Int j = 0; j < i; j++) pre *= sizes[j];
        for (Int j = i + 1; j < count; j++) post *= sizes[j];
        const bool last = turn + 1 == count;
        T *to = last ? out : spares[turn % 2];
        contract_numbers<T>(matrix(i, k), from, to, pre, post, columns, last && k > 0);
        sizes[i] = factors[i].rows;
        from = to;
      }
    }
  }
  // Which of the two is faster, in units of a vector multiply-add (measured with AVX-512: a tile's
  // tree of sums and its scattered results take 10 units a lane; blocks of one and two vectors of
  // tokens take 1.45 and 1.15 times as long per vector as those of three).
  bool few(Int tokens) const {
    constexpr int L = LANES<T>;
    if (tokens > 2 * L) return false;
    double a_token = 0, a_block = 1.5 * double(inputs() + outputs());
    Int sizes[KRON_MAX_FACTORS], now = inputs();
    for (Int i = 0; i < count; i++) sizes[i] = factors[i].cols;
    for (Int turn = 0; turn < count; turn++) {
      const Int i = turns[turn];
      const kron_factor &f = factors[i];
      if (f.col_stride != 1) return false;
      Int post = 1;
      for (Int j = i + 1; j < count; j++) post *= sizes[j];
      const double multiply_adds = double(rank) * double(now) * double(f.rows);
      if (post > 1 && post % L == 0) {
        a_token += 1.3 * multiply_adds / L;
      } else {
        const double tiles = multiply_adds / double(f.cols) / L;
        a_token += tiles * double(((f.cols + L - 1) / L + 10) * L) + (post > 1 ? double(now) : 0);
      }
      a_block += multiply_adds;
      sizes[i] = f.rows;
      now = now / f.cols * f.rows;
    }
    const Int units = (tokens + L - 1) / L;
    return double(tokens) * a_token < double(units) * a_block * (units == 1 ? 1.45 : 1.15);
  }
  // The longest vector before a contraction.
  Int longest() const { return larger(inputs(), middle()); }

private:
  T *widened = nullptr;
};

// Memory for one range of blocks: nothing is read before it is written, and it ends with the call.
template <class T> class Scratch {
public:
  explicit Scratch(Int numbers, Int pieces)
      : memory(static_cast<char *>(
            aligned_alloc(64, (size_t(numbers) * sizeof(T) + size_t(pieces) * 64 + 63) / 64 * 64))),
        next(memory) {}
  Scratch(const Scratch &) = delete;
  ~Scratch() { free(memory); }
  explicit operator bool() const { return memory; }
  T *take(Int numbers) {
    char *here = next;
    next += (size_t(numbers) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T *>(here);
  }

private:
  char *memory, *next;
};

constexpr int MAX_NV = 3;      // vectors of tokens in a block: 8 rows of a factor fill the registers
constexpr double GRAIN = 1e6; // multiply-adds (20 us or so) below which a thread does not pay

inline Int parts_of(const kron_execution &e, Int units, double multiply_adds) {
  const double useful = multiply_adds / GRAIN;
  return useful < 2 ? 1 : larger(1, smaller(e.threads, smaller(units, Int(smaller(Int(useful), units)))));
}

// body(part, first unit, last unit) for equal ranges of units, a part each; false if it failed.
template <class Body> const char *split(const kron_execution &e, Int units, Int parts, Body body) {
  struct Context {
    Body &body;
    Int units, parts;
    int failed;
  } context{body, units, parts, 0};
  kron_range run = [](int64_t begin, int64_t end, void *p) {
    Context &c = *static_cast<Context *>(p);
    for (Int i = begin; i < end; i++)
      if (!c.body(i, i * c.units / c.parts, (i + 1) * c.units / c.parts))
        __atomic_store_n(&c.failed, 1, __ATOMIC_RELAXED);
  };
  if (parts == 1 || !e.parallel_for) run(0, parts, &context);
  else if (e.parallel_for(0, parts, 1, run, &context)) return "torch's thread pool failed";
  return context.failed ? OUT_OF_MEMORY : nullptr;
}

// Units are vectors of tokens; blocks of up to MAX_NV of them, as equal as can be:
// body(std::integral_constant<int, NV>(), first token).
template <class T, class Body> void blocks(Int first, Int last, Body body) {
  while (first < last) {
    const Int left = last - first, blocks = (left + MAX_NV - 1) / MAX_NV;
    const Int nv = (left + blocks - 1) / blocks, token = first * LANES<T>;
    if (nv == 1) body(std::integral_constant<int, 1>(), token);
    else if (nv == 2) body(std::integral_constant<int, 2>(), token);
    else body(std::integral_constant<int, 3>(), token);
    first += nv;
  }
}

} // namespace
