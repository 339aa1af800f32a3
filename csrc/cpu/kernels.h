// One table of kernels per instruction set; the functions of kron.h without their first checks.
#pragma once
#include "../kron.h"

struct Kernels {
  const char *(*forward)(const kron_execution &, int64_t dtype, int64_t tokens, const void *x,
                         int64_t n_products, const kron_product *products);
  const char *(*forward_along)(const kron_execution &, int64_t dtype, int64_t tokens, const void *x,
                               int64_t tail, const kron_product &);
  const char *(*feed_forward)(const kron_execution &, int64_t dtype, int64_t tokens, const void *x,
                              const kron_product &up, const kron_product &down);
  const char *(*backward)(const kron_execution &, int64_t dtype, int64_t tokens, const void *dy,
                          const void *x, const kron_product &, void *dx, void *da, void *db);
  const char *(*feed_forward_backward)(const kron_execution &, int64_t dtype, int64_t tokens,
                                       const void *dy, const void *x, const kron_product &up,
                                       const kron_product &down, void *const *gradients);
};

extern const Kernels kron_kernels_portable, kron_kernels_avx2, kron_kernels_avx512;
