// The kernels of one kind of math, KRON_MATH: float16, bfloat16, tf32 or float32.
#include "feed_forward.h"
#include "gradient.h"
#include "kernels.h"
#include "small.h"

namespace kron {
namespace {

namespace math {
using float16 = TensorCores<Float16>;
using bfloat16 = TensorCores<Bfloat16>;
using tf32 = TensorCores<float, true>;
using float32 = Exact;
} // namespace math
using Math = math::KRON_MATH;

} // namespace
} // namespace kron

#define KRON_JOIN_(A, B) A##B
#define KRON_JOIN(A, B) KRON_JOIN_(A, B)
#define KRON_NAME(KERNEL) KRON_JOIN(kron_##KERNEL##_, KRON_MATH)

using namespace kron;

// Exact sums take more registers, and operands fill the shared memory: one block fits.
enum { BLOCKS = sizeof(Math::Left) > 16 ? 1 : 2 };

KRON_KERNEL(KRON_NAME(forward), ForwardArguments, BLOCK_THREADS, BLOCKS, forward<Math, false>)
KRON_KERNEL(KRON_NAME(mix_gradient), ForwardArguments, BLOCK_THREADS, BLOCKS, forward<Math, true>)
KRON_KERNEL(KRON_NAME(one_token), ForwardArguments, SMALL_THREADS, 2, small_forward<Math, 2>)
KRON_KERNEL(KRON_NAME(few_tokens), ForwardArguments, SMALL_THREADS, 2, small_forward<Math, SMALL_ROWS>)
KRON_KERNEL(KRON_NAME(feed_forward), FeedForwardArguments, BLOCK_THREADS, BLOCKS,
            feed_forward<Math>)
KRON_KERNEL(KRON_NAME(feed_forward_backward), FeedForwardArguments, BLOCK_THREADS, 1,
            feed_forward_backward<Math>)
KRON_KERNEL(KRON_NAME(dot_gradient), DotGradientArguments, BLOCK_THREADS, BLOCKS,
            dot_gradient<Math>)
KRON_KERNEL(KRON_NAME(sum_parts), SumArguments, SUM_THREADS, 2, sum_parts)

#define KRON_TEXT_(A) #A
#define KRON_TEXT(A) KRON_TEXT_(A)
#define KRON_ENTRY(KERNEL)                                                                         \
  { KRON_TEXT(KRON_NAME(KERNEL)), reinterpret_cast<const void *>(KRON_NAME(KERNEL)) }

const Kernels kron::KRON_JOIN(kernels_, KRON_MATH) = {
    KRON_ENTRY(forward),      KRON_ENTRY(mix_gradient),          KRON_ENTRY(one_token),
    KRON_ENTRY(few_tokens),   KRON_ENTRY(feed_forward),          KRON_ENTRY(feed_forward_backward),
    KRON_ENTRY(dot_gradient), KRON_ENTRY(sum_parts),
};
