#include "plan.h"

#include <algorithm>

namespace kron {
namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Shared memory of a launch in bytes: rows of the left operand, and stages.
int64_t left_bytes(int64_t rows, int64_t steps) { return rows * (steps * STEP_BYTES + 16); }
int64_t stages_bytes(int along, int item, int warps_along, int warps, int slabs) {
  const int64_t stages = 2 * stage_bytes(warps_along * WARP_COLUMNS, along, item);
  return std::max<int64_t>(stages, int64_t(warps) * slabs * SLAB_BYTES);
}

// The number of warps side by side, which have a group of columns each: leave as few as possible
// without work, then take as many as possible, because they share the left operand.
int widest(int64_t groups) {
  int best = 1;
  for (int along = 2; along <= 3; along++)
    if (ceil_div(groups, along) * along <= ceil_div(groups, best) * best) best = along;
  return best;
}

// The number of warps below one another: the most on a multiprocessor with up to two blocks, one of
// which loads while the other multiplies. Ties go to fewer blocks, which read the factor less often. 0
// if none fit. A block may use a multiprocessor's shared memory except for 1 KB per block.
template <class Shared> int highest(int along, const Device &device, Shared shared) {
  int best = 0;
  int64_t most = 0;
  for (int down = BLOCK_WARPS / along; down > 0; down--) {
    const int64_t blocks = std::min<int64_t>(2, (device.shared + 1024) / (shared(down) + 1024));
    if (blocks * down > most) most = blocks * down, best = down;
  }
  return best;
}

} // namespace

const char *find_geometry(const kron_product &p, Geometry &g) {
  if (p.n_factors != 2) return "it multiplies by two factors";
  for (const kron_factor *f = p.factors; f < p.factors + 2; f++) {
    // No overflow: sides and rank have been checked.
    const int64_t extent = (p.rank - 1) * f->rank_stride + (f->rows - 1) * f->row_stride +
                           (f->cols - 1) * f->col_stride;
    if (extent >= int64_t(1) << 31) return "a factor's entries are 2^31 or more apart";
  }
  if (p.rank > 16) return "it sums up to 16 products";
  bool found = false;
  for (const bool interleaved : {true, false}) {
    const kron_factor &mix = p.factors[interleaved], &dot = p.factors[!interleaved];
    const Geometry way = {{&mix, false}, {&dot, false}, p.rank, interleaved,
                          p.turns[0] == int64_t(interleaved)};
    const int64_t sides = std::max(mix.rows, mix.cols);
    const bool fits = sides <= 64 && p.rank * mix.cols * mix_pitch(int(mix.rows)) <= 4096 &&
                      p.rank * mix.rows * mix_pitch(int(mix.cols)) <= 4096;
    if (!fits || way.vectors() > 16) continue;
    if (found && g.mix.rows() * g.mix.cols() <= mix.rows * mix.cols) continue;
    g = way, found = true;
  }
  return found ? nullptr
               : "a factor must have sides of 64 at most, and of 16 on the product's side, and in all "
                 "terms 4096 numbers, to mix; neither has";
}

// For few tokens: one block for eight columns.
bool plan_small(const Problem &p, const ForwardArguments &a, Shape &shape) {
  const int64_t across = a.mix_first ? 1 : a.terms, deep = a.mix_first ? a.terms : 1;
  if (p.tokens > 16 || a.dot.along != 1 || across * SMALL_COLUMNS > WARP_COLUMNS) return false;
  const int64_t count = p.tokens * a.vectors, padded = ceil_div(count, SMALL_ROWS) * SMALL_ROWS;
  const int64_t mix = a.mixes ? int64_t(a.terms) * a.in.vectors * mix_pitch(a.out.vectors) : 0;
  shape = {};
  shape.threads = SMALL_THREADS;
  shape.grid = p.products * ceil_div(a.dot.columns, SMALL_COLUMNS);
  shape.shared = 4 * (mix + padded * deep * small_pitch(a.in.length) + count * SLAB_PITCH);
  return shape.shared <= p.device.shared;
}

