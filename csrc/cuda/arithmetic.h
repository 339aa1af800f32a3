// The kinds of math: tensor cores in 16 bits or tf32, and exact float32.
//
// A product consists of pieces of 16 rows by 8 columns by DEPTH bytes of each operand. Every kind of
// math has the same four sums of a piece in the same lanes (device.h, multiply_add), so all other code
// is shared.
#pragma once
#include "arguments.h"
#include "device.h"

namespace kron {

struct Lane {
  int row, pair; // the lane has rows row and row + 8, columns 2 pair and 2 pair + 1 of the result
};
KRON_DEVICE Lane lane_of(int lane) { return {lane >> 2, lane & 3}; }

// In shared memory an operand is rows, `pitch` bytes apart, or columns of a step, along the depth; or,
// transposed, rows across the depth.
template <class N, bool TF32 = false> struct TensorCores {
  using Number = N;
  static constexpr int DEPTH = 32, UNROLL = 2;
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[2];
  };

  static KRON_DEVICE Left load_left(const unsigned char *tile, int pitch, int lane) {
    Left left;
    load_matrices(left.r, tile + (lane & 15) * pitch + (lane >> 4) * 16);
    round(left.r);
    return left;
  }
  // From 16 columns of a step, starting at byte `depth`.
  static KRON_DEVICE void load_right(Right (&right)[2], const unsigned char *tile, int depth,
                                     int lane) {
    uint32_t r[4];
    const int column = (lane & 7) + (lane >> 4) * 8;
    load_matrices(r, tile + step_offset(column, depth + (lane >> 3 & 1) * 16));
    round(r);
    right[0] = {{r[0], r[1]}}, right[1] = {{r[2], r[3]}};
  }

  // tile + i * pitch has the numbers at depth i.
  static KRON_DEVICE Left load_left_transposed(const unsigned char *tile, int pitch, int lane) {
    Left left;
    if constexpr (sizeof(N) == 2) {
      const int row = (lane & 7) + (lane >> 4) * 8, column = (lane >> 3 & 1) * 8;
      load_matrices_transposed(left.r, tile + row * pitch + column * 2);
    } else {
      const Lane l = lane_of(lane);
      for (int i = 0; i < 4; i++)
        left.r[i] = word(tile + (l.pair + i / 2 * 4) * pitch + (l.row + i % 2 * 8) * 4);
      round(left.r);
    }
    return left;
  }
  static KRON_DEVICE void load_right_transposed(Right (&right)[2], const unsigned char *tile,
                                                int pitch, int lane) {
    uint32_t r[4];
    if constexpr (sizeof(N) == 2) {
      const int row = lane & 15, column = (lane >> 4) * 8;
      load_matrices_transposed(r, tile + row * pitch + column * 2);
    } else {
      const Lane l = lane_of(lane);
      for (int i = 0; i < 4; i++)
        r[i] = word(tile + (l.pair + i % 2 * 4) * pitch + (l.row + i / 2 * 8) * 4);
      round(r);
    }
    right[0] = {{r[0], r[1]}}, right[1] = {{r[2], r[3]}};
  }

  static KRON_DEVICE void multiply(float (&sums)[4], const Left &left, const Right &right) {
    multiply_add(sums, left.r, right.r, Number{});
  }

private:
  static KRON_DEVICE uint32_t word(const unsigned char *p) {
    return *reinterpret_cast<const uint32_t *>(p);
  }
  static KRON_DEVICE void round(uint32_t (&r)[4]) {
    if constexpr (TF32)
      for (uint32_t &x : r) x = to_tf32(x);
  }
};

// Exact float32, without tensor cores.
struct Exact {
  using Number = float;
  static constexpr int DEPTH = 16, UNROLL = 1; // registers are scarce
  struct Left {
    float r[2][4]; // rows row and row + 8
  };
  struct Right {
    float r[2][4]; // columns 2 pair and 2 pair + 1
  };

  static KRON_DEVICE Left load_left(const unsigned char *tile, int pitch, int lane) {
    const int row = lane_of(lane).row;
    Left left;
    four(left.r[0], tile + row * pitch), four(left.r[1], tile + (row + 8) * pitch);
    return left;
  }
  static KRON_DEVICE void load_right(Right (&right)[2], const unsigned char *tile, int depth,
                                     int lane) {
    const int column = lane_of(lane).pair * 2;
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        four(right[i].r[j], tile + step_offset(i * 8 + column + j, depth));
  }
  static KRON_DEVICE Left load_left_transposed(const unsigned char *tile, int pitch, int lane) {
    const int row = lane_of(lane).row;
    Left left;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++) left.r[j][i] = number(tile + i * pitch + (row + j * 8) * 4);
    return left;
  }
  static KRON_DEVICE void load_right_transposed(Right (&right)[2], const unsigned char *tile,
                                                int pitch, int lane) {
    const int column = lane_of(lane).pair * 2;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        right[j / 2].r[j % 2][i] = number(tile + i * pitch + (j / 2 * 8 + column + j % 2) * 4);
  }
  static KRON_DEVICE void multiply(float (&sums)[4], const Left &left, const Right &right) {
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < 4; i++) sums[i] += left.r[i / 2][k] * right.r[i % 2][k];
  }

private:
  static KRON_DEVICE float number(const unsigned char *p) {
    return *reinterpret_cast<const float *>(p);
  }
  static KRON_DEVICE void four(float (&r)[4], const unsigned char *p) {
    const float4 v = *reinterpret_cast<const float4 *>(p);
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  }
};

} // namespace kron
