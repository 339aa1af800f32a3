// Products of more than two factors after their checks, for one dtype. `forward` takes two as well.
#pragma once
#include "../kron.h"

struct Many {
  const char *(*forward)(const kron_execution &, int64_t tokens, const void *x, const kron_product &);
  // A gradient that is null is not computed: of x, and of each factor.
  const char *(*backward)(const kron_execution &, int64_t tokens, const void *dy, const void *x,
                          const kron_product &, void *dx, void *const *gradients);
};

// One table for each instruction set, indexed by kron_dtype.
extern const Many kron_many_portable[4], kron_many_avx2[4], kron_many_avx512[4];
