// The gradient of a large factor, Σ over tokens t and vectors v of left_t,v rightᵀ_t,v, with the vectors
// of one side mixed on the way; and sums over the blocks' parts, in a fixed order.
#pragma once
#include "forward.h"

namespace kron {

// Shared memory: the mix, left, right.
template <class M> KRON_DEVICE void dot_gradient(const DotGradientArguments &a) {
  using N = typename M::Number;
  const int row_count = gradient_rows(sizeof(N));
  constexpr int PIECE = M::DEPTH / sizeof(N);
  const Place place(a.warps_along);
  const int warps = blockDim.x / 32;
  const int height = warps / a.warps_along * WARP_ROWS, width = a.warps_along * WARP_COLUMNS;
  const int n = a.sides[0].layout.length, m = a.sides[1].layout.length;
  const int down = (n + height - 1) / height, along = (m + width - 1) / width;
  const int i = blockIdx.x % down, j = blockIdx.x / down % along;
  const int k = blockIdx.x / down / along % a.terms, share = blockIdx.x / down / along / a.terms;

  const DotGradientArguments::Side &mixing = a.sides[a.sides[0].mix ? 0 : 1];
  float *mix = reinterpret_cast<float *>(shared_memory());
  const int pitch = mix_pitch(a.vectors);
  Tile left = {reinterpret_cast<unsigned char *>(mix), transposed_pitch(height, sizeof(N)), i * height,
               height};
  if (mixing.mix) {
    load_mix(mix, static_cast<const N *>(mixing.mix) + k * mixing.strides.term, 1, a.vectors,
             mixing.layout.vectors, 0, mixing.strides.output, mixing.strides.input);
    left.data += mixing.layout.vectors * pitch * 4;
  }
  const Tile right = {left.data + row_count * left.pitch, transposed_pitch(width, sizeof(N)), j * width, width};
  const Rows rows(a.vectors);
  if (rows.spare) // rows without a token are zero
    for (int b = threadIdx.x * 4; b < row_count * (left.pitch + right.pitch); b += blockDim.x * 4)
      *reinterpret_cast<uint32_t *>(left.data + b) = 0;
  __syncthreads();

  const int block_tokens = row_count / 16 * rows.tokens;
  const int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  const int64_t begin = blocks * share / a.shares, end = blocks * (share + 1) / a.shares;
  Sums sums;
  clear(sums);
#pragma unroll 1
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block * block_tokens;
    const int live = int(a.tokens - first < block_tokens ? a.tokens - first : block_tokens);
#pragma unroll 1
    for (int s = 0; s < 2; s++) {
      const DotGradientArguments::Side &side = a.sides[s];
      const Tile tile = s ? right : left;
      const int size = side.layout.vectors * side.layout.length;
      const Source<N> source = {static_cast<const N *>(side.data) + first * size, live, side.layout};
      if (side.mix)
        fill_mixed(tile, rows, block_tokens, source, {mix, a.vectors, pitch});
      else
        fill_copied(tile, rows, block_tokens, source);
    }
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    const unsigned char *l = left.data + place.row * WARP_ROWS * sizeof(N);
    const unsigned char *r = right.data + place.column * WARP_COLUMNS * sizeof(N);
#pragma unroll 2
    for (int row = 0; row < row_count; row += PIECE) {
      typename M::Left down[2];
      for (int p = 0; p < 2; p++)
        down[p] = M::load_left_transposed(l + row * left.pitch + p * 16 * sizeof(N), left.pitch,
                                          place.lane);
#pragma unroll
      for (int p = 0; p < WARP_COLUMNS / 8; p += 2) {
        typename M::Right along[2];
        M::load_right_transposed(along, r + row * right.pitch + p * 8 * sizeof(N), right.pitch,
                                 place.lane);
#pragma unroll
        for (int q = 0; q < 2; q++) {
          M::multiply(sums[0][p + q], down[0], along[q]);
          M::multiply(sums[1][p + q], down[1], along[q]);
        }
      }
    }
    __syncthreads();
  }

  float *to = a.partial + (int64_t(share) * a.terms + k) * n * m;
  const Lane l = lane_of(place.lane);
#pragma unroll
  for (int p = 0; p < WARP_ROWS / 16; p++)
#pragma unroll
    for (int q = 0; q < WARP_COLUMNS / 8; q++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = left.first + place.row * WARP_ROWS + p * 16 + l.row + e / 2 * 8;
        const int column = right.first + place.column * WARP_COLUMNS + q * 8 + l.pair * 2 + e % 2;
        if (row < n && column < m) to[int64_t(row) * m + column] = sums[p][q][e];
      }
}

// Each of eight warps sums every eighth part of 32 numbers; then the eight sums are added.
KRON_DEVICE void sum_parts(const SumArguments &a) {
  float *slices = reinterpret_cast<float *>(shared_memory());
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t i = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (i < a.count)
#pragma unroll 4
    for (int part = slice; part < a.shares; part += SUM_SLICES) sum += a.parts[part * a.count + i];
  slices[slice * 32 + lane] = sum;
  __syncthreads();
  if (slice > 0 || i >= a.count) return;
  for (int other = 1; other < SUM_SLICES; other++) sum += slices[other * 32 + lane];
  a.sums[i] = sum;
}

} // namespace kron
