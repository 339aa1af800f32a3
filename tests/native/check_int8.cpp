// Checks products with int8 factors, kron_cpu_forward and kron_cpu_feed_forward of kron.h, without torch or
// Python.
//
//   check_int8 [--seed 1] [--draws 150] [--every 1] [--work 1e6]
//   check_int8 --self-test
//
// Operands are chosen so that float32 operations determine each result: it must be that of sums of integers,
// bit for bit, with every instruction set, by words of two and of four features, and with any number of threads.
// Where the order of float32 sums matters, last bits may differ. All results are compared with exact products as
// well. --draws is the number of random shapes; --every 3 runs a third of the chosen cases; --work limits the
// multiply-adds of a case's reference by using fewer tokens. --self-test plants mistakes of kernels and fails if
// one is not found.
#include "allocations.h"
#include "int8_products.h"

using namespace oracle;

namespace {

// ---- cases -------------------------------------------------------------------------------------

// Entries of int8 factors. Those up to 7 keep sums so short that a factor in float32 adds them exactly.
enum Values { FULL, SMALL, ALL_127, ALL_MINUS_128, ROWS_OF_ZEROS, VALUES };
// What a vector that an int8 factor multiplies has: multiples of a half of a unit that is a power of two; any
// numbers; the largest one only; one that is much larger than others; numbers around 2^-100.
enum Inputs { HALVES, REALS, ALL_LARGEST, OUTLIER, TINY, INPUTS };
const char *const VALUE_NAMES[] = {"any values", "small values", "all 127", "all -128", "rows of zeros"};
const char *const INPUT_NAMES[] = {"halves", "reals", "all largest", "an outlier", "tiny numbers"};

struct Case {
  Int dtype, tokens;
  std::vector<Shape> shapes; // of products of the same x, or of up and down
  bool block;
  Int int8; // two bits for each product: its factors in int8
  Int values, inputs, activation;
  bool epilogue = false; // bias and residual
};

bool in_int8(const Case &c, Int product, Int factor) { return c.int8 >> (2 * product + factor) & 1; }

struct Product : Weight {
  Product(const Case &c, Int which, Random &r)
      : Weight(DTYPES[c.dtype], c.shapes[size_t(which)], r), bias(dtype, m),
        residual(dtype, c.tokens * m) {
    const Int multiples = c.inputs == HALVES;
    for (Int at = 0; at < call.n_factors; at++) {
      if (!in_int8(c, which, at)) continue;
      const Int values = multiples && (c.block || call.n_factors == 2) && c.values == FULL ? Int(SMALL) : c.values;
      const auto value = [&]() -> Int {
        switch (values) {
        case SMALL: return r.below(15) - 7;
        case ALL_127: return 127;
        case ALL_MINUS_128: return -128;
        default: return r.below(256) - 128;
        }
      };
      make_int8(at, r, value, [&] { return multiples ? ldexp(1, int(r.below(3)) - 6) : (1.5 + r.number()) / 127; });
      if (values == ROWS_OF_ZEROS)
        for (Int i = 0; i < shape.sides[size_t(at)].rows; i += 1 + r.below(3))
          for (Int k = 0; k < shape.rank; k++)
            for (Int j = 0; j < shape.sides[size_t(at)].cols; j++) factors[size_t(at)].set(place(at, k, i, j), 0);
    }
    for (Int i = 0; i < m; i++) bias.set(i, double(r.below(64) - 32));
    for (Int i = 0; i < residual.size; i++) residual.set(i, double(r.below(64) - 32) / 4);
    call.activation = c.block && which == 1 ? Int(KRON_NONE) : c.activation;
    call.bias = c.epilogue ? bias.data() : nullptr;
    call.residual = c.epilogue && !(c.block && which == 0) ? residual.data() : nullptr;
    text = "; " + std::string(VALUE_NAMES[c.values]) + ", " + ACTIVATIONS[call.activation] +
           (c.epilogue ? ", bias" : "") + text;
  }
  // Factors in floating point: one that comes first repeats or negates a feature in each row, so that it is known
  // what is rounded next; one that comes second has entries of -1, 0 and 1.
  void set_order(Int index, Random &r) {
    Weight::set_order(index);
    for (Int at = 0; at < call.n_factors; at++) {
      if (is_int8(at)) continue;
      const Side s = shape.sides[size_t(at)];
      const bool thin = columns() >= 0, is_first = thin ? at != columns() : call.turns[0] == at;
      for (Int k = 0; k < shape.rank; k++) {
        for (Int i = 0; i < s.rows; i++) {
          const Int only = r.below(s.cols), sign = 1 - 2 * r.below(2);
          for (Int j = 0; j < s.cols; j++)
            factors[size_t(at)].set(place(at, k, i, j), double(!is_first ? r.below(3) - 1 : j == only ? sign : 0));
        }
      }
    }
    // Terms that share their numbers have the last ones drawn.
  }
  // The factor whose vectors x is made of: (outer, size, inner).
  void vectors(Int &outer, Int &size, Int &inner) const {
    outer = inner = 1, size = n;
    if (call.n_factors == 1 || columns() >= 0) return;
    const Int at = is_int8(0) && is_int8(1) ? call.turns[0] : is_int8(0) ? 0 : 1;
    size = shape.sides[size_t(at)].cols;
    (at ? outer : inner) = n / size;
  }
  Buffer bias, residual;
};

struct Call {
  Call(const Case &chosen, Random &r)
      : c(chosen), dtype(DTYPES[c.dtype]), x(dtype, c.tokens * c.shapes[0].product(&Side::cols)) {
    for (size_t i = 0; i < c.shapes.size(); i++) products.push_back(std::make_unique<Product>(c, Int(i), r));
    for (size_t i = c.block; i < products.size(); i++) outputs.emplace_back(dtype, products[i]->residual.size);
  }

