// The entries of kron.h for GPUs: the checks of a call, and the kernels that it launches.
#include "../checks.h"
#include "kernels.h"
#include "plan.h"

#include <algorithm>

using namespace kron;
using namespace kron_checks;

namespace {

int item_of(int64_t dtype) { return dtype == KRON_FLOAT32 ? 4 : 2; }

const char *kernels_of(const kron_cuda_execution &e, int64_t dtype, const Kernels *&kernels) {
  switch (dtype) {
  case KRON_FLOAT16: kernels = &kernels_float16; return nullptr;
  case KRON_BFLOAT16: kernels = &kernels_bfloat16; return nullptr;
  case KRON_FLOAT32: kernels = e.tf32 ? &kernels_tf32 : &kernels_float32; return nullptr;
  default: return "the CUDA kernels are for float32, float16 and bfloat16";
  }
}

bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The layout of vectors, to be accessed 16 bytes at a time if all pointers are aligned; `width` columns
// at most.
Layout layout(int64_t vectors, int64_t length, bool interleaved, int item, bool all_aligned,
              int width = WARP_COLUMNS) {
  const int packet = 16 / item;
  Layout l = {int(vectors), int(length), interleaved && vectors > 1, 0};
  if (!l.interleaved)
    l.run = packet;
  else if (vectors % packet == 0)
    l.run = 1;
  else if (vectors == 2)
    l.run = packet / 2;
  if (!all_aligned || !l.run || length % l.run || l.run > width) l.run = 0;
  return l;
}

Dot dot(const Role &role, int64_t terms, int item, int width = WARP_COLUMNS) {
  const int packet = 16 / item;
  const kron_factor &f = *role.factor;
  Dot d = {int(terms), int(role.rows()), int(role.cols()), int(f.rank_stride),
           int(role.row_stride()), int(role.col_stride()), 0};
  if (!aligned(f.data) || (terms > 1 && f.rank_stride % packet)) return d;
  if (d.depth_stride == 1 && d.depth % packet == 0 && d.column_stride % packet == 0)
    d.along = 1;
  else if (d.column_stride == 1 && d.columns % packet == 0 && d.depth_stride % packet == 0 &&
           width % packet == 0)
    d.along = 2;
  return d;
}

Strides strides(const Role &mix) {
  return {int(mix.factor->rank_stride), int(mix.row_stride()), int(mix.col_stride())};
}

int shift_of(int64_t terms) { // columns of a term in a warp: a power of two
  int shift = 6;
  while ((terms << shift) > WARP_COLUMNS) shift--;
  return shift;
}

struct Call {
  const Kernels *kernels;
  Device device;
  int64_t tokens;
  int item;
  void *stream;

