// kron.h from C++: a layer of weight A ⊗ B on the CPU and, if there is one, on the GPU, compared with
// sums over the whole weight. build.sh compiles it.
#include "kron.h"

#include <math.h>
#include <stdio.h>

#include <random>
#include <vector>

#if defined(WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

// A (16 x 2) and B (192 x 384): the weight (3072 x 768) of KroneckerBERT's feed-forward at 21x.
enum { M1 = 16, N1 = 2, M2 = 192, N2 = 384, M = M1 * M2, N = N1 * N2, TOKENS = 5 };
typedef std::vector<float> Floats;

Floats drawn(int64_t size) {
  static std::mt19937 bits;
  std::uniform_real_distribution<float> numbers(-1, 1);
  Floats v(size);
  for (float &number : v) number = numbers(bits);
  return v;
}

// y = x (A ⊗ B)ᵀ + bias of contiguous operands, all on the CPU or all on the GPU.
kron_product layer(const float *a, const float *b, const float *bias, float *y) {
  kron_product p = {};
  p.rank = 1, p.n_factors = 2;
  p.factors[0] = {a, M1, N1, M1 * N1, N1, 1, nullptr, 0};
  p.factors[1] = {b, M2, N2, M2 * N2, N2, 1, nullptr, 0};
  p.turns[0] = 1, p.turns[1] = 0; // B first: x has 768 numbers, B x 384 and (A ⊗ B) x 3072
  p.bias = bias, p.activation = KRON_NONE, p.y = y;
  return p;
}

// The largest difference between y and its definition.
double largest_error(const Floats &y, const Floats &x, const Floats &a, const Floats &b,
                     const Floats &bias) {
  double largest = 0;
  for (int token = 0; token < TOKENS; token++)
    for (int row = 0; row < M; row++) {
      double sum = bias[row];
      for (int column = 0; column < N; column++)
        sum += double(a[row / M2 * N1 + column / N2]) * b[row % M2 * N2 + column % N2] *
               x[token * N + column];
      largest = fmax(largest, fabs(y[token * M + row] - sum));
    }
  return largest;
}

bool report(const char *where, const char *error, double largest) {
  if (error) {
    printf("%s: %s\n", where, error);
    return false;
  }
  const bool right = largest < 1e-4; // for float32 sums of 768 products; false for NaN
  printf("%s: %s, largest error %.1e\n", where, right ? "right" : "WRONG", largest);
  return right;
}

bool on_cpu(const Floats &x, const Floats &a, const Floats &b, const Floats &bias) {
  Floats y(TOKENS * M, NAN);
  if (kron_abi() != KRON_ABI) return puts("CPU: the library was built for another kron.h"), false;
  const kron_execution here = {kron_cpu_isa(), 1, nullptr, 0, 0}; // the calling thread
  const kron_product product = layer(a.data(), b.data(), bias.data(), y.data());
  const char *error = kron_cpu_forward(&here, KRON_FLOAT32, TOKENS, x.data(), 1, &product);
  return report("CPU", error, largest_error(y, x, a, b, bias));
}

#if defined(WITH_CUDA)
class OnGpu {
public:
  explicit OnGpu(const Floats &v) : size(v.size() * sizeof(float)) {
    if (cudaMalloc(&data, size)) data = nullptr;
    cudaMemcpy(data, v.data(), size, cudaMemcpyHostToDevice);
  }
  ~OnGpu() { cudaFree(data); }
  OnGpu(const OnGpu &) = delete;
  OnGpu &operator=(const OnGpu &) = delete;
  operator float *() const { return static_cast<float *>(data); }
  void copy_to(Floats &v) const { cudaMemcpy(v.data(), data, size, cudaMemcpyDeviceToHost); }

private:
  size_t size;
  void *data;
};

bool on_gpu(const Floats &x, const Floats &a, const Floats &b, const Floats &bias) {
  if (const char *reason = kron_cuda_why_not(0)) {
    printf("GPU: not tried: %s\n", reason);
    return true;
  }
  Floats y(TOKENS * M, NAN);
  const OnGpu x_there(x), a_there(a), b_there(b), bias_there(bias), y_there(y);
  const kron_cuda_execution there = {0, nullptr, 0}; // the default stream, no tf32
  const kron_product product = layer(a_there, b_there, bias_there, y_there);
  const char *error = kron_cuda_forward(&there, KRON_FLOAT32, TOKENS, x_there, 1, &product);
  y_there.copy_to(y); // waits for the kernels
  return report("GPU", error, largest_error(y, x, a, b, bias));
}
#endif

} // namespace

int main() {
  const Floats x = drawn(TOKENS * N), a = drawn(M1 * N1), b = drawn(M2 * N2), bias = drawn(M);
  bool right = on_cpu(x, a, b, bias);
#if defined(WITH_CUDA)
  right = on_gpu(x, a, b, bias) && right;
#endif
  return right ? 0 : 1;
}