  // Draws what depends on the order.
  void set_order(Int index, Random &r) {
    for (size_t i = 0; i < products.size(); i++)
      products[i]->set_order(c.block && i ? index >> 1 : index & 1, r);
    Int outer, size, inner;
    products[0]->vectors(outer, size, inner);
    for (Int o = 0; o < c.tokens * outer; o++)
      for (Int i = 0; i < inner; i++) draw(o * size * inner + i, size, inner, r);
  }

  // Writes the outputs and returns the bytes of all.
  std::vector<std::string> run(Int isa, Int bytes, Int threads, kron_parallel_for pool = parallel_for) {
    doing = ISAS[isa] + std::string(bytes ? ", bytes, " : ", ") + std::to_string(threads) + " threads; " + text();
    std::vector<kron_product> p;
    for (const auto &product : products) p.push_back(product->call);
    for (size_t i = 0; i < outputs.size(); i++)
      outputs[i].reset(), p[i + c.block].y = outputs[i].data();
    const kron_execution e = {isa, threads, pool, bytes, 0};
    allocated = 0;
    const char *error =
        c.block ? kron_cpu_feed_forward(&e, dtype.id, c.tokens, x.data(), &p[0], &p[1])
                : kron_cpu_forward(&e, dtype.id, c.tokens, x.data(), Int(p.size()), p.data());
    found_allocated = allocated;
    if (error) fail(std::string("refused: ") + error);
    std::vector<std::string> all;
    for (const Buffer &b : outputs) all.push_back(b.bytes(0, b.size));
    return all;
  }

  std::string text() const {
    std::string all = std::string(c.block ? "feed-forward, " : "forward, ") + dtype.name + ", " +
                      std::to_string(c.tokens) + " tokens, " + INPUT_NAMES[c.inputs];
    for (const auto &product : products) all += product->text + product->turns;
    return all;
  }

  kron_division division(Int isa, Int threads) const {
    const kron_execution e = {isa, threads, parallel_for, 1, 0};
    std::vector<kron_product> p;
    for (const auto &product : products) p.push_back(product->call);
    const float *const nowhere = reinterpret_cast<const float *>(64); // which must not be followed
    for (kron_product &product : p)
      for (kron_factor &f : product.factors) f.data = nullptr, f.scale = f.scale ? nowhere : nullptr;
    kron_division d;
    const char *error =
        c.block ? kron_cpu_feed_forward_division(&e, dtype.id, c.tokens, &p[0], &p[1], &d)
                : kron_cpu_forward_division(&e, dtype.id, c.tokens, Int(p.size()), p.data(), &d);
    if (error) fail(std::string("the division was refused: ") + error);
    return d;
  }

  // Whether float32 operations determine the results, up to last bits of final sums.
  bool determined() const { return c.activation == KRON_NONE || c.activation == KRON_RELU; }
  bool poisoned() const {
    for (Int i = 0; i < x.size; i++)
      if (!isfinite(x.get(i))) return true;
    return false;
  }

