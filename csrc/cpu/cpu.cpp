// The CPU functions of kron.h: they check a call and pass it to the kernels of its instruction set.
#if defined(KRON_HAS_X86)
#include <cpuid.h>
#endif

#include "../checks.h"
#include "kernels.h"
#include "many.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

using namespace kron_checks;

#if defined(KRON_HAS_X86)
namespace {
// Not by __builtin_cpu_supports, which takes a library of GCC's that other linkers lack.
struct Features {
  int64_t isa = KRON_PORTABLE;
  bool avx_vnni = false, avx512_vnni = false, avx512_bf16 = false;

  Features() {
    const Registers basic = cpuid(1, 0), more = cpuid(7, 0), most = cpuid(7, 1);
    uint32_t kept = 0, high; // the registers that the operating system saves
    if (has(basic.c, 27)) __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    const bool avx = (kept & 0x06) == 0x06, avx512 = (kept & 0xe6) == 0xe6;
    if (avx && has(basic.c, 12) && has(more.b, 5)) isa = KRON_AVX2; // FMA and AVX2
    if (avx512 && has(more.b, 16) && has(more.b, 17) && has(more.b, 30) && has(more.b, 31)) // F, DQ, BW, VL
      isa = KRON_AVX512;
    avx_vnni = has(most.a, 4), avx512_vnni = has(more.c, 11), avx512_bf16 = has(most.a, 5);
  }

private:
  struct Registers {
    unsigned a, b, c, d;
  };
  static Registers cpuid(unsigned leaf, unsigned subleaf) { // zeros, if there is no such leaf
    Registers r = {};
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
  }
  static bool has(unsigned bits, int bit) { return bits >> bit & 1; }
};
const Features features; // read once: in a virtual machine CPUID takes microseconds
} // namespace
#endif

int64_t kron_cpu_isa(void) {
#if defined(KRON_HAS_X86)
  return features.isa;
#else
  return KRON_PORTABLE;
#endif
}

int64_t kron_cpu_bytes(int64_t isa) {
  if (isa < 0 || isa > kron_cpu_isa()) return 0;
#if defined(KRON_EMULATE_BYTES)
  return 1;
#elif defined(KRON_HAS_X86)
  return isa == KRON_AVX512 ? features.avx512_vnni : isa == KRON_AVX2 && features.avx_vnni;
#elif defined(__APPLE__) && defined(__aarch64__)
  return 1; // all Macs with ARM
#elif defined(__linux__) && defined(__aarch64__)
  return getauxval(AT_HWCAP) >> 20 & 1; // ASIMDDP
#else
  return 0;
#endif
}

int64_t kron_cpu_bfloat16(int64_t isa) {
  if (isa < 0 || isa > kron_cpu_isa()) return 0;
#if defined(KRON_EMULATE_BFLOAT16)
  return 1;
#elif defined(KRON_HAS_X86)
  return isa == KRON_AVX512 && features.avx512_bf16;
#else
  return 0;
#endif
}

