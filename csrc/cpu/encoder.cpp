// kron_cpu_encode, compiled once per instruction set and type of computation like kernels.cpp, whose rules hold here
// as well.
//
// A lane is a token from the embeddings to the last LayerNorm: nothing is transposed in between.
// Sequences are packed behind one another without their padding, each from a whole vector of lanes on.
// docs/kernels/cpu.md has a picture.
#include "attention.h"
#include "hidden.h"
#include "kernels.h"
#include "product.h"
#include "team.h"

namespace {

// Pieces of one allocation. Without memory they are only counted.
class Arena {
public:
  explicit Arena(char *start) : start(start) {}
  template <class T> T *take(Int count) {
    char *piece = start ? start + used : nullptr;
    used += (count * Int(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T *>(piece);
  }
  Int used = 0;

private:
  char *const start;
};

// ---- which tokens ------------------------------------------------------------------------------

// Of a sequence in a group: its vectors of lanes, and how many of its tokens are attended to. A first
// position that is padding is the last of its lanes.
struct Sequence {
  Int first, vectors, keys;
};

// Sequences that are computed together, and their vectors of lanes, which are divided into blocks.
struct Group {
  Int vectors, blocks, count;
  Sequence *sequences;
  Int *sequence_of; // of each vector
  Int *rows;        // of each lane, the row of the batch, or -1

  Int first(Int block) const { return block * vectors / blocks; }
  // Vectors between the features of keys and values: odd, so that features do not share cache sets.
  static Int stride(Int vectors) { return vectors | 1; }
};

template <int L> Int vectors_of_lanes(Int lanes) { return (lanes + L - 1) / L; }
inline Int tokens_in(const kron_batch &b, Int sequence) {
  if (!b.mask) return b.length;
  Int tokens = 0;
  for (Int i = 0; i < b.length; i++) tokens += b.mask[sequence * b.length + i] != 0;
  return tokens;
}
// The lanes that a sequence takes.
inline Int lanes_in(const kron_batch &b, Int sequence, Int tokens) {
  return tokens + (tokens && b.mask && !b.mask[sequence * b.length] ? 1 : 0);
}

// Fills the group with these sequences, which have tokens.
template <int L> void pack(const kron_batch &b, const Int *sequences, Int count, Group &group) {
  group.count = count, group.vectors = 0;
  for (Int s = 0; s < count; s++) {
    const Int row = sequences[s] * b.length, start = group.vectors * L;
    Int lane = start;
    for (Int i = 0; i < b.length; i++)
      if (!b.mask || b.mask[row + i]) group.rows[lane++] = row + i;
    const Int keys = lane - start;
    if (b.mask && !b.mask[row]) group.rows[lane++] = row;
    const Int end = (lane + L - 1) / L;
    group.sequences[s] = {group.vectors, end - group.vectors, keys};
    for (; lane < end * L; lane++) group.rows[lane] = -1;
    for (Int v = group.vectors; v < end; v++) group.sequence_of[v] = s;
    group.vectors = end;
  }
}

// ---- numbers as they are stored ----------------------------------------------------------------

template <class S, class T> KRON_INLINE Vector<T> widened(const S *p) {
  if constexpr (std::is_same_v<S, int8_t>) {
    typename VectorOf<int8_t, LANES<T>>::type bytes;
    memcpy(&bytes, p, sizeof bytes);
#if defined(__AVX2__) // GCC 12 converts byte by byte: that took a fifth of the time of an 8x student
    if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
      const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, bits_of<__m128i>(bytes)); // unmasked ones warn
      return __builtin_convertvector(bits_of<VectorOf<int32_t, KRON_BYTES>::type>(wide), Vector<T>);
#else
      return bits_of<Vector<T>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set1_epi64x(bits_of<int64_t>(bytes)))));
#endif
    }
#endif
    return __builtin_convertvector(bytes, Vector<T>);
  } else {
    return fetch(p);
  }
}
// out += factor * in, of `count` numbers that are `stride` apart.
template <class S, class T> void add_row(const void *numbers, Int stride, Int count, T factor, T *out) {
  constexpr int L = LANES<T>;
  const S *const in = static_cast<const S *>(numbers);
  Int i = 0;
  if (stride == 1)
    for (; i + L <= count; i += L) store(out + i, load(out + i) + widened<S, T>(in + i) * factor);
  for (; i < count; i++) out[i] += T(scalar(in[i * stride])) * factor;
}

// A row of a term of a table's factor.
template <class S> class TableRow {
  typedef Compute<S> T;

public:
  TableRow(const kron_factor &f, Int k, Int row)
      : data(static_cast<const char *>(f.data) +
             (k * f.rank_stride + row * f.row_stride) * Int(f.scale ? 1 : sizeof(S))),
        stride(f.col_stride), is_int8(f.scale), scale(f.scale ? T(f.scale[k * f.scale_rank_stride + row]) : T(1)) {}
  T entry(Int i) const {
    if (is_int8) return T(reinterpret_cast<const int8_t *>(data)[i * stride]) * scale;
    return scalar(reinterpret_cast<const S *>(data)[i * stride]);
  }
  // out += factor * the row, of `count` entries.
  void add(Int count, T factor, T *out) const {
    if (is_int8) add_row<int8_t, T>(data, stride, count, factor * scale, out);
    else add_row<S, T>(data, stride, count, factor, out);
  }

private:
  const char *data;
  Int stride;
  bool is_int8;
  T scale;
};
template <class S> void add_table_row(const kron_product &table, Int id, Compute<S> *row) {
  typedef Compute<S> T;
  const kron_factor &a = table.factors[0], &b = table.factors[1];
  const Int b_rows = table.n_factors == 2 ? b.rows : 1, b_cols = table.n_factors == 2 ? b.cols : 1;
  for (Int k = 0; k < table.rank; k++) {
    const TableRow<S> left(a, k, id / b_rows);
    if (table.n_factors == 1) {
      left.add(a.cols, T(1), row);
      continue;
    }
    const TableRow<S> right(b, k, id % b_rows);
    for (Int i = 0; i < a.cols; i++) right.add(b_cols, left.entry(i), row + i * b_cols);
  }
}

