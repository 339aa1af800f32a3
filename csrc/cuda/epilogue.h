// The epilogue of a product: its sums pass through shared memory piece by piece, where the vectors of a
// token are together. There they are mixed and finished with bias, activation and residual.
#pragma once
#include "activation.h"
#include "product.h"

namespace kron {

// The position of a column in a slab. The packets of the second half are swapped in pairs: lanes that
// read eight columns each, four at a time, access different banks.
KRON_DEVICE int slab_column(int column) { return column ^ (column >> 3 & 4); }

template <int COUNT> KRON_DEVICE void load_slab(float (&values)[COUNT], const float *row, int column) {
  const int at = slab_column(column);
  if constexpr (COUNT == 8) {
    float half[2][4];
    load_floats(half[0], row + at), load_floats(half[1], row + (at ^ 4));
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = half[i / 4][i % 4];
  } else {
    load_floats(values, row + at);
  }
}

// By one warp. The caller does __syncwarp before and after.
KRON_DEVICE void store_slab(float *slab, const float (&sums)[WARP_COLUMNS / 8][4], int lane) {
  const Lane l = lane_of(lane);
#pragma unroll
  for (int i = 0; i < WARP_COLUMNS / 8; i++) {
    float *to = slab + l.row * SLAB_PITCH + slab_column(i * 8 + l.pair * 2);
    *reinterpret_cast<float2 *>(to) = make_float2(sums[i][0], sums[i][1]);
    *reinterpret_cast<float2 *>(to + 8 * SLAB_PITCH) = make_float2(sums[i][2], sums[i][3]);
  }
}

// The tokens of a piece of rows, and the columns of a warp.
struct Piece {
  int tokens, vectors;  // existing tokens; rows of a token
  int first, columns;   // d of the first column; N
  int shift, terms;     // columns of a term: 1 << shift
};

// Calls f(token, o, column) for VECTORS outputs from o on and RUN columns each, over a whole piece,
// with this many lanes.
template <class A, class F>
KRON_DEVICE void for_packets(const Piece &piece, int outputs, int lane, int lanes, F f) {
  constexpr int RUN = A::ENTRIES;
  const int shift = piece.shift - LOG2<RUN>, runs = 1 << shift;
  const int groups = (outputs + A::VECTORS - 1) / A::VECTORS;
  const int stride = max(1, lanes >> shift), start = lane >> shift;
  const int tokens_on = stride / groups, groups_on = stride % groups;
#pragma unroll 1
  for (int run = lane & (runs - 1); run < runs; run += lanes) {
    if (piece.first + run * RUN >= piece.columns) break;
    int token = start / groups, group = start % groups;
#pragma unroll 1
    for (; token < piece.tokens; token += tokens_on) {
      f(token, group * A::VECTORS, run * RUN);
      if ((group += groups_on) >= groups) group -= groups, token++;
    }
  }
}

// Sums COUNT numbers, a power of two, over a warp's lanes; returns that of number lane / (32 / COUNT).
template <int COUNT, int BIT = 16>
KRON_DEVICE float sum_over_lanes(const float (&values)[COUNT], int lane) {
  if constexpr (COUNT > 1) {
    float half[COUNT / 2];
    const bool upper = lane & BIT;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++)
      half[i] = (upper ? values[i + COUNT / 2] : values[i]) +
                shuffle_xor(upper ? values[i] : values[i + COUNT / 2], BIT);
    return sum_over_lanes<COUNT / 2, BIT / 2>(half, lane);
  } else {
    float sum = values[0];
#pragma unroll
    for (int bit = BIT; bit > 0; bit /= 2) sum += shuffle_xor(sum, bit);
    return sum;
  }
}

template <class N> struct Output {
  N *y;              // of the piece's first token
  const N *residual; // the same, or null
  const N *bias;     // or null
  Layout layout;
  int activation;
};

// act(values + bias) + residual for NUMBERS contiguous features of a token; if PLAIN, only values.
template <bool PLAIN, class N, int NUMBERS>
KRON_DEVICE void finish(float (&values)[NUMBERS], const Output<N> &out, int token, int feature) {
  if (!PLAIN && out.bias) {
    float bias[NUMBERS];
    load(bias, out.bias + feature);
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) values[i] += bias[i];
  }
  if (!PLAIN && out.activation != KRON_NONE)
    with_activation(out.activation, [&](auto activation) {
#pragma unroll
      for (float &value : values) value = activation.value(value);
    });
  const int64_t at = int64_t(token) * (out.layout.vectors * out.layout.length) + feature;
  if (!PLAIN && out.residual) {
    float residual[NUMBERS];
    load(residual, out.residual + at);
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) values[i] += residual[i];
  }
  store(out.y + at, values);
}

// Writes y for a piece of rows in a slab. The rows are outputs, or inputs of a mix (terms · rows x
// pitch, see left.h).
template <bool PLAIN = false, class N>
KRON_DEVICE void write_piece(const float *slab, const Piece &piece, const float *mix, int pitch,
                             const Output<N> &out, int lane, int lanes = 32) {
  with_access<N>(out.layout.run, [&](auto access) {
    using A = decltype(access);
    constexpr int RUN = A::ENTRIES, VECTORS = A::VECTORS;
    const auto row = [&](int token, int v) {
      return slab + (token * piece.vectors + v) * SLAB_PITCH;
    };
    const int inputs = mix ? piece.terms * piece.vectors : 0;
    if (inputs && inputs <= 2) { // the inputs stay in registers
      for_packets<A>(piece, VECTORS, lane, lanes, [&](int token, int, int column) {
        float z[2][RUN] = {};
        load_slab(z[0], row(token, 0), column);
        if (piece.vectors == 2)
          load_slab(z[1], row(token, 1), column);
        else if (piece.terms == 2)
          load_slab(z[1], row(token, 0), column + (1 << piece.shift));
#pragma unroll 1
        for (int o = 0; o < out.layout.vectors; o += VECTORS) {
          float m[2][VECTORS] = {}, values[A::NUMBERS];
          load_floats(m[0], mix + o);
          if (inputs == 2) load_floats(m[1], mix + pitch + o);
#pragma unroll
          for (int e = 0; e < RUN; e++)
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
              values[e * VECTORS + v] = m[0][v] * z[0][e] + m[1][v] * z[1][e];
          finish<PLAIN>(values, out, token, offset_of(out.layout, o, piece.first + column));
        }
      });
      return;
    }
    for_packets<A>(piece, out.layout.vectors, lane, lanes, [&](int token, int o, int column) {
      float values[A::NUMBERS] = {};
#pragma unroll 2
      for (int i = 0; i < inputs; i++) {
        const int k = i / piece.vectors, u = i % piece.vectors;
        float z[RUN], m[VECTORS];
        load_slab(z, row(token, u), (k << piece.shift) + column);
        load_floats(m, mix + i * pitch + o);
#pragma unroll
        for (int e = 0; e < RUN; e++)
#pragma unroll
          for (int v = 0; v < VECTORS; v++) values[e * VECTORS + v] += m[v] * z[e];
      }
      if (!inputs) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
          float z[RUN];
          load_slab(z, row(token, o + v), column);
#pragma unroll
          for (int e = 0; e < RUN; e++) values[e * VECTORS + v] = z[e];
        }
      }
      finish<PLAIN>(values, out, token, offset_of(out.layout, o, piece.first + column));
    });
  });
}

} // namespace kron
