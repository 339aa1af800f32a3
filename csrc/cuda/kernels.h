// One table of kernels for each kind of math; kernels.cu is compiled once for each.
#pragma once
#include "runtime.h"

namespace kron {

struct Kernels {
  Kernel forward, mix_gradient;
  Kernel one_token, few_tokens; // small_forward with two rows and with eight at a time
  Kernel feed_forward, feed_forward_backward;
  Kernel dot_gradient, sum_parts;
};

extern const Kernels kernels_float16, kernels_bfloat16, kernels_tf32, kernels_float32;

} // namespace kron