// A vector of tokens of x, whose features are `step` apart, to their rows of a state.
template <class S> void write_state(const Compute<S> *x, Int step, Int width, const Int *rows, void *state) {
  typedef Compute<S> T;
  constexpr int L = LANES<T>;
  for (Int f = 0; f < width; f += L) {
    const int features = int(smaller(L, width - f));
    Vector<T> square[L];
    KRON_UNROLL
    for (int i = 0; i < L; i++) square[i] = i < features ? load(x + (f + i) * step) : Vector<T>{};
    transpose<T>(square);
    for (int l = 0; l < L && rows[l] >= 0; l++) {
      S *const y = static_cast<S *>(state) + rows[l] * width + f;
      if (features == L) put(y, square[l]);
      else put_some(y, square[l], features);
    }
  }
}

// Reads and writes tokens of a type of storage.
template <class T> struct StoredTokens : Storage<T> {
  decltype(&add_row<T, T>) add_row;
  decltype(&add_table_row<T>) add_table_row;
  decltype(&normalise<T>) normalise;
  decltype(&write_state<T>) write_state;
};
template <class S>
constexpr StoredTokens<Compute<S>> STORED_TOKENS = {STORAGE<S>, add_row<S, Compute<S>>, add_table_row<S>,
                                                    normalise<S>, write_state<S>};

// ---- what is done ------------------------------------------------------------------------------

// Vectors of each block. Those that are read by the next step only belong to a worker, if it computes
// whole blocks.
enum Buffer { STATE, QUERY, KEY, VALUE, EMBEDDED, MIDDLE, INNER = MIDDLE + 3, BUFFERS };

enum Kind { EMBED, FIRST_PRODUCT, PRODUCT, MEET, ATTEND, NORMALISE };

struct Step {
  Kind kind;
  bool waits; // for the steps before it, in all blocks; the others follow in the same block
  Int parts;  // into which the step divides a block
  const kron_layer *layer;
  const kron_linear *linear;
  Int part; // of the linear layer
  Way way;
  Buffer from, to, middle;
  bool adds, ends; // to what `to` holds; with bias and activation
  int64_t activation;
  const kron_norm *norm; // null: only store
  const void *bias;      // before the norm
  void *state;           // to write, or null
  double work;           // multiply-adds of a token
};

// Whether up and down exchange the hidden vector entry by entry, see hidden.h.
inline bool meets(const kron_layer &layer) {
  const kron_linear &up = layer.up, &down = layer.down;
  if (up.n_parts != 1 || down.n_parts != 1) return false;
  const kron_product &u = up.parts[0], &d = down.parts[0];
  if (u.n_factors != 2 || d.n_factors != 2 || u.turns[0] != 1 || d.turns[0] != 0) return false;
  const bool fits = u.factors[0].rows == d.factors[0].cols && u.factors[1].rows == d.factors[1].cols;
  const auto thin = [](const kron_product &p) { // as Part sees it: two thin matrices
    const kron_factor &a = p.factors[0], &b = p.factors[1];
    return (a.cols == 1 && b.rows == 1) || (a.rows == 1 && b.cols == 1);
  };
  return fits && !thin(u) && !thin(d) && !u.factors[0].scale && !d.factors[0].scale;
}

