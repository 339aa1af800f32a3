// Products of more than two factors after their checks, for one dtype. `forward` takes two as well.
#pragma once
#include "../kron.h"

struct Many {
  const char *(*forward)(const kron_execution &, int64_t tokens, const void *x, const kron_product &);
  // A gradient that is null is not computed: of x, and of each factor.
  const char *(*backward)(const kron_execution &, int64_t tokens, const void *dy, const void *x,
                          const kron_product &, void *dx, void *const *gradients);
};

// One table for each instruction set and type of computation, as in kernels.h.
extern const Many kron_many_portable_float[4], kron_many_portable_double[4];
extern const Many kron_many_avx2_float[4], kron_many_avx2_double[4];
extern const Many kron_many_avx512_float[4], kron_many_avx512_double[4];