  template <class Arguments>
  const char *run(const Kernel &kernel, const Shape &shape, const Arguments &arguments) const {
    if (shape.grid > 0x7fffffff) return "there are too many tokens for one launch";
    const Launch launch = {shape.grid, shape.threads, shape.shared, stream};
    return kron::run(kernel, launch, &arguments, sizeof arguments);
  }
  // sums[i] = Σ_share parts[share, i]
  const char *sum(const float *parts, void *sums, int64_t count, int64_t shares) const {
    const SumArguments a = {parts, static_cast<float *>(sums), count, int(shares)};
    Shape shape = {};
    shape.grid = (count + 31) / 32, shape.threads = SUM_THREADS, shape.shared = SUM_THREADS * 4;
    return run(kernels->sum_parts, shape, a);
  }
};

const char *begin(const kron_cuda_execution *e, int64_t dtype, int64_t tokens, Call &call) {
  if (!e) return "the execution is null";
  if (tokens < 0) return "the number of tokens must not be negative";
  call.tokens = tokens, call.item = item_of(dtype), call.stream = e->stream;
  if (const char *error = kernels_of(*e, dtype, call.kernels)) return error;
  return device_properties(e->device, call.device);
}

// The arguments of the forward kernels for a geometry, without pointers.
ForwardArguments forward_arguments(const Geometry &g, const Call &call, bool pointers_aligned) {
  ForwardArguments a = {};
  const int64_t across = g.mix_first ? 1 : g.terms;
  a.tokens = call.tokens, a.n_products = 1;
  a.terms = int(g.terms), a.vectors = int(g.vectors());
  a.mixes = 1, a.mix_first = g.mix_first;
  a.mix = strides(g.mix);
  a.shift = shift_of(across);
  a.dot = dot(g.dot, g.terms, call.item, 1 << a.shift);
  a.in = layout(g.mix.cols(), g.dot.cols(), g.interleaved, call.item, pointers_aligned);
  a.out = layout(g.mix.rows(), g.dot.rows(), g.interleaved, call.item, pointers_aligned,
                 1 << a.shift);
  return a;
}

const char *launch_forward(const Call &call, ForwardArguments &a) {
  const Problem problem = {call.tokens, a.n_products, call.item, call.device};
  Shape shape;
  if (plan_small(problem, a, shape)) {
    const bool one = call.tokens * a.vectors <= 2;
    return call.run(one ? call.kernels->one_token : call.kernels->few_tokens, shape, a);
  }
  shape = plan_forward(problem, a, false);
  a.rows = shape.rows, a.warps_along = shape.warps_along, a.splits = shape.splits;
  a.steps = shape.steps;
  return call.run(call.kernels->forward, shape, a);
}

// Whether two products differ only in their pointers.
bool alike(const kron_product &p, const kron_product &q) {
  bool same = p.rank == q.rank && p.activation == q.activation && p.turns[0] == q.turns[0];
  for (int i = 0; i < 2; i++) {
    const kron_factor &f = p.factors[i], &g = q.factors[i];
    same = same && f.rows == g.rows && f.cols == g.cols && f.rank_stride == g.rank_stride &&
           f.row_stride == g.row_stride && f.col_stride == g.col_stride;
  }
  return same;
}

const char *two_factors(const kron_product &p) {
  if (has_int8(p)) return "the CUDA kernels have no int8 factors";
  return p.n_factors == 2 ? nullptr : "the CUDA kernels multiply by two factors";
}

const char *geometry_of(const kron_product *p, Geometry &g) {
  if (const char *error = check_shape(p)) return error;
  if (const char *error = two_factors(*p)) return error;
  return find_geometry(*p, g);
}

// The launches for the gradients of a product of geometry g.
struct Backward {
  Geometry last; // g or its transpose, whichever has the mix last
  ForwardArguments mix;
  Shape mix_shape;
  DotGradientArguments dot;
  Shape dot_shape;
  int64_t mix_size, dot_size; // numbers in the gradients

  Backward(const Geometry &g, const Call &call, bool pointers_aligned)
      : last(g.mix_first ? g.transposed() : g),
        mix(forward_arguments(last, call, pointers_aligned)), dot() {
    const Problem problem = {call.tokens, 1, call.item, call.device};
    mix_shape = plan_forward(problem, mix, true);
    mix.rows = mix_shape.rows, mix.warps_along = mix_shape.warps_along;
    mix.splits = mix_shape.splits, mix.steps = mix_shape.steps;
    // A mix that comes last maps vectors of `in` to vectors of `out`; its transpose maps them back.
    const Role back = {last.mix.factor, !last.mix.transposed};
    dot.vectors = mix.vectors, dot.terms = mix.terms, dot.tokens = call.tokens;
    DotGradientArguments::Side &mixed = dot.sides[g.mix_first], &plain = dot.sides[!g.mix_first];
    mixed.layout = mix.out, mixed.mix = back.factor->data, mixed.strides = strides(back);
    mixed.layout.run = layout(mix.out.vectors, mix.out.length, g.interleaved, call.item,
                              pointers_aligned).run;
    plain.layout = mix.in;
    mix_size = g.terms * g.mix.rows() * g.mix.cols(), dot_size = g.terms * g.dot.rows() * g.dot.cols();
    dot_shape = plan_dot_gradient(problem, g.dot.rows(), g.dot.cols(), g.terms, mix.vectors,
                                  int64_t(mix.out.vectors) * mix_pitch(mix.vectors));
    dot.warps_along = dot_shape.warps_along, dot.shares = dot_shape.splits;
  }
  int64_t mix_parts() const { return mix_shape.grid * mix_size; }
  int64_t dot_parts() const { return dot.shares * dot_size; }
};

const char *launch_dot_gradient(const Call &call, const DotGradientArguments &a, const Shape &shape,
                                void *sums) {
  if (const char *error = call.run(call.kernels->dot_gradient, shape, a)) return error;
  const int64_t count = int64_t(a.terms) * a.sides[0].layout.length * a.sides[1].layout.length;
  return call.sum(a.partial, sums, count, a.shares);
}

// up and down as a feed-forward block, or why they cannot be fused.
const char *meeting(const kron_product &up, const kron_product &down, const Call &call,
                    bool backward, bool pointers_aligned, FeedForwardArguments &a, Shape &shape) {
  if (const char *error = two_factors(up)) return error;
  if (const char *error = two_factors(down)) return error;
  const kron_factor *u = up.factors, *d = down.factors;
  if (up.rank > 1 || down.rank > 1) return "the fused feed-forward block is for rank 1";
  if (u[0].rows != d[0].cols || u[1].rows != d[1].cols)
    return "the factors do not meet in one hidden grid";
  if (up.turns[0] != 1 || down.turns[0] != 0)
    return "up must be contracted from the right and down from the left";
  if (u[0].cols > MEETING || d[0].rows > MEETING)
    return "more than two vectors go into or come out of the hidden grid";
  Geometry unused;
  if (find_geometry(up, unused) || find_geometry(down, unused)) return "a factor is too large";
  a = {};
  const Role right = {&d[1], backward};
  a.tokens = call.tokens, a.hidden = int(u[0].rows);
  a.in = layout(u[0].cols, u[1].cols, false, call.item, pointers_aligned);
  a.out = layout(d[0].rows, d[1].rows, false, call.item, pointers_aligned);
  a.up_mix_strides = strides({&u[0], false}), a.down_mix_strides = strides({&d[0], false});
  a.up = dot({&u[1], false}, 1, call.item), a.down = dot(right, 1, call.item);
  a.wide = u[1].rows % LANE_COLUMNS == 0 && pointers_aligned;
  a.activation = int(up.activation);
  a.up_mix = u[0].data, a.up_dot = u[1].data, a.down_mix = d[0].data, a.down_dot = d[1].data;
  a.bias = up.bias;
  const Problem problem = {call.tokens, 1, call.item, call.device};
  if (!plan_feed_forward(problem, a, backward, shape))
    return "the feed-forward block takes more shared memory than this GPU has";
  a.rows = shape.rows, a.warps_along = shape.warps_along, a.up_steps = shape.steps;
  a.shares = shape.splits;
  return nullptr;
}

// The workspace of a feed-forward block's backward: offsets in bytes.
struct FeedForwardBackward {
  FeedForwardArguments a;
  Shape shape;
  DotGradientArguments up, down;
  Shape up_shape, down_shape;
  int64_t v, dz, up_mix, down_mix, bias, parts, size;