// The steps of an encoder, and the sizes of what they need.
template <class T> class Plan {
public:
  typedef ::Part<T, sizeof(T) == 4> Part; // 16-bit numbers are computed in float32

  // With `layers` below all only an estimate. Without room for steps they are only counted.
  Plan(const StoredTokens<T> &stored, const kron_encoder &e, const kron_batch &b, Int parts, Int layers, Step *steps)
      : parts(parts), steps(steps), stored(stored), encoder(e), batch(b) {
    const kron_layer &any = e.layers[0];
    size(STATE, outputs(any.output));
    const bool projects = e.projection.n_parts > 0;
    embedded = projects ? inputs(e.projection) : sizes[STATE];
    wait(false);
    Step embed = step(EMBED);
    embed.to = projects ? EMBEDDED : STATE;
    embed.parts = divided() ? MAX_NV : 1;
    embed.state = projects ? nullptr : b.states[0];
    size(embed.to, embedded);
    add(embed);
    if (projects) {
      const Target to_state = {&e.projection, EMBEDDED, STATE, MIDDLE};
      products(&to_state, 1, KRON_NONE, true);
      wait(false);
      if (b.states[0]) normalise(nullptr, nullptr, b.states[0]);
    }
    for (Int i = 0; i < layers; i++) layer(e.layers[i], b.states[i + 1], i > 0);
    end_stage();
  }

  bool divided() const { return parts > 1; }
  Int scratch_of_block(Int lanes) const { // numbers
    Int sum = 0;
    for (Int i = 0; i < BUFFERS; i++)
      if (shared(Buffer(i))) sum += sizes[i] * lanes;
    return sum;
  }
  // Queries, keys, values and states are read by other blocks and later stages.
  bool shared(Buffer i) const { return divided() || i <= VALUE; }

  const Int parts;
  Step *const steps;
  Int count = 0;
  Int sizes[BUFFERS] = {}, embedded = 0;
  Int local_middle = 0, z = 0, columns = 0, biases = 0;
  SpaceSizes space;
  Int stages = 0;
  double work = 0; // multiply-adds of a token

  // Of the first stages: items of a block, and the multiply-adds of the largest for a token.
  struct Stage {
    Int items;
    double largest;
  };
  static constexpr Int MOST_ESTIMATED = 64;
  Stage estimated[MOST_ESTIMATED];

  // The share of the work that the busiest of `workers` has at most.
  double share(Int blocks, Int vectors, Int workers) const {
    const double block = double((vectors + blocks - 1) / blocks); // vectors of the largest one
    double busiest = 0;
    for (Int i = 0; i < smaller(stages, MOST_ESTIMATED); i++) {
      const Int items = blocks * estimated[i].items;
      busiest += double((items + workers - 1) / workers) * estimated[i].largest * block;
    }
    return busiest / (work * double(vectors));
  }

private:
  struct Target {
    const kron_linear *linear;
    Buffer from, to, middle;
  };

  static Int outputs(const kron_linear &l) { return Part(l.parts[0]).outputs(); }
  static Int inputs(const kron_linear &l) { return Part(l.parts[0]).inputs(); }
  void size(Buffer b, Int features) { sizes[b] = larger(sizes[b], features); }
  void wait(bool for_blocks) { waits = for_blocks || divided(); }
  static Step step(Kind kind) {
    Step s = {};
    s.kind = kind, s.parts = 1;
    return s;
  }
  void add(Step s) {
    s.waits = waits || count == 0, waits = false;
    if (s.waits) end_stage();
    if (steps) steps[count] = s;
    count++;
    work += s.work;
    stage_parts += s.parts;
    if (divided()) stage_work = stage_work > s.work / double(s.parts) ? stage_work : s.work / double(s.parts);
    else stage_work += s.work;
  }
  void end_stage() {
    if (stage_parts && stages < MOST_ESTIMATED) {
      estimated[stages] = {divided() ? stage_parts : 1, stage_work};
    }
    if (stage_parts) stages++;
    stage_parts = 0, stage_work = 0;
  }
  Int parts_of_rows(Int rows) const { return larger(1, smaller(parts, rows / 4)); }

  void normalise(const kron_norm *norm, const void *bias, void *state) {
    Step s = step(NORMALISE);
    s.norm = norm, s.bias = bias, s.state = state, s.from = s.to = STATE;
    s.parts = divided() ? MAX_NV : 1;
    add(s);
  }

  // Linear layers of which none reads another's result; their parts one after another.
  void products(const Target *targets, int n, int64_t activation, bool bias, bool add_first = false) {
    Int waves = 0;
    for (const Target *t = targets; t < targets + n; t++) waves = larger(waves, t->linear->n_parts);
    for (Int wave = 0; wave < waves; wave++) {
      if (wave) wait(false);
      bool any_shared = false;
      for (const Target *t = targets; t < targets + n; t++) {
        if (wave >= t->linear->n_parts) continue;
        const Part part(t->linear->parts[wave], stored);
        const Way way = part.way(parts);
        space.include(part);
        if (way != SHARED) {
          if (!part.dense()) local_middle = larger(local_middle, part.middle());
          continue;
        }
        Step s = step(FIRST_PRODUCT);
        s.linear = t->linear, s.part = wave, s.from = t->from, s.to = t->middle;
        s.parts = parts_of_rows(part.first_rows());
        s.work = part.first_work();
        size(t->middle, part.rank * part.middle());
        add(s);
        any_shared = true;
      }
      if (any_shared) wait(false);
      for (const Target *t = targets; t < targets + n; t++) {
        if (wave >= t->linear->n_parts) continue;
        const Part part(t->linear->parts[wave], stored);
        Step s = step(PRODUCT);
        s.linear = t->linear, s.part = wave, s.way = part.way(parts);
        s.from = t->from, s.to = t->to, s.middle = t->middle;
        s.adds = add_first || wave > 0;
        s.ends = wave + 1 == t->linear->n_parts;
        s.bias = bias ? t->linear->bias : nullptr;
        s.activation = activation;
        if (s.bias && stored.narrow) biases = larger(biases, part.outputs());
        s.parts = parts_of_rows(part.rows(s.way));
        s.work = part.second_work();
        if (s.way == BY_FIRST) s.work += part.first_work();
        if (s.way == BY_SECOND && !part.dense()) s.work += double(s.parts) * part.first_work();
        size(t->to, part.outputs());
        add(s);
      }
    }
  }

  void layer(const kron_layer &l, void *state, bool after_another) {
    wait(after_another);
    const Target inputs[] = {{&l.query, STATE, QUERY, MIDDLE},
                             {&l.key, STATE, KEY, Buffer(MIDDLE + 1)},
                             {&l.value, STATE, VALUE, Buffer(MIDDLE + 2)}};
    products(inputs, 3, KRON_NONE, true);
    wait(true);
    Step attend = step(ATTEND);
    attend.layer = &l;
    attend.parts = divided() ? encoder.heads : 1;
    attend.work = 2.0 * double(outputs(l.query)) * double(batch.length);
    add(attend);
    wait(false);
    const Target output = {&l.output, QUERY, STATE, MIDDLE};
    products(&output, 1, KRON_NONE, false, true);
    wait(false);
    normalise(&l.attention_norm, l.output.bias, nullptr);
    wait(false);
    feed_forward(l);
    wait(false);
    normalise(&l.output_norm, l.down.bias, state);
  }

  void feed_forward(const kron_layer &l) {
    const Target down = {&l.down, INNER, STATE, MIDDLE};
    if (!meets(l)) {
      const Target up = {&l.up, STATE, INNER, MIDDLE};
      products(&up, 1, l.activation, true);
      wait(false);
      products(&down, 1, KRON_NONE, false, true);
      return;
    }
    const Part first(l.up.parts[0], stored), second(l.down.parts[0], stored);
    const Int width = first.f.rows, k = first.g.rows;
    Step s = step(MEET);
    s.layer = &l, s.from = STATE, s.to = INNER, s.activation = l.activation;
    s.parts = parts_of_rows(width);
    s.work = first.first_work() + first.second_work() + second.first_work();
    const Int a_sizes = first.rank * k * first.g.cols + second.rank * second.f.rows * k;
    space.include(first), space.include(second);
    if (stored.narrow) space.panel = larger(space.panel, a_sizes), biases = larger(biases, k * width);
    z = larger(z, first.rank * first.f_pre * width);
    columns = larger(columns, columns_at_a_time(k) * k);
    size(INNER, second.rank * second.middle());
    add(s);
    wait(false);
    Step t = step(PRODUCT);
    t.linear = &l.down, t.way = SHARED, t.middle = INNER, t.from = INNER, t.to = STATE;
    t.adds = true;
    t.parts = parts_of_rows(second.g.rows);
    t.work = second.second_work();
    add(t);
  }

  const StoredTokens<T> &stored;
  const kron_encoder &encoder;
  const kron_batch &batch;
  bool waits = false;
  Int stage_parts = 0;
  double stage_work = 0;
};

