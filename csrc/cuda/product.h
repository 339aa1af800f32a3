// The product of a left operand, which is in shared memory, with a large factor, which passes through
// it a step at a time.
#pragma once
#include "left.h"
#include "math.h"

namespace kron {

// Numbers in a step.
template <class N> inline constexpr int STEP = STEP_BYTES / sizeof(N);

// Which columns a block multiplies: each of its warps side by side 64, which are `width` (a power of
// two) of each of `terms` terms.
struct Columns {
  int first, warps, terms, shift; // width = 1 << shift
  KRON_DEVICE int width() const { return 1 << shift; }
  KRON_DEVICE int count() const { return warps * WARP_COLUMNS; }
  // Of column i of the block: its term, and d.
  KRON_DEVICE int term(int i) const { return i % WARP_COLUMNS >> shift; }
  KRON_DEVICE int d(int i) const {
    return first + (i / WARP_COLUMNS << shift) + (i & (width() - 1));
  }
};

// Begins to copy columns of dot, entries c … c + STEP, into a stage: column by column, or for
// dot.along == 2 transposed, entry by entry. Zeros where there is nothing.
template <class N>
KRON_DEVICE void stage(unsigned char *to, const N *dot, const Dot &shape, const Columns &columns,
                       int c) {
  constexpr int E = PACKET<N>, PACKETS = STEP_BYTES / 16;
  const int threads = blockDim.x, count = columns.count();
  const auto copy = [&](unsigned char *place, int column, int entry, int depth) {
    const int term = columns.term(column), d = columns.d(column);
    const bool inside = term < columns.terms && d < shape.columns && depth < shape.depth;
    const N *from = dot + term * shape.term_stride + d * shape.column_stride +
                    depth * shape.depth_stride;
    if (entry) {
      *reinterpret_cast<N *>(place) = inside ? *from : N{};
    } else if (inside) {
      copy_async(place, from);
    } else {
      *reinterpret_cast<uint4 *>(place) = make_uint4(0, 0, 0, 0);
    }
  };
  if (shape.along == 1) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * PACKETS; i += threads)
      copy(to + i / PACKETS * STEP_PITCH + i % PACKETS * 16, i / PACKETS, 0, c + i % PACKETS * E);
  } else if (shape.along == 2) {
    const int packets = count / E, pitch = transposed_pitch(count, sizeof(N));
#pragma unroll 1
    for (int i = threadIdx.x; i < packets * STEP<N>; i += threads)
      copy(to + i / packets * pitch + i % packets * 16, i % packets * E, 0, c + i / packets);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * STEP<N>; i += threads)
      copy(to + i % count * STEP_PITCH + i / count * int(sizeof(N)), i % count, 1, c + i / count);
  }
}

// Sums of a warp's rows and columns: piece of 16 rows, piece of 8 columns, math.h's four.
using Sums = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

KRON_DEVICE void clear(Sums &sums) {
#pragma unroll
  for (auto &row : sums)
#pragma unroll
    for (auto &piece : row)
#pragma unroll
      for (float &x : piece) x = 0.f;
}

// Adds one step: left at the warp's rows and the step's first byte, right at the warp's columns.
template <class M, bool TRANSPOSED>
KRON_DEVICE void multiply_step(Sums &sums, const unsigned char *left, int left_pitch,
                               const unsigned char *right, int right_pitch, int lane) {
  using N = typename M::Number;
#pragma unroll M::UNROLL
  for (int depth = 0; depth < STEP_BYTES; depth += M::DEPTH) {
    typename M::Left rows[2];
    rows[0] = M::load_left(left + depth, left_pitch, lane);
    rows[1] = M::load_left(left + 16 * left_pitch + depth, left_pitch, lane);
#pragma unroll
    for (int i = 0; i < WARP_COLUMNS / 8; i += 2) {
      typename M::Right columns[2];
      if constexpr (TRANSPOSED)
        M::load_right_transposed(
            columns, right + depth / int(sizeof(N)) * right_pitch + i * 8 * int(sizeof(N)),
            right_pitch, lane);
      else
        M::load_right(columns, right + i * 8 * right_pitch + depth, right_pitch, lane);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        M::multiply(sums[0][i + j], rows[0], columns[j]);
        M::multiply(sums[1][i + j], rows[1], columns[j]);
      }
    }
  }
}

// Where a warp of a block is.
struct Place {
  int lane, row, column; // row and column count warps
  KRON_DEVICE explicit Place(int warps_along)
      : lane(threadIdx.x % 32), row(threadIdx.x / 32 / warps_along),
        column(threadIdx.x / 32 % warps_along) {}
};

// Adds left (the block's rows, steps · STEP numbers) times dot's columns. where(step, term) says
// from which entry on, and of which term if the columns have none, a step of dot is. left may still
// be on its way by copies of this thread that are not committed.
template <class M, class Where>
KRON_DEVICE void multiply(Sums &sums, const Tile &left, unsigned char *stages,
                          const typename M::Number *dot, const Dot &shape, const Columns &columns,
                          const Place &place, int steps, Where where) {
  using N = typename M::Number;
  const bool transposed = shape.along == 2;
  const int count = columns.count(), bytes = stage_bytes(count, shape.along, sizeof(N));
  const int pitch = transposed ? transposed_pitch(count, sizeof(N)) : int(STEP_PITCH);
  const unsigned char *rows = left.data + place.row * WARP_ROWS * left.pitch;
  const unsigned char *right =
      stages + place.column * WARP_COLUMNS * (transposed ? int(sizeof(N)) : pitch);
#pragma unroll 1
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      copies_wait<0>();
      __syncthreads(); // the step is there, and nobody reads the other stage any more
    }
    if (step + 1 < steps) {
      int term = 0;
      const int c = where(step + 1, term);
      stage(stages + (step + 1) % 2 * bytes, dot + term * shape.term_stride, shape, columns, c);
    }
    copies_commit();
    if (step < 0) continue;
    const unsigned char *here = right + step % 2 * bytes;
    if (transposed)
      multiply_step<M, true>(sums, rows + step * STEP_BYTES, left.pitch, here, pitch, place.lane);
    else
      multiply_step<M, false>(sums, rows + step * STEP_BYTES, left.pitch, here, pitch, place.lane);
  }
  __syncthreads(); // the stages may be used for something else, and left filled anew
}

} // namespace kron