  const char *plan(const kron_product &first, const kron_product &second, const Call &call,
                   bool pointers_aligned) {
    if (const char *error = meeting(first, second, call, true, pointers_aligned, a, shape))
      return error;
    const auto gradient = [&](const Layout &left, const Layout &right, DotGradientArguments &g,
                              Shape &s) {
      g = {};
      g.vectors = left.vectors, g.terms = 1, g.tokens = call.tokens;
      g.sides[0].layout = left, g.sides[1].layout = right;
      const Problem problem = {call.tokens, 1, call.item, call.device};
      s = plan_dot_gradient(problem, left.length, right.length, 1, left.vectors, 0);
      g.warps_along = s.warps_along, g.shares = s.splits;
    };
    const int64_t n = a.up.columns;
    gradient(layout(a.in.vectors, n, false, call.item, pointers_aligned), a.in, up, up_shape);
    gradient(a.out, layout(a.out.vectors, n, false, call.item, pointers_aligned), down, down_shape);
    const int64_t h = a.hidden;
    size = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t at = size;
      size += (bytes + 15) / 16 * 16;
      return at;
    };
    v = take(call.tokens * a.out.vectors * n * call.item);
    dz = take(call.tokens * a.in.vectors * n * call.item);
    up_mix = take(shape.grid * h * a.in.vectors * 4);
    down_mix = take(shape.grid * h * a.out.vectors * 4);
    bias = take(a.shares * h * n * 4);
    parts = take(4 * std::max(up.shares * n * a.in.length, down.shares * n * a.out.length));
    return nullptr;
  }
};

} // namespace


const char *kron_cuda_why_not(int64_t index) {
  Device device;
  return device_properties(index, device);
}

const char *kron_cuda_unserved(const kron_product *product) {
  Geometry g;
  return geometry_of(product, g);
}

