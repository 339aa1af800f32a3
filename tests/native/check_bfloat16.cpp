// Products by the instruction for bfloat16 (csrc/cpu/bfloat16.h), which is emulated here: with small integers, which
// bfloat16 holds, every sum is exact, so a result must equal that of plain loops; and numbers are rounded to
// nearest even.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../../csrc/cpu/block.h"
#include "../../csrc/cpu/bfloat16.h"

static constexpr Int L = LANES<float>;
static unsigned state = 1;
static Int below(Int n) { return Int((state = state * 1664525u + 1013904223u) >> 8) % n; }
static float integer() { return float(below(33) - 16); }
static bfloat16 stored(float x) { return {uint16_t(bits_of<uint32_t>(x) >> 16)}; }
static long cases = 0;
static void require(bool holds, const char *what) {
  if (!holds) printf("wrong: %s\n", what), exit(1);
  cases++;
}

static void contraction() {
  const Int rows = 1 + below(40), cols = 1 + below(40), pre = 1 + below(3), post = 1 + below(3);
  const int nv = 1 + int(below(2));
  const bool turned = below(2), accumulate = below(2);
  const Int tb = nv * L, step = post * tb;
  std::vector<bfloat16> w(size_t(rows * cols));
  for (bfloat16 &x : w) x = stored(integer());
  const Matrix<bfloat16> m = {w.data(), rows, cols, turned ? 1 : cols, turned ? rows : 1};
  std::vector<float> in(size_t(pre * cols * step)), out(size_t(pre * rows * step));
  for (float &x : in) x = integer();
  for (float &x : out) x = integer();
  const std::vector<float> before = out;
  std::vector<int32_t> panel(size_t(KRON_ACCUMULATORS * (cols + 1) / 2 + KRON_ACCUMULATORS)),
      words(size_t(pre * step * ((cols + 1) / 2)));
  const Grid g = {pre, post, tb, cols * step, rows * step, step, step, L, L};
  contract_halves(m, nv, in.data(), out.data(), g, accumulate, panel.data(), words.data());
  for (Int i = 0; i < pre; i++)
    for (Int r = 0; r < rows; r++)
      for (Int at = 0; at < step; at++) {
        const size_t to = size_t(i * rows * step + r * step + at);
        float sum = accumulate ? before[to] : 0;
        for (Int c = 0; c < cols; c++)
          sum += scalar(m.data[r * m.row_stride + c * m.col_stride]) * in[size_t((i * cols + c) * step + at)];
        require(out[to] == sum, "a contraction");
      }
}

// Scores (keys)[queries] of keys (size)[keys], and results (size)[queries] of values and scores.
static void attention() {
  const Int size = 1 + below(20), keys = 1 + below(3 * L), vectors = vectors_of<float>(keys), row = (vectors | 1) * L;
  std::vector<float> kept(size_t(size * row)), in(size_t((keys + size) * L)), out(size_t((keys + size) * L));
  for (float &x : kept) x = integer();
  for (float &x : in) x = integer();
  std::vector<int32_t> words(size_t(size * vectors * L + L)), narrow(size_t((keys + size + 1) * L));
  const Grid g = {1, 1, L, 0, 0, L, L, L, L};
  const auto multiply = [&](const Words &w, Int rows, Int count) {
    narrow_features(in.data(), L, count, narrow.data(), L);
    multiply_all<Halves>(w, rows, {narrow.data(), nullptr, 1, 1, out.data(), g, false}, 0);
  };
  const char *data = reinterpret_cast<const char *>(words.data());
  narrow_keys(kept.data(), row, size, vectors, words.data());
  multiply({data, 4, vectors * L * 4, (size + 1) / 2, nullptr, 0, nullptr}, keys, size);
  for (Int k = 0; k < keys; k++)
    for (Int q = 0; q < L; q++) {
      float sum = 0;
      for (Int f = 0; f < size; f++) sum += kept[size_t(f * row + k)] * in[size_t(f * L + q)];
      require(out[size_t(k * L + q)] == sum, "scores");
    }
  for (Int k = keys; k < vectors * L; k++) // what lies behind the last key must not count
    for (Int f = 0; f < size; f++) kept[size_t(f * row + k)] = NAN;
  narrow_values(kept.data(), row, size, keys, vectors, words.data());
  multiply({data, vectors * L * 2, 4, (keys + 1) / 2, nullptr, 0, nullptr}, size, keys);
  for (Int f = 0; f < size; f++)
    for (Int q = 0; q < L; q++) {
      float sum = 0;
      for (Int k = 0; k < keys; k++) sum += kept[size_t(f * row + k)] * in[size_t(k * L + q)];
      require(out[size_t(f * L + q)] == sum, "results");
    }
}

static void rounding() {
  const uint32_t specials[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffffffff, 0x7f7fffff, 0, 0x80000000, 1};
  for (int i = 0; i < 100000; i++) {
    const uint32_t bits = i < 9 ? specials[i] : uint32_t(below(1 << 24)) << 8 ^ uint32_t(below(1 << 16));
    const Bits found = upper_halves(Floats{} + bits_of<float>(bits) - Floats{});
    const float x = bits_of<float>(bits), y = bits_of<float>(uint32_t(found[0]));
    if (x != x) { require(y != y, "NaN"); continue; }
    require(!(found[0] & 0xffff), "sixteen bits");
    const float down = bits_of<float>(bits & 0xffff0000), up = bits_of<float>((bits & 0xffff0000) + 0x10000);
    if ((bits & 0x7fffffff) >= 0x7f7f0000) continue; // up is infinity or more
    const double to_down = fabs(double(x) - double(down)), to_up = fabs(double(up) - double(x));
    const bool even_down = !(bits >> 16 & 1);
    require(y == (to_down < to_up || (to_down == to_up && even_down) ? down : up), "the nearest");
  }
}

int main() {
  for (int i = 0; i < 400; i++) contraction(), attention();
  rounding();
  printf("%-28s%9ld cases\n", "bfloat16 products", cases);
}
