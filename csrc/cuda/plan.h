// Plans launches: which factor mixes, and the tiles. Plain C++.
#pragma once
#include "arguments.h"
#include "runtime.h"

namespace kron {

// A factor in a role, possibly transposed.
struct Role {
  const kron_factor *factor;
  bool transposed;
  int64_t rows() const { return transposed ? factor->cols : factor->rows; }
  int64_t cols() const { return transposed ? factor->rows : factor->cols; }
  int64_t row_stride() const { return transposed ? factor->col_stride : factor->row_stride; }
  int64_t col_stride() const { return transposed ? factor->row_stride : factor->col_stride; }
};

// dot (terms, N, K) multiplies and mix (terms, O, U) mixes; see forward.h.
struct Geometry {
  Role mix, dot;
  int64_t terms;
  bool interleaved; // the mix is the right factor
  bool mix_first;
  int64_t vectors() const { return mix_first ? mix.rows() : mix.cols(); }
  // The transposed product: mix first and mix last change places.
  Geometry transposed() const {
    return {{mix.factor, !mix.transposed}, {dot.factor, !dot.transposed}, terms, interleaved,
            !mix_first};
  }
};

// Finds the geometry, or returns why these kernels cannot compute the product.
const char *find_geometry(const kron_product &, Geometry &);

// The shape of a launch, part of which goes into the kernel's arguments.
struct Shape {
  int rows, warps_along, threads, splits, steps;
  int64_t grid, shared;
};

struct Problem {
  int64_t tokens, products;
  int item; // bytes of a number
  Device device;
};

bool plan_small(const Problem &, const ForwardArguments &, Shape &);
Shape plan_forward(const Problem &, const ForwardArguments &, bool gradient);
Shape plan_dot_gradient(const Problem &, int64_t n, int64_t m, int64_t terms, int64_t vectors,
                        int64_t mix_size);
bool plan_feed_forward(const Problem &, const FeedForwardArguments &, bool backward, Shape &);

} // namespace kron