namespace {

// Limits the memory of partial sums, which each thread has.
constexpr int64_t MOST_THREADS = 65536;

const Kernels &kernels([[maybe_unused]] const kron_execution &e, int64_t dtype) {
  const bool is_double = dtype == KRON_FLOAT64;
#if defined(KRON_HAS_X86)
  if (e.isa == KRON_AVX512) return (is_double ? kron_kernels_avx512_double : kron_kernels_avx512_float)[dtype];
  if (e.isa == KRON_AVX2) return (is_double ? kron_kernels_avx2_double : kron_kernels_avx2_float)[dtype];
#endif
  return (is_double ? kron_kernels_portable_double : kron_kernels_portable_float)[dtype];
}

const Many &many([[maybe_unused]] const kron_execution &e, int64_t dtype) {
  const bool is_double = dtype == KRON_FLOAT64;
#if defined(KRON_HAS_X86)
  if (e.isa == KRON_AVX512) return (is_double ? kron_many_avx512_double : kron_many_avx512_float)[dtype];
  if (e.isa == KRON_AVX2) return (is_double ? kron_many_avx2_double : kron_many_avx2_float)[dtype];
#endif
  return (is_double ? kron_many_portable_double : kron_many_portable_float)[dtype];
}

// Whether the kernels of many factors compute a product. Of two they are faster if both are neither small
// nor large and whole vectors of rows end the result: of 16x16 and 32x32, 128 tokens, 91 and 101 GFLOP/s
// instead of 73 and 85 (AVX-512).
bool is_for_many(int64_t tokens, const kron_product &p) {
  if (p.n_factors > 2) return true;
  if (p.n_factors < 2 || tokens < 32 || p.rank > 1 || p.turns[0] != 1 || p.factors[1].rows % 16) return false;
  for (int64_t i = 0; i < 2; i++) {
    const kron_factor &f = p.factors[i];
    if (f.rows < 16 || f.rows > 64 || f.cols < 16 || f.cols > 64 || f.scale) return false;
  }
  return true;
}

Encode encoder_of([[maybe_unused]] const kron_execution &e, int64_t dtype) {
  const bool is_double = dtype == KRON_FLOAT64;
#if defined(KRON_HAS_X86)
  if (e.isa == KRON_AVX512) return (is_double ? kron_encoders_avx512_double : kron_encoders_avx512_float)[dtype];
  if (e.isa == KRON_AVX2) return (is_double ? kron_encoders_avx2_double : kron_encoders_avx2_float)[dtype];
#endif
  return (is_double ? kron_encoders_portable_double : kron_encoders_portable_float)[dtype];
}

const char *check(const kron_execution *e, int64_t dtype) {
  if (!e) return "the execution is null";
  if (e->isa < 0 || e->isa > kron_cpu_isa())
    return "this machine lacks the instruction set";
  if (e->threads < 1 || e->threads > MOST_THREADS) return "there must be 1 to 65536 threads";
  return dtype < KRON_FLOAT32 || dtype > KRON_FLOAT16 ? "there is no such dtype" : nullptr;
}

// The call with special instructions only where this machine has them.
kron_execution on_this_machine(const kron_execution &e) {
  kron_execution here = e;
  here.bytes = e.bytes && kron_cpu_bytes(e.isa);
  here.bfloat16 = e.bfloat16 && kron_cpu_bfloat16(e.isa);
  return here;
}

const char *check_scales(int64_t n_products, const kron_product *products, int64_t dtype) {
  for (const kron_product *p = products; p < products + n_products; p++)
    if (const char *error = check_int8(*p, dtype)) return error;
  return nullptr;
}

} // namespace

int64_t kron_abi(void) { return KRON_ABI; }

const char *kron_cpu_forward(const kron_execution *e, int64_t dtype, int64_t tokens, const void *x,
                             int64_t n_products, const kron_product *products) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_products(n_products, products, tokens, x)) return error;
  if (const char *error = check_scales(n_products, products, dtype)) return error;
  if (!tokens) return nullptr;
  if (n_products == 1 && is_for_many(tokens, *products)) return many(*e, dtype).forward(*e, tokens, x, *products);
  return kernels(*e, dtype).forward(on_this_machine(*e), tokens, x, n_products, products, nullptr);
}

const char *kron_cpu_forward_along(const kron_execution *e, int64_t dtype, int64_t tokens,
                                   const void *x, int64_t tail, const kron_product *product) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_product(product, tokens, x, true)) return error;
  if (tail < 1) return "the tail must be at least 1";
  if (double(tokens) * double(tail) > MOST_NUMBERS) return "the tail is larger than memory can be";
  if (const char *error = check_operands(*product, tokens * tail, x, true)) return error;
  if (has_int8(*product)) return "an axis in the middle takes no int8 factors";
  if (!tokens) return nullptr;
  return kernels(*e, dtype).forward_along(*e, tokens, x, tail, *product);
}

const char *kron_cpu_feed_forward(const kron_execution *e, int64_t dtype, int64_t tokens,
                                  const void *x, const kron_product *up, const kron_product *down) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_feed_forward(up, down, tokens, x, true)) return error;
  if (const char *error = check_int8(*up, dtype)) return error;
  if (const char *error = check_int8(*down, dtype)) return error;
  if (!tokens) return nullptr;
  return kernels(*e, dtype).feed_forward(on_this_machine(*e), tokens, x, *up, *down, nullptr);
}

const char *kron_cpu_forward_division(const kron_execution *e, int64_t dtype, int64_t tokens,
                                      int64_t n_products, const kron_product *products,
                                      kron_division *division) {
  if (!division) return "the division is null";
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_each(n_products, products, [=](const kron_product *p) {
        return check_product_shape(p, tokens);
      }))
    return error;
  if (const char *error = check_scales(n_products, products, dtype)) return error;
  *division = {};
  if (!tokens) return nullptr;
  return kernels(*e, dtype).forward(*e, tokens, nullptr, n_products, products, division);
}

namespace {

const char *check_feed_forward_division(const kron_execution *e, int64_t dtype, int64_t tokens,
                                        const kron_product *up, const kron_product *down,
                                        const kron_division *division) {
  if (!division) return "the division is null";
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_shapes(up, down)) return error;
  if (const char *error = check_tokens(*up, tokens)) return error;
  return check_tokens(*down, tokens);
}

} // namespace