// ---- doing it ----------------------------------------------------------------------------------

// Scratch memory of one worker.
template <class T> struct Worker {
  T *middle, *z, *columns, *bias, *scores, *query, *result, *embedded;
  Space<T> space;
  int32_t *keys, *values, *narrow; // of attention in bfloat16: words of a head, and of what they multiply
  T *local[BUFFERS]; // or null, for shared buffers
};

template <class T> class Encoding {
  static constexpr int L = LANES<T>;
  typedef typename Plan<T>::Part Part;
  // Whether there is code for an instruction that multiplies bfloat16 numbers.
  static constexpr bool HALVES = sizeof(T) == 4 && KRON_BFLOAT16_PRODUCTS;

public:
  Encoding(const StoredTokens<T> &stored, const kron_encoder &e, const kron_batch &b, const Plan<T> &plan, const T *distances)
      : stored(stored), e(e), b(b), plan(plan), distances(distances) {}

  // Room for a group of this many vectors and sequences.
  void place(Arena &arena, Int vectors, Int count) {
    group.sequences = arena.take<Sequence>(count);
    group.sequence_of = arena.take<Int>(vectors);
    group.rows = arena.take<Int>(vectors * L);
    for (Int i = 0; i < BUFFERS; i++) {
      const Int room = i == KEY || i == VALUE ? Group::stride(vectors) : vectors;
      shared[i] = plan.shared(Buffer(i)) ? arena.take<T>(plan.sizes[i] * room * L) : nullptr;
    }
  }
  // Room for a worker; a sequence has up to `lanes` lanes.
  static Worker<T> place_worker(Arena &arena, const StoredTokens<T> &stored, const Plan<T> &plan, Int nv, Int lanes,
                                Int head, const kron_execution &execution) {
    const Int tb = nv * L;
    Worker<T> w;
    w.middle = arena.take<T>(plan.local_middle * tb);
    w.z = arena.take<T>(plan.z * tb);
    w.columns = arena.take<T>(plan.columns * tb);
    w.bias = arena.take<T>(plan.biases);
    w.space = {arena.take<T>(plan.space.panel), arena.take<T>(plan.space.words * tb),
               arena.take<T>(plan.space.units * tb), arena.take<T>(plan.space.rows), execution.bytes != 0,
               execution.bfloat16 && stored.is_bfloat16};
    if (HALVES && w.space.halves) {
      w.keys = arena.take<int32_t>(vectors_of<T>(lanes) * L * ((head + 1) / 2));
      w.values = arena.take<int32_t>(vectors_of<T>(lanes) * L * head / 2 + 1);
      w.narrow = arena.take<int32_t>((larger(lanes, head) + 1) / 2 * tb);
    }
    w.scores = arena.take<T>(lanes * tb);
    w.query = arena.take<T>(head * tb);
    w.result = arena.take<T>(head * tb);
    w.embedded = arena.take<T>(plan.embedded * L);
    for (Int i = 0; i < BUFFERS; i++)
      w.local[i] = plan.shared(Buffer(i)) ? nullptr : arena.take<T>(plan.sizes[i] * tb);
    return w;
  }

  // Computes stages of steps of the present group, whose starts and number stages() gives.
  void run(Worker<T> &w, const Int *starts, Int stages, Team *team) {
    const auto body = [&](Int stage, Int item) { run_item(w, stage, item); };
    if (team) return team->work(starts, stages, body);
    for (Int stage = 0; stage < stages; stage++)
      for (Int item = 0; item < starts[stage + 1] - starts[stage]; item++) body(stage, item);
  }

  // first_steps[s] is the first step of stage s.
  void set_stages(const Int *first) { first_steps = first; }

  Group group;

private:
  T *buffer(const Worker<T> &w, Buffer i, Int block) const {
    if (w.local[i]) return w.local[i];
    return shared[i] + group.first(block) * L * (i == KEY || i == VALUE ? 1 : plan.sizes[i]);
  }
  // Keys and values are (features)[all lanes], of which attention reads a sequence's at once.
  template <int NV> Int row_of(Buffer i) const {
    return i == KEY || i == VALUE ? Group::stride(group.vectors) * L : NV * L;
  }

  void run_item(Worker<T> &w, Int stage, Int item) {
    const Step *s = plan.steps + first_steps[stage], *const end = plan.steps + first_steps[stage + 1];
    if (!plan.divided()) {
      for (; s < end; s++) run_step(w, *s, item, 0);
      return;
    }
    for (; item >= group.blocks * s->parts; s++) item -= group.blocks * s->parts;
    run_step(w, *s, item / s->parts, item % s->parts);
  }

  void run_step(Worker<T> &w, const Step &s, Int block, Int part) {
    switch (group.first(block + 1) - group.first(block)) {
    case 1: return run_step<1>(w, s, block, part);
    case 2: return run_step<2>(w, s, block, part);
    default:
      if constexpr (MAX_NV == 3) return run_step<3>(w, s, block, part);
    }
  }

  template <int NV> void run_step(Worker<T> &w, const Step &s, Int block, Int part) {
    switch (s.kind) {
    case EMBED: return each_vector<NV>(s, part, [&](Int v) { embed<NV>(w, s, block, v); });
    case NORMALISE: return each_vector<NV>(s, part, [&](Int v) { normalise_vector<NV>(w, s, block, v); });
    case FIRST_PRODUCT: {
      const Part p(s.linear->parts[s.part], stored);
      return p.template first<NV>(buffer(w, s.from, block), buffer(w, s.to, block),
                                  range_of(p.first_rows(), part, s.parts), w.space);
    }
    case PRODUCT: return product<NV>(w, s, block, part);
    case MEET: return meet<NV>(w, s, block, part);
    case ATTEND: {
      const Range heads = range_of(e.heads, part, s.parts);
      for (Int head = heads.first; head < heads.end; head++) attend_block<NV>(w, block, head);
    }
    }
  }

  template <int NV, class Body> static void each_vector(const Step &s, Int part, Body body) {
    if (s.parts == 1)
      for (Int v = 0; v < NV; v++) body(v);
    else if (part < NV) body(part);
  }

  template <int NV> void product(Worker<T> &w, const Step &s, Int block, Int part) {
    const Part p(s.linear->parts[s.part], stored);
    const Range range = range_of(p.rows(s.way), part, s.parts);
    if (!range.size()) return;
    T *const out = buffer(w, s.to, block);
    const Int row = row_of<NV>(s.to);
    p.template apply<NV>(s.way, buffer(w, s.from, block),
                         s.way == SHARED ? buffer(w, s.middle, block) : w.middle, out, row, range,
                         s.adds, w.space);
    if (!s.ends || (!s.bias && !s.activation)) return;
    const Runs runs = p.runs(s.way, range);
    for (Int i = 0; i < runs.count; i++) {
      const Int at = i * runs.step + runs.first;
      const T *bias = static_cast<const T *>(s.bias);
      if (bias && stored.narrow) stored.widen(stored.at(s.bias, at), runs.length, 1, w.bias), bias = w.bias;
      else if (bias) bias += at;
      activate_rows<T, NV>(out + at * row, row, out + at * row, row, runs.length, s.activation, bias);
    }
  }

  template <int NV> void meet(Worker<T> &w, const Step &s, Int block, Int part) {
    const Part up(s.layer->up.parts[0], stored), down(s.layer->down.parts[0], stored);
    const Int width = up.f.rows;
    const Range range = range_of(width, part, s.parts);
    up.template some_first<NV>(buffer(w, s.from, block), w.z, range, w.space);
    const Hidden<T> hidden = {up.rank,   down.rank,        small(up.g, up.rank, w.space.panel),
                              small(down.f, down.rank, w.space.panel + up.rank * up.g.rows * up.g.cols),
                              step_of(up.g), step_of(down.f), s.activation};
    const T *bias = static_cast<const T *>(s.layer->up.bias);
    Int bias_row = width;
    if (bias && stored.narrow) {
      bias = w.bias, bias_row = range.size();
      for (Int i = 0; i < up.g.rows; i++)
        stored.widen(stored.at(s.layer->up.bias, i * width + range.first), bias_row, 1, w.bias + i * bias_row);
    } else if (bias) {
      bias += range.first;
    }
    through_hidden<NV>(hidden, width, range, bias, bias_row, w.z, buffer(w, s.to, block), w.columns);
  }
  // The terms of a small factor in the type of computation.
  Matrix<T> small(const kron_factor &f, Int rank, T *panel) const {
    if (!stored.narrow) return {static_cast<const T *>(f.data), f.rows, f.cols, f.row_stride, f.col_stride};
    for (Int k = 0; k < rank; k++)
      for (Int r = 0; r < f.rows; r++)
        stored.widen(stored.at(f.data, k * f.rank_stride + r * f.row_stride), f.cols, f.col_stride,
                     panel + (k * f.rows + r) * f.cols);
    return {panel, f.rows, f.cols, f.cols, 1};
  }
  Int step_of(const kron_factor &f) const { return stored.narrow ? f.rows * f.cols : f.rank_stride; }

  // ---- attention

  // A head's outputs of a block's queries, in the place of the queries.
  template <int NV> void attend_block(Worker<T> &w, Int block, Int head) {
    const Int first = group.first(block);
    const Int size = plan.sizes[QUERY] / e.heads, row = head * size * NV * L;
    T *const queries = buffer(w, QUERY, block) + row;
    for (Int v = 0; v < NV;) { // the vectors of each sequence
      const Int sequence = group.sequence_of[first + v];
      Int end = v + 1;
      while (end < NV && group.sequence_of[first + end] == sequence) end++;
      T *const q = queries + v * L;
      const Int *rows = group.rows + (first + v) * L;
      switch (end - v) {
      case 1: attend<1>(w, group.sequences[sequence], head, size, q, NV * L, rows); break;
      case 2: attend<2>(w, group.sequences[sequence], head, size, q, NV * L, rows); break;
      default:
        if constexpr (MAX_NV == 3)
          attend<3>(w, group.sequences[sequence], head, size, q, NV * L, rows);
      }
      v = end;
    }
  }

  // Of NV vectors of queries, whose features are `step` apart: scores (keys)[queries] = K Q and
  // outputs (size)[queries] = V softmax(scores), where entries of K and V are scalars.
  template <int NV>
  void attend(Worker<T> &w, const Sequence &sequence, Int head, Int size, T *q, Int step,
              const Int *rows) {
    constexpr int TB = NV * L;
    for (Int f = 0; f < size; f++) {
      KRON_UNROLL
      for (int v = 0; v < NV; v++) store(w.query + f * TB + v * L, load(q + f * step + v * L) * T(e.scale));
    }
    const Int row = row_of<NV>(KEY), at = head * size * row + sequence.first * L;
    multiply_keys<NV>(w, shared[KEY] + at, row, sequence.keys, size);
    if (distances) add_distances<NV>(w, sequence, head, rows);
    Vector<T> factor[NV];
    soften<T, NV>(w.scores, sequence.keys, factor);
    multiply_values<NV>(w, shared[VALUE] + at, row, sequence.keys, size);
    for (Int f = 0; f < size; f++) {
      KRON_UNROLL
      for (int v = 0; v < NV; v++)
        store(q + f * step + v * L, load(w.result + f * TB + v * L) * factor[v]);
    }
  }

  // Scores (keys)[queries] of keys (size)[keys], whose features are `row` apart.
  template <int NV> static void multiply_keys(Worker<T> &w, const T *in, Int row, Int keys, Int size) {
    constexpr int TB = NV * L;
    if constexpr (HALVES) {
      if (w.space.halves) {
        const Int vectors = vectors_of<T>(keys);
        narrow_keys(in, row, size, vectors, w.keys);
        const char *data = reinterpret_cast<const char *>(w.keys);
        return multiply_halves<NV>(w, {data, 4, vectors * L * 4, (size + 1) / 2, nullptr, 0, nullptr}, keys, w.query, size,
                                   w.scores);
      }
    }
    contract_grid<T, NV>({in, keys, size, 1, row}, w.query, w.scores, {1, 1, TB, 0, 0, TB, TB, L, L}, false);
  }
  // Results (size)[queries] of scores and values (size)[keys].
  template <int NV> static void multiply_values(Worker<T> &w, const T *in, Int row, Int keys, Int size) {
    constexpr int TB = NV * L;
    if constexpr (HALVES) {
      if (w.space.halves) {
        const Int vectors = vectors_of<T>(keys);
        narrow_values(in, row, size, keys, vectors, w.values);
        const char *data = reinterpret_cast<const char *>(w.values);
        return multiply_halves<NV>(w, {data, vectors * L * 2, 4, (keys + 1) / 2, nullptr, 0, nullptr}, size, w.scores, keys,
                                   w.result);
      }
    }
    contract_grid<T, NV>({in, size, keys, row, 1}, w.scores, w.result, {1, 1, TB, 0, 0, TB, TB, L, L}, false);
  }
  // `rows` rows of words times `count` features of in (count)[queries], which are narrowed.
  template <int NV>
  static void multiply_halves(Worker<T> &w, const Words &words, Int rows, const T *in, Int count, T *out) {
    if constexpr (HALVES) {
      constexpr int TB = NV * L;
      const Grid grid = {1, 1, TB, 0, 0, TB, TB, L, L};
      for (int v = 0; v < NV; v++) narrow_features(in + v * L, TB, count, w.narrow + v * L, TB);
      multiply_all<Halves>(words, rows, {w.narrow, nullptr, NV, NV, out, grid, false}, 0);
    }
  }

  template <int NV>
  void add_distances(Worker<T> &w, const Sequence &s, Int head, const Int *rows) const {
    constexpr int TB = NV * L;
    const Int *const keys = group.rows + s.first * L;
    const T *const table = distances + head * (2 * b.length - 1) + b.length - 1;
    for (int v = 0; v < NV; v++) {
      const Int *const lanes = rows + v * L;
      for (Int k = 0; k < s.keys; k++) {
        T *const score = w.scores + k * TB + v * L;
        for (int l = 0; l < L && lanes[l] >= 0; l++) score[l] += table[lanes[l] - keys[k]];
      }
    }
  }

  // ---- rows of memory and lanes

  // A vector of tokens: the sum of a row of each table, its norm, and from x (width)[tokens] to states.
  template <int NV> void embed(Worker<T> &w, const Step &s, Int block, Int v) {
    constexpr int TB = NV * L;
    const Int width = plan.embedded;
    const Int *const rows = group.rows + (group.first(block) + v) * L;
    T *const x = buffer(w, s.to, block) + v * L;
    memset(w.embedded, 0, size_t(width * L) * sizeof(T));
    for (int l = 0; l < L && rows[l] >= 0; l++) {
      T *const row = w.embedded + l * width;
      if (b.embeddings) stored.add_row(stored.at(b.embeddings, rows[l] * width), 1, width, T(1), row);
      for (Int t = b.embeddings ? 1 : 0; t < e.n_tables; t++)
        stored.add_table_row(e.tables[t], b.ids[t][rows[l]], row);
    }
    for (Int f = 0; f < width; f += L) {
      const int features = int(smaller(L, width - f));
      Vector<T> square[L];
      KRON_UNROLL
      for (int l = 0; l < L; l++) square[l] = fetch_some(w.embedded + l * width + f, features);
      transpose<T>(square);
      for (int i = 0; i < features; i++) store(x + (f + i) * TB, square[i]);
    }
    stored.normalise(x, TB, width, nullptr, e.norm);
    if (s.state) stored.write_state(x, TB, plan.sizes[STATE], rows, s.state);
  }

  template <int NV> void normalise_vector(Worker<T> &w, const Step &s, Int block, Int v) {
    constexpr int TB = NV * L;
    T *const x = buffer(w, STATE, block) + v * L;
    const Int width = plan.sizes[STATE];
    if (s.norm) stored.normalise(x, TB, width, s.bias, *s.norm);
    if (s.state) stored.write_state(x, TB, width, group.rows + (group.first(block) + v) * L, s.state);
  }

  const StoredTokens<T> &stored;
  const kron_encoder &e;
  const kron_batch &b;
  const Plan<T> &plan;
  const T *const distances; // (heads, 2 * length - 1) or null
  T *shared[BUFFERS];
  const Int *first_steps = nullptr;
};

