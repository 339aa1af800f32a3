// Checks kron_cpu_encode and kron_cpu_encode_division against encoder.h, without torch or Python.
//
//   check_encoder [--seed 1] [--draws 100] [--every 1] [--work 1e7]
//   check_encoder --self-test
//   check_encoder --division
//
// --draws is the number of random encoders; --every 3 runs a third of the chosen ones; --work limits
// the multiply-adds of a case's reference by using fewer and shorter sequences. --self-test computes in
// float32 or float64, which must be accepted, and with mistakes, which must not be. --division prints
// how the presets' work is divided.
#include "allocations.h"
#include "encoder.h"

using namespace oracle;

namespace {

// ---- calls -------------------------------------------------------------------------------------

// Other pools than `parallel_for`: the calling thread, range by range, from the first or from the last,
// or all at once; a pool that fails.
int32_t in_order(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
  for (Int i = begin; i < end; i++) fn(i, i + 1, context);
  return 0;
}
int32_t in_reverse(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
  for (Int i = end; i > begin; i--) fn(i - 1, i, context);
  return 0;
}
int32_t at_once(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
  fn(begin, end, context);
  return 0;
}
int32_t failing(int64_t, int64_t, int64_t, kron_range, void *) { return 1; }

const struct {
  const char *name;
  kron_parallel_for pool;
} POOLS[] = {{"a thread each", parallel_for}, {"in order", in_order}, {"in reverse", in_reverse},
             {"at once", at_once}, {"no pool", nullptr}};

struct Call {
  Call(const Recipe &c, Random &r) : model(c, r), batch(model, c, r) {}

  // Writes the states whose bit is set in `wanted`, and returns the bytes of all.
  std::vector<std::string> run(Int isa, Int threads, Int pool, Int wanted = -1) {
    doing = std::string(model.dtype.name) + ", " + ISAS[isa] + ", " + std::to_string(threads) +
            (by_bytes ? " threads, bytes, " : " threads, ") + (by_halves ? "halves, " : "") + POOLS[pool].name + ", states " +
            std::to_string(wanted) + "; " + batch.text() + "; " + model.text();
    for (Buffer &b : batch.states) b.reset();
    const kron_execution e = {isa, threads, POOLS[pool].pool, by_bytes, by_halves};
    if (const char *error = encode(e, wanted)) fail(std::string("refused: ") + error);
    return bytes();
  }
  const char *encode(const kron_execution &e, Int wanted = -1, Int most = INT64_MAX) {
    std::vector<void *> states;
    const kron_encoder encoder = model.call();
    const kron_batch b = batch.call(states, wanted);
    allocations = allocated = 0, allowed = most;
    const char *error = kron_cpu_encode(&e, model.dtype.id, &encoder, &b);
    allowed = INT64_MAX;
    found_allocations = allocations, found_allocated = allocated;
    return error;
  }
  std::vector<std::string> bytes() const {
    std::vector<std::string> all;
    for (const Buffer &b : batch.states) all.push_back(b.bytes(0, b.size));
    return all;
  }
  kron_division division(Int isa, Int threads) const {
    std::vector<void *> states;
    const kron_encoder encoder = model.call();
    const kron_batch b = batch.call(states, -1);
    const kron_execution e = {isa, threads, parallel_for, 0, by_halves};
    kron_division found;
    memset(&found, 0xff, sizeof found);
    if (const char *error = kron_cpu_encode_division(&e, model.dtype.id, &encoder, &b, &found))
      fail(std::string("the division was refused: ") + error);
    return found;
  }