  // The outputs (tokens, m) one after another, with N of int8_products.h.
  template <class N, class Arithmetic> std::vector<std::vector<N>> expected(const Arithmetic &arithmetic) const {
    std::vector<std::vector<N>> all(outputs.size());
    std::vector<Contractions> contractions;
    for (const auto &p : products) contractions.emplace_back(*p);
    for (Int t = 0; t < c.tokens; t++) {
      const Int n = products[0]->n;
      std::vector<N> in;
      for (Int i = 0; i < n; i++) in.push_back({x.get(t * n + i)});
      for (size_t i = 0; i < products.size(); i++) {
        std::vector<N> y = finish(*products[i], t, contractions[i].multiply(in, arithmetic));
        if (c.block && i == 0) in = y;
        else all[i - c.block].insert(all[i - c.block].end(), y.begin(), y.end());
      }
    }
    return all;
  }

  const Case c;
  const Dtype &dtype;
  Buffer x;
  std::vector<std::unique_ptr<Product>> products;
  std::vector<Buffer> outputs;
  Int found_allocated = 0; // bytes, of the last call

private:
  // A vector of x from `at` on.
  void draw(Int at, Int size, Int step, Random &r) {
    const bool narrow = dtype.id == KRON_FLOAT16;
    const double unit = ldexp(1, int(c.inputs == HALVES ? r.below(2) : r.below(narrow ? 9 : 60) - (narrow ? 4 : 30)));
    const Int most = r.below(size);
    for (Int i = 0; i < size; i++) {
      double v = 0;
      switch (c.inputs) {
      case HALVES: v = unit * (i == most ? 127 - 254. * double(r.below(2)) : double(r.below(509) - 254) / 2); break;
      case ALL_LARGEST: v = unit * 127 * double(1 - 2 * (i % 7 == 6)); break;
      case OUTLIER: v = i == most ? (narrow ? 6e4 : 1e30) : r.number(); break;
      case TINY: v = 0x1p-100 * (r.below(3) ? r.number() : double(r.below(2))); break;
      default: v = r.below(5) ? 127 * unit * r.number() : 0;
      }
      x.set(at + i * step, v);
    }
  }
  std::vector<Float> finish(const Product &p, Int token, std::vector<Float> y) const {
    for (Int i = 0; i < p.m; i++) {
      double &v = y[size_t(i)].value, &slack = y[size_t(i)].slack;
      const auto add = [&](double w) {
        v = InFloat::narrow(v + w);
        if (slack != 0) slack += 0x1p-23 * fabs(v); // sums of other numbers are rounded to others
      };
      if (p.call.bias) add(p.bias.get(i));
      if (p.call.activation == KRON_RELU && !isnan(v)) v = std::max(0., v);
      if (p.call.residual) add(p.residual.get(token * p.m + i));
    }
    return y;
  }
  std::vector<Real8> finish(const Product &p, Int token, std::vector<Real8> y) const {
    const double eps = 0x1p-23;
    for (Int i = 0; i < p.m; i++) {
      Real8 &v = y[size_t(i)];
      const auto rounded = [&] { v.bound += eps * (fabs(double(v.value)) + v.bound); };
      if (p.call.bias) v.value += p.bias.get(i), rounded();
      const double before = fabs(double(v.value)) + v.bound;
      // Slopes are at most 1.13; values are within 2 eps of x.
      v.value = activate(dtype, p.call.activation, Number(v.value)).first.value;
      if (p.call.activation != KRON_NONE) v.bound = 1.13 * v.bound + 2 * eps * before;
      if (p.call.residual) v.value += p.residual.get(token * p.m + i), rounded();
    }
    return y;
  }
};

// ---- checks ------------------------------------------------------------------------------------

Group integers{"sums of integers"}, last_bits{"up to last bits"}, exact_products{"exact products"};
Group same_bits{"instruction sets, threads"}, poison{"NaN and infinity"}, divisions{"division"};

// Whether the numbers found are these, once rounded to their dtype; last bits within the slack.
bool are(const Buffer &found, const std::vector<Float> &expected) {
  for (Int i = 0; i < found.size; i++) {
    const Float &e = expected[size_t(i)];
    const double v = found.get(i);
    const auto stored = [&](double w) {
      return found.dtype->bytes == 2 ? decode(*found.dtype, encode(*found.dtype, w)) : w;
    };
    const bool fits = v >= stored(e.value - e.slack) && v <= stored(e.value + e.slack);
    if (isnan(e.value) ? !isnan(v) : !fits) return false;
  }
  return true;
}
bool are_determined(const std::vector<std::vector<Float>> &all) {
  for (const auto &output : all)
    for (const Float &v : output)
      if (v.slack != 0) return false;
  return true;
}
// The largest error in units of its bound.
double error_of(const Buffer &found, const std::vector<Real8> &expected) {
  const double half = ldexp(1, -found.dtype->digits), tiny = ldexp(half, found.dtype->least);
  double worst = found.intact() ? 0 : INFINITY;
  for (Int i = 0; i < found.size; i++) {
    const double value = double(expected[size_t(i)].value), bound = expected[size_t(i)].bound, v = found.get(i);
    const double largest = ldexp(1 - half, found.dtype->id == KRON_FLOAT16 ? 16 : 128);
    if (fabs(value) + bound > largest) continue; // it may be infinite
    const double error = fabs(v - value) - half * (fabs(value) + bound) - tiny;
    worst = isnan(v) ? INFINITY : error > 0 ? std::max(worst, error / bound) : worst;
  }
  return worst;
}

// One call of the kernels on every instruction set, with and without products of bytes, on 1, 2 and 5 threads.
void check_order(Call &call) {
  const bool determined = call.determined(), poisoned = call.poisoned();
  doing = call.text();
  std::vector<std::vector<Float>> right;
  if (determined) right = call.expected<Float>(InFloat());
  const bool all_determined = determined && are_determined(right);
  std::vector<std::vector<Real8>> real;
  if (!poisoned) real = call.expected<Real8>(Bounded());
  Group &of_integers = poisoned ? poison : all_determined ? integers : last_bits;
  std::vector<std::string> first;
  for (Int isa = 0; isa <= kron_cpu_isa(); isa++) {
    if (!all_determined) first.clear();
    for (Int bytes = 0; bytes <= kron_cpu_bytes(isa); bytes++) {
      for (Int threads : {1, 2, 5}) {
        const std::vector<std::string> found = call.run(isa, bytes, threads);
        for (size_t i = 0; i < call.outputs.size(); i++) {
          if (determined) of_integers.require(are(call.outputs[i], right[i]), "not the sum of the integers");
          if (!poisoned) exact_products.note(error_of(call.outputs[i], real[i]));
          else poison.require(call.outputs[i].intact(), "a write out of bounds");
        }
        if (poisoned) continue; // of which NaN it is, nothing is said
        if (first.empty()) first = found;
        same_bits.require(found == first, "this depends on the instruction set or on threads");
      }
    }
  }
}

// Scratch is as large as the division says. 16-bit factors are widened besides.
int32_t in_order(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
  for (Int i = begin; i < end; i++) fn(i, i + 1, context);
  return 0;
}
void check_division(Call &call) {
  if (call.dtype.id != KRON_FLOAT32) return;
  for (Int isa = 0; isa <= kron_cpu_isa(); isa++) {
    for (Int threads : {1, 2, 5}) {
      const kron_division d = call.division(isa, threads);
      divisions.require(d.teams * d.workers >= 1 && d.teams * d.workers <= threads, "a division without threads");
      divisions.require(d.share * double(threads) > 1 - 1e-9 && d.share < 1 + 1e-9, "a share that cannot be");
      call.run(isa, 1, threads, in_order);
      const Int pieces = 10 * 64 * (d.teams * d.workers + 1); // each a multiple of 64 bytes
      divisions.require(call.found_allocated <= d.scratch + pieces, "more than the scratch");
      divisions.require(call.found_allocated >= d.scratch, "less than the scratch");
    }
  }
}

Int tokens_of(const Case &c, double most_work) {
  double work = 0;
  for (const Shape &s : c.shapes) {
    const Int m = s.product(&Side::rows), n = s.product(&Side::cols);
    work += double(s.sides.size() == 1 ? m * n : s.rank * (m * s.sides.back().cols + n * s.sides[0].rows));
  }
  return std::max<Int>(1, std::min(c.tokens, Int(most_work / work)));
}

void check(Case c, double most_work, Random &r) {
  c.tokens = tokens_of(c, most_work);
  Call call(c, r);
  const Int orders = c.block ? 4 : call.products[0]->call.n_factors;
  for (Int order = 0; order < orders; order++) {
    call.set_order(order, r);
    check_order(call);
    // A number that is not finite reaches its token, as float32 has it, and no other.
    const Int place = r.below(call.x.size);
    const double good = call.x.get(place), bad[] = {NAN, INFINITY, -INFINITY};
    call.x.set(place, bad[r.below(3)]);
    if (call.determined()) check_order(call);
    call.x.set(place, good);
  }
  check_division(call);
}

// ---- refusals ----------------------------------------------------------------------------------

enum { FORWARDS = 1, FEEDS = 2, ALONG = 4, BACKS = 8, FEEDS_BACK = 16, ALL = 31 };
const struct {
  const char *fault;
  int functions;
  void (*plant)(kron_product *, Int &); // up and down (64, 64) of 8x8 ⊗ int8 8x8; the dtype
  const char *error;
} REFUSALS[] = {
    {"float64", FORWARDS + FEEDS, [](kron_product *, Int &dtype) { dtype = KRON_FLOAT64; },
     "int8 factors are not for float64"},
    {"three factors", FORWARDS + FEEDS,
     [](kron_product *p, Int &) {
       p[1].n_factors = 3, p[1].factors[2] = {p[1].factors[0].data, 1, 1, 1, 1, 1, nullptr, 0};
       p[1].turns[2] = 2;
     },
     "there are int8 factors for up to two"},
    {"65537 columns", FORWARDS + FEEDS,
     [](kron_product *p, Int &) {
       p[0].factors[1].rows = p[0].factors[1].cols = p[1].factors[1].cols = 65537;
     },
     "an int8 factor has more than 65536 columns"},
    {"65537 columns in down", FEEDS,
     [](kron_product *p, Int &) { p[1].factors[1].cols = p[0].factors[1].rows = 65537; },
     "an int8 factor has more than 65536 columns"},
    {"65537 terms of a column", FORWARDS + FEEDS,
     [](kron_product *p, Int &) {
       for (int i = 0; i < 2; i++) p[i].rank = 65537, p[i].factors[0].rows = 1, p[i].factors[1].cols = 1;
     },
     "an int8 factor has more than 65536 terms"},
    {"columns with their own scales", FORWARDS + FEEDS,
     [](kron_product *p, Int &) {
       for (int i = 0; i < 2; i++) {
         p[i].rank = 2, p[i].factors[0].rows = 1, p[i].factors[1].cols = 1;
         p[i].factors[1].scale_rank_stride = 8;
       }
     },
     "int8 columns must share their scales"},
    {"first columns with their own scales", FORWARDS + FEEDS,
     [](kron_product *p, Int &) {
       for (int i = 0; i < 2; i++) {
         std::swap(p[i].factors[0], p[i].factors[1]);
         p[i].rank = 2, p[i].factors[0].cols = 1, p[i].factors[1].rows = 1;
         p[i].factors[0].scale_rank_stride = 8;
       }
     },
     "int8 columns must share their scales"},
    {"an axis in the middle", ALONG, [](kron_product *, Int &) {}, "an axis in the middle takes no int8 factors"},
    {"gradients", BACKS + FEEDS_BACK, [](kron_product *, Int &) {}, "int8 factors have no gradient"},
    {"gradients of a block whose up is int8", FEEDS_BACK,
     [](kron_product *p, Int &) { p[1].factors[1].scale = nullptr; }, "int8 factors have no gradient"},
    {"gradients of a block whose down is int8", FEEDS_BACK,
     [](kron_product *p, Int &) { p[0].factors[1].scale = nullptr; }, "int8 factors have no gradient"},
};

void check_refusals(Group &group, Random &r) {
  const Shape shape = {1, {{8, 8}, {8, 8}}};
  Call call({KRON_FLOAT32, 20, {shape, shape}, false, 2 | 2 << 2, FULL, HALVES, KRON_NONE}, r);
  call.products[0]->set_order(1, r);
  const kron_execution e = {0, 2, parallel_for, 1, 0};
  void *const y = call.outputs[0].data();
  kron_division division;
  memset(&division, 0xff, sizeof division);
  for (const auto &refusal : REFUSALS) {
    kron_product p[] = {call.products[0]->call, call.products[1]->call}, *const up = p, *const down = p + 1;
    Int dtype = KRON_FLOAT32;
    for (kron_product &product : p) product.y = y;
    refusal.plant(p, dtype);
    doing = refusal.fault;
    const auto refused = [&](int function, auto call_it, auto... arguments) {
      if (!(refusal.functions & function)) return;
      const char *error = call_it(&e, dtype, 20, arguments...);
      if (!error || strcmp(error, refusal.error)) doing += std::string(": ") + (error ? error : "no error");
      group.require(error && !strcmp(error, refusal.error), "not refused in these words");
    };
    const void *const x = call.x.data();
    refused(FORWARDS, kron_cpu_forward, x, 2, p);
    refused(FORWARDS, kron_cpu_forward_division, 2, p, &division);
    refused(FEEDS, kron_cpu_feed_forward, x, up, down);
    refused(FEEDS, kron_cpu_feed_forward_division, up, down, &division);
    refused(ALONG, kron_cpu_forward_along, x, 5, down);
    refused(BACKS, kron_cpu_backward, x, x, down, y, y, y);
    refused(BACKS, kron_cpu_backward_division, down, &division);
    refused(FEEDS_BACK, kron_cpu_feed_forward_backward, x, x, up, down, y, y, y, y, y, y);
    refused(FEEDS_BACK, kron_cpu_feed_forward_backward_division, up, down, &division);
  }
  const std::string unwritten(sizeof division, '\xff');
  group.require(!memcmp(&division, unwritten.data(), sizeof division), "a refused call wrote");
  const Buffer &b = call.outputs[0];
  group.require(b.bytes(0, b.size) == std::string(size_t(4 * b.size), '\xff'), "a refused call wrote");
  // A single column may have any stride of its scales.
  kron_product p = call.products[0]->call;
  p.factors[0].rows = p.factors[1].cols = 1, p.factors[1].scale_rank_stride = 8, p.y = y;
  doing = "a single column";
  group.require(!kron_cpu_forward(&e, KRON_FLOAT32, 1, call.x.data(), 1, &p), "refused");
}

// ---- the self-test -----------------------------------------------------------------------------

// Numbers as a kernel with a mistake would find them.
const char *const FAULTS[] = {
    "none", "row sums are not subtracted", "pairs of products saturate", "entries of -128 are clamped",
    "numbers are rounded down", "halves are rounded away from 0", "numbers are rounded once", "a tail is not zero",
    "the scale is the next row's", "the unit is another vector's", "NaN reaches the next vector",
    "tiny numbers do not count as zeros", "sums are in float32"};

void self_test(const std::vector<Case> &cases, Random &r) {
  Int found[INT8_FAULTS] = {}, beyond[INT8_FAULTS] = {};
  for (const Case &chosen : cases) {
    Case c = chosen;
    c.tokens = tokens_of(c, 2e4);
    Call call(c, r);
    if (!call.determined()) continue;
    call.set_order(r.below(2), r);
    for (int poisoned = 0; poisoned < 2; poisoned++) {
      if (poisoned) call.x.set(r.below(call.x.size), NAN);
      doing = call.text();
      const auto right = call.expected<Float>(InFloat());
      const auto real = call.expected<Real8>(Bounded());
      for (Int fault = NO_MISTAKE; fault < INT8_FAULTS; fault++) {
        InFloat arithmetic;
        arithmetic.fault = fault;
        const auto planted = call.expected<Float>(arithmetic);
        bool differs = false, too_far = false;
        for (size_t i = 0; i < call.outputs.size(); i++) {
          for (Int o = 0; o < call.outputs[i].size; o++) call.outputs[i].set(o, planted[i][size_t(o)].value);
          differs = differs || !are(call.outputs[i], right[i]);
          too_far = too_far || (!poisoned && error_of(call.outputs[i], real[i]) > 1);
        }
        if (fault == NO_MISTAKE && (differs || too_far)) fail("the right numbers are rejected");
        found[fault] += differs, beyond[fault] += too_far;
      }
    }
  }
  for (Int fault = NO_MISTAKE + 1; fault < INT8_FAULTS; fault++) {
    doing = FAULTS[fault];
    if (!found[fault]) fail("a mistake passes");
    printf("%-36s found in %4lld cases, beyond the bound of exact products in %4lld\n", FAULTS[fault],
           (long long)found[fault], (long long)beyond[fault]);
  }
}

// ---- which cases -------------------------------------------------------------------------------

const std::vector<Int> TOKENS = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 64, 70};
const Int DTYPE_IDS[] = {KRON_FLOAT32, KRON_BFLOAT16, KRON_FLOAT16};
const Int NO_ACTIVATION = KRON_NONE;

