// The C ABI of the compiled kernels: raw pointers and sizes, no torch and no Python headers.
//
// Sizes and strides count elements. Every function returns nullptr or an error message (static storage;
// nothing was written). Null pointers, impossible sizes and numbers outside an enum are errors. The
// caller must make buffers as large as the sizes say.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Increases with every change of a structure, an enum or an argument. kron_abi() returns the number that
// the library was built with: compare them before the first call.
enum { KRON_ABI = 1 };
int64_t kron_abi(void);

enum kron_dtype { KRON_FLOAT32, KRON_FLOAT64, KRON_BFLOAT16, KRON_FLOAT16 };
enum kron_activation { KRON_NONE, KRON_GELU, KRON_GELU_TANH, KRON_RELU, KRON_SILU };
enum kron_isa { KRON_PORTABLE, KRON_AVX2, KRON_AVX512 }; // NEON is what PORTABLE means on ARM

enum { KRON_MAX_FACTORS = 8, KRON_MAX_PRODUCTS = 4 };

// A factor (rank, rows, cols). Any strides: a transposed factor needs no copy.
typedef struct {
  const void *data;
  int64_t rows, cols;
  int64_t rank_stride, row_stride, col_stride;
} kron_factor;

// y = act((Σ_k F_1k ⊗ F_2k ⊗ …) x + bias) + residual, in contiguous rows.
typedef struct {
  int64_t rank, n_factors;
  kron_factor factors[KRON_MAX_FACTORS];
  int64_t turns[KRON_MAX_FACTORS]; // the factors in the order in which they are contracted
  const void *bias;                // (m,) or null
  const void *residual;            // (tokens, m) or null
  int64_t activation;              // enum kron_activation
  void *y;                         // (tokens, m)
} kron_product;

// Runs fn(begin, end, context) over disjoint ranges that cover [0, n), on any threads; 0 on success.
// torch's own torch_parallel_for has this signature. Null means the calling thread.
typedef void (*kron_range)(int64_t begin, int64_t end, void *context);
typedef int32_t (*kron_parallel_for)(int64_t begin, int64_t end, int64_t grain, kron_range fn,
                                     void *context);

typedef struct {
  int64_t isa;     // enum kron_isa, at most what kron_cpu_isa returns
  // The most threads, 1 to 65536. The last bits of sums over tokens and of a feed-forward depend on it.
  int64_t threads;
  kron_parallel_for parallel_for;
} kron_execution;

// The widest instruction set that this machine has and this binary was built for.
int64_t kron_cpu_isa(void);

// Several products of the same x (tokens, n); x is read once.
const char *kron_cpu_forward(const kron_execution *, int64_t dtype, int64_t tokens, const void *x,
                             int64_t n_products, const kron_product *products);

// The product along the middle axis of x (tokens, n, tail): y and residual are (tokens, m, tail), and
// bias is (m, tail). Products of many factors use it for a few factors at a time.
const char *kron_cpu_forward_along(const kron_execution *, int64_t dtype, int64_t tokens,
                                   const void *x, int64_t tail, const kron_product *);

// down(act(up x)), with the hidden vector of one block of tokens at a time in memory. If up = (k x l) ⊗
// large is contracted from the right, and down = (l' x k) ⊗ large' from the left, about 64 entries of it
// exist at a time.
const char *kron_cpu_feed_forward(const kron_execution *, int64_t dtype, int64_t tokens,
                                  const void *x, const kron_product *up, const kron_product *down);

// Gradients of a product of two factors; its bias, residual, activation and y are ignored. dx (tokens, n)
// has x's dtype; da and db are contiguous, in float32 (for KRON_FLOAT64: float64). Each may be null. The
// order of sums over tokens depends only on the number of threads.
const char *kron_cpu_backward(const kron_execution *, int64_t dtype, int64_t tokens, const void *dy,
                              const void *x, const kron_product *product, void *dx, void *da,
                              void *db);

// Gradients of kron_cpu_feed_forward for factors that share the hidden vector entry by entry; it is
// recomputed and never stored. dx has x's dtype; the others are contiguous, in the dtype of sums as
// above. dbias is the gradient of up's bias. Each may be null.
const char *kron_cpu_feed_forward_backward(const kron_execution *, int64_t dtype, int64_t tokens,
                                           const void *dy, const void *x, const kron_product *up,
                                           const kron_product *down, void *dx, void *da_up,
                                           void *db_up, void *dbias, void *da_down, void *db_down);

// --- NVIDIA GPUs. All pointers are to the GPU's memory. A call only launches kernels on a stream: it
// allocates nothing and waits for nothing, so a CUDA graph can capture it. Products have two factors, in
// float32, float16 or bfloat16. A library without CUDA kernels has none of these functions.

typedef struct {
  int64_t device; // the GPU's index
  void *stream;   // cudaStream_t
  int64_t tf32;   // whether KRON_FLOAT32 may be multiplied in tf32
} kron_cuda_execution;

// nullptr if this GPU can run the kernels, otherwise why not.
const char *kron_cuda_why_not(int64_t device);

// nullptr if the kernels can compute the product and its gradients, otherwise why not.
const char *kron_cuda_unserved(const kron_product *);

// Like kron_cpu_forward.
const char *kron_cuda_forward(const kron_cuda_execution *, int64_t dtype, int64_t tokens,
                              const void *x, int64_t n_products, const kron_product *products);

// Like kron_cpu_backward, and deterministic. workspace has at least kron_cuda_backward_workspace bytes.
int64_t kron_cuda_backward_workspace(const kron_cuda_execution *, int64_t dtype, int64_t tokens,
                                     const kron_product *product);
const char *kron_cuda_backward(const kron_cuda_execution *, int64_t dtype, int64_t tokens,
                               const void *dy, const void *x, const kron_product *product, void *dx,
                               void *da, void *db, void *workspace);

// nullptr if kron_cuda_feed_forward and its backward can compute these two, otherwise why not.
const char *kron_cuda_feed_forward_unserved(const kron_cuda_execution *, int64_t dtype,
                                            const kron_product *up, const kron_product *down);

// down(act(up x)), for up = (h x u) ⊗ large, contracted from the right, and down = (p x h) ⊗ large',
// from the left. The hidden vector exists in registers, one entry at a time.
const char *kron_cuda_feed_forward(const kron_cuda_execution *, int64_t dtype, int64_t tokens,
                                   const void *x, const kron_product *up, const kron_product *down);

// Like kron_cpu_feed_forward_backward, and deterministic.
int64_t kron_cuda_feed_forward_backward_workspace(const kron_cuda_execution *, int64_t dtype,
                                                  int64_t tokens, const kron_product *up,
                                                  const kron_product *down);
const char *kron_cuda_feed_forward_backward(const kron_cuda_execution *, int64_t dtype,
                                            int64_t tokens, const void *dy, const void *x,
                                            const kron_product *up, const kron_product *down,
                                            void *dx, void *da_up, void *db_up, void *dbias,
                                            void *da_down, void *db_down, void *workspace);

#ifdef __cplusplus
}
#endif