  Model model;
  Batch batch;
  bool by_halves = false; // whether bfloat16 numbers are multiplied by an instruction; check_bfloat16.cpp has the numbers
  bool by_bytes = false; // whether int8 factors are multiplied by an instruction for bytes, where there is one
  Int found_allocations = 0, found_allocated = 0; // of the last call
};

// ---- checks ------------------------------------------------------------------------------------

// In units of the bound of encoder.h, doubled. It takes errors for independent, but the error of a head
// of one number reaches all features at once, and sums of them have longer tails: in 10,000 random
// encoders the largest error was 0.9 of the bound, and all above 0.65 were of such narrow ones.
double error_of(const Dtype &d, const Buffer &found, const Numbers &expected) {
  return worst_error(d, found, expected) / 2;
}

Group numbers{"encoders"}, threads_agree{"threads and states"}, poisoned{"NaN and padding"};
Group divisions{"division"}, refusals{"refusals"};

void check_division(const kron_division &d, Int threads) {
  divisions.require(d.teams >= 1 && d.workers >= 1 && d.teams * d.workers <= threads,
                    "the division has no threads, or more than there are");
  divisions.require(d.scratch >= 0 && d.stages >= 1 && d.parts >= 1, "a division of nothing");
  divisions.require(d.share >= (1 - 1e-9) / double(threads) && d.share <= 1 + 1e-9,
                    "a share below its part of all, or above 1");
  divisions.require(threads > 1 || fabs(d.share - 1) < 1e-9, "one thread has less than all");
}

// Threads, pools, products of bytes and the choice of states do not change a bit, and memory is allocated at once.
void check_threads(Call &call, Int isa, const std::vector<std::string> &right, Random &r) {
  const Int last = Int(right.size()) - 1;
  for (Int threads : {1, 2, 3, 8, 64}) {
    const kron_division d = call.division(isa, threads);
    if (call.batch.any_token()) check_division(d, threads);
    for (Int pool = 0; pool < 5; pool++) {
      call.by_bytes = r.below(2);
      const Int wanted = Int(1) << last | (r.below(2) ? -1 : r.below(Int(1) << last));
      const std::vector<std::string> found = call.run(isa, threads, pool, wanted);
      for (Int i = 0; i <= last; i++) {
        const bool written = wanted >> i & 1;
        const std::string nothing(right[size_t(i)].size(), '\xff');
        threads_agree.require(found[size_t(i)] == (written ? right[size_t(i)] : nothing),
                              "this depends on threads, pool, bytes or wanted states");
        threads_agree.require(call.batch.states[size_t(i)].intact(), "a write out of bounds");
      }
      if (pool == 0) continue; // its own threads allocate
      // One for the order of the sequences and the teams, four numbers each, and one for all scratch.
      const Int order = 4 * (8 * call.batch.sequences + 64);
      divisions.require(call.found_allocations <= 2, "memory is not allocated at once");
      divisions.require(call.found_allocated <= d.scratch + order, "more than the scratch");
    }
  }
}

// A bad number in a token reaches its sequence, no other and no later call; one in padding nothing.
void check_poison(Call &call, Int isa, const std::vector<std::string> &right, Random &r) {
  Batch &b = call.batch;
  if (!b.given || !b.sequences || !b.length) return;
  const Int s = r.below(b.sequences), i = r.below(b.length), width = call.model.first_width;
  const Int place = (s * b.length + i) * width + r.below(width);
  const double good = b.embeddings.get(place);
  b.embeddings.set(place, r.below(2) ? NAN : INFINITY);
  const std::vector<std::string> found = call.run(isa, 2, 0);
  b.embeddings.set(place, good);
  const size_t of_one = right.back().size() / size_t(b.sequences);
  for (size_t state = 0; state < right.size(); state++) {
    for (Int other = 0; other < b.sequences; other++) {
      const bool spared = other != s || !b.computed(s, i);
      const size_t at = size_t(other) * of_one;
      if (spared)
        poisoned.require(!found[state].compare(at, of_one, right[state], at, of_one),
                         "a bad number reaches another sequence");
    }
    const Int row = b.length * call.model.width; // of a sequence
    for (Int o = s * row; b.computed(s, i) && o < (s + 1) * row; o++) {
      const Int at = o / call.model.width % b.length;
      const bool reached = at == i || (state > 0 && b.token(s, i) && b.computed(s, at));
      if (reached)
        poisoned.require(!(fabs(b.states[state].get(o)) < INFINITY), "a bad number is lost");
    }
  }
  poisoned.require(call.run(isa, 2, 0) == right, "a bad number reaches the next call");
}

// The ids of padding count for nothing, and one out of range stops the call before it writes.
void check_ids(Call &call, Int isa, const std::vector<std::string> &right, Random &r) {
  Batch &b = call.batch;
  std::vector<Int> tokens;
  for (Int t = 0; t < b.sequences * b.length; t++) {
    if (b.computed(t / b.length, t % b.length)) tokens.push_back(t);
    else
      for (size_t i = 0; i < b.ids.size(); i++)
        b.ids[i][size_t(t)] = r.below(call.model.tables[i].m);
  }
  poisoned.require(call.run(isa, 3, 1) == right, "an id of padding counts");
  for (size_t i = b.given; i < b.ids.size() && !tokens.empty(); i++) {
    Int &id = b.ids[i][size_t(tokens[size_t(r.below(Int(tokens.size())))])];
    const Int good = id, bad[] = {call.model.tables[i].m, -1, INT64_MAX, INT64_MIN};
    id = bad[r.below(4)];
    for (Buffer &state : b.states) state.reset();
    const std::vector<std::string> untouched = call.bytes();
    const kron_execution e = {isa, 2, parallel_for, 0, 0};
    refusals.require(call.encode(e), "an id out of range is taken");
    refusals.require(call.bytes() == untouched, "a refused call wrote");
    id = good;
  }
}

// Sequences and length that the reference can afford.
Recipe affordable(Recipe c, double most_work) {
  const auto work = [&] {
    const double heads = double(c.heads * c.head_size);
    const double weights = double(4 * c.width) * heads + double(2 * c.width * c.hidden);
    return double(c.layers * c.sequences * c.length) * (weights + 2 * double(c.length) * heads);
  };
  while (c.sequences > 1 && work() > most_work) c.sequences /= 2;
  while (c.length > 1 && work() > most_work) c.length = c.length * 2 / 3;
  return c;
}

void check(const Recipe &recipe, double most_work, Random &r) {
  Call call(affordable(recipe, most_work), r);
  Definition<Number> definition{call.model, call.batch};
  const std::vector<Numbers> &expected = definition.run();
  for (Int isa = 0; isa <= kron_cpu_isa(); isa++) {
    const bool halves = recipe.dtype == KRON_BFLOAT16 && kron_cpu_bfloat16(isa);
    for (call.by_halves = false;; call.by_halves = true) {
      call.by_bytes = false;
      const std::vector<std::string> right = call.run(isa, 1, 4);
      for (size_t i = 0; i < expected.size() && !call.by_halves; i++) {
        doing = "state " + std::to_string(i) + "; " + doing;
        numbers.note(error_of(call.model.dtype, call.batch.states[i], expected[i]));
      }
      check_threads(call, isa, right, r);
      check_poison(call, isa, right, r);
      check_ids(call, isa, right, r);
      if (call.by_halves || !halves) break;
    }
  }
}

// ---- refusals ----------------------------------------------------------------------------------

// The arguments of a call, right but for one fault.
struct Arguments {
  Arguments(Call &call)
      : dtype(call.model.dtype.id), encoder(call.model.call()), layers(call.model.calls),
        batch(call.batch.call(states, -1)) {
    encoder.layers = layers.data();
  }
  Arguments(const Arguments &) = delete;
  kron_execution e = {0, 2, parallel_for, 0, 0}, *execution = &e;
  Int dtype;
  kron_encoder encoder, *p = &encoder;
  std::vector<kron_layer> layers;
  std::vector<void *> states;
  kron_batch batch, *b = &batch;
  std::vector<kron_product> parts; // of the linear layer at fault
};

const Int HUGE_SIZE = INT64_MAX;
const float SCALES[256] = {};
Int columns_of(const kron_product &p) {
  return p.factors[0].cols * (p.n_factors == 2 ? p.factors[1].cols : 1);
}
enum { DATA = 1 }; // what the division does not look at
const struct {
  const char *fault;
  int about;
  void (*plant)(Arguments &);
} REFUSALS[] = {
    {"a null execution", 0, [](Arguments &a) { a.execution = nullptr; }},
    {"isa -1", 0, [](Arguments &a) { a.e.isa = -1; }},
    {"isa too high", 0, [](Arguments &a) { a.e.isa = kron_cpu_isa() + 1; }},
    {"no thread", 0, [](Arguments &a) { a.e.threads = 0; }},
    {"-1 threads", 0, [](Arguments &a) { a.e.threads = -1; }},
    {"a million threads", 0, [](Arguments &a) { a.e.threads = 1000000; }},
    {"dtype -1", 0, [](Arguments &a) { a.dtype = -1; }},
    {"dtype 4", 0, [](Arguments &a) { a.dtype = 4; }},
    {"a null encoder", 0, [](Arguments &a) { a.p = nullptr; }},
    {"a null batch", 0, [](Arguments &a) { a.b = nullptr; }},
    {"no table", 0, [](Arguments &a) { a.encoder.n_tables = 0; }},
    {"four tables", 0, [](Arguments &a) { a.encoder.n_tables = 4; }},
    {"a table of rank 0", 0, [](Arguments &a) { a.encoder.tables[1].rank = 0; }},
    {"a table of no factor", 0, [](Arguments &a) { a.encoder.tables[1].n_factors = 0; }},
    {"a table of three factors", 0, [](Arguments &a) { a.encoder.tables[1].n_factors = 3; }},
    {"an empty table", 0, [](Arguments &a) { a.encoder.tables[1].factors[0].rows = 0; }},
    {"a table of another width", 0, [](Arguments &a) { a.encoder.tables[1].factors[0].cols++; }},
    {"an int8 table in float64", 0,
     [](Arguments &a) { a.dtype = KRON_FLOAT64, a.encoder.tables[1].factors[0].scale = SCALES; }},
    {"an int8 table of terms with their own scales", 0,
     [](Arguments &a) {
       kron_product &t = a.encoder.tables[1];
       const Int width = columns_of(a.encoder.tables[0]);
       t.rank = t.n_factors = 2, t.turns[0] = 0, t.turns[1] = 1;
       t.factors[0] = {SCALES, 1, 1, 1, 1, 1, SCALES, 1};
       t.factors[1] = {SCALES, 1, width, width, width, 1, nullptr, 0};
     }},
    {"a null table", DATA, [](Arguments &a) { a.encoder.tables[1].factors[0].data = nullptr; }},
    {"no layer", 0, [](Arguments &a) { a.encoder.n_layers = 0; }},
    {"-1 layers", 0, [](Arguments &a) { a.encoder.n_layers = -1; }},
    {"2^63 - 1 layers", 0, [](Arguments &a) { a.encoder.n_layers = HUGE_SIZE; }},
    {"null layers", 0, [](Arguments &a) { a.encoder.layers = nullptr; }},
    {"no head", 0, [](Arguments &a) { a.encoder.heads = 0; }},
    {"-1 heads", 0, [](Arguments &a) { a.encoder.heads = -1; }},
    {"heads that do not divide", 0, [](Arguments &a) { a.encoder.heads = 5; }},
    {"2^63 - 1 heads", 0, [](Arguments &a) { a.encoder.heads = HUGE_SIZE; }},
    {"activation -1", 0, [](Arguments &a) { a.layers[1].activation = -1; }},
    {"activation 5", 0, [](Arguments &a) { a.layers[1].activation = 5; }},
    {"-1 sequences", 0, [](Arguments &a) { a.batch.sequences = -1; }},
    {"a length of -1", 0, [](Arguments &a) { a.batch.length = -1; }},
    {"2^63 - 1 sequences", 0, [](Arguments &a) { a.batch.sequences = HUGE_SIZE; }},
    {"a length of 2^63 - 1", 0, [](Arguments &a) { a.batch.length = HUGE_SIZE; }},
    {"2^64 tokens", 0,
     [](Arguments &a) { a.batch.sequences = a.batch.length = Int(1) << 32; }},
    {"null ids", DATA, [](Arguments &a) { a.batch.ids[1] = nullptr; }},
    {"neither ids nor embeddings", DATA,
     [](Arguments &a) { a.batch.ids[0] = nullptr, a.batch.embeddings = nullptr; }},
    {"null states", DATA, [](Arguments &a) { a.batch.states = nullptr; }},
    {"a null last state", DATA, [](Arguments &a) { a.states.back() = nullptr; }},
};

// Those of one linear layer, whose first part is a.parts[0].
const struct {
  const char *fault;
  int about;
  void (*plant)(Arguments &, kron_linear &);
} LINEAR_REFUSALS[] = {
    {"-1 parts", 0, [](Arguments &, kron_linear &l) { l.n_parts = -1; }},
    {"2^63 - 1 parts", 0, [](Arguments &, kron_linear &l) { l.n_parts = HUGE_SIZE; }},
    {"null parts", 0, [](Arguments &, kron_linear &l) { l.parts = nullptr; }},
    {"rank 0", 0, [](Arguments &a, kron_linear &) { a.parts[0].rank = 0; }},
    {"rank 2^63 - 1", 0, [](Arguments &a, kron_linear &) { a.parts[0].rank = HUGE_SIZE; }},
    {"rank -2^63", 0, [](Arguments &a, kron_linear &) { a.parts[0].rank = INT64_MIN; }},
    {"no factor", 0, [](Arguments &a, kron_linear &) { a.parts[0].n_factors = 0; }},
    {"three factors", 0, [](Arguments &a, kron_linear &) { a.parts[0].n_factors = 3; }},
    {"nine factors", 0, [](Arguments &a, kron_linear &) { a.parts[0].n_factors = 9; }},
    {"an empty side", 0, [](Arguments &a, kron_linear &) { a.parts[0].factors[0].rows = 0; }},
    {"a row more", 0, [](Arguments &a, kron_linear &) { a.parts[0].factors[0].rows++; }},
    {"a column more", 0, [](Arguments &a, kron_linear &) { a.parts[0].factors[0].cols++; }},
    {"a side of 2^63 - 1", 0,
     [](Arguments &a, kron_linear &) { a.parts[0].factors[0].rows = HUGE_SIZE; }},
    {"a stride of -2^63", 0,
     [](Arguments &a, kron_linear &) { a.parts[0].factors[0].row_stride = INT64_MIN; }},
    {"a turn too high", 0, [](Arguments &a, kron_linear &) { a.parts[0].turns[0] = 2; }},
    {"a turn below 0", 0, [](Arguments &a, kron_linear &) { a.parts[0].turns[0] = -1; }},
    {"a turn twice", 0,
     [](Arguments &a, kron_linear &) { a.parts[0].turns[0] = a.parts[0].turns[1]; }},
    {"int8 in float64", 0,
     [](Arguments &a, kron_linear &) { a.dtype = KRON_FLOAT64, a.parts[0].factors[0].scale = SCALES; }},
    {"int8 columns with their own scales", 0,
     [](Arguments &a, kron_linear &) {
       kron_product &p = a.parts[0];
       const Int m = p.factors[0].rows * p.factors[1].rows, n = columns_of(p);
       p.rank = 2, p.factors[0] = {SCALES, m, 1, m, 1, 1, SCALES, m};
       p.factors[1] = {SCALES, 1, n, n, n, 1, nullptr, 0};
     }},
    {"a null factor", DATA,
     [](Arguments &a, kron_linear &) { a.parts[0].factors[0].data = nullptr; }},
};

void expect_refusal(Call &call, Arguments &a, const std::string &fault, int about) {
  doing = fault;
  for (Buffer &state : call.batch.states) state.reset();
  kron_division division;
  memset(&division, 0xff, sizeof division);
  const std::string nothing(reinterpret_cast<char *>(&division), sizeof division);
  refusals.require(kron_cpu_encode(a.execution, a.dtype, a.p, a.b), "taken");
  for (const Buffer &b : call.batch.states)
    refusals.require(b.bytes(0, b.size) == std::string(size_t(b.size * b.dtype->bytes), '\xff'),
                     "a refused call wrote");
  if (about == DATA) return;
  refusals.require(kron_cpu_encode_division(a.execution, a.dtype, a.p, a.b, &division),
                   "taken by the division");
  refusals.require(!memcmp(&division, nothing.data(), sizeof division), "a refused division");
}

void check_refusals(Random &r) {
  const Recipe recipe = {KRON_FLOAT32, 2, 12, 4, 3, 24, SUM, 2, 5, HOLES};
  std::unique_ptr<Call> call;
  const auto usable = [&] { // for all faults: a stride of one row, or one factor's turn, is not read
    const auto fits = [](const Linear &l) {
      return l.calls[0].n_factors == 2 && l.calls[0].factors[0].rows > 1;
    };
    const Model &m = call->model;
    const std::vector<Linear> &linears = m.layers[1].linears;
    return m.tables.size() > 1 && m.projection && fits(*m.projection) &&
           std::all_of(linears.begin(), linears.end(), fits);
  };
  do call = std::make_unique<Call>(recipe, r);
  while (!usable());
  for (const auto &refusal : REFUSALS) {
    Arguments a(*call);
    refusal.plant(a);
    expect_refusal(*call, a, refusal.fault, refusal.about);
  }
  for (Int role = 0; role <= ROLES; role++) {
    for (const auto &refusal : LINEAR_REFUSALS) {
      Arguments a(*call);
      kron_linear *const linears[] = {&a.layers[1].query, &a.layers[1].key, &a.layers[1].value,
                                      &a.layers[1].output, &a.layers[1].up, &a.layers[1].down,
                                      &a.encoder.projection};
      kron_linear &l = *linears[role];
      a.parts.assign(l.parts, l.parts + l.n_parts);
      l.parts = a.parts.data();
      refusal.plant(a, l);
      expect_refusal(*call, a, "linear layer " + std::to_string(role) + ": " + refusal.fault,
                     refusal.about);
    }
  }
  for (kron_linear kron_layer::*l : {&kron_layer::query, &kron_layer::down}) {
    Arguments a(*call);
    (a.layers[1].*l).n_parts = 0;
    expect_refusal(*call, a, "no part", 0);
  }
  Arguments a(*call);
  refusals.require(kron_cpu_encode_division(&a.e, a.dtype, a.p, a.b, nullptr), "a null division");

  const kron_execution broken = {0, 64, failing, 0, 0};
  Recipe large = {KRON_FLOAT32, 1, 96, 4, 24, 384, DENSE, 4, 70, NO_MASK};
  Call divided(large, r);
  refusals.require(divided.encode(broken), "a pool that fails goes unnoticed");
  const kron_execution here = {0, 1, nullptr, 0, 0};
  refusals.require(!divided.encode(here), "refused");
  for (Int most = divided.found_allocations - 1; most >= 0; most--)
    refusals.require(divided.encode(here, -1, most), "missing memory goes unnoticed");
}

// ---- the division of the presets' work -----------------------------------------------------------

// Pointers that must not be followed.
const void *const NOWHERE = reinterpret_cast<const void *>(64);
kron_product term(Int a_rows, Int a_cols, Int b_rows, Int b_cols) {
  kron_product p = {};
  p.rank = 1, p.n_factors = 2;
  p.factors[0] = {NOWHERE, a_rows, a_cols, a_rows * a_cols, a_cols, 1, nullptr, 0};
  p.factors[1] = {NOWHERE, b_rows, b_cols, b_rows * b_cols, b_cols, 1, nullptr, 0};
  const double right = double(b_rows * a_cols * (b_cols + a_rows)); // multiply-adds, B first
  const double left = double(a_rows * b_cols * (a_cols + b_rows));
  p.turns[0] = right <= left, p.turns[1] = !p.turns[0];
  return p;
}
kron_product dense(Int rows, Int cols) {
  kron_product p = {};
  p.rank = p.n_factors = 1;
  p.factors[0] = {NOWHERE, rows, cols, rows * cols, cols, 1, nullptr, 0};
  return p;
}

// BERT_BASE by kroneckerbert/presets.py.
struct Preset {
  const char *name;
  kron_product table, attention, up, down;
};
const Preset PRESETS[] = {
    {"dense", dense(30522, 768), dense(768, 768), dense(3072, 768), dense(768, 3072)},
    {"8x", term(30522, 96, 1, 8), term(384, 384, 2, 2), term(8, 2, 384, 384), term(2, 8, 384, 384)},
    {"21x", term(30522, 48, 1, 16), term(384, 48, 2, 16), term(16, 2, 192, 384),
     term(2, 16, 384, 192)},
};
struct Size {
  Int sequences, length;
};
const Size SIZES[] = {{1, 1}, {1, 16}, {1, 128}, {1, 512}, {32, 128}};

kron_division divide(const Preset &preset, Size size, Int threads, Int layers) {
  doing = std::string(preset.name) + ", " + std::to_string(size.sequences) + " x " +
          std::to_string(size.length) + ", " + std::to_string(threads) + " threads";
  const kron_linear attention = {1, &preset.attention, NOWHERE};
  const kron_norm norm = {NOWHERE, NOWHERE, 1e-12};
  const kron_layer layer = {attention, attention, attention, attention, {1, &preset.up, NOWHERE},
                            {1, &preset.down, NOWHERE}, norm, norm, KRON_GELU};
  const std::vector<kron_layer> all(size_t(layers), layer);
  kron_encoder encoder = {3, {preset.table, dense(512, 768), dense(2, 768)}, norm,
                          {0, nullptr, nullptr}, layers, 12, all.data(), 0.125};
  const std::vector<void *> states(size_t(layers + 1), const_cast<void *>(NOWHERE));
  const Int *const ids = static_cast<const Int *>(NOWHERE);
  const kron_batch batch = {size.sequences, size.length, nullptr, {ids, ids, ids},
                            nullptr, nullptr, states.data()};
  const kron_execution e = {kron_cpu_isa(), threads, parallel_for, 0, 0};
  kron_division found;
  if (const char *error = kron_cpu_encode_division(&e, KRON_FLOAT32, &encoder, &batch, &found))
    fail(error);
  check_division(found, threads);
  return found;
}

void print_row(const Preset &preset, Size size, Int threads, const kron_division &d) {
  printf("%-8s%6lld x%4lld%9lld%9lld%9lld%8lld%8lld%8.3f%9.2f%12.0f\n", preset.name,
         (long long)size.sequences, (long long)size.length, (long long)threads, (long long)d.teams,
         (long long)d.workers, (long long)d.stages, (long long)d.parts, d.share,
         d.share * double(threads), double(d.scratch) / 1024);
}

void check_presets(bool print) {
  if (print)
    printf("%-8s%12s%9s%9s%9s%8s%8s%8s%9s%12s\n", "preset", "tokens", "threads", "teams", "workers",
           "stages", "parts", "share", "x even", "scratch KB");
  for (const Preset &preset : PRESETS) {
    for (Size size : SIZES) {
      double last_share = 1;
      for (Int threads : {1, 2, 4, 8, 16, 64}) {
        const kron_division d = divide(preset, size, threads, 12);
        const Int of_one_layer = divide(preset, size, threads, 1).scratch;
        if (print) print_row(preset, size, threads, d);
        const Int tokens = size.sequences * size.length, used = d.teams * d.workers;
        const Int most_used = tokens < 16 ? 2 : tokens < 128 ? 4 : tokens < 512 ? 8 : 16;
        divisions.require(used >= std::min(threads, most_used), "threads are left without work");
        divisions.require(d.share * double(used) < 1.2, "the work is divided unevenly");
        divisions.require(d.share <= last_share + 1e-9, "more threads, and a larger share");
        last_share = d.share;
        // Four vectors of the width for each token (and 64 more, of lanes without one); a worker's
        // own: 48 tokens of the hidden vector, less than another 2000 numbers, and scores.
        const Int most = 4 * 4 * 768 * (tokens + 64 * size.sequences) +
                         used * 48 * 4 * (3072 + 2000 + 512);
        divisions.require(d.scratch <= most, "more scratch than tokens and workers need");
        // A layer adds the list of its steps, nothing that depends on tokens.
        divisions.require(d.scratch <= of_one_layer + 11 * 8192, "layers take scratch");
      }
    }
  }
}

// ---- the self-test -----------------------------------------------------------------------------

// The largest error of the definition with a fault, in the arithmetic of T, for the last state.
template <class T>
double error_with(Int fault, const Model &model, const Batch &batch, const Numbers &expected) {
  Definition<Plain<T>> definition{model, batch, fault};
  const std::vector<Plain<T>> &last = definition.run().back();
  Buffer found(model.dtype, Int(last.size()));
  for (size_t i = 0; i < last.size(); i++) found.set(Int(i), double(last[i].value));
  return error_of(model.dtype, found, expected);
}

// For every dtype and depth: the right definition is within the bound, and of five encoders at least one
// shows each mistake. Twelve layers and 16 bits hide the mildest ones. Those with int8 factors have one layer:
// where an error may carry a number past a half, the bound grows by a unit, and after more it says less and less.
void self_test(Random &r) {
  double worst = 0, mildest = INFINITY;
  const auto test = [&](Int dtype, Int depth, bool int8) {
    const Int faults = int8 ? Int(ALL_FAULTS) : Int(FAULTS);
    std::vector<double> seen(static_cast<size_t>(faults));
    for (Int tries = 0; tries < 5; tries++) {
      Recipe c = {dtype, depth, 24, 3, 8, 36, RANDOM, 3, 12, LEFT};
      c.distances = true, c.int8 = int8;
      Call call(c, r);
      for (Layer &layer : call.model.layers) layer.activation = KRON_GELU;
      call.batch.mask[0] = 0; // of a first position
      Definition<Number> definition{call.model, call.batch};
      const Numbers &expected = definition.run().back();
      for (Int fault = NO_FAULT; fault < faults; fault++) {
        const auto error = dtype == KRON_FLOAT64 ? error_with<double> : error_with<float>;
        double &most = seen[size_t(fault)];
        most = std::max(most, error(fault, call.model, call.batch, expected));
      }
    }
    for (Int fault = NO_FAULT; fault < faults; fault++) {
      const double error = seen[size_t(fault)];
      doing = std::string(DTYPES[dtype].name) + (int8 ? ", int8, " : ", ") + std::to_string(depth) +
              " layers, mistake " + std::to_string(fault) + ": an error of " + std::to_string(error) +
              " times its bound";
      if (fault == NO_FAULT) worst = std::max(worst, error);
      else if (depth < 12 || DTYPES[dtype].bytes > 2) mildest = std::min(mildest, error);
      if (worst > 1) fail("the right definition is rejected");
      if (mildest <= 1) fail("a mistake passes");
    }
  };
  for (Int dtype = 0; dtype < 4; dtype++) {
    for (Int depth : {1, 3, 12}) test(dtype, depth, false);
    if (dtype != KRON_FLOAT64) test(dtype, 1, true);
  }
  printf("the right definition has %.2f of the bound, the mildest mistake %.1f times the bound\n",
         worst, mildest);
}

// ---- cases -------------------------------------------------------------------------------------

const Int LENGTHS[] = {1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 49, 64, 70};
const Int WIDTHS[] = {1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 33, 48, 60, 64, 96};
const Int HIDDEN[] = {1, 7, 16, 24, 33, 64, 96, 130};
const Int HEADS[] = {1, 1, 2, 3, 4, 12}, HEAD_SIZES[] = {1, 2, 3, 5, 8, 16, 17, 32, 64};

Recipe drawn(Int i, Random &r) {
  Recipe c = {i % 4, 1 + r.below(3), WIDTHS[r.below(16)], HEADS[r.below(6)],
              HEAD_SIZES[r.below(9)], HIDDEN[r.below(8)], RANDOM, 1 + r.below(r.below(2) ? 3 : 40),
              LENGTHS[r.below(15)], r.below(PADDINGS)};
  c.given = r.below(2), c.distances = r.below(2), c.meeting = r.below(2);
  c.int8 = c.dtype != KRON_FLOAT64 && r.below(2);
  if (r.below(20) == 0) (r.below(2) ? c.sequences : c.length) = 0;
  return c;
}

std::vector<Recipe> chosen_cases() {
  std::vector<Recipe> cases;
  for (Int i = 0; i < 15; i++) { // every kind of layer in every dtype
    for (Int dtype = 0; dtype < 4; dtype++) {
      Recipe c = {dtype, 1 + i % 3, 24, 4, 6, 40, i % 5, 2, LENGTHS[(i * 4 + dtype) % 15],
                  (i + dtype) % PADDINGS};
      c.given = i % 2, c.distances = i / 2 % 2, c.meeting = i % 5 == 1 || i % 5 == 2;
      cases.push_back(c);
    }
  }
  for (Int dtype = 0; dtype < 4; dtype++) {
    for (Int i = 0; i < 15; i++) { // every length, at little work
      Recipe c = {dtype, 1, 5, 1 + i % 3, 3, 7, RANDOM, i % 4 == 1 ? 40 : 1 + i % 4, LENGTHS[i],
                  (i + dtype) % PADDINGS};
      c.given = i % 2 == dtype % 2, c.distances = i % 3 == 0;
      cases.push_back(c);
    }
    Recipe deep = {dtype, 12, 24, 2, 12, 36, RANDOM, 2, 10, MIXED};
    Recipe is_long = {dtype, 2, 6, 2, 3, 8, RANDOM, 1, 513, dtype};
    Recipe text = {dtype, 2, 96, 3, 32, 384, dtype == 1 ? PARTS : TERM, 1, 16, NO_MASK};
    is_long.distances = text.meeting = true;
    Recipe texts = {dtype, 1, 48, 3, 16, 96, RANDOM, 12, 70, MIXED};
    texts.given = true;
    Recipe no_sequence = {dtype, 1, 5, 1, 5, 7, RANDOM, 0, 5, MIXED};
    Recipe no_position = {dtype, 1, 5, 1, 5, 7, RANDOM, 5, 0, NO_MASK};
    for (const Recipe &c : {deep, is_long, text, texts, no_sequence, no_position})
      cases.push_back(c);
    for (Int kind = 0; dtype != KRON_FLOAT64 && kind < LINEAR_KINDS; kind++) {
      Recipe c = {dtype, 1 + kind % 2, 33, 3, 11, 42, kind, 3, LENGTHS[(3 * kind + 4 * dtype) % 15], MIXED};
      c.given = (kind + dtype) % 2, c.distances = kind % 3 == 0, c.meeting = kind == TERM || kind == SUM;
      c.int8 = true;
      cases.push_back(c);
    }
    if (dtype == KRON_FLOAT64) continue;
    text.int8 = texts.int8 = deep.int8 = true;
    for (const Recipe &c : {text, texts, deep}) cases.push_back(c);
  }
  return cases;
}

} // namespace

int main(int count, char **arguments) {
  const Options options(count, arguments, 100, 1e7);
  Random r;
  if (options.first == "--self-test") return self_test(r), 0;
  if (options.first == "--division") return check_presets(true), 0;
  if (!options.first.empty()) return no_such(options.first);
  r.bits.seed(uint64_t(options.seed));
  for (const Recipe &c : each(options.every, chosen_cases())) check(c, options.work, r);
  for (Int i = 0; i < options.draws; i++) check(drawn(i, r), options.work, r);
  check_refusals(r);
  check_presets(false);
  for (const Group *g : {&numbers, &threads_agree, &poisoned, &divisions, &refusals}) g->print();
}
