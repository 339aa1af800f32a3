// down(act(up x)) with the hidden vector in registers only, and its gradients.
//
// up = A (H, U) ⊗ B (N, K) and down = A' (P, H) ⊗ B' (M, N) see the hidden vector as a grid (H, N). For
// column d of a token's grid the input is z_u[d] = Σ_c B[d, c] x_u[c] and the output
//
//   v_p[d] = Σ_h A'[p, h] act(Σ_u A[h, u] z_u[d] + bias[h, d]).
#pragma once
#include "forward.h"

namespace kron {

template <class N> KRON_DEVICE void load_mixes(float *to, const FeedForwardArguments &a) {
  const N *up = static_cast<const N *>(a.up_mix), *down = static_cast<const N *>(a.down_mix);
#pragma unroll 1
  for (int i = threadIdx.x; i < a.hidden * MEETING_PITCH; i += blockDim.x) {
    const int h = i / MEETING_PITCH, v = i % MEETING;
    float m = 0.f;
    if (i % MEETING_PITCH < MEETING) {
      if (v < a.in.vectors)
        m = to_float(up[h * a.up_mix_strides.output + v * a.up_mix_strides.input]);
    } else if (v < a.out.vectors) {
      m = to_float(down[v * a.down_mix_strides.output + h * a.down_mix_strides.input]);
    }
    to[i] = m;
  }
}

// A row of the bias from column d on, of this many columns; 0 beyond.
template <class N>
KRON_DEVICE void load_bias(float (&to)[LANE_COLUMNS], const N *row, int columns, bool wide) {
  if (wide && columns > 0) return load(to, row);
#pragma unroll
  for (int i = 0; i < LANE_COLUMNS; i++) to[i] = i < columns ? to_float(row[i]) : 0.f;
}

// The z of a token and four columns; 0 outside.
KRON_DEVICE void load_meeting(float (&z)[MEETING][LANE_COLUMNS], const float *slab, int token,
                              int vectors, int column, bool live) {
#pragma unroll
  for (int u = 0; u < MEETING; u++) {
#pragma unroll
    for (float &x : z[u]) x = 0.f;
    if (live && u < vectors) load_slab(z[u], slab + (token * MEETING + u) * SLAB_PITCH, column);
  }
}

// Writes v of a piece in a slab, rounded, to its rows and columns of left.
template <class N>
KRON_DEVICE void contract_hidden(const float *slab, const Piece &piece, const FeedForwardArguments &a,
                                 const float *mixes, const Tile &left, int first_row, int lane) {
  const N *bias = static_cast<const N *>(a.bias);
  with_activation(a.activation, [&](auto activation) {
#pragma unroll 1
    for (int i = lane; i < piece.tokens * (WARP_COLUMNS / LANE_COLUMNS); i += 32) {
      const int column = i % (WARP_COLUMNS / LANE_COLUMNS) * LANE_COLUMNS;
      const int token = i / (WARP_COLUMNS / LANE_COLUMNS), d = piece.first + column;
      if (d >= left.columns) continue;
      float z[MEETING][LANE_COLUMNS], v[MEETING][LANE_COLUMNS] = {};
      load_meeting(z, slab, token, a.in.vectors, column, true);
      const N *from = bias + d;
#pragma unroll 2
      for (int h = 0; h < a.hidden; h++) {
        float m[MEETING_PITCH], row[LANE_COLUMNS] = {};
        load_floats(m, mixes + h * MEETING_PITCH);
        if (bias) load_bias(row, from, piece.columns - d, a.wide);
        from += piece.columns;
#pragma unroll
        for (int e = 0; e < LANE_COLUMNS; e++) {
#pragma unroll
          for (int u = 0; u < MEETING; u++) row[e] += m[u] * z[u][e];
          row[e] = activation.value(row[e]);
#pragma unroll
          for (int p = 0; p < MEETING; p++) v[p][e] += m[MEETING + p] * row[e];
        }
      }
#pragma unroll
      for (int p = 0; p < MEETING; p++)
        store(left.at<N>(first_row + token * MEETING + p, d), v[p]);
    }
  });
}

// Shared memory: the mixes; x; v; the stages, which become slabs.
template <class M> KRON_DEVICE void feed_forward(const FeedForwardArguments &a) {
  using N = typename M::Number;
  const Place place(a.warps_along);
  const Rows rows(MEETING);
  const int block_tokens = a.rows / MEETING;
  const int steps = (a.in.length + STEP<N> - 1) / STEP<N>;
  const int v_steps = (a.up.columns + STEP<N> - 1) / STEP<N>;
  float *mixes = reinterpret_cast<float *>(shared_memory());
  const Tile left = {reinterpret_cast<unsigned char *>(mixes + a.hidden * MEETING_PITCH),
                     steps_pitch(a.up_steps), 0, 0};
  const Tile v = {left.data + a.rows * left.pitch, steps_pitch(v_steps), 0, v_steps * STEP<N>};
  unsigned char *stages = v.data + a.rows * v.pitch;
  float *slab = reinterpret_cast<float *>(stages + threadIdx.x / 32 * SLAB_BYTES);

  const int64_t first = int64_t(blockIdx.x) * block_tokens;
  const int live = int(a.tokens - first < block_tokens ? a.tokens - first : block_tokens);
  const Source<N> source = {static_cast<const N *>(a.x) + first * (a.in.vectors * a.in.length),
                            live, a.in};
  load_mixes<N>(mixes, a);
  const int block_width = a.warps_along * WARP_COLUMNS;
#pragma unroll 1
  for (int d = 0; d < a.up.columns; d += block_width) {
    Sums sums;
    clear(sums);
#pragma unroll 1
    for (int from = 0; from < steps; from += a.up_steps) {
      const int to = min(steps, from + a.up_steps);
      if (a.up_steps < steps || d == 0)
        fill_copied(Tile{left.data, left.pitch, from * STEP<N>, (to - from) * STEP<N>}, rows,
                    block_tokens, source);
      multiply<M>(sums, left, stages, static_cast<const N *>(a.up_dot), a.up,
                  Columns{d, a.warps_along, 1, 6}, place, to - from,
                  [&](int step, int &) { return (from + step) * STEP<N>; });
    }
#pragma unroll 1
    for (int i = 0; i < WARP_ROWS / 16; i++) {
      const int row = place.row * WARP_ROWS + i * 16, before = row / MEETING;
      const Piece piece = {min(rows.tokens, live - before), MEETING,
                           d + place.column * WARP_COLUMNS, a.up.columns, 6, 1};
      if (i == 0)
        store_slab(slab, sums[0], place.lane);
      else
        store_slab(slab, sums[1], place.lane);
      __syncwarp();
      contract_hidden<N>(slab, piece, a, mixes, v, row, place.lane);
      __syncwarp();
    }
    __syncthreads(); // the slabs become stages
  }
#pragma unroll 1
  for (int d = 0; d < a.down.columns; d += block_width) {
    Sums sums;
    clear(sums);
    multiply<M>(sums, v, stages, static_cast<const N *>(a.down_dot), a.down,
                Columns{d, a.warps_along, 1, 6}, place, v_steps,
                [&](int step, int &) { return step * STEP<N>; });
#pragma unroll 1
    for (int i = 0; i < WARP_ROWS / 16; i++) {
      const int before = (place.row * WARP_ROWS + i * 16) / MEETING;
      const Piece piece = {min(rows.tokens, live - before), MEETING,
                           d + place.column * WARP_COLUMNS, a.down.columns, 6, 1};
      const int64_t token = (first + before) * (a.out.vectors * a.out.length);
      const N *residual = static_cast<const N *>(a.residual);
      const Output<N> out = {static_cast<N *>(a.y) + token, residual ? residual + token : nullptr,
                             static_cast<const N *>(a.down_bias), a.out, KRON_NONE};
      if (i == 0)
        store_slab(slab, sums[0], place.lane);
      else
        store_slab(slab, sums[1], place.lane);
      __syncwarp();
      write_piece(slab, piece, nullptr, 0, out, place.lane);
      __syncwarp();
    }
    __syncthreads();
  }
}

// For a piece with z in one slab and the gradient of v in another: v, the gradient of z and the sums.
template <class N>
KRON_DEVICE void hidden_gradients(const float *slab, const Piece &piece,
                                  const FeedForwardArguments &a, const float *mixes, float *cells,
                                  int64_t first, int lane) {
  const N *bias = static_cast<const N *>(a.bias);
  float *bias_cells = cells + a.hidden * MEETING_PITCH;
  const auto write = [&](void *to, const float (&values)[MEETING][LANE_COLUMNS], int vectors,
                         int token, int d) {
#pragma unroll
    for (int v = 0; v < MEETING; v++) {
      if (v >= vectors) continue;
      N *row = static_cast<N *>(to) + ((first + token) * vectors + v) * piece.columns + d;
      if (a.wide) {
        if (d < piece.columns) store(row, values[v]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < LANE_COLUMNS; e++)
        if (d + e < piece.columns) row[e] = from_float(values[v][e], N{});
    }
  };
  with_activation(a.activation, [&](auto activation) {
    // Two tokens at a time; all lanes take part in the sums over them.
#pragma unroll 1
    for (int pair = 0; pair < 16 / MEETING; pair += 2) {
      const int token = pair + lane / 16, column = lane % 16 * LANE_COLUMNS;
      const int d = piece.first + column;
      const bool live = token < piece.tokens;
      float z[MEETING][LANE_COLUMNS], dv[MEETING][LANE_COLUMNS];
      float v[MEETING][LANE_COLUMNS] = {}, dz[MEETING][LANE_COLUMNS] = {};
      load_meeting(z, slab, token, a.in.vectors, column, live);
      load_meeting(dv, slab + 16 * SLAB_PITCH, token, a.out.vectors, column, live);
      const N *from = bias + d;
#pragma unroll 1
      for (int h = 0; h < a.hidden; h++) {
        float m[MEETING_PITCH], row[LANE_COLUMNS] = {}, gradient[LANE_COLUMNS];
        float mixed[MEETING_PITCH] = {};
        load_floats(m, mixes + h * MEETING_PITCH);
        if (bias) load_bias(row, from, piece.columns - d, a.wide);
        from += piece.columns;
#pragma unroll
        for (int e = 0; e < LANE_COLUMNS; e++) {
          float slope, sum = 0.f;
#pragma unroll
          for (int u = 0; u < MEETING; u++) row[e] += m[u] * z[u][e];
          row[e] = activation.value(row[e], slope);
#pragma unroll
          for (int p = 0; p < MEETING; p++) {
            v[p][e] += m[MEETING + p] * row[e];
            sum += m[MEETING + p] * dv[p][e];
            mixed[MEETING + p] += dv[p][e] * row[e];
          }
          gradient[e] = sum * slope;
#pragma unroll
          for (int u = 0; u < MEETING; u++) {
            dz[u][e] += m[u] * gradient[e];
            mixed[u] += z[u][e] * gradient[e];
          }
        }
        const float sum = sum_over_lanes(mixed, lane);
        if (lane % (32 / MEETING_PITCH) == 0)
          cells[h * MEETING_PITCH + lane / (32 / MEETING_PITCH)] += sum;
        // Adds the other token's sums of the same columns: each lane keeps two.
        const bool upper = lane & 16;
        const float kept[2] = {upper ? gradient[2] : gradient[0], upper ? gradient[3] : gradient[1]};
        const float sent[2] = {upper ? gradient[0] : gradient[2], upper ? gradient[1] : gradient[3]};
        float *cell = bias_cells + h * WARP_COLUMNS + column + (upper ? 2 : 0);
        cell[0] += kept[0] + shuffle_xor(sent[0], 16);
        cell[1] += kept[1] + shuffle_xor(sent[1], 16);
      }
      if (live) {
        write(a.v, v, a.out.vectors, token, d);
        write(a.dz, dz, a.in.vectors, token, d);
      }
    }
  });
}

// Shared memory: the mixes; the warps' sums; x, then dy; the stages, which become two slabs a warp.
template <class M> KRON_DEVICE void feed_forward_backward(const FeedForwardArguments &a) {
  using N = typename M::Number;
  const Place place(a.warps_along);
  const Rows rows(MEETING);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int block_tokens = a.rows / MEETING, block_width = a.warps_along * WARP_COLUMNS;
  const int column_blocks = (a.up.columns + block_width - 1) / block_width;
  const int share = blockIdx.x / column_blocks, column_block = blockIdx.x % column_blocks;
  const Columns columns = {column_block * block_width, a.warps_along, 1, 6};

  float *mixes = reinterpret_cast<float *>(shared_memory());
  float *cells = mixes + a.hidden * MEETING_PITCH;
  const int cell_count = hidden_cells(a.hidden);
  const Tile left = {reinterpret_cast<unsigned char *>(cells + warps * cell_count),
                     steps_pitch(a.up_steps), 0, 0};
  unsigned char *stages = left.data + a.rows * left.pitch;
  float *slab = reinterpret_cast<float *>(stages + warp * 2 * SLAB_BYTES);
  load_mixes<N>(mixes, a);
#pragma unroll 1
  for (int i = threadIdx.x; i < warps * cell_count; i += blockDim.x) cells[i] = 0.f;

  const int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  const int64_t end = blocks * (share + 1) / a.shares;
#pragma unroll 1
  for (int64_t block = blocks * share / a.shares; block < end; block++) {
    const int64_t first = block * block_tokens;
    const int live = int(a.tokens - first < block_tokens ? a.tokens - first : block_tokens);
    Sums z, dv;
    clear(z), clear(dv);
    const auto product = [&](Sums &sums, const void *data, const Layout &layout, const void *dot,
                             const Dot &shape) {
      const Source<N> source = {
          static_cast<const N *>(data) + first * (layout.vectors * layout.length), live, layout};
      const int steps = (layout.length + STEP<N> - 1) / STEP<N>;
#pragma unroll 1
      for (int from = 0; from < steps; from += a.up_steps) {
        const int to = min(steps, from + a.up_steps);
        fill_copied(Tile{left.data, left.pitch, from * STEP<N>, (to - from) * STEP<N>}, rows,
                    block_tokens, source);
        multiply<M>(sums, left, stages, static_cast<const N *>(dot), shape, columns, place,
                    to - from, [&](int step, int &) { return (from + step) * STEP<N>; });
      }
    };
    product(z, a.x, a.in, a.up_dot, a.up);
    product(dv, a.dy, a.out, a.down_dot, a.down);
#pragma unroll 1
    for (int i = 0; i < WARP_ROWS / 16; i++) {
      const int before = (place.row * WARP_ROWS + i * 16) / MEETING;
      const Piece piece = {min(rows.tokens, live - before), MEETING,
                           columns.first + place.column * WARP_COLUMNS, a.up.columns, 6, 1};
      if (i == 0) {
        store_slab(slab, z[0], place.lane);
        store_slab(slab + 16 * SLAB_PITCH, dv[0], place.lane);
      } else {
        store_slab(slab, z[1], place.lane);
        store_slab(slab + 16 * SLAB_PITCH, dv[1], place.lane);
      }
      __syncwarp();
      hidden_gradients<N>(slab, piece, a, mixes, cells + warp * cell_count, first + before,
                          place.lane);
      __syncwarp();
    }
    __syncthreads(); // the slabs become stages
  }

  __syncthreads();
  // Warps side by side have different columns, warps below one another the same.
#pragma unroll 1
  for (int i = threadIdx.x; i < a.hidden * MEETING_PITCH; i += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < warps; w++) sum += cells[w * cell_count + i];
    const int h = i / MEETING_PITCH, v = i % MEETING;
    if (i % MEETING_PITCH < MEETING) {
      if (v < a.in.vectors)
        a.d_up_mix[(int64_t(blockIdx.x) * a.hidden + h) * a.in.vectors + v] = sum;
    } else if (v < a.out.vectors) {
      a.d_down_mix[(int64_t(blockIdx.x) * a.out.vectors + v) * a.hidden + h] = sum;
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < a.hidden * block_width; i += blockDim.x) {
    const int h = i / block_width, column = i % block_width, d = columns.first + column;
    if (d >= a.up.columns) continue;
    float sum = 0.f;
    for (int w = column / WARP_COLUMNS; w < warps; w += a.warps_along)
      sum += cells[w * cell_count + a.hidden * MEETING_PITCH + h * WARP_COLUMNS +
                   column % WARP_COLUMNS];
    a.d_bias[(int64_t(share) * a.hidden + h) * a.up.columns + d] = sum;
  }
}

} // namespace kron
