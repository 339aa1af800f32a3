// The forward of a few tokens, optimised for latency: many blocks, each of which reads the factors of
// eight columns once, in packets of 16 bytes, and sums without tensor cores.
#pragma once
#include "forward.h"

namespace kron {

// Shared memory: the mix; rows (t, v) of floats, mixed if the mix comes first, term by term; a slab
// with as many rows. ROWS rows are summed at a time.
template <class M, int ROWS> KRON_DEVICE void small_forward(const ForwardArguments &a) {
  using N = typename M::Number;
  constexpr int E = PACKET<N>;
  const int which = blockIdx.x % a.n_products;
  const int first = blockIdx.x / a.n_products * SMALL_COLUMNS;
  const ForwardArguments::Product &p = a.products[which];
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32, d = first + column;
  const int tokens = int(a.tokens), count = tokens * a.vectors;
  const int outputs = a.out.vectors, inputs = a.in.vectors, mixed = mix_pitch(outputs);
  const int depth_terms = a.mix_first ? a.terms : 1, column_terms = a.mix_first ? 1 : a.terms;
  const int length = small_pitch(a.in.length), pitch = depth_terms * length;

  float *mix = reinterpret_cast<float *>(shared_memory());
  float *rows = mix + (a.mixes ? a.terms * inputs * mixed : 0);
  float *slab = rows + (count + ROWS - 1) / ROWS * ROWS * pitch;
  if (a.mixes)
    load_mix(mix, static_cast<const N *>(p.mix), a.terms, outputs, inputs, a.mix.term, a.mix.output,
             a.mix.input);
  __syncthreads();
  with_access<N>(a.in.run, [&](auto access) {
    using A = decltype(access);
    constexpr int RUN = A::ENTRIES;
    const Source<N> source = {static_cast<const N *>(a.x), tokens, a.in};
    const bool mixes = a.mixes && a.mix_first;
    const int runs = length / RUN; // the last one extends beyond the end
#pragma unroll 1
    for (int i = threadIdx.x; i < depth_terms * count * runs; i += blockDim.x) {
      const int c = i % runs * RUN, row = i / runs % count, k = i / runs / count;
      const int token = row / a.vectors, o = row % a.vectors;
      float z[RUN] = {};
#pragma unroll 1
      for (int u = 0; c < a.in.length && u < inputs; u += A::VECTORS) {
        float x[A::NUMBERS];
        load(x, source.at(token, c) + u * source.stride());
#pragma unroll
        for (int v = 0; v < A::VECTORS; v++) {
          const float m = mixes ? mix[(k * inputs + u + v) * mixed + o] : u + v == o ? 1.f : 0.f;
#pragma unroll
          for (int e = 0; e < RUN; e++)
            if (mixes || m != 0.f) z[e] += m * x[e * A::VECTORS + v];
        }
      }
      float *to = rows + row * pitch + k * length + c;
#pragma unroll
      for (int e = 0; e < RUN; e++) to[e] = z[e];
    }
  });
  __syncthreads();

  const N *dot = static_cast<const N *>(p.dot) + d * a.dot.column_stride;
#pragma unroll 1
  for (int k = 0; d < a.dot.columns && k < column_terms; k++)
#pragma unroll 1
    for (int row = 0; row < count; row += ROWS) {
      float sums[ROWS] = {};
#pragma unroll 1
      for (int term = k; term < k + depth_terms; term++) {
        const N *from = dot + term * a.dot.term_stride;
        const float *left = rows + row * pitch + (term - k) * length;
#pragma unroll 2
        for (int c = lane * E; c < a.in.length; c += 32 * E) {
          float f[E];
          load(f, from + c);
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            float z[E];
            load_floats(z, left + r * pitch + c);
#pragma unroll
            for (int e = 0; e < E; e++) sums[r] += f[e] * z[e];
          }
        }
      }
      const float sum = sum_over_lanes(sums, lane);
      const int r = row + lane / (32 / ROWS);
      if (lane % (32 / ROWS) == 0 && r < count)
        slab[r * SLAB_PITCH + slab_column(k * SMALL_COLUMNS + column)] = sum;
    }
  __syncthreads();
  const Piece piece = {tokens, a.vectors, first, a.dot.columns, 3, column_terms};
  const Output<N> out = {static_cast<N *>(p.y), static_cast<const N *>(p.residual),
                         static_cast<const N *>(p.bias), a.out, a.activation};
  write_piece(slab, piece, a.mix_first ? nullptr : mix, mixed, out, threadIdx.x, blockDim.x);
}

} // namespace kron