// Every tail of rows, columns and tokens, of a dense weight.
void add_tails(std::vector<Case> &cases) {
  Int i = 0;
  for (Int cols : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 16, 17, 31, 33, 63, 65, 70, 127, 384})
    for (Int rows = 1; rows <= 25; rows++, i++)
      cases.push_back({DTYPE_IDS[i % 3], 1 + i * 11 % 70, {{1, {{rows, cols}}}}, false, 1, FULL,
                       i % 4 ? HALVES : REALS, NO_ACTIVATION, i % 5 == 0});
}
// The largest sums, and vectors at the ends of what is rounded.
void add_extremes(std::vector<Case> &cases) {
  Int i = 0;
  for (Int cols : {1, 2, 3, 4, 5, 8, 64, 65, 384, 4099})
    for (Int values : {FULL, ALL_127, ALL_MINUS_128, ROWS_OF_ZEROS})
      for (Int inputs = REALS; inputs < INPUTS; inputs++, i++)
        cases.push_back({DTYPE_IDS[i % (inputs == TINY ? 2 : 3)], 9, {{1, {{7, cols}}}}, false, 1, values, inputs,
                         NO_ACTIVATION});
  for (Int values : {ALL_127, ALL_MINUS_128})
    cases.push_back({KRON_FLOAT32, 3, {{1, {{2, 65536}}}}, false, 1, values, ALL_LARGEST, NO_ACTIVATION});
}
// Two factors, one or both in int8, either of them first; thin matrices; products of the same x.
void add_products(std::vector<Case> &cases) {
  const std::vector<Shape> shapes = {
      {1, {{2, 2}, {24, 40}}}, {3, {{5, 3}, {7, 65}}}, {2, {{16, 17}, {3, 2}}}, {1, {{2, 16}, {25, 24}}},
      {1, {{48, 33}, {2, 2}}}, {2, {{9, 7}, {17, 24}}}, {1, {{1, 1}, {3, 5}}}, {4, {{3, 1}, {1, 9}}},
      {1, {{13, 6}, {4, 8}}}, {2, {{4, 12}, {12, 4}}}, {1, {{7, 2}, {26, 70}}}, {1, {{70, 9}, {1, 4}}},
      {1, {{33, 1}, {1, 70}}}, {5, {{1, 70}, {33, 1}}}, {9, {{70, 1}, {1, 31}}}, {65, {{1, 9}, {7, 1}}},
      {3, {{1, 5}, {6, 4}}}, {2, {{6, 4}, {1, 5}}}, {2, {{1, 8}, {1, 4}}}, {3, {{4, 1}, {8, 1}}},
  };
  Int i = 0;
  for (const Shape &s : shapes) {
    for (Int int8 = 1; int8 <= 3; int8++, i += 7) {
      const Int inputs = i % 3 ? HALVES : REALS;
      cases.push_back({DTYPE_IDS[i % 3], TOKENS[size_t(i) % TOKENS.size()], {s}, false, int8, FULL, inputs,
                       NO_ACTIVATION, i % 4 == 0});
      cases.push_back({DTYPE_IDS[(i + 1) % 3], TOKENS[size_t(i + 5) % TOKENS.size()], {s}, false, int8, i % VALUES,
                       i % INPUTS == TINY ? Int(HALVES) : i % INPUTS, i % 5, true});
      if (s.sides[0].cols == 1) continue;
      // Others with the same columns, in floating point and in int8.
      const Shape other = {2, {{3, s.product(&Side::cols)}, {5, 1}}};
      cases.push_back({DTYPE_IDS[i % 3], TOKENS[size_t(i + 3) % TOKENS.size()], {s, other, s}, false,
                       int8 | (i % 4) << 2 | 2 << 4, FULL, HALVES, NO_ACTIVATION});
    }
  }
}
// Blocks whose products meet entry by entry in one of their orders, and others.
void add_blocks(std::vector<Case> &cases) {
  const std::vector<std::vector<Shape>> blocks = {
      {{1, {{4, 2}, {9, 33}}}, {1, {{2, 4}, {21, 9}}}},   {{2, {{16, 2}, {6, 8}}}, {1, {{2, 16}, {8, 6}}}},
      {{1, {{4, 1}, {12, 20}}}, {2, {{1, 4}, {20, 12}}}}, {{1, {{5, 3}, {7, 4}}}, {1, {{2, 5}, {3, 7}}}},
      {{1, {{6, 2}, {4, 9}}}, {1, {{3, 8}, {7, 3}}}},     {{1, {{30, 17}}}, {1, {{11, 30}}}},
      {{1, {{30, 1}, {1, 17}}}, {1, {{2, 5}, {3, 6}}}},   {{1, {{40, 65}}}, {1, {{9, 8}, {7, 5}}}},
  };
  Int i = 0;
  for (const auto &shapes : blocks) {
    for (Int int8 : {2, 2 | 2 << 2, 2 << 2, 1 | 1 << 2, 3 | 3 << 2, 1, 3 << 2}) {
      Int some = int8;
      for (Int p = 0; p < 2; p++)
        if (shapes[size_t(p)].sides.size() == 1 && some >> (2 * p) & 2) some = (some & ~(3 << 2 * p)) | 1 << 2 * p;
      const bool unknown = shapes[0].rank > 1 && (some & 3) == 3; // what down rounds then depends on a sum
      if (unknown) continue;
      const Int activation = i % 4 == 3 ? 1 + i % 3 : i % 2 ? Int(KRON_RELU) : Int(KRON_NONE);
      cases.push_back({DTYPE_IDS[i % 3], TOKENS[size_t(7 * i) % TOKENS.size()], shapes, true, some, FULL, HALVES,
                       activation, i % 2 == 0});
      i++;
    }
  }
}
// Enough work for several threads.
void add_divided(std::vector<Case> &cases) {
  const std::vector<std::vector<Shape>> all = {
      {{1, {{384, 384}}}}, {{1, {{2, 2}, {192, 384}}}}, {{1, {{160, 224}, {2, 2}}}}, {{64, {{400, 1}, {1, 500}}}},
      {{3, {{16, 2}, {96, 64}}}, {1, {{2, 16}, {64, 96}}}}, {{1, {{700, 300}}}, {1, {{100, 700}}}},
  };
  Int i = 0;
  for (Int tokens : {70, 16, 5}) {
    for (const auto &shapes : all) {
      const bool block = shapes.size() == 2;
      const Int int8 = shapes[0].sides.size() == 1 || i % 2 ? 1 | 1 << 2 : 2 | 2 << 2;
      cases.push_back({DTYPE_IDS[i++ % 3], tokens, shapes, block, int8, FULL, HALVES, NO_ACTIVATION});
    }
  }
}
std::vector<Case> chosen_cases() {
  std::vector<Case> cases;
  add_tails(cases), add_extremes(cases), add_products(cases), add_blocks(cases);
  return cases;
}