// ---- the division of the work ------------------------------------------------------------------

// What a stage costs in multiply-adds (5e4 are about 1 us), and for each worker besides. Two cores were
// measured; that workers add a fifth is a guess.
constexpr double STAGE = 5e4;

// Groups of sequences for teams of one worker, or all sequences for one team.
struct Choice {
  Int teams, workers, parts, nv; // nv: vectors of a block, at most
  double share;
};

struct Lengths { // of the sequences that have tokens, the longest first
  Int count, *sequences, *lanes;
  Int *group_starts, groups; // for teams of one worker
  Int *loads;                // room for a number for each team
};

template <int L> void sort_and_group(const kron_batch &b, Int threads, Lengths &s) {
  s.count = 0;
  for (Int i = 0; i < b.sequences; i++) {
    const Int lanes = lanes_in(b, i, tokens_in(b, i));
    if (!lanes) continue;
    Int at = s.count++; // by insertion: few sequences, or hardly any order to change
    for (; at > 0 && s.lanes[at - 1] < lanes; at--)
      s.lanes[at] = s.lanes[at - 1], s.sequences[at] = s.sequences[at - 1];
    s.lanes[at] = lanes, s.sequences[at] = i;
  }
  Int total = 0;
  for (Int i = 0; i < s.count; i++) total += vectors_of_lanes<L>(s.lanes[i]);
  // Enough for whole blocks, and for four groups a thread if they are so many.
  const Int wanted = larger(MAX_NV, smaller(4 * MAX_NV, total / (4 * threads)));
  s.groups = 0;
  for (Int i = 0, vectors = 0; i < s.count; i++) {
    const Int own = vectors_of_lanes<L>(s.lanes[i]);
    if (!vectors || vectors + own > wanted) s.group_starts[s.groups++] = i, vectors = 0;
    vectors += own;
  }
  s.group_starts[s.groups] = s.count;
}

