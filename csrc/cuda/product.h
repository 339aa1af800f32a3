// The product of a left operand in shared memory with a large factor, which passes through shared
// memory one step at a time.
#pragma once
#include "arithmetic.h"
#include "left.h"

namespace kron {

// Numbers in a step.
template <class N> inline constexpr int STEP = STEP_BYTES / sizeof(N);

// The columns of a block: 64 for each of its warps side by side, `width` (a power of two) in each of
// `terms` terms.
struct Columns {
  int first, warps, terms, shift; // width = 1 << shift
  KRON_DEVICE int count() const { return warps * WARP_COLUMNS; }
  // The term and the d of column i of the block.
  KRON_DEVICE int term(int i) const { return i % WARP_COLUMNS >> shift; }
  KRON_DEVICE int d(int i) const {
    return first + (i / WARP_COLUMNS << shift) + (i & ((1 << shift) - 1));
  }
};

// Copies columns of dot, STEP entries at a time, into a stage: column by column or, if dot.along == 2,
// transposed, entry by entry. Zeros outside.
template <class N> class Stager {
public:
  // Only the entry that a thread copies changes from step to step, so positions are computed once. The
  // number of threads is a multiple of the packets of eight columns, and of an entry's.
  KRON_DEVICE Stager(const N *dot, const Dot &shape, const Columns &columns)
      : dot(dot), shape(shape), columns(columns) {
    const int i = threadIdx.x, packets = columns.count() / PACKET<N>;
    if (shape.along == 1) {
      column = i / PACKETS, entry = i % PACKETS * PACKET<N>;
      offset = step_offset(column, entry * int(sizeof(N)));
    } else {
      column = i % packets * PACKET<N>, entry = i / packets;
      offset = entry * transposed_pitch(columns.count(), sizeof(N)) + column * int(sizeof(N));
    }
  }

  // Starts to copy entries c … of a term, or of each column's own term.
  KRON_DEVICE void operator()(unsigned char *to, int term, int c) const {
    const N *from = dot + term * shape.term_stride + (c + entry) * shape.depth_stride;
    const int threads = blockDim.x, count = columns.count();
    to += offset;
    if (shape.along == 1) {
      const bool deep = c + entry < shape.depth;
      if (columns.terms == 1) { // then i and d advance together
        from += (columns.first + column) * shape.column_stride;
        const int far = threads / PACKETS * shape.column_stride;
#pragma unroll 4
        for (int i = column; i < count; i += threads / PACKETS) {
          copy_async(to, from, deep && columns.first + i < shape.columns);
          to += threads / PACKETS * STEP_BYTES, from += far;
        }
        return;
      }
#pragma unroll 1
      for (int i = column; i < count; i += threads / PACKETS, to += threads / PACKETS * STEP_BYTES)
        copy_async(to, from + own(i), deep && inside(i));
    } else if (shape.along == 2) {
      const int stride = threads * PACKET<N> / count; // of entries
      const int pitch = stride * transposed_pitch(count, sizeof(N));
      const bool wide = inside(column);
      from += own(column);
#pragma unroll 4
      for (int e = entry; e < STEP<N>; e += stride) {
        copy_async(to, from, wide && c + e < shape.depth);
        to += pitch, from += stride * shape.depth_stride;
      }
    } else {
      to -= offset, from -= entry * shape.depth_stride;
#pragma unroll 1
      for (int i = threadIdx.x; i < count * STEP<N>; i += threads) {
        const int column = i % count, e = i / count;
        N *place = reinterpret_cast<N *>(to + step_offset(column, e * int(sizeof(N))));
        *place = inside(column) && c + e < shape.depth ? from[own(column) + e * shape.depth_stride]
                                                       : N{};
      }
    }
  }

private:
  static constexpr int PACKETS = STEP_BYTES / 16;
  const N *dot;
  const Dot &shape;
  const Columns &columns;
  int column, entry, offset; // the first of this thread's packets

  KRON_DEVICE bool inside(int i) const {
    return columns.term(i) < columns.terms && columns.d(i) < shape.columns;
  }
  KRON_DEVICE int own(int i) const {
    return columns.term(i) * shape.term_stride + columns.d(i) * shape.column_stride;
  }
};

// A warp's sums: piece of 16 rows, piece of 8 columns, and a lane's four numbers.
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
        M::load_right(columns, right + step_offset(i * 8, 0), depth, lane);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        M::multiply(sums[0][i + j], rows[0], columns[j]);
        M::multiply(sums[1][i + j], rows[1], columns[j]);
      }
    }
  }
}

// The position of a warp in its block.
struct Place {
  int lane, row, column; // row and column count warps
  KRON_DEVICE explicit Place(int warps_along)
      : lane(threadIdx.x % 32), row(threadIdx.x / 32 / warps_along),
        column(threadIdx.x / 32 % warps_along) {}
};

// Adds left (the block's rows, steps · STEP numbers) times dot's columns. where(step, term) returns the
// first entry of a step of dot and, unless the columns have their own terms, its term. left may have
// copies of this thread that are not committed yet.
template <class M, class Where>
KRON_DEVICE void multiply(Sums &sums, const Tile &left, unsigned char *stages,
                          const typename M::Number *dot, const Dot &shape, const Columns &columns,
                          const Place &place, int steps, Where where) {
  using N = typename M::Number;
  const bool transposed = shape.along == 2;
  const int count = columns.count(), bytes = stage_bytes(count, shape.along, sizeof(N));
  const int pitch = transposed ? transposed_pitch(count, sizeof(N)) : int(STEP_BYTES);
  const unsigned char *rows = left.data + place.row * WARP_ROWS * left.pitch;
  const unsigned char *right =
      stages + place.column * WARP_COLUMNS * (transposed ? int(sizeof(N)) : pitch);
  const Stager<N> stage(dot, shape, columns);
#pragma unroll 1
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      copies_wait<0>();
      __syncthreads(); // the step has arrived, and no thread reads the other stage
    }
    if (step + 1 < steps) {
      int term = 0;
      const int c = where(step + 1, term);
      stage(stages + (step + 1) % 2 * bytes, term, c);
    }
    copies_commit();
    if (step < 0) continue;
    const unsigned char *here = right + step % 2 * bytes;
    if (transposed)
      multiply_step<M, true>(sums, rows + step * STEP_BYTES, left.pitch, here, pitch, place.lane);
    else
      multiply_step<M, false>(sums, rows + step * STEP_BYTES, left.pitch, here, pitch, place.lane);
  }
  __syncthreads(); // the stages may be reused, and left filled again
}

} // namespace kron