Case drawn(Random &r) {
  const Int sides[] = {1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 48, 65};
  const auto side = [&] { return sides[r.below(21)]; };
  Shape s = {1 + r.below(3), {{side(), side()}}};
  if (r.below(4)) s.sides.push_back({side(), side()});
  const Int int8 = s.sides.size() == 1 ? 1 : 1 + r.below(3), inputs = r.below(INPUTS);
  return {inputs == TINY ? Int(KRON_FLOAT32) : DTYPE_IDS[r.below(3)], TOKENS[size_t(r.below(20))], {s}, false, int8,
          r.below(VALUES), inputs, r.below(3) ? NO_ACTIVATION : r.below(5), r.below(2) > 0};
}

} // namespace

int main(int count, char **arguments) {
  const Options options(count, arguments, 150, 1e6);
  Random r;
  if (options.first == "--self-test") return self_test(chosen_cases(), r), 0;
  if (!options.first.empty()) return no_such(options.first);
  r.bits.seed(uint64_t(options.seed));
  for (const Case &c : each(options.every, chosen_cases())) check(c, options.work, r);
  for (Int i = 0; i < options.draws; i++) check(drawn(r), options.work, r);
  std::vector<Case> divided;
  add_divided(divided);
  most_ranges = 0;
  for (const Case &c : each(options.every, divided)) check(c, std::max(20 * options.work, 6e6), r);
  if (!most_ranges) fail("no work was divided among threads");
  Group refusals{"refusals"};
  check_refusals(refusals, r);
  for (const Group *g : {&integers, &last_bits, &exact_products, &same_bits, &poison, &divisions, &refusals})
    g->print();
}
