// The C ABI of the compiled kernels: raw pointers and sizes, no torch and no Python headers.
//
// Sizes and strides count elements. Functions that return a string return nullptr on success, or an
// error in static storage; after an error in the arguments, nothing was written. They refuse null
// pointers, sizes that no memory holds and numbers outside an enum. They cannot check that buffers are
// as large as the sizes require: that is up to the caller.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Incremented with every change of a structure, an enum or an argument. kron_abi() returns the number of
// the library: compare the two before the first call.
enum { KRON_ABI = 4 };
int64_t kron_abi(void);

enum kron_dtype { KRON_FLOAT32, KRON_FLOAT64, KRON_BFLOAT16, KRON_FLOAT16 };
enum kron_activation { KRON_NONE, KRON_GELU, KRON_GELU_TANH, KRON_RELU, KRON_SILU };
enum kron_isa { KRON_PORTABLE, KRON_AVX2, KRON_AVX512 }; // on ARM, KRON_PORTABLE uses NEON

enum { KRON_MAX_FACTORS = 8, KRON_MAX_PRODUCTS = 4 };

// A factor (rank, rows, cols) with any strides: a transposed factor needs no copy.
//
// With a scale its entries are int8, and entry j of row i of term k stands for
// data[...] * scale[k * scale_rank_stride + i]. A product contracts such a factor in integers: of each
// vector that the factor multiplies, entries are rounded to multiples of its largest one / 127. A vector with
// an entry that is not finite gives NaN. Terms of a column and a row each must share the columns' scales
// (scale_rank_stride 0). The CPU functions take such factors in products and tables of up to two factors, in
// float32 and the 16-bit dtypes, but not where gradients are computed.
typedef struct {
  const void *data;
  int64_t rows, cols;
  int64_t rank_stride, row_stride, col_stride;
  const float *scale; // or null
  int64_t scale_rank_stride;
} kron_factor;

// y = act((Σ_k F_1k ⊗ F_2k ⊗ …) x + bias) + residual, in contiguous rows.
typedef struct {
  int64_t rank, n_factors;
  kron_factor factors[KRON_MAX_FACTORS];
  int64_t turns[KRON_MAX_FACTORS]; // indices of the factors in the order of contraction
  const void *bias;                // (m,) or null
  const void *residual;            // (tokens, m) or null
  int64_t activation;              // enum kron_activation
  void *y;                         // (tokens, m)
} kron_product;

// Calls fn(begin, end, context) for disjoint ranges that cover [begin, end), on any threads, and returns
// 0 on success. It is the signature of torch_parallel_for. Null means the calling thread.
typedef void (*kron_range)(int64_t begin, int64_t end, void *context);
typedef int32_t (*kron_parallel_for)(int64_t begin, int64_t end, int64_t grain, kron_range fn,
                                     void *context);

typedef struct {
  int64_t isa; // enum kron_isa, at most kron_cpu_isa()
  // The largest number of threads, 1 to 65536. Last bits depend on it: of sums over tokens, of
  // kron_cpu_feed_forward_backward, and of a few tokens, which one thread may compute in another order.
  int64_t threads;
  kron_parallel_for parallel_for;
  // Not 0: int8 factors by an instruction that multiplies bytes, if kron_cpu_bytes(isa); encoders in
  // KRON_BFLOAT16 by one that multiplies bfloat16 numbers, if kron_cpu_bfloat16(isa).
  int64_t bytes, bfloat16;
} kron_execution;

// The widest instruction set of this machine for which the library has kernels.
int64_t kron_cpu_isa(void);
// Whether this machine has an instruction for sums of four products of bytes, in vectors of this set: VNNI, or
// dotprod on ARM. Otherwise bytes are widened to 16 bits, which gives the same sums.
int64_t kron_cpu_bytes(int64_t isa);
// Whether it has one for sums of two products of bfloat16 numbers (AVX512_BF16). Large factors and attention then
// round what they multiply to bfloat16; otherwise it stays float32.
int64_t kron_cpu_bfloat16(int64_t isa);

// 1 to KRON_MAX_PRODUCTS products of the same x (tokens, n), which each thread reads once.
const char *kron_cpu_forward(const kron_execution *, int64_t dtype, int64_t tokens, const void *x,
                             int64_t n_products, const kron_product *products);

// The product along the middle axis of x (tokens, n, tail): y and residual are (tokens, m, tail), bias
// is (m, tail). A product of many factors can be computed a few factors at a time.
const char *kron_cpu_forward_along(const kron_execution *, int64_t dtype, int64_t tokens,
                                   const void *x, int64_t tail, const kron_product *);

// down(act(up x)). The hidden vector is held for a block of tokens that a thread computes, or for up to
// twice as many blocks as threads, if the outputs of blocks are divided. Where the factors meet entry by
// entry, a thread holds about 64 of its entries at a time: up = (k x l) ⊗ B, contracted from the
// right, and down = (l' x k) ⊗ B', contracted from the left, with as many rows of B as columns of B'.
const char *kron_cpu_feed_forward(const kron_execution *, int64_t dtype, int64_t tokens,
                                  const void *x, const kron_product *up, const kron_product *down);