Shape plan_forward(const Problem &p, const ForwardArguments &a, bool gradient) {
  const int step = STEP_BYTES / p.item, width = 1 << a.shift;
  const int64_t all = ceil_div(a.in.length, step) * (a.mix_first ? a.terms : 1);
  const int64_t mix = int64_t(a.terms) * a.in.vectors * mix_pitch(a.out.vectors) * 4;
  const int64_t groups = ceil_div(a.dot.columns, width), piece = 16 / a.vectors;
  const auto shared = [&](int along, int down, int64_t steps) {
    return (a.mixes ? mix : 0) + (gradient ? along * down * mix : 0) +
           left_bytes(down * WARP_ROWS, steps) +
           stages_bytes(a.dot.along, p.item, along, along * down, 1);
  };
  int along = widest(groups);
  int64_t steps = all;
  int down = highest(along, p.device, [&](int down) { return shared(along, down, all); });
  if (!down) { // the left operand in parts
    down = 1;
    while (steps > 1 && shared(along, down, steps) > p.device.shared) steps = ceil_div(steps, 2);
  }
  const auto blocks = [&] { return ceil_div(p.tokens, down * 2 * piece) * p.products; };
  const auto tiles = [&] { return ceil_div(groups, along); };
  // Too few blocks for all multiprocessors: divide the columns, then make the blocks smaller.
  const int64_t wanted = p.device.multiprocessors;
  if (blocks() * tiles() < wanted) along = 1;
  while (down > 1 && blocks() * tiles() < wanted) down--;
  Shape shape;
  shape.rows = down * WARP_ROWS, shape.warps_along = along, shape.threads = along * down * 32;
  shape.splits = int(std::min(tiles(), std::max<int64_t>(1, ceil_div(wanted, std::max<int64_t>(1, blocks())))));
  shape.steps = int(steps);
  int64_t programs = std::max<int64_t>(1, blocks() / p.products);
  // Each block writes its sums: fewer blocks have fewer sums to add up.
  if (gradient) programs = std::min(programs, ceil_div(4 * wanted, shape.splits));
  shape.grid = programs * p.products * shape.splits;
  shape.shared = shared(along, down, steps);
  return shape;
}

Shape plan_dot_gradient(const Problem &p, int64_t n, int64_t m, int64_t terms, int64_t vectors,
                        int64_t mix_size) {
  const int rows = gradient_rows(p.item), along = widest(ceil_div(m, WARP_COLUMNS));
  const int down = int(std::min<int64_t>(BLOCK_WARPS / along, ceil_div(n, WARP_ROWS)));
  const int height = down * WARP_ROWS, width = along * WARP_COLUMNS;
  const int64_t programs = ceil_div(n, height) * ceil_div(m, width) * terms;
  const int64_t blocks = ceil_div(p.tokens, rows / 16 * (16 / vectors));
  Shape shape = {};
  shape.warps_along = along, shape.threads = along * down * 32;
  // Two blocks per multiprocessor; each writes sums in float32 of the size of the factor.
  shape.splits = int(std::max<int64_t>(
      1, std::min(2 * p.device.multiprocessors / programs, ceil_div(blocks, 4))));
  shape.grid = programs * shape.splits;
  shape.shared = mix_size * 4 + rows * (transposed_pitch(height, p.item) + transposed_pitch(width, p.item));
  return shape;
}

bool plan_feed_forward(const Problem &p, const FeedForwardArguments &a, bool backward,
                       Shape &shape) {
  const int step = STEP_BYTES / p.item;
  const int64_t deep = backward ? std::max(a.in.length, a.out.length) : a.in.length;
  const int64_t all = ceil_div(deep, step), v_steps = ceil_div(a.up.columns, step);
  const int64_t mixes = int64_t(a.hidden) * MEETING_PITCH * 4;
  const auto shared = [&](int along, int down, int64_t steps) {
    const int warps = along * down;
    const int64_t stages = std::max(stages_bytes(a.up.along, p.item, along, warps, 1 + backward),
                                    stages_bytes(a.down.along, p.item, along, warps, 1 + backward));
    return mixes + left_bytes(down * WARP_ROWS, steps) + stages +
           (backward ? int64_t(warps) * hidden_cells(a.hidden) * 4
                     : left_bytes(down * WARP_ROWS, v_steps));
  };
  const int along = widest(ceil_div(a.up.columns, WARP_COLUMNS));
  int64_t steps = all;
  int down = highest(along, p.device, [&](int down) { return shared(along, down, all); });
  if (!down) {
    down = 1;
    while (steps > 1 && shared(along, down, steps) > p.device.shared) steps = ceil_div(steps, 2);
  }
  if (shared(along, down, steps) > p.device.shared) return false;
  const auto blocks = [&] { return ceil_div(p.tokens, down * WARP_ROWS / MEETING); };
  while (down > 1 && blocks() < p.device.multiprocessors) down--;
  shape.rows = down * WARP_ROWS, shape.warps_along = along, shape.threads = along * down * 32;
  shape.steps = int(steps), shape.shared = shared(along, down, steps);
  shape.splits = 1, shape.grid = blocks();
  if (backward) { // shares of the tokens: two blocks per multiprocessor
    const int64_t tiles = ceil_div(a.up.columns, along * WARP_COLUMNS);
    shape.splits = int(std::max<int64_t>(
        1, std::min(blocks(), 2 * p.device.multiprocessors / tiles)));
    shape.grid = tiles * shape.splits;
  }
  return true;
}

} // namespace kron
