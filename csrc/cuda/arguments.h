// The kernels' arguments, and sizes shared by kernels and launches; plain C++.
#pragma once
#include "../kron.h"

#if defined(__CUDACC__)
#define KRON_BOTH __host__ __device__ inline
#else
#define KRON_BOTH inline
#endif

namespace kron {

// The layout of a token's vectors in memory, and how lanes read and write them 16 bytes at a time.
//
// A token is U vectors of K numbers. They are consecutive (entry c of vector u is at u K + c) or, if
// the right factor mixes, interleaved (at c U + u). In 16 contiguous bytes, E numbers, a lane gets RUN
// entries of each of E / RUN vectors: RUN = E for consecutive vectors, E / 2 for two interleaved ones,
// and 1 for E or more. Any other number of vectors, and unaligned memory, is accessed one number at a
// time: E = RUN = 1.
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
  int along; // contiguous and aligned to 16 bytes: 0 neither, 1 the depth, 2 the columns
};

struct ForwardArguments {
  struct Product {
    const void *mix, *dot, *bias, *residual;
    void *y;
  } products[KRON_MAX_PRODUCTS];
  int n_products;
  int64_t tokens;
  const void *x;
  Layout in, out; // U vectors of length K; O of N
  int terms, vectors;
  int mixes, mix_first; // without a mix: U = O = vectors and mix_first
  Strides mix;
  Dot dot;
  int shift; // columns of a term in a warp: 1 << shift
  int activation;
  int rows, warps_along; // of a block; warps side by side
  int splits;            // blocks that divide the columns of the same tokens
  int steps;             // of the left operand in shared memory at a time

  // The gradient of a mix that comes last: Σ_t,d other_o[d] z_k,u[d].
  const void *other;      // with the layout of y, which may then be null
  float *partial;         // (blocks, terms · O · U), indexed by k, o and u with the strides
  Strides partial_stride;
};

struct FeedForwardArguments {
  const void *x, *up_mix, *up_dot, *bias, *down_mix, *down_dot, *down_bias, *residual;
  void *y;
  int64_t tokens;
  Layout in, out; // U vectors of length K; P of M
  int hidden;     // H
  Strides up_mix_strides, down_mix_strides;
  Dot up, down; // B; B' forward, its transpose (N, M) backward
  int wide;     // whether bias is read, and v and dz are written, four columns at a time
  int activation;
  int rows, warps_along;
  int up_steps; // of x, and in the backward of dy, in shared memory at a time

  // Backward: v (T, P, N) and dz (T, U, N) for further products; each block's sums over its tokens
  // (and columns): (shares, column blocks, H, U), (…, P, H) and (shares, H, N).
  const void *dy;
  void *v, *dz;
  float *d_up_mix, *d_down_mix, *d_bias;
  int shares;
};

struct DotGradientArguments {
  struct Side {
    const void *data, *mix; // mix (terms, vectors, layout.vectors), or null: not mixed
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

// A warp multiplies 32 rows by 64 columns, in steps of 64 bytes along the depth. The next step is
// copied meanwhile: two stages.
enum { WARP_ROWS = 32, WARP_COLUMNS = 64, STEP_BYTES = 64 };

// The position of byte b of a column in a step. Packets of 16 bytes are permuted within a column:
// the packets of eight columns, which are read together, and those of two whole columns, which are
// written together, are in different banks.
KRON_BOTH int step_offset(int column, int b) {
  return column * STEP_BYTES + (b ^ (column >> 1 & 3) << 4);
}

// The most threads of a block: six warps. Two blocks leave 168 registers for each thread.
enum { BLOCK_WARPS = 6, BLOCK_THREADS = BLOCK_WARPS * 32 };

// Bytes between rows of this many steps: an odd multiple of 16, which puts rows that are read together
// in different banks.
KRON_BOTH int steps_pitch(int steps) { return steps * STEP_BYTES + 16; }
// The same for rows that are read across; 4-byte numbers are read one by one.
KRON_BOTH int transposed_pitch(int columns, int item) {
  return columns * item + (item == 2 ? 16 : 32);
}
KRON_BOTH int stage_bytes(int columns, int along, int item) {
  return along == 2 ? STEP_BYTES / item * transposed_pitch(columns, item) : columns * STEP_BYTES;
}

// A slab has 16 rows and 64 columns of a warp. Its rows are 72 floats apart, so the lanes of
// arithmetic.h write to different banks.
enum { SLAB_PITCH = WARP_COLUMNS + 8, SLAB_BYTES = 16 * SLAB_PITCH * 4 };

// Floats between rows of a mix: outputs are padded with zeros, to be read in packets.
KRON_BOTH int mix_pitch(int outputs) { return (outputs + 7) / 8 * 8; }

// For few tokens a warp has one column, and sums the products of this many rows at a time.
enum { SMALL_COLUMNS = 8, SMALL_THREADS = SMALL_COLUMNS * 32, SMALL_ROWS = 8 };
// Floats between its rows: the depth and a packet, against bank conflicts.
KRON_BOTH int small_pitch(int depth) { return (depth + 7) / 8 * 8 + 4; }

// U and P of a feed-forward block are at most MEETING: a lane keeps those of four columns in registers.
// For each row h of the grid, up's entries of the mixes and then down's are stored together, padded
// with zeros.
enum { MEETING = 2, MEETING_PITCH = 2 * MEETING, LANE_COLUMNS = 4 };
// Sums over a block's tokens, separate for each warp: the gradients of the mixes (H, 2 MEETING) and of
// the bias (H, WARP_COLUMNS).
KRON_BOTH int hidden_cells(int hidden) { return hidden * (MEETING_PITCH + WARP_COLUMNS); }

// For the gradient of a large factor: rows of each operand in shared memory at a time.
KRON_BOTH int gradient_rows(int item) { return 128 / item; }

enum { SUM_THREADS = 256, SUM_SLICES = SUM_THREADS / 32 };

} // namespace kron
