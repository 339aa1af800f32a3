// The functions of kron.h after their checks, for one dtype. With a division that is not null they only
// describe it, and read no data.
#pragma once
#include "../kron.h"

struct Kernels {
  const char *(*forward)(const kron_execution &, int64_t tokens, const void *x, int64_t n_products,
                         const kron_product *products, kron_division *);
  const char *(*forward_along)(const kron_execution &, int64_t tokens, const void *x, int64_t tail,
                               const kron_product &);
  const char *(*feed_forward)(const kron_execution &, int64_t tokens, const void *x,
                              const kron_product &up, const kron_product &down, kron_division *);
  const char *(*backward)(const kron_execution &, int64_t tokens, const void *dy, const void *x,
                          const kron_product &, void *dx, void *da, void *db, kron_division *);
  const char *(*feed_forward_backward)(const kron_execution &, int64_t tokens, const void *dy,
                                       const void *x, const kron_product &up,
                                       const kron_product &down, void *const *gradients,
                                       kron_division *);
};

// One table for each instruction set and type of computation, indexed by kron_dtype; dtypes of the other type are null.
extern const Kernels kron_kernels_portable_float[4], kron_kernels_portable_double[4];
extern const Kernels kron_kernels_avx2_float[4], kron_kernels_avx2_double[4];
extern const Kernels kron_kernels_avx512_float[4], kron_kernels_avx512_double[4];

// kron_cpu_encode after its checks, or only the division of its work, if that is not null.
typedef const char *(*Encode)(const kron_execution &, const kron_encoder &, const kron_batch &,
                              kron_division *);
extern const Encode kron_encoders_portable_float[4], kron_encoders_portable_double[4];
extern const Encode kron_encoders_avx2_float[4], kron_encoders_avx2_double[4];
extern const Encode kron_encoders_avx512_float[4], kron_encoders_avx512_double[4];
