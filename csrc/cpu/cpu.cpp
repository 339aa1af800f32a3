// The entries of kron.h: what a call must satisfy, and which instruction set serves it.
#include "kernels.h"

int64_t kron_cpu_isa(void) {
#if defined(KRON_HAS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return KRON_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return KRON_AVX2;
#endif
  return KRON_PORTABLE;
}

namespace {

const Kernels &kernels(int64_t isa) {
#if defined(KRON_HAS_X86)
  if (isa == KRON_AVX512) return kron_kernels_avx512;
  if (isa == KRON_AVX2) return kron_kernels_avx2;
#endif
  return kron_kernels_portable;
}

const char *check(const kron_product &p, int64_t columns) {
  if (p.rank < 1) return "the rank must be at least 1";
  if (p.n_factors < 1 || p.n_factors > KRON_MAX_FACTORS) return "too few or too many factors";
  int64_t inputs = 1, seen = 0;
  for (int64_t i = 0; i < p.n_factors; i++) {
    if (p.factors[i].rows < 1 || p.factors[i].cols < 1) return "a factor has an empty side";
    if (p.turns[i] < 0 || p.turns[i] >= p.n_factors) return "a turn is out of range";
    inputs *= p.factors[i].cols;
    seen |= int64_t(1) << p.turns[i];
  }
  if (seen != (int64_t(1) << p.n_factors) - 1) return "a factor has no turn";
  return columns && inputs != columns ? "products must share the columns of x" : nullptr;
}

int64_t columns_of(const kron_product &p) {
  int64_t n = 1;
  for (int64_t i = 0; i < p.n_factors; i++) n *= p.factors[i].cols;
  return n;
}
int64_t rows_of(const kron_product &p) {
  int64_t m = 1;
  for (int64_t i = 0; i < p.n_factors; i++) m *= p.factors[i].rows;
  return m;
}

const char *check(const kron_execution &e) {
  if (e.isa < 0 || e.isa > kron_cpu_isa()) return "this machine lacks the instruction set asked for";
  return e.threads < 1 ? "a call needs at least one thread" : nullptr;
}

} // namespace

const char *kron_cpu_forward(const kron_execution *e, int64_t dtype, int64_t tokens, const void *x,
                             int64_t n_products, const kron_product *products) {
  if (const char *error = check(*e)) return error;
  if (n_products < 1 || n_products > KRON_MAX_PRODUCTS) return "too few or too many products";
  for (int64_t i = 0; i < n_products; i++)
    if (const char *error = check(products[i], i ? columns_of(products[0]) : 0)) return error;
  if (!tokens) return nullptr;
  return kernels(e->isa).forward(*e, dtype, tokens, x, n_products, products);
}

const char *kron_cpu_forward_along(const kron_execution *e, int64_t dtype, int64_t tokens,
                                   const void *x, int64_t tail, const kron_product *product) {
  if (const char *error = check(*e)) return error;
  if (const char *error = check(*product, 0)) return error;
  if (tail < 1) return "the tail must be at least 1";
  if (!tokens) return nullptr;
  return kernels(e->isa).forward_along(*e, dtype, tokens, x, tail, *product);
}

const char *kron_cpu_feed_forward(const kron_execution *e, int64_t dtype, int64_t tokens,
                                  const void *x, const kron_product *up, const kron_product *down) {
  if (const char *error = check(*e)) return error;
  if (const char *error = check(*up, 0)) return error;
  if (const char *error = check(*down, rows_of(*up))) return error;
  if (!tokens) return nullptr;
  return kernels(e->isa).feed_forward(*e, dtype, tokens, x, *up, *down);
}

const char *kron_cpu_backward(const kron_execution *e, int64_t dtype, int64_t tokens,
                              const void *dy, const void *x, const kron_product *product, void *dx,
                              void *da, void *db) {
  if (const char *error = check(*e)) return error;
  if (const char *error = check(*product, 0)) return error;
  if (product->n_factors != 2) return "gradients are for two factors";
  return kernels(e->isa).backward(*e, dtype, tokens, dy, x, *product, dx, da, db);
}

const char *kron_cpu_feed_forward_backward(const kron_execution *e, int64_t dtype, int64_t tokens,
                                           const void *dy, const void *x, const kron_product *up,
                                           const kron_product *down, void *dx, void *da_up,
                                           void *db_up, void *dbias, void *da_down, void *db_down) {
  if (const char *error = check(*e)) return error;
  if (const char *error = check(*up, 0)) return error;
  if (const char *error = check(*down, rows_of(*up))) return error;
  void *const gradients[] = {dx, da_up, db_up, dbias, da_down, db_down};
  return kernels(e->isa).feed_forward_backward(*e, dtype, tokens, dy, x, *up, *down, gradients);
}