const char *kron_cuda_forward(const kron_cuda_execution *e, int64_t dtype, int64_t tokens,
                              const void *x, int64_t n_products, const kron_product *products) {
  Call call;
  if (const char *error = begin(e, dtype, tokens, call)) return error;
  if (const char *error = check_products(n_products, products, tokens, x)) return error;
  for (int64_t i = 0; i < n_products; i++) {
    Geometry g;
    if (const char *error = geometry_of(products + i, g)) return error;
  }
  if (!tokens) return nullptr;
  const OnDevice device(e->device);
  if (device.error) return device.error;
  for (int64_t i = 0, end; i < n_products; i = end) {
    for (end = i + 1; end < n_products && alike(products[i], products[end]);) end++;
    Geometry g;
    find_geometry(products[i], g);
    bool all = aligned(x), dots = true;
    for (int64_t j = i; j < end; j++) {
      const kron_product &p = products[j];
      all = all && aligned(p.bias) && aligned(p.residual) && aligned(p.y);
      dots = dots && aligned(p.factors[!g.interleaved].data);
    }
    ForwardArguments a = forward_arguments(g, call, all);
    if (!dots) a.dot.along = 0;
    a.x = x, a.n_products = int(end - i), a.activation = int(products[i].activation);
    for (int64_t j = i; j < end; j++) {
      const kron_product &p = products[j];
      a.products[j - i] = {p.factors[g.interleaved].data, p.factors[!g.interleaved].data, p.bias,
                           p.residual, p.y};
    }
    if (const char *error = launch_forward(call, a)) return error;
  }
  return nullptr;
}

int64_t kron_cuda_backward_workspace(const kron_cuda_execution *e, int64_t dtype, int64_t tokens,
                                     const kron_product *product) {
  Call call;
  Geometry g;
  if (begin(e, dtype, tokens, call) || geometry_of(product, g)) return 0;
  // Unaligned operands have other tiles: make room for both.
  int64_t most = 0;
  for (const bool pointers_aligned : {false, true}) {
    const Backward b(g, call, pointers_aligned);
    most = std::max({most, b.mix_parts(), b.dot_parts()});
  }
  return 4 * most;
}

const char *kron_cuda_backward(const kron_cuda_execution *e, int64_t dtype, int64_t tokens,
                               const void *dy, const void *x, const kron_product *product, void *dx,
                               void *da, void *db, void *workspace) {
  Call call;
  Geometry g;
  if (const char *error = begin(e, dtype, tokens, call)) return error;
  if (const char *error = check_product(product, tokens, x, false)) return error;
  if (const char *error = geometry_of(product, g)) return error;
  if (tokens && (!dy || !workspace)) return "dy or the workspace is null";
  const OnDevice device(e->device);
  if (device.error) return device.error;
  const bool all = aligned(dy) && aligned(x) && aligned(dx);
  void *d_mix = g.interleaved ? db : da, *d_dot = g.interleaved ? da : db;
  float *parts = static_cast<float *>(workspace);
  Backward b(g, call, all);

  // A mix that comes first comes last in dX, which computes its gradient as well.
  const bool together = g.mix_first && d_mix;
  if (dx && tokens && !together) {
    const Geometry back = g.transposed();
    ForwardArguments a = forward_arguments(back, call, all);
    a.x = dy, a.activation = KRON_NONE;
    a.products[0] = {back.mix.factor->data, back.dot.factor->data, nullptr, nullptr, dx};
    if (const char *error = launch_forward(call, a)) return error;
  }
  if (d_mix) {
    ForwardArguments a = b.mix;
    a.x = g.mix_first ? dy : x, a.other = g.mix_first ? x : dy, a.activation = KRON_NONE;
    a.products[0] = {b.last.mix.factor->data, b.last.dot.factor->data, nullptr, nullptr,
                     together && tokens ? dx : nullptr};
    const int o = int(g.mix.rows()), u = int(g.mix.cols());
    a.partial = parts;
    a.partial_stride = g.mix_first ? Strides{o * u, 1, u} : Strides{o * u, u, 1};
    if (const char *error = call.run(call.kernels->mix_gradient, b.mix_shape, a)) return error;
    if (const char *error = call.sum(parts, d_mix, b.mix_size, b.mix_shape.grid)) return error;
  }
  if (d_dot) {
    b.dot.sides[0].data = dy, b.dot.sides[1].data = x;
    b.dot.partial = parts;
    return launch_dot_gradient(call, b.dot, b.dot_shape, d_dot);
  }
  return nullptr;
}

const char *kron_cuda_feed_forward_unserved(const kron_cuda_execution *e, int64_t dtype,
                                            const kron_product *up, const kron_product *down) {
  Call call;
  if (const char *error = begin(e, dtype, 1, call)) return error;
  if (const char *error = check_shapes(up, down)) return error;
  FeedForwardArguments a;
  Shape shape;
  for (const bool backward : {false, true})
    if (const char *error = meeting(*up, *down, call, backward, true, a, shape)) return error;
  return nullptr;
}