const char *kron_cpu_feed_forward_division(const kron_execution *e, int64_t dtype, int64_t tokens,
                                           const kron_product *up, const kron_product *down,
                                           kron_division *division) {
  if (const char *error = check_feed_forward_division(e, dtype, tokens, up, down, division)) return error;
  if (const char *error = check_int8(*up, dtype)) return error;
  if (const char *error = check_int8(*down, dtype)) return error;
  *division = {};
  if (!tokens) return nullptr;
  return kernels(*e, dtype).feed_forward(*e, tokens, nullptr, *up, *down, division);
}

const char *kron_cpu_feed_forward_backward_division(const kron_execution *e, int64_t dtype, int64_t tokens,
                                                    const kron_product *up, const kron_product *down,
                                                    kron_division *division) {
  if (const char *error = check_feed_forward_division(e, dtype, tokens, up, down, division)) return error;
  if (has_int8(*up) || has_int8(*down)) return NO_GRADIENT;
  kron_division found = {};
  const char *error = !tokens ? nullptr
                              : kernels(*e, dtype).feed_forward_backward(*e, tokens, nullptr, nullptr, *up,
                                                                         *down, nullptr, &found);
  if (!error) *division = found;
  return error;
}

const char *kron_cpu_backward(const kron_execution *e, int64_t dtype, int64_t tokens,
                              const void *dy, const void *x, const kron_product *product, void *dx,
                              void *da, void *db) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_product(product, tokens, x, false)) return error;
  if (tokens && !dy) return "x or dy is null";
  if (product->n_factors != 2) return "gradients are for two factors";
  if (has_int8(*product)) return NO_GRADIENT;
  return kernels(*e, dtype).backward(*e, tokens, dy, x, *product, dx, da, db, nullptr);
}

const char *kron_cpu_backward_many(const kron_execution *e, int64_t dtype, int64_t tokens, const void *dy,
                                   const void *x, const kron_product *product, void *dx,
                                   void *const *gradients) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_product(product, tokens, x, false)) return error;
  if (tokens && !dy) return "x or dy is null";
  if (!gradients) return "the gradients are null";
  if (product->n_factors < 3) return "these gradients are for three factors and more";
  if (has_int8(*product)) return NO_GRADIENT;
  return many(*e, dtype).backward(*e, tokens, dy, x, *product, dx, gradients);
}

const char *kron_cpu_backward_division(const kron_execution *e, int64_t dtype, int64_t tokens,
                                       const kron_product *product, kron_division *division) {
  if (!division) return "the division is null";
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_product_shape(product, tokens)) return error;
  if (product->n_factors != 2) return "gradients are for two factors";
  if (has_int8(*product)) return NO_GRADIENT;
  *division = {};
  if (!tokens) return nullptr;
  return kernels(*e, dtype).backward(*e, tokens, nullptr, nullptr, *product, division, division, division,
                                     division);
}

const char *kron_cpu_feed_forward_backward(const kron_execution *e, int64_t dtype, int64_t tokens,
                                           const void *dy, const void *x, const kron_product *up,
                                           const kron_product *down, void *dx, void *da_up,
                                           void *db_up, void *dbias, void *da_down, void *db_down) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_feed_forward(up, down, tokens, x, false)) return error;
  if (tokens && !dy) return "x or dy is null";
  if (has_int8(*up) || has_int8(*down)) return NO_GRADIENT;
  void *const gradients[] = {dx, da_up, db_up, dbias, da_down, db_down};
  return kernels(*e, dtype).feed_forward_backward(*e, tokens, dy, x, *up, *down, gradients, nullptr);
}

namespace {

const char *encode(const kron_execution *e, int64_t dtype, const kron_encoder *encoder,
                   const kron_batch *batch, kron_division *division) {
  if (const char *error = check(e, dtype)) return error;
  if (const char *error = check_encoder(encoder, dtype)) return error;
  if (const char *error = check_batch(*encoder, batch)) return error;
  if (division) *division = {};
  if (!batch->sequences || !batch->length) return nullptr;
  if (!division)
    if (const char *error = check_ids(*encoder, *batch)) return error;
  return encoder_of(*e, dtype)(on_this_machine(*e), *encoder, *batch, division);
}

} // namespace

const char *kron_cpu_encode(const kron_execution *e, int64_t dtype, const kron_encoder *encoder,
                            const kron_batch *batch) {
  return encode(e, dtype, encoder, batch, nullptr);
}

const char *kron_cpu_encode_division(const kron_execution *e, int64_t dtype,
                                     const kron_encoder *encoder, const kron_batch *batch,
                                     kron_division *division) {
  if (!division) return "the division is null";
  return encode(e, dtype, encoder, batch, division);
}