// How a call divides its work among threads.
typedef struct {
  int64_t scratch; // bytes, without factors that are widened for the call
  int64_t teams;   // that compute groups of sequences or tokens, each team without waiting for another
  int64_t workers; // threads of a team
  int64_t stages;  // of a call or a layer, between which the workers of a team wait for one another
  int64_t parts;   // of the outputs, into which products of one block of tokens are divided
  double share;    // of the multiply-adds, of the thread that has most of them, at least 1 / threads
} kron_division;

// The division of the calls above. No data is read: its pointers may be null.
const char *kron_cpu_forward_division(const kron_execution *, int64_t dtype, int64_t tokens,
                                      int64_t n_products, const kron_product *products, kron_division *);
const char *kron_cpu_feed_forward_division(const kron_execution *, int64_t dtype, int64_t tokens,
                                           const kron_product *up, const kron_product *down,
                                           kron_division *);

// Gradients of a product of two factors; its bias, residual and y are not read, and its activation is
// not applied. dx (tokens, n) is in the dtype of x. da and db are contiguous, in float32, or in float64
// for KRON_FLOAT64. Each may be null. The number of threads fixes the order of sums over tokens.
const char *kron_cpu_backward(const kron_execution *, int64_t dtype, int64_t tokens, const void *dy,
                              const void *x, const kron_product *product, void *dx, void *da,
                              void *db);
// The division of such a call for all three gradients. No data is read.
const char *kron_cpu_backward_division(const kron_execution *, int64_t dtype, int64_t tokens,
                                       const kron_product *product, kron_division *);

// The same of 3 to KRON_MAX_FACTORS factors, in one call: gradients[i] is that of factor i.
const char *kron_cpu_backward_many(const kron_execution *, int64_t dtype, int64_t tokens, const void *dy,
                                   const void *x, const kron_product *product, void *dx,
                                   void *const *gradients);

// Gradients of kron_cpu_feed_forward for factors that meet entry by entry. It recomputes the hidden
// vector, entry by entry. Dtypes are those of kron_cpu_backward; dbias is the gradient of up's bias. Each
// gradient may be null.
const char *kron_cpu_feed_forward_backward(const kron_execution *, int64_t dtype, int64_t tokens,
                                           const void *dy, const void *x, const kron_product *up,
                                           const kron_product *down, void *dx, void *da_up,
                                           void *db_up, void *dbias, void *da_down, void *db_down);
// The division of such a call for all gradients. No data is read.
const char *kron_cpu_feed_forward_backward_division(const kron_execution *, int64_t dtype, int64_t tokens,
                                                    const kron_product *up, const kron_product *down,
                                                    kron_division *);

// --- a whole encoder on the CPU: a transformer that normalises after each block, such as BERT. All
// numbers of an encoder and a batch are of one dtype.

enum { KRON_MAX_TABLES = 3 };

// y = (Σ W_part) x + bias. A part has one factor, which is a dense weight, or two; of each part rank,
// n_factors, factors and turns are read.
typedef struct {
  int64_t n_parts;
  const kron_product *parts;
  const void *bias; // (m,) or null
} kron_linear;

typedef struct {
  const void *weight, *bias; // (width,) each; null for 1 and for 0
  double epsilon;
} kron_norm;

// x = norm(output(attention(query x, key x, value x)) + x), then x = norm(down(act(up x)) + x).
typedef struct {
  kron_linear query, key, value, output, up, down;
  kron_norm attention_norm, output_norm;
  int64_t activation; // enum kron_activation
} kron_layer;

// The first x is projection(norm(the sum of a row of each table)).
typedef struct {
  int64_t n_tables; // 1 to KRON_MAX_TABLES
  kron_product tables[KRON_MAX_TABLES]; // (rows, width) each; read like the part of a layer
  kron_norm norm;
  kron_linear projection; // n_parts may be 0: no projection
  int64_t n_layers, heads;
  const kron_layer *layers;
  double scale; // of the scores of attention, usually 1 / sqrt(the size of a head)
} kron_encoder;

// Padded sequences, of which only the tokens are computed. A sequence attends to its tokens. If it has
// any, its first position is computed even if it is padding. Other padding has zeros in all results.
typedef struct {
  int64_t sequences, length;
  const int64_t *mask;                 // (sequences, length), 0 for padding; null: all are tokens
  const int64_t *ids[KRON_MAX_TABLES]; // (sequences, length), rows of each table
  const void *embeddings; // (sequences, length, width of the tables) instead of the first table; or null
  // (heads, 2 * length - 1) or null: entry length - 1 + i - j is added to the score of query i and key j.
  const void *distance_bias;
  void *const *states; // n_layers + 1 results (sequences, length, width), the first x and after each
                       // layer. All but the last may be null.
} kron_batch;

const char *kron_cpu_encode(const kron_execution *, int64_t dtype, const kron_encoder *,
                            const kron_batch *);
// Without reading or writing any data but the mask.
const char *kron_cpu_encode_division(const kron_execution *, int64_t dtype, const kron_encoder *,
                                     const kron_batch *, kron_division *);

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
