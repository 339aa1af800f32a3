// y = act((Σ_k A_k ⊗ B_k) x + bias) + residual, for one x and up to four products.
//
// One factor is dot (terms, N, K), the other the mix (terms, O, U): see docs/kernels/cuda.md. If the mix
// comes first, a block mixes its tokens on the way to shared memory, and the terms are consecutive along
// the depth. Otherwise it copies them, the terms are columns side by side, and it mixes the results.
#pragma once
#include "epilogue.h"

namespace kron {

// Adds Σ_t,d other_o[d] z_k,u[d] of a piece to the warp's cells (k, u, o).
template <class N>
KRON_DEVICE void contract_piece(const float *slab, const Piece &piece, const N *other,
                                const Layout &layout, float *cells, int pitch, int lane) {
  const int size = layout.vectors * layout.length;
  with_access<N>(layout.run, [&](auto access) {
    using A = decltype(access);
    constexpr int RUN = A::ENTRIES, VECTORS = A::VECTORS;
    constexpr int OUTPUTS = VECTORS > 4 ? VECTORS : 4, INPUTS = 2; // at a time, in registers
    const int runs = (1 << piece.shift) / RUN;
#pragma unroll 1
    for (int k = 0; k < piece.terms; k++)
#pragma unroll 1
      for (int u = 0; u < piece.vectors; u += INPUTS) {
        const int next = u + 1 < piece.vectors ? u + 1 : u;
#pragma unroll 1
        for (int o = 0; o < layout.vectors; o += OUTPUTS) {
          float sums[OUTPUTS * INPUTS] = {};
#pragma unroll 1
          for (int j = lane; j < piece.tokens * runs; j += 32) {
            const int token = j / runs, column = j % runs * RUN, d = piece.first + column;
            if (d >= piece.columns) continue;
            const float *rows = slab + token * piece.vectors * SLAB_PITCH;
            float z[INPUTS][RUN];
            load_slab(z[0], rows + u * SLAB_PITCH, (k << piece.shift) + column);
            load_slab(z[1], rows + next * SLAB_PITCH, (k << piece.shift) + column);
#pragma unroll
            for (int g = 0; g < OUTPUTS; g += VECTORS) {
              if (o + g >= layout.vectors) continue;
              float values[A::NUMBERS];
              load(values, other + int64_t(token) * size + offset_of(layout, o + g, d));
#pragma unroll
              for (int e = 0; e < RUN; e++)
#pragma unroll
                for (int v = 0; v < VECTORS; v++)
#pragma unroll
                  for (int w = 0; w < INPUTS; w++)
                    sums[(g + v) * INPUTS + w] += values[e * VECTORS + v] * z[w][e];
            }
          }
          const float sum = sum_over_lanes(sums, lane);
          constexpr int LANES = 32 / (OUTPUTS * INPUTS); // for each sum
          const int which = lane / LANES, to = o + which / INPUTS, from = u + which % INPUTS;
          if (lane % LANES == 0 && to < layout.vectors && from < piece.vectors)
            cells[(k * piece.vectors + from) * pitch + to] += sum;
        }
      }
  });
}

// Shared memory: the mix; the cells of each warp (GRADIENT); left; the stages, which become slabs.
template <class M, bool GRADIENT> KRON_DEVICE void forward(const ForwardArguments &a) {
  using N = typename M::Number;
  const int which = blockIdx.x % a.n_products, share = blockIdx.x / a.n_products;
  const int split = share % a.splits;
  const ForwardArguments::Product &p = a.products[which];
  const Place place(a.warps_along);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const Rows rows(a.vectors);
  const int block_tokens = a.rows / 16 * rows.tokens;

  const int outputs = a.out.vectors, inputs = a.in.vectors, pitch = mix_pitch(outputs);
  const int mix_size = a.mixes ? a.terms * inputs * pitch : 0;
  float *mix = reinterpret_cast<float *>(shared_memory()), *cells = mix + mix_size;
  const int cell_size = GRADIENT ? a.terms * inputs * pitch : 0;
  Tile left = {reinterpret_cast<unsigned char *>(cells + warps * cell_size), steps_pitch(a.steps),
               0, 0};
  unsigned char *stages = left.data + a.rows * left.pitch;
  float *slab = reinterpret_cast<float *>(stages + warp * SLAB_BYTES);
  if (a.mixes)
    load_mix(mix, static_cast<const N *>(p.mix), a.terms, outputs, inputs, a.mix.term, a.mix.output,
             a.mix.input);
  if constexpr (GRADIENT)
#pragma unroll 1
    for (int i = threadIdx.x; i < warps * cell_size; i += blockDim.x) cells[i] = 0.f;
  __syncthreads();

  // Steps of a term, and number of terms, along the depth.
  const int term_steps = (a.in.length + STEP<N> - 1) / STEP<N>;
  const int depth_terms = a.mix_first ? a.terms : 1, steps = depth_terms * term_steps;
  const int width = 1 << a.shift, block_width = a.warps_along * width;
  const int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  const int64_t stride = gridDim.x / a.n_products / a.splits;
#pragma unroll 1
  for (int64_t block = share / a.splits; block < blocks; block += stride) {
    const int64_t first = block * block_tokens;
    const int live = int(a.tokens - first < block_tokens ? a.tokens - first : block_tokens);
    const int in_size = inputs * a.in.length, out_size = outputs * a.out.length;
    const Source<N> source = {static_cast<const N *>(a.x) + first * in_size, live, a.in};
    // Fills left with steps from … to, term by term.
    const auto fill = [&](int from, int to) {
#pragma unroll 1
      for (int k = from / term_steps; k * term_steps < to; k++) {
        const int begin = max(from, k * term_steps), end = min(to, (k + 1) * term_steps);
        const Tile tile = {left.data + (begin - from) * STEP_BYTES, left.pitch,
                           (begin - k * term_steps) * STEP<N>, (end - begin) * STEP<N>};
        if (a.mixes && a.mix_first)
          fill_mixed(tile, rows, block_tokens, source, {mix + k * inputs * pitch, outputs, pitch});
        else
          fill_copied(tile, rows, block_tokens, source);
      }
    };
#pragma unroll 1
    for (int d = split * block_width; d < a.dot.columns; d += a.splits * block_width) {
      const Columns columns = {d, a.warps_along, a.mix_first ? 1 : a.terms, a.shift};
      Sums sums;
      clear(sums);
#pragma unroll 1
      for (int from = 0; from < steps; from += a.steps) {
        const int to = min(steps, from + a.steps);
        if (a.steps < steps || d == split * block_width) fill(from, to);
        multiply<M>(sums, left, stages, static_cast<const N *>(p.dot), a.dot, columns, place,
                    to - from, [&](int step, int &term) {
                      if (depth_terms > 1) term = (from + step) / term_steps;
                      return (from + step - term * term_steps) * STEP<N>;
                    });
      }
#pragma unroll 1
      for (int i = 0; i < WARP_ROWS / 16; i++) {
        const int before = (place.row * (WARP_ROWS / 16) + i) * rows.tokens;
        const Piece piece = {min(rows.tokens, live - before), rows.vectors,
                             d + place.column * width, a.dot.columns, a.shift, columns.terms};
        const int64_t token = (first + before) * out_size;
        if (i == 0)
          store_slab(slab, sums[0], place.lane);
        else
          store_slab(slab, sums[1], place.lane);
        __syncwarp();
        if (!GRADIENT || p.y) {
          const N *residual = static_cast<const N *>(p.residual);
          const Output<N> out = {static_cast<N *>(p.y) + token,
                                 residual ? residual + token : nullptr,
                                 static_cast<const N *>(p.bias), a.out, a.activation};
          write_piece<GRADIENT>(slab, piece, a.mix_first ? nullptr : mix, pitch, out, place.lane);
        }
        if constexpr (GRADIENT)
          contract_piece(slab, piece, static_cast<const N *>(a.other) + token, a.out,
                         cells + warp * cell_size, pitch, place.lane);
        __syncwarp();
      }
      __syncthreads(); // the slabs become stages
    }
    __syncthreads(); // left is filled again
  }
  if constexpr (GRADIENT) {
    float *to = a.partial + int64_t(blockIdx.x) * (a.terms * outputs * inputs);
#pragma unroll 1
    for (int i = threadIdx.x; i < a.terms * inputs * outputs; i += blockDim.x) {
      const int o = i % outputs, u = i / outputs % inputs, k = i / outputs / inputs;
      float sum = 0.f;
      for (int w = 0; w < warps; w++) sum += cells[w * cell_size + (k * inputs + u) * pitch + o];
      to[k * a.partial_stride.term + o * a.partial_stride.output + u * a.partial_stride.input] = sum;
    }
  }
}

} // namespace kron