// The vectors of sequences from first to end.
template <int L> Int vectors_in(const Lengths &s, Int first, Int end) {
  Int vectors = 0;
  for (Int i = first; i < end; i++) vectors += vectors_of_lanes<L>(s.lanes[i]);
  return vectors;
}
inline Int blocks_of(Int vectors, Int nv) { return (vectors + nv - 1) / nv; }

// Which division takes the least time, by an estimate from the first layer.
template <class T>
Choice choose(const StoredTokens<T> &stored, const kron_encoder &e, const kron_batch &b, Int threads, const Lengths &s) {
  constexpr int L = LANES<T>;
  const Int vectors = vectors_in<L>(s, 0, s.count);
  const Plan<T> whole(stored, e, b, 1, 1, nullptr);
  Choice best = {1, 1, 1, MAX_NV, 1};
  const double work = whole.work * double(vectors * L);
  double least = 1;
  // Teams of one: groups in order, each to the team that has least so far.
  const Int teams = smaller(threads, s.groups);
  if (teams > 1) {
    for (Int i = 0; i < teams; i++) s.loads[i] = 0;
    Int most = 0;
    for (Int i = 0; i < s.groups; i++) {
      Int least_loaded = 0;
      for (Int j = 1; j < teams; j++)
        if (s.loads[j] < s.loads[least_loaded]) least_loaded = j;
      s.loads[least_loaded] += vectors_in<L>(s, s.group_starts[i], s.group_starts[i + 1]);
      most = larger(most, s.loads[least_loaded]);
    }
    least = double(most) / double(vectors);
    best = {teams, 1, 1, MAX_NV, least};
  }
  for (Int workers = 2; workers <= threads; workers = workers < threads ? smaller(2 * workers, threads) : workers + 1) {
    for (Int nv = MAX_NV; nv >= 1; nv--) {
      const Int blocks = blocks_of(vectors, nv);
      if (nv < MAX_NV && blocks == blocks_of(vectors, nv + 1)) continue;
      for (Int times = 0; times <= 3; times++) {
        const Int parts = times ? (times * workers + blocks - 1) / blocks : 1;
        if (times && parts == 1) continue;
        const Plan<T> plan(stored, e, b, parts, 1, nullptr);
        const double share = plan.share(blocks, vectors, workers);
        const double waiting = double(plan.stages) * STAGE * (1 + 0.2 * double(workers - 1)) / work;
        const double time = share * (plan.work / whole.work) * (nv == 1 ? 1.1 : 1) + waiting;
        if (time < 0.95 * least) least = time, best = {1, workers, parts, nv, share};
      }
    }
  }
  return best;
}

