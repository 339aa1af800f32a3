// The left operand of a product: rows of vectors in shared memory, copied or mixed.
#pragma once
#include "vectors.h"

namespace kron {

// A piece of 16 rows (arithmetic.h) has as many whole tokens, of up to 16 vectors, as fit: the results
// of a token are in a single warp.
struct Rows {
  int vectors, tokens, spare; // of a token; in a piece; rows of a piece without a token
  KRON_DEVICE explicit Rows(int vectors)
      : vectors(vectors), tokens(16 / vectors), spare(16 % vectors) {}
  KRON_DEVICE int row(int token, int vector) const {
    return token * vectors + vector + (spare ? token / tokens * spare : 0);
  }
};

// The vectors of a block's tokens in memory; only the first `live` tokens exist.
template <class N> struct Source {
  const N *data; // of the block's first token
  int live;
  Layout layout;
  // Entry c of vector 0, and the distance between the vectors' entries.
  KRON_DEVICE const N *at(int token, int c) const {
    return data + int64_t(token) * (layout.vectors * layout.length) + offset_of(layout, 0, c);
  }
  KRON_DEVICE int stride() const { return layout.interleaved ? 1 : layout.length; }
};

// Stores a mix (outputs x inputs) in shared memory, transposed and in float32, to be read in packets.
// Rows are padded with zeros.
struct Mix {
  const float *data;
  int outputs, pitch;
};

template <class N>
KRON_DEVICE void load_mix(float *to, const N *from, int terms, int outputs, int inputs,
                          int term_stride, int output_stride, int input_stride) {
  const int pitch = mix_pitch(outputs);
#pragma unroll 1
  for (int i = threadIdx.x; i < terms * inputs * pitch; i += blockDim.x) {
    const int o = i % pitch, u = i / pitch % inputs, k = i / pitch / inputs;
    const N *entry = from + k * term_stride + o * output_stride + u * input_stride;
    to[i] = o < outputs ? to_float(*entry) : 0.f;
  }
}

// A tile of columns from `first` on: column c of a row is at data + row * pitch.
struct Tile {
  unsigned char *data;
  int pitch, first, columns;
  template <class N> KRON_DEVICE N *at(int row, int c) const {
    return reinterpret_cast<N *>(data + row * pitch) + (c - first);
  }
};

// Calls f(token, c) for RUN columns of each token of a tile, by all threads.
template <int RUN, class F> KRON_DEVICE void for_runs(const Tile &tile, int tokens, F f) {
  const int runs = tile.columns / RUN, threads = blockDim.x;
  int token = threadIdx.x / runs, run = threadIdx.x % runs;
#pragma unroll 1
  for (; token < tokens; token += threads / runs) {
    f(token, tile.first + run * RUN);
    if ((run += threads % runs) >= runs) run -= runs, token++;
  }
}

// Mixes G outputs at a time.
template <int G, class A, class N>
KRON_DEVICE void fill_mixed_by(const Tile &tile, const Rows &rows, int tokens,
                               const Source<N> &source, const Mix &mix) {
  constexpr int RUN = A::ENTRIES;
  const int vectors = source.layout.vectors, stride = source.stride();
  for_runs<RUN>(tile, tokens, [&](int token, int c) {
    const bool inside = token < source.live && c < source.layout.length;
    const N *start = source.at(token, c);
    N *to = tile.at<N>(rows.row(token, 0), c);
#pragma unroll 1
    for (int o = 0; o < mix.outputs; o += G) {
      float z[G][RUN] = {};
      const N *from = start;
      const float *m = mix.data + o;
#pragma unroll 2
      for (int u = 0; inside && u < vectors; u += A::VECTORS) {
        float x[A::NUMBERS];
        load(x, from);
        from += A::VECTORS * stride;
#pragma unroll
        for (int v = 0; v < A::VECTORS; v++) {
          float weights[G];
          load_floats(weights, m);
          m += mix.pitch;
#pragma unroll
          for (int g = 0; g < G; g++)
#pragma unroll
            for (int i = 0; i < RUN; i++) z[g][i] += weights[g] * x[i * A::VECTORS + v];
        }
      }
#pragma unroll
      for (int g = 0; g < G; g++) {
        if (o + g < mix.outputs) store(to, z[g]);
        to += tile.pitch / int(sizeof(N));
      }
    }
  });
}

// Σ_u mix[o, u] x_u of a block's tokens, rounded to N; 0 for tokens and entries that do not exist.
template <class N>
KRON_DEVICE void fill_mixed(const Tile &tile, const Rows &rows, int tokens,
                            const Source<N> &source, const Mix &mix) {
  with_access<N>(source.layout.run, [&](auto access) {
    if (mix.outputs <= 2)
      fill_mixed_by<2, decltype(access)>(tile, rows, tokens, source, mix);
    else
      fill_mixed_by<4, decltype(access)>(tile, rows, tokens, source, mix);
  });
}

// Copies the vectors asynchronously; the caller commits the copies.
template <class N>
KRON_DEVICE void fill_copied(const Tile &tile, const Rows &rows, int tokens,
                             const Source<N> &source) {
  with_access<N>(source.layout.run, [&](auto access) {
    using A = decltype(access);
    constexpr int RUN = A::ENTRIES;
    const int vectors = source.layout.vectors, stride = source.stride();
    for_runs<RUN>(tile, tokens, [&](int token, int c) {
      const bool inside = token < source.live && c < source.layout.length;
      const N *from = source.at(token, c);
      N *to = tile.at<N>(rows.row(token, 0), c);
#pragma unroll 2
      for (int u = 0; u < vectors; u += A::VECTORS) {
        if constexpr (RUN == PACKET<N>) {
          copy_async(to, from, inside);
          to += tile.pitch / int(sizeof(N));
        } else {
          float x[A::NUMBERS] = {};
          if (inside) load(x, from);
#pragma unroll
          for (int v = 0; v < A::VECTORS; v++) {
            float one[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) one[i] = x[i * A::VECTORS + v];
            store(to, one);
            to += tile.pitch / int(sizeof(N));
          }
        }
        from += A::VECTORS * stride;
      }
    });
  });
}

} // namespace kron
