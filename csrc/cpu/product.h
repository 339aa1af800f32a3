// A product applied to blocks of tokens; the division of tokens into blocks and among threads.
#pragma once
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "block.h"

namespace {

const char *const OUT_OF_MEMORY = "out of memory for a block of tokens";

// Memory on a cache line; `bytes` is a multiple of 64.
inline char *allocate(size_t bytes) {
#if defined(_WIN32) // it lacks aligned_alloc, and refuses 0 bytes
  return static_cast<char *>(_aligned_malloc(bytes ? bytes : 64, 64));
#else
  return static_cast<char *>(aligned_alloc(64, bytes));
#endif
}
inline void release(char *memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  free(memory);
#endif
}

// A product with its factors and bias in the dtype of computation, but for int8 factors: 16-bit ones are
// widened for each call.
template <class T> struct Product : kron_product {
  Product() {}
  Product(const Product &) = delete;
  ~Product() { free(widened); }

  // The sizes and strides that set() leaves, without reading data.
  void set_shape(const Storage<T> &stored, const kron_product &p) {
    kron_product::operator=(p);
    if (stored.narrow)
      for (Int i = 0; i < n_factors; i++) {
        kron_factor &f = factors[i];
        if (!f.scale) f.rank_stride = f.rows * f.cols, f.row_stride = f.cols, f.col_stride = 1;
      }
  }
  // Returns false if memory ran out. The bias is (outputs, tail).
  KRON_NOINLINE bool set(const Storage<T> &stored, const kron_product &p, Int tail = 1) {
    set_shape(stored, p);
    if (stored.narrow) {
      const Int bias_size = bias ? outputs() * tail : 0;
      Int total = bias_size;
      for (Int i = 0; i < n_factors; i++)
        if (!factors[i].scale) total += rank * factors[i].rows * factors[i].cols;
      T *out = widened = static_cast<T *>(malloc(size_t(total) * sizeof(T)));
      if (!out) return false;
      for (Int i = 0; i < n_factors; i++) {
        const kron_factor &f = p.factors[i];
        if (f.scale) continue; // int8, which is multiplied as it is
        factors[i].data = out;
        for (Int k = 0; k < rank; k++)
          for (Int r = 0; r < f.rows; r++, out += f.cols)
            stored.widen(stored.at(f.data, k * f.rank_stride + r * f.row_stride), f.cols, f.col_stride, out);
      }
      if (bias) {
        stored.widen(bias, bias_size, 1, out);
        bias = out;
      }
    }
    return true;
  }

  Matrix<T> matrix(Int i, Int k) const {
    const kron_factor &f = factors[i];
    return {static_cast<const T *>(f.data) + k * f.rank_stride, f.rows, f.cols, f.row_stride,
            f.col_stride};
  }
  const T *bias_data() const { return static_cast<const T *>(bias); }

  Int inputs() const {
    Int n = 1;
    for (Int i = 0; i < n_factors; i++) n *= factors[i].cols;
    return n;
  }
  Int outputs() const {
    Int m = 1;
    for (Int i = 0; i < n_factors; i++) m *= factors[i].rows;
    return m;
  }

  // Calls body(i, pre, post) for each contraction in turn: of (pre, cols, post) by factor i.
  template <class Body> KRON_INLINE void each_turn(Body body) const {
    Int sizes[KRON_MAX_FACTORS] = {};
    for (Int i = 0; i < n_factors; i++) sizes[i] = factors[i].cols;
    for (Int turn = 0; turn < n_factors; turn++) {
      const Int i = turns[turn];
      Int pre = 1, post = 1;
      for (Int j = 0; j < i; j++) pre *= sizes[j];
      for (Int j = i + 1; j < n_factors; j++) post *= sizes[j];
      body(i, pre, post);
      sizes[i] = factors[i].rows;
    }
  }
  // The longest vector between two contractions.
  KRON_NOINLINE Int middle() const {
    Int longest = 0, left = n_factors;
    each_turn([&](Int i, Int pre, Int post) {
      if (--left) longest = larger(longest, pre * factors[i].rows * post);
    });
    return longest;
  }
  // The longest vector before a contraction.
  Int longest() const { return larger(inputs(), middle()); }
  KRON_NOINLINE Int multiply_adds() const {
    Int sum = 0;
    each_turn([&](Int i, Int pre, Int post) {
      sum += pre * factors[i].cols * post * factors[i].rows;
    });
    return rank * sum;
  }

  // in (n)[tokens] to out (m)[tokens]; `spare` holds two vectors of middle()[tokens].
  template <int NV> KRON_NOINLINE void apply(const T *in, T *out, T *spare) const {
    each_contraction(in, out, spare, middle() * NV * LANES<T>,
                     [](const Matrix<T> &w, const T *from, T *to, Int pre, Int post, bool add) {
                       contract<T, NV>(w, from, to, pre, post, add);
                     });
  }
  // The same for a few tokens, which would leave lanes of tokens empty, in the layout of memory:
  // in (tokens, n) to out (tokens, m). Lanes run along the axes behind the contracted one, or along
  // that one itself. `spare` holds two vectors of middle() and one of longest() for each token.
  KRON_NOINLINE void apply_to_few(Int tokens, const T *in, T *out, T *spare) const {
    const Int size = tokens * middle();
    each_contraction(in, out, spare, size,
                     [=](const Matrix<T> &w, const T *from, T *to, Int pre, Int post, bool add) {
                       contract_numbers<T>(w, from, to, tokens * pre, post, spare + 2 * size, add);
                     });
  }
  // Whether apply_to_few, on one thread, is faster than blocks of tokens on `threads`. Costs are in vector multiply-adds, measured with AVX-512: ending
  // and scattering a tile of sums costs 10 for each lane; blocks of one and two vectors of tokens take
  // 1.45 and 1.15 times as long for each vector as blocks of three.
  KRON_NOINLINE bool few(Int tokens, Int threads) const {
    constexpr int L = LANES<T>;
    if (tokens > 2 * L) return false;
    bool contiguous = true;
    double a_token = 0, a_block = 1.5 * double(inputs() + outputs());
    each_turn([&](Int i, Int pre, Int post) {
      const kron_factor &f = factors[i];
      const double entries = double(pre * f.cols * post);
      const double multiply_adds = double(rank) * entries * double(f.rows);
      contiguous = contiguous && f.col_stride == 1 && !f.scale;
      a_block += multiply_adds;
      if (post > 1 && post % L == 0) {
        a_token += 1.3 * multiply_adds / L;
      } else {
        const double tiles = multiply_adds / double(f.cols) / L;
        a_token += tiles * double((vectors_of<T>(f.cols) + 10) * L) + (post > 1 ? entries : 0);
      }
    });
    const Int units = vectors_of<T>(tokens);
    return contiguous &&
           double(threads * tokens) * a_token < double(units) * a_block * (units == 1 ? 1.45 : 1.15);
  }

private:
  // Calls contract(matrix, from, to, pre, post, accumulate) for each contraction of each term. The
  // vectors between two of them alternate between two pieces of `spare`, of `size` numbers each.
  template <class Contract>
  KRON_INLINE void each_contraction(const T *in, T *out, T *spare, Int size,
                                    Contract contract) const {
    for (Int k = 0; k < rank; k++) {
      const T *from = in;
      Int turn = 0;
      each_turn([&](Int i, Int pre, Int post) {
        const bool last = turn + 1 == n_factors;
        T *to = last ? out : spare + turn % 2 * size;
        contract(matrix(i, k), from, to, pre, post, last && k > 0);
        from = to, turn++;
      });
    }
  }

  T *widened = nullptr;
};

// Scratch memory of one range of blocks. Every number is written before it is read.
template <class T> class Scratch {
public:
  struct Piece {
    T **start;
    Int size;
  };
  template <int N> KRON_NOINLINE explicit Scratch(const Piece (&pieces)[N]) {
    size_t total = 0;
    for (const Piece &p : pieces) total += bytes(p.size);
    memory = allocate(total);
    if (!memory) return;
    char *next = memory;
    for (const Piece &p : pieces) *p.start = reinterpret_cast<T *>(next), next += bytes(p.size);
  }
  Scratch(const Scratch &) = delete;
  ~Scratch() { release(memory); }
  explicit operator bool() const { return memory; }

private:
  static size_t bytes(Int size) { return (size_t(size) * sizeof(T) + 63) / 64 * 64; }
  char *memory;
};

// Sums over tokens: each part of the tokens has its own, and total() adds them in order.
template <class T> class PartialSums {
public:
  PartialSums(Int parts, Int size)
      : parts(parts), size(size),
        memory(static_cast<T *>(calloc(size_t(larger(1, parts * size)), sizeof(T)))) {}
  PartialSums(const PartialSums &) = delete;
  ~PartialSums() { free(memory); }
  explicit operator bool() const { return memory; }
  T *of(Int part) const { return memory + part * size; }
  const T *total() const {
    for (Int part = 1; part < parts; part++)
      for (Int i = 0; i < size; i++) memory[i] += of(part)[i];
    return memory;
  }

private:
  const Int parts, size;
  T *const memory;
};

constexpr double GRAIN = 1e6; // multiply-adds (about 20 us) below which another thread costs time

// The number of threads that so much work keeps busy.
inline Int workers_of(const kron_execution &e, double multiply_adds) {
  const double useful = multiply_adds / GRAIN;
  return larger(1, useful < double(e.threads) ? Int(useful) : e.threads);
}
// The number of parts to divide `units` vectors of tokens into: at most `most`, and no more than make the
// largest part smaller.
inline Int parts_of(Int units, Int most) {
  const Int largest = larger(1, (units + most - 1) / most);
  return larger(1, (units + largest - 1) / largest);
}
inline Int parts_of(const kron_execution &e, Int units, double multiply_adds) {
  return parts_of(units, workers_of(e, multiply_adds));
}

// Calls body(part, first, end) for equal ranges of units, on threads. A body returns false if memory ran
// out.
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

// Divides units, which are vectors of tokens, into blocks of up to MAX_NV, as equal as possible, and
// calls body(std::integral_constant<int, NV>(), first token) for each.
template <class T, class Body> void blocks(Int first, Int end, Body body) {
  while (first < end) {
    const Int left = end - first, blocks = (left + MAX_NV - 1) / MAX_NV;
    const Int nv = (left + blocks - 1) / blocks, token = first * LANES<T>;
    if (nv == 1) body(std::integral_constant<int, 1>(), token);
    else if (nv == 2) body(std::integral_constant<int, 2>(), token);
    else if constexpr (MAX_NV == 3) body(std::integral_constant<int, 3>(), token);
    first += nv;
  }
}
// The lanes of the largest of these blocks.
template <class T> Int lanes_of(Int first, Int end) {
  return smaller(MAX_NV, end - first) * LANES<T>;
}

} // namespace