const char *kron_cuda_feed_forward(const kron_cuda_execution *e, int64_t dtype, int64_t tokens,
                                   const void *x, const kron_product *up,
                                   const kron_product *down) {
  Call call;
  FeedForwardArguments a;
  Shape shape;
  if (const char *error = begin(e, dtype, tokens, call)) return error;
  if (const char *error = check_feed_forward(up, down, tokens, x, true)) return error;
  const bool all = aligned(x) && aligned(up->bias) && aligned(down->bias) &&
                   aligned(down->residual) && aligned(down->y);
  if (const char *error = meeting(*up, *down, call, false, all, a, shape)) return error;
  if (!tokens) return nullptr;
  const OnDevice device(e->device);
  if (device.error) return device.error;
  a.x = x, a.down_bias = down->bias, a.residual = down->residual, a.y = down->y;
  return call.run(call.kernels->feed_forward, shape, a);
}

int64_t kron_cuda_feed_forward_backward_workspace(const kron_cuda_execution *e, int64_t dtype,
                                                  int64_t tokens, const kron_product *up,
                                                  const kron_product *down) {
  Call call;
  if (begin(e, dtype, tokens, call) || check_shapes(up, down)) return 0;
  int64_t most = 0;
  for (const bool pointers_aligned : {false, true}) {
    FeedForwardBackward b;
    if (b.plan(*up, *down, call, pointers_aligned)) return 0;
    most = std::max(most, b.size);
  }
  return most;
}

const char *kron_cuda_feed_forward_backward(const kron_cuda_execution *e, int64_t dtype,
                                            int64_t tokens, const void *dy, const void *x,
                                            const kron_product *up, const kron_product *down,
                                            void *dx, void *da_up, void *db_up, void *dbias,
                                            void *da_down, void *db_down, void *workspace) {
  Call call;
  FeedForwardBackward b;
  if (const char *error = begin(e, dtype, tokens, call)) return error;
  if (const char *error = check_feed_forward(up, down, tokens, x, false)) return error;
  if (tokens && (!dy || !workspace)) return "dy or the workspace is null";
  const bool all = aligned(dy) && aligned(x) && aligned(dx) && aligned(up->bias) &&
                   aligned(workspace);
  if (const char *error = b.plan(*up, *down, call, all)) return error;
  const OnDevice device(e->device);
  if (device.error) return device.error;
  char *const base = static_cast<char *>(workspace);
  const auto floats = [&](int64_t at) { return reinterpret_cast<float *>(base + at); };
  b.a.x = x, b.a.dy = dy, b.a.v = base + b.v, b.a.dz = base + b.dz;
  b.a.d_up_mix = floats(b.up_mix), b.a.d_down_mix = floats(b.down_mix), b.a.d_bias = floats(b.bias);
  if (const char *error = call.run(call.kernels->feed_forward_backward, b.shape, b.a)) return error;
  const int64_t h = b.a.hidden;
  if (da_up)
    if (const char *error =
            call.sum(b.a.d_up_mix, da_up, h * b.a.in.vectors, b.shape.grid))
      return error;
  if (da_down)
    if (const char *error =
            call.sum(b.a.d_down_mix, da_down, h * b.a.out.vectors, b.shape.grid))
      return error;
  if (dbias)
    if (const char *error = call.sum(b.a.d_bias, dbias, h * b.a.up.columns, b.a.shares))
      return error;
  if (db_up) {
    b.up.sides[0].data = b.a.dz, b.up.sides[1].data = x, b.up.partial = floats(b.parts);
    if (const char *error = launch_dot_gradient(call, b.up, b.up_shape, db_up)) return error;
  }
  if (db_down) {
    b.down.sides[0].data = dy, b.down.sides[1].data = b.a.v, b.down.partial = floats(b.parts);
    if (const char *error = launch_dot_gradient(call, b.down, b.down_shape, db_down)) return error;
  }
  if (!dx || !tokens) return nullptr;
  // dx_u = Bᵀ dz_u: a product without a mix.
  ForwardArguments a = {};
  a.tokens = tokens, a.n_products = 1, a.x = b.a.dz, a.terms = 1, a.vectors = b.a.in.vectors;
  a.mix_first = 1, a.shift = 6;
  a.in = b.up.sides[0].layout, a.out = b.a.in;
  a.dot = dot({&up->factors[1], true}, 1, call.item);
  a.products[0] = {nullptr, up->factors[1].data, nullptr, nullptr, dx};
  return launch_forward(call, a);
}
