// What kernels are given, and the sizes on which they and their launches must agree; plain C++.
#pragma once
#include "../kron.h"

#if defined(__CUDACC__)
#define KRON_BOTH __host__ __device__ inline
#else
#define KRON_BOTH inline
#endif

namespace kron {

// A token's vectors in memory, and how lanes read and write them 16 bytes at a time.
//
// A token is U vectors of K numbers, one after another (entry c of vector u at u K + c) or, where the
// right factor mixes, interleaved (at c U + u). Of 16 contiguous bytes, E numbers, a lane gets RUN
// entries of each of E / RUN vectors: RUN = E if they lie one after another, E / 2 if they are two
// interleaved ones, and 1 if they are E or more. Whatever fits none of that, or is not aligned, goes
// one number at a time: E = RUN = 1.
struct Layout {
  int vectors, length; // U and K
  int interleaved;
  int run; // RUN; 0: one number at a time
};

struct Strides {
  int term, output, input;
};

// dot (terms, N, K), with strides. A column of the product is one of its rows d.
struct Dot {
  int terms, columns, depth; // N columns, K deep
  int term_stride, column_stride, depth_stride;
  int along; // what lies together, 16 bytes aligned: 0 nothing, 1 the depth, 2 the columns
};

struct ForwardArguments {
  struct Product {
    const void *mix, *dot, *bias, *residual;
    void *y;
  } products[KRON_MAX_PRODUCTS];
  int n_products;
  int64_t tokens;
  const void *x;
  Layout in, out; // U vectors of K; O of N
  int terms, vectors;
  int mixes, mix_first; // without a mix U = O = vectors, and mix_first
  Strides mix;
  Dot dot;
  int shift; // columns of a term in a warp: 1 << shift
  int activation;
  int rows, warps_along; // of a block; its warps side by side
  int splits;            // blocks that share the columns of the same tokens
  int steps;             // of the left operand that are in shared memory at a time

  // Gradient of the mix, for a mix that comes last: Σ_t,d other_o[d] z_k,u[d].
  const void *other;      // laid as y, which may be null then
  float *partial;         // (blocks, terms · O · U), k, o and u at the strides
  Strides partial_stride;
};

struct FeedForwardArguments {
  const void *x, *up_mix, *up_dot, *bias, *down_mix, *down_dot, *down_bias, *residual;
  void *y;
  int64_t tokens;
  Layout in, out; // U vectors of K; P of M
  int hidden;     // H
  Strides up_mix_strides, down_mix_strides;
  Dot up, down; // B; B' forward, its transpose (N, M) backward
  int wide;     // bias can be read four columns at a time, and v and dz be written so
  int activation;
  int rows, warps_along;
  int up_steps; // of x, and backward of dy, that are in shared memory at a time

  // Backward. v (T, P, N) and dz (T, U, N) for further products; of each block sums over its tokens
  // (and columns): (shares, column blocks, H, U), (…, P, H) and (shares, H, N).
  const void *dy;
  void *v, *dz;
  float *d_up_mix, *d_down_mix, *d_bias;
  int shares;
};

struct DotGradientArguments {
  struct Side {
    const void *data, *mix; // mix (terms, vectors, layout.vectors), or null: as they are
    Layout layout;
    Strides strides;
  } sides[2]; // left, right
  int64_t tokens;
  int vectors, terms;
  int warps_along;
  int shares;     // of the tokens
  float *partial; // (shares, terms, left's length, right's length)
};

struct SumArguments {
  const float *parts; // (shares, count)
  float *sums;        // (count,)
  int64_t count;
  int shares;
};

// A warp multiplies 32 rows by 64 columns, a step of 64 bytes along which is summed at a time. While
// it does the next step is copied: two stages.
enum { WARP_ROWS = 32, WARP_COLUMNS = 64, STEP_BYTES = 64 };

// Where byte b of a column of a step is. Packets of 16 bytes are exchanged within a column so that
// those of eight columns, read together, and those of two whole columns, written together, lie in
// different banks.
KRON_BOTH int step_offset(int column, int b) {
  return column * STEP_BYTES + (b ^ (column >> 1 & 3) << 4);
}

// Threads of a block at most: six warps, of which two blocks leave 168 registers for a thread.
enum { BLOCK_WARPS = 6, BLOCK_THREADS = BLOCK_WARPS * 32 };

// Bytes between rows of so many steps: an odd number of 16s, so that the rows that are read together
// lie in different banks.
KRON_BOTH int steps_pitch(int steps) { return steps * STEP_BYTES + 16; }
// Of rows of so many columns, which are read across; of 4-byte numbers one by one.
KRON_BOTH int transposed_pitch(int columns, int item) {
  return columns * item + (item == 2 ? 16 : 32);
}
KRON_BOTH int stage_bytes(int columns, int along, int item) {
  return along == 2 ? STEP_BYTES / item * transposed_pitch(columns, item) : columns * STEP_BYTES;
}

// A piece of 16 rows and 64 columns of a warp, in its own place: rows 72 floats apart, so that the
// lanes of arithmetic.h write to different banks.
enum { SLAB_PITCH = WARP_COLUMNS + 8, SLAB_BYTES = 16 * SLAB_PITCH * 4 };

// Floats between rows of a mix: outputs padded with zeros, to be read in packets.
KRON_BOTH int mix_pitch(int outputs) { return (outputs + 7) / 8 * 8; }

// Of few tokens a warp has a column, of which it sums so many rows' products at a time.
enum { SMALL_COLUMNS = 8, SMALL_THREADS = SMALL_COLUMNS * 32, SMALL_ROWS = 8 };
// Floats between rows of what it multiplies: the depth and a packet, against bank conflicts.
KRON_BOTH int small_pitch(int depth) { return (depth + 7) / 8 * 8 + 4; }

// U and P of a feed-forward block are at most MEETING: a lane has them of four columns in registers.
// Of both mixes lies together, for row h of the grid, up's entries, then down's, padded with zeros.
enum { MEETING = 2, MEETING_PITCH = 2 * MEETING, LANE_COLUMNS = 4 };
// Sums over a block's tokens, in a place for each of its warps: of the mixes' gradients
// (H, 2 MEETING) and of the bias's (H, WARP_COLUMNS).
KRON_BOTH int hidden_cells(int hidden) { return hidden * (MEETING_PITCH + WARP_COLUMNS); }

// Rows of either operand in shared memory at a time, for the gradient of a large factor.
KRON_BOTH int gradient_rows(int item) { return 128 / item; }

enum { SUM_THREADS = 256, SUM_SLICES = SUM_THREADS / 32 };

} // namespace kron