// ---- a call ------------------------------------------------------------------------------------

template <class T> class Call {
  static constexpr int L = LANES<T>;

public:
  Call(const StoredTokens<T> &stored, const kron_execution &execution, const kron_encoder &e, const kron_batch &b)
      : stored(stored), execution(execution), e(e), b(b) {}
  ~Call() { release(indices), release(memory); }
  Call(const Call &) = delete;

  // Returns false if memory ran out.
  bool divide() {
    Arena counted(nullptr);
    place_lengths(counted);
    indices = allocate(size_t(counted.used));
    if (!indices) return false;
    Arena arena(indices);
    place_lengths(arena);
    sort_and_group<L>(b, execution.threads, lengths);
    if (!lengths.count) return true;
    choice = choose(stored, e, b, execution.threads, lengths);
    most_vectors = 0, most_sequences = 0, most_lanes = 0;
    for (Int i = 0; i < groups(); i++) {
      most_vectors = larger(most_vectors, vectors_in<L>(lengths, group_start(i), group_start(i + 1)));
      most_sequences = larger(most_sequences, group_start(i + 1) - group_start(i));
    }
    for (Int i = 0; i < lengths.count; i++) most_lanes = larger(most_lanes, lengths.lanes[i]);
    const Plan<T> plan(stored, e, b, choice.parts, e.n_layers, nullptr);
    n_steps = plan.count, n_stages = plan.stages;
    scratch = 0;
    Arena sizes(nullptr);
    place(sizes, plan);
    scratch = sizes.used;
    return true;
  }

  void describe(kron_division &d) {
    d = {};
    d.scratch = scratch, d.teams = choice.teams, d.workers = choice.workers, d.parts = choice.parts;
    d.stages = lengths.count ? (n_stages + e.n_layers - 1) / e.n_layers : 0;
    d.share = choice.share;
  }

  const char *run() {
    clear_padding();
    if (!lengths.count) return nullptr;
    memory = allocate(size_t(scratch));
    if (!memory) return OUT_OF_MEMORY;
    Arena arena(memory);
    steps = arena.template take<Step>(n_steps); // placed first, as place() does
    Plan<T> plan(stored, e, b, choice.parts, e.n_layers, steps);
    Arena all(memory);
    place(all, plan);
    Int stage = 0;
    for (Int i = 0; i < plan.count; i++)
      if (steps[i].waits) first_steps[stage++] = i;
    first_steps[stage] = plan.count;
    if (stored.narrow && b.distance_bias)
      stored.widen(b.distance_bias, e.heads * (2 * b.length - 1), 1, distances);
    return choice.workers > 1 ? run_team(plan) : run_teams(plan);
  }

private:
  Int groups() const { return choice.workers > 1 ? 1 : lengths.groups; }
  Int group_start(Int i) const {
    if (choice.workers > 1) return i ? lengths.count : 0;
    return lengths.group_starts[i];
  }
  void place_lengths(Arena &arena) {
    lengths.sequences = arena.template take<Int>(b.sequences);
    lengths.lanes = arena.template take<Int>(b.sequences);
    lengths.group_starts = arena.template take<Int>(b.sequences + 1);
    lengths.loads = arena.template take<Int>(smaller(b.sequences, execution.threads));
  }
  Encoding<T> encoding(const Plan<T> &plan) const {
    const T *const table = stored.narrow && b.distance_bias ? distances : static_cast<const T *>(b.distance_bias);
    return Encoding<T>(stored, e, b, plan, table);
  }
  // The memory of a team, which is the only one or has one worker.
  void place_team(Arena &arena, Encoding<T> &encoding, Int *&starts, Worker<T> &worker, const Plan<T> &plan) {
    starts = arena.template take<Int>(n_stages + 1);
    encoding.place(arena, most_vectors, most_sequences);
    place_worker(arena, worker, plan);
  }
  void place_worker(Arena &arena, Worker<T> &worker, const Plan<T> &plan) {
    const Int nv = smaller(choice.nv, most_vectors);
    worker = Encoding<T>::place_worker(arena, stored, plan, nv, most_lanes, plan.sizes[QUERY] / e.heads, execution);
  }
  void place(Arena &arena, const Plan<T> &plan) {
    arena.template take<Step>(n_steps);
    first_steps = arena.template take<Int>(n_stages + 1);
    if (stored.narrow && b.distance_bias) distances = arena.template take<T>(e.heads * (2 * b.length - 1));
    team_start = arena.used;
    Encoding<T> any(stored, e, b, plan, nullptr);
    Int *starts;
    Worker<T> worker;
    place_team(arena, any, starts, worker, plan);
    team_size = arena.used - team_start;
    worker_start = arena.used;
    for (Int i = 1; i < choice.teams; i++) place_team(arena, any, starts, worker, plan);
    for (Int i = 1; i < choice.workers; i++) place_worker(arena, worker, plan);
    worker_size = choice.workers > 1 ? (arena.used - worker_start) / (choice.workers - 1) : 0;
  }
  void pack_group(Encoding<T> &encoding, Int group, Int *starts, const Plan<T> &plan) {
    Group &g = encoding.group;
    const Int first = group_start(group);
    pack<L>(b, lengths.sequences + first, group_start(group + 1) - first, g);
    g.blocks = blocks_of(g.vectors, choice.nv);
    encoding.set_stages(first_steps);
    starts[0] = 0;
    for (Int stage = 0; stage < n_stages; stage++) {
      Int items = 0;
      for (Int i = first_steps[stage]; i < first_steps[stage + 1]; i++) items += steps[i].parts;
      starts[stage + 1] = starts[stage] + g.blocks * (plan.divided() ? items : 1);
    }
  }

  // All threads for all sequences at once.
  const char *run_team(const Plan<T> &plan) {
    Encoding<T> all = encoding(plan);
    Arena arena(memory + team_start);
    Int *starts;
    Worker<T> first;
    place_team(arena, all, starts, first, plan);
    pack_group(all, 0, starts, plan);
    Team team;
    return on_threads(choice.workers, [&](Int i) {
      Worker<T> worker = first;
      if (i) {
        Arena own(memory + worker_start + (i - 1) * worker_size);
        place_worker(own, worker, plan);
      }
      all.run(worker, starts, n_stages, &team);
    });
  }
  // Each thread takes a group at a time.
  const char *run_teams(const Plan<T> &plan) {
    Int next = 0;
    return on_threads(choice.teams, [&](Int i) {
      Encoding<T> own = encoding(plan);
      Arena arena(memory + team_start + i * team_size);
      Int *starts;
      Worker<T> worker;
      place_team(arena, own, starts, worker, plan);
      for (;;) {
        const Int group = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (group >= lengths.groups) return;
        pack_group(own, group, starts, plan);
        own.run(worker, starts, n_stages, nullptr);
      }
    });
  }
  template <class Body> const char *on_threads(Int count, Body body) {
    return split(execution, count, count, [&](Int i, Int, Int) { return body(i), true; });
  }

  // Zeros in all results, where nothing is computed.
  void clear_padding() const {
    if (!b.mask) return;
    const size_t bytes = size_t(typename Plan<T>::Part(e.layers[0].output.parts[0]).outputs() * stored.size);
    for (Int i = 0; i < b.sequences; i++) {
      const bool any = tokens_in(b, i) > 0;
      for (Int j = 0; j < b.length; j++) {
        const Int row = i * b.length + j;
        if (b.mask[row] || (j == 0 && any)) continue;
        for (Int state = 0; state <= e.n_layers; state++)
          if (b.states[state]) memset(static_cast<char *>(b.states[state]) + size_t(row) * bytes, 0, bytes);
      }
    }
  }

  const StoredTokens<T> &stored;
  const kron_execution &execution;
  const kron_encoder &e;
  const kron_batch &b;
  char *indices = nullptr, *memory = nullptr;
  Lengths lengths = {};
  Choice choice = {1, 1, 1, MAX_NV, 1};
  Int most_vectors = 0, most_sequences = 0, most_lanes = 0;
  Int n_steps = 0, n_stages = 0, scratch = 0;
  Int team_start = 0, team_size = 0, worker_start = 0, worker_size = 0;
  Step *steps = nullptr;
  Int *first_steps = nullptr;
  T *distances = nullptr;
};

template <class S>
const char *encode(const kron_execution &execution, const kron_encoder &e, const kron_batch &b,
                   kron_division *division) {
  Call<KRON_TYPE> call(STORED_TOKENS<S>, execution, e, b);
  if (!call.divide()) return OUT_OF_MEMORY;
  if (!division) return call.run();
  call.describe(*division);
  return nullptr;
}
template <class S> constexpr Encode encode_of() {
  if constexpr (std::is_same_v<Compute<S>, KRON_TYPE>) return encode<S>;
  else return nullptr;
}

} // namespace

#define KRON_JOIN(isa, type) kron_encoders_##isa##_##type
#define KRON_TABLE(isa, type) KRON_JOIN(isa, type)

const Encode KRON_TABLE(KRON_ISA, KRON_TYPE)[] = {encode_of<float>(), encode_of<double>(), encode_of<bfloat16>(),
                                                  encode_of<float16>()};
