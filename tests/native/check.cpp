// Checks the kernels of kron.h against sums over whole Kronecker products, without torch or Python.
//
//   check [--seed 1] [--draws 200] [--every 1] [--work 1e6]
//   check --self-test
//
// --draws is the number of random shapes of each kind of call; --every 3 runs a third of the chosen
// ones; --work limits the multiply-adds of a case's reference by using fewer tokens. --self-test plants
// wrong numbers and fails if the comparison accepts one.
#include "oracle.h"

using namespace oracle;

namespace {

// rows x cols dot products of `count` terms, whose rows and terms in p and q have these strides.
Numbers dots(Int rows, Int cols, Int count, const Numbers &p, Int p_row, Int p_term,
             const Numbers &q, Int q_row, Int q_term) {
  Numbers all(rows * cols);
  for (Int r = 0; r < rows; r++) {
    for (Int c = 0; c < cols; c++) {
      Number sum;
      for (Int i = 0; i < count; i++) sum.add(p[r * p_row + i * p_term], q[c * q_row + i * q_term]);
      all[r * cols + c] = sum;
    }
  }
  return all;
}

// Index in (outer, size, tail) of entry i of (outer, tail, size).
Int behind(Int i, Int size, Int tail) {
  return (i / (size * tail) * size + i % size) * tail + i / size % tail;
}

// A weight and its own operands. With a tail, rows and results here are (tokens, tail) in outer order,
// and those in memory (tokens, size, tail).
struct Product : Weight {
  Product(const Dtype &d, const Shape &s, Int tokens, Int tail, Random &r)
      : Weight(d, s, r), tail(tail), bias(d, m * tail), residual(d, tokens * m * tail) {
    bias.draw(r, 1), residual.draw(r, 4);
    call.activation = r.below(5);
    call.bias = r.below(2) ? bias.data() : nullptr;
    call.residual = r.below(2) ? residual.data() : nullptr;
    text = std::string("; ") + ACTIVATIONS[call.activation] + (call.bias ? ", bias" : "") +
           (call.residual ? ", residual" : "") + text;
  }
  // Up to the activation, of x (rows, n).
  Numbers apply(const Numbers &x, Int rows) const {
    double terms = 2;
    for (const Side &s : shape.sides) terms += double(shape.rank * s.cols);
    Numbers all = dots(rows, m, n, x, n, 1, whole(), n, 1);
    for (Int i = 0; i < Int(all.size()); i++) {
      if (call.bias) all[i].add(bias.get(behind(i, m, tail) % bias.size), 1);
      all[i] = all[i].rounded(terms);
    }
    return all;
  }
  // From the activation to the result, in the layout of memory.
  Numbers finish(const Numbers &rows) const {
    Numbers y(rows.size());
    for (Int i = 0; i < Int(y.size()); i++) {
      const Int place = behind(i, m, tail);
      y[place] = activate(dtype, call.activation, rows[i]).first;
      if (call.residual) y[place].add(residual.get(place), 1);
      y[place] = y[place].rounded(1);
    }
    return y;
  }
  // dx and those of the factors, the latter from the gradient of the whole.
  std::vector<Numbers> gradients(const Numbers &dy, const Numbers &x, Int tokens) const {
    const Numbers dw = dots(m, n, tokens, dy, 1, m, x, 1, n);
    std::vector<Numbers> all = {dots(tokens, n, m, dy, m, 1, whole(), 1, n)};
    double terms = 0;
    for (const Side &s : shape.sides) terms += double(shape.rank * s.rows);
    for (Number &v : all[0]) v = v.rounded(terms);
    Int rows_behind = m, cols_behind = n;
    for (Int f = 0; f < call.n_factors; f++) {
      const Side s = shape.sides[f];
      rows_behind /= s.rows, cols_behind /= s.cols;
      Numbers df(shape.rank * s.rows * s.cols);
      for (Int k = 0; k < shape.rank; k++) {
        for (Int i = 0; i < m * n; i++) {
          Real others = 1;
          Int rows = m, cols = n;
          for (Int j = 0; j < call.n_factors; j++) {
            const Side other = shape.sides[j];
            rows /= other.rows, cols /= other.cols;
            if (j != f) others *= factor(j, k, i / n / rows % other.rows, i % n / cols % other.cols);
          }
          df[(k * s.rows + i / n / rows_behind % s.rows) * s.cols + i % n / cols_behind % s.cols].add(dw[i], others);
        }
      }
      double sides = 1;
      for (Int j = 0; j < call.n_factors; j++)
        if (j != f) sides *= double(std::max(shape.sides[j].rows, shape.sides[j].cols));
      for (Number &v : df) v = v.rounded(double(tokens + call.n_factors) * sides);
      all.push_back(df);
    }
    return all;
  }

  const Int tail;
  Buffer bias, residual;
};

// ---- calls -------------------------------------------------------------------------------------

enum Kind { FORWARD, FORWARD_ALONG, FEED_FORWARD, BACKWARD, FEED_FORWARD_BACKWARD };
const char *const KINDS[] = {"forward", "forward along an axis", "feed-forward", "backward",
                             "feed-forward's backward"};
const Int TAILS[] = {1, 5, 16, 33, 48, 50};
// A call with its operands and results; run() makes it, any number of times.
struct Call {
  Call(Kind kind, const Dtype &d, Int tokens, Int tail, const std::vector<Shape> &shapes, Random &r)
      : kind(kind), dtype(d), tokens(tokens), tail(tail),
        x(d, tokens * shapes[0].product(&Side::cols) * tail),
        dy(d, tokens * shapes.back().product(&Side::rows)) {
    x.draw(r, 1), dy.draw(r, 1);
    for (const Shape &s : shapes) products.emplace_back(d, s, tokens, tail, r);
    if (kind > FORWARD_ALONG) outputs.emplace_back(d, kind == FEED_FORWARD ? dy.size : x.size);
    for (const Product &p : products) {
      if (kind <= FORWARD_ALONG) outputs.emplace_back(d, p.residual.size);
      if (kind < BACKWARD) continue;
      for (const Side &s : p.shape.sides)
        outputs.emplace_back(computed(d), p.shape.rank * s.rows * s.cols);
      if (kind != BACKWARD && &p == &products[0]) outputs.emplace_back(computed(d), p.m);
    }
  }

  // Two products of two factors have four orders; the second is that in which they meet.
  void set_order(Int index) {
    for (Product &p : products) p.set_order(index >> (kind != FORWARD && &p != &products[0]));
  }

  // Writes the outputs whose bit is set in `wanted`, and returns the bytes of all.
  std::vector<std::string> run(Int isa, Int threads, Int wanted = -1) {
    doing = std::string(KINDS[kind]) + ", " + dtype.name + ", " + ISAS[isa] + ", " +
            std::to_string(threads) + " threads, " + std::to_string(tokens) + " tokens, tail " +
            std::to_string(tail) + ", outputs " + std::to_string(wanted);
    std::vector<kron_product> p;
    for (const Product &product : products)
      doing += product.text + product.turns, p.push_back(product.call);
    std::vector<void *> y;
    for (Buffer &b : outputs)
      b.reset(), y.push_back(wanted >> y.size() & 1 ? b.data() : nullptr);
    for (size_t i = 0; i < p.size(); i++) p[i].y = y[kind == FORWARD ? i : 0];
    const kron_execution e = {isa, threads, threads == 1 ? nullptr : parallel_for, 0, 0};
    const Int id = dtype.id;
    const char *error =
        kind == FORWARD ? kron_cpu_forward(&e, id, tokens, x.data(), Int(p.size()), p.data())
        : kind == FORWARD_ALONG ? kron_cpu_forward_along(&e, id, tokens, x.data(), tail, &p[0])
        : kind == FEED_FORWARD ? kron_cpu_feed_forward(&e, id, tokens, x.data(), &p[0], &p[1])
        : kind == BACKWARD && p[0].n_factors > 2
            ? kron_cpu_backward_many(&e, id, tokens, dy.data(), x.data(), &p[0], y[0], &y[1])
        : kind == BACKWARD
            ? kron_cpu_backward(&e, id, tokens, dy.data(), x.data(), &p[0], y[0], y[1], y[2])
            : kron_cpu_feed_forward_backward(&e, id, tokens, dy.data(), x.data(), &p[0], &p[1],
                                             y[0], y[1], y[2], y[3], y[4], y[5]);
    if (error) fail(std::string("refused: ") + error);
    std::vector<std::string> bytes;
    for (const Buffer &b : outputs) bytes.push_back(b.bytes(0, b.size));
    return bytes;
  }

  // Of kinds that can be asked, as if with all gradients; others have two threads.
  kron_division division(Int isa, Int threads) const {
    const kron_execution e = {isa, threads, parallel_for, 0, 0};
    std::vector<kron_product> p;
    for (const Product &product : products) p.push_back(product.call);
    for (kron_product &product : p)
      for (kron_factor &f : product.factors) f.data = nullptr;
    kron_division d = {0, 2, 1, 1, 1, 0.5};
    const Int id = dtype.id;
    const char *error =
        kind == FORWARD ? kron_cpu_forward_division(&e, id, tokens, Int(p.size()), p.data(), &d)
        : kind == FEED_FORWARD ? kron_cpu_feed_forward_division(&e, id, tokens, &p[0], &p[1], &d)
        : kind == BACKWARD && p[0].n_factors == 2 ? kron_cpu_backward_division(&e, id, tokens, &p[0], &d)
        : kind == FEED_FORWARD_BACKWARD
            ? kron_cpu_feed_forward_backward_division(&e, id, tokens, &p[0], &p[1], &d)
            : nullptr;
    if (error) fail(std::string("the division was refused: ") + error);
    return d;
  }

  std::vector<Numbers> expected() const {
    const Numbers in_memory = exact(x);
    Numbers in(in_memory.size()); // (tokens, tail, n)
    for (Int i = 0; i < x.size; i++) in[i] = in_memory[behind(i, products[0].n, tail)];
    if (kind == BACKWARD) return products[0].gradients(exact(dy), in, tokens);
    if (kind <= FORWARD_ALONG) {
      std::vector<Numbers> all;
      for (const Product &p : products) all.push_back(p.finish(p.apply(in, tokens * tail)));
      return all;
    }
    const Product &up = products[0], &down = products[1];
    Numbers h = up.apply(in, tokens), slopes, dbias(up.m);
    for (Number &v : h) {
      const auto both = activate(dtype, up.call.activation, v);
      v = both.first, slopes.push_back(both.second);
    }
    if (kind == FEED_FORWARD) return {down.finish(down.apply(h, tokens))};
    const std::vector<Numbers> g2 = down.gradients(exact(dy), h, tokens);
    for (Int i = 0; i < Int(h.size()); i++) {
      Number dh;
      dh.add(g2[0][i], slopes[i]);
      h[i] = dh.rounded(1), dbias[i % up.m].add(h[i], 1);
    }
    for (Number &b : dbias) b = b.rounded(double(tokens));
    const std::vector<Numbers> g1 = up.gradients(h, in, tokens);
    return {g1[0], g1[1], g1[2], dbias, g2[1], g2[2]};
  }

  const Kind kind;
  const Dtype &dtype;
  const Int tokens, tail;
  Buffer x, dy;
  std::vector<Product> products;
  std::vector<Buffer> outputs; // those of tokens first
};

// ---- groups of cases ---------------------------------------------------------------------------

Group divided{"threads"}, poisoned{"NaN and infinity"};

// Several threads against one, and one run against the next.
void check_threads(Call &call, Int isa, const std::vector<Numbers> &expected) {
  const std::vector<std::string> alone = call.run(isa, 1);
  for (Int threads : {64, 8, 3, 2}) {
    most_ranges = 0;
    const std::vector<std::string> bytes = call.run(isa, threads);
    if (!most_ranges) return; // too little work to divide
    const kron_division d = call.division(isa, threads);
    divided.require(d.teams * d.workers > 1 && d.teams * d.workers <= threads, "a division without threads");
    divided.require(d.share < 1 && d.share * double(threads) > 1 - 1e-9, "a share that cannot be");
    for (size_t i = 0; i < bytes.size(); i++) {
      // Up to two vectors of tokens may take another way on one thread. Sums over tokens depend on threads
      // if tokens are divided. The compiler may fuse a feed-forward block's gradients differently for each
      // size of a block.
      const bool same_way = call.tokens > 2 * (16 << isa) / (call.dtype.id == KRON_FLOAT64 ? 8 : 4);
      if (call.kind == FORWARD_ALONG || (call.kind <= FEED_FORWARD && same_way) ||
          (call.kind == BACKWARD && (i == 0 || d.teams == 1)))
        divided.require(bytes[i] == alone[i], "this depends on the number of threads");
      else divided.note(worst_error(call.dtype, call.outputs[i], expected[i]));
    }
    divided.require(call.run(isa, threads) == bytes, "this differs from run to run");
  }
}

// A bad number reaches all outputs of its token (and place in the tail), no others, and no later call.
void check_poison(Call &call, Int isa, Random &r) {
  const bool forward = call.kind < BACKWARD;
  Buffer &input = forward ? call.x : call.dy;
  double bad = INFINITY; // which an activation may turn into 0
  for (const Product &p : call.products) bad = p.call.activation ? NAN : bad;
  const Int place = r.below(input.size);
  const auto token = [&](const Buffer &b, Int i) {
    return std::make_pair(i / (b.size / call.tokens), i % call.tail);
  };
  const double good = input.get(place);
  const std::vector<std::string> clean = call.run(isa, 1);
  input.set(place, bad), call.run(isa, 1), input.set(place, good);
  for (size_t i = 0; i < (forward ? clean.size() : 1); i++) {
    const Buffer &b = call.outputs[i];
    const Int bytes = b.dtype->bytes;
    bool reached = true, spared = true;
    for (Int o = 0; o < b.size; o++) {
      if (token(b, o) == token(input, place)) reached = reached && !(fabs(b.get(o)) < INFINITY);
      else spared = spared && !memcmp(b.data() + o * bytes, clean[i].data() + o * bytes, bytes);
    }
    poisoned.require(reached, "a bad number does not reach all of its token");
    poisoned.require(spared, "a bad number reaches another token");
  }
  poisoned.require(call.run(isa, 1) == clean, "a bad number reaches the next call");
}

// One kind of call and its operands. With `divided`, threads share the work, the reference may take 100
// times as many multiply-adds, and all gradients are wanted.
struct Case {
  Kind kind;
  Int dtype, tokens;
  std::vector<Shape> shapes;
  bool divided = false;
};

// Every instruction set and order, and subsets of the gradients.
void check(Group &group, const Case &c, double most_work, Random &r) {
  double work = 0;
  for (const Shape &s : c.shapes) work += double(s.product(&Side::rows) * s.product(&Side::cols));
  const Int tail = c.kind == FORWARD_ALONG ? TAILS[r.below(6)] : 1;
  const Int most_tokens = 1 + Int((c.divided ? 100 : 1) * most_work / (work * double(tail)));
  const Dtype &d = DTYPES[c.dtype];
  Call call(c.kind, d, std::min(c.tokens, most_tokens), tail, c.shapes, r);
  const std::vector<Numbers> expected = call.expected();
  const Int all = (Int(1) << call.outputs.size()) - 1;
  const Int orders = c.kind == FEED_FORWARD ? 4 : c.shapes[0].sides.size() == 3 ? 6 : 2;
  const Int step = c.kind < BACKWARD || c.divided ? all + 1 : c.kind == BACKWARD ? 1 : 7;
  for (Int isa = 0; isa <= kron_cpu_isa(); isa++) {
    for (Int order = c.kind == FEED_FORWARD_BACKWARD; order < orders; order++) {
      call.set_order(order);
      for (Int wanted = all; wanted >= 0; wanted -= step) {
        call.run(isa, 1, wanted);
        for (size_t i = 0; i < call.outputs.size(); i++)
          if (wanted >> i & 1) group.note(worst_error(d, call.outputs[i], expected[i]));
      }
      check_threads(call, isa, expected);
    }
    if (call.tokens) check_poison(call, isa, r);
  }
}

// Every 16-bit number plus nothing, and plus another one: such a sum is often halfway between two.
void check_rounding(Group &group, const Dtype &d, Random &r) {
  Call call(FORWARD, d, 2 << 16, 1, {{1, {{1, 1}}}}, r);
  Product &p = call.products[0];
  p.factors[0].set(0, 1);
  p.call.activation = KRON_NONE, p.call.bias = nullptr, p.call.residual = p.residual.data();
  for (Int i = 0; i < call.tokens; i++) {
    call.x.set(i, decode(d, uint16_t(i)));
    p.residual.set(i, i >> 16 ? -0. : decode(d, uint16_t(r.below(1 << 16))));
  }
  for (Int isa = 0; isa <= kron_cpu_isa(); isa++) {
    call.run(isa, 1);
    for (Int i = 0; i < call.tokens; i++) {
      const double sum = float(call.x.get(i)) + float(p.residual.get(i));
      const double y = call.outputs[0].get(i), right = decode(d, encode(d, sum));
      group.require(isnan(sum) ? isnan(y) : y == right, "a 16-bit number is rounded wrongly");
    }
  }
}

// The arguments of every function of kron.h, right but for one fault.
struct Arguments {
  kron_execution e = {0, 2, parallel_for, 0, 0}, *execution = &e;
  kron_product p[2], *products = p;
  Int dtype = KRON_FLOAT32, n = 2, tokens, tail = 1;
  const void *x, *dy;
};
enum { FORWARDS = 1, FEEDS = 2, BACKS = 4, FEEDS_BACK = 8, ALONG = 16, ALL = 31 };
const Int HUGE_SIZE = INT64_MAX;
const struct {
  const char *fault;
  int functions;
  void (*plant)(Arguments &);
  bool in_data = false; // which a call that asks for the division does not look at
} REFUSALS[] = {
    {"rank 0", ALL, [](Arguments &a) { a.p[1].rank = 0; }},
    {"rank 2^63 - 1", ALL, [](Arguments &a) { a.p[1].rank = HUGE_SIZE; }},
    {"rank -2^63", ALL, [](Arguments &a) { a.p[1].rank = INT64_MIN; }},
    {"no factor", ALL, [](Arguments &a) { a.p[1].n_factors = 0; }},
    {"nine factors", ALL, [](Arguments &a) { a.p[1].n_factors = 9; }},
    {"a null factor", ALL, [](Arguments &a) { a.p[1].factors[1].data = nullptr; }, true},
    {"an empty side", ALL, [](Arguments &a) { a.p[1].factors[1].cols = 0; }},
    {"a side of 2^63 - 1", ALL, [](Arguments &a) { a.p[1].factors[1].rows = HUGE_SIZE; }},
    {"sides whose product is 2^64", ALL,
     [](Arguments &a) { a.p[1].factors[0].rows = a.p[1].factors[1].rows = Int(1) << 32; }},
    {"a stride of -2^63", ALL, [](Arguments &a) { a.p[1].factors[0].row_stride = INT64_MIN; }},
    {"a turn too high", ALL, [](Arguments &a) { a.p[1].turns[0] = 2; }},
    {"a turn below 0", ALL, [](Arguments &a) { a.p[1].turns[0] = -1; }},
    {"a turn twice", ALL, [](Arguments &a) { a.p[1].turns[0] = 1; }},
    {"activation 5", ALL, [](Arguments &a) { a.p[1].activation = 5; }},
    {"activation -1", ALL, [](Arguments &a) { a.p[1].activation = -1; }},
    {"dtype -1", ALL, [](Arguments &a) { a.dtype = -1; }},
    {"dtype 4", ALL, [](Arguments &a) { a.dtype = 4; }},
    {"a null execution", ALL, [](Arguments &a) { a.execution = nullptr; }},
    {"isa -1", ALL, [](Arguments &a) { a.e.isa = -1; }},
    {"isa too high", ALL, [](Arguments &a) { a.e.isa = kron_cpu_isa() + 1; }},
    {"no thread", ALL, [](Arguments &a) { a.e.threads = 0; }},
    {"a million threads", ALL, [](Arguments &a) { a.e.threads = 1000000; }},
    {"-1 tokens", ALL, [](Arguments &a) { a.tokens = -1; }},
    {"2^63 - 1 tokens", ALL, [](Arguments &a) { a.tokens = HUGE_SIZE; }},
    {"null x", ALL, [](Arguments &a) { a.x = a.dy = nullptr; }, true},
    {"null dy", BACKS + FEEDS_BACK, [](Arguments &a) { a.dy = nullptr; }, true},
    {"null y", FORWARDS + FEEDS + ALONG, [](Arguments &a) { a.p[1].y = nullptr; }, true},
    {"null products", FORWARDS, [](Arguments &a) { a.products = nullptr; }},
    {"no product", FORWARDS, [](Arguments &a) { a.n = 0; }},
    {"five products", FORWARDS, [](Arguments &a) { a.n = 5; }},
    {"unequal columns", ALL - BACKS - ALONG, [](Arguments &a) { a.p[1].factors[1].cols = 7; }},
    {"does not meet", FEEDS_BACK, [](Arguments &a) { std::swap(a.p[0].turns[0], a.p[0].turns[1]); }},
    {"no tail", ALONG, [](Arguments &a) { a.tail = 0; }},
    {"a tail of 2^63 - 1", ALONG, [](Arguments &a) { a.tail = HUGE_SIZE; }},
    {"a tail of 2^39", ALONG, [](Arguments &a) { a.tail = Int(1) << 39; }}, // by the product's sides
};

void check_refusals(Group &group, Random &r) {
  const Shape shape = {1, {{8, 8}, {8, 8}}};
  Call call(FEED_FORWARD_BACKWARD, DTYPES[0], 20, 1, {shape, shape}, r);
  call.set_order(1);
  kron_division division;
  memset(&division, 0xff, sizeof division);
  for (const auto &refusal : REFUSALS) {
    Arguments a;
    a.p[0] = call.products[0].call, a.p[1] = call.products[1].call;
    a.tokens = call.tokens, a.x = a.dy = call.x.data();
    void *const g = a.p[0].y = a.p[1].y = call.outputs[0].data();
    refusal.plant(a);
    doing = refusal.fault;
    const kron_product *up = a.p, *down = a.p + 1;
    const auto refused = [&](int function, auto call, auto... arguments) {
      if (refusal.functions & function)
        group.require(call(a.execution, a.dtype, a.tokens, arguments...), "taken");
    };
    refused(FORWARDS, kron_cpu_forward, a.x, a.n, a.products);
    refused(ALONG, kron_cpu_forward_along, a.x, a.tail, down);
    refused(FEEDS, kron_cpu_feed_forward, a.x, up, down);
    refused(BACKS, kron_cpu_backward, a.dy, a.x, down, g, g, g);
    refused(FEEDS_BACK, kron_cpu_feed_forward_backward, a.dy, a.x, up, down, g, g, g, g, g, g);
    if (refusal.in_data) continue;
    refused(FORWARDS, kron_cpu_forward_division, a.n, a.products, &division);
    refused(FEEDS, kron_cpu_feed_forward_division, up, down, &division);
    refused(BACKS, kron_cpu_backward_division, down, &division);
    refused(FEEDS_BACK, kron_cpu_feed_forward_backward_division, up, down, &division);
  }
  const kron_execution e = {0, 2, parallel_for, 0, 0};
  const kron_product *p = &call.products[0].call;
  doing = "a null division";
  group.require(kron_cpu_forward_division(&e, 0, 20, 1, p, nullptr), "taken");
  group.require(kron_cpu_feed_forward_division(&e, 0, 20, p, p, nullptr), "taken");
  group.require(kron_cpu_backward_division(&e, 0, 20, p, nullptr), "taken");
  group.require(kron_cpu_feed_forward_backward_division(&e, 0, 20, p, p, nullptr), "taken");
  const std::string unwritten(sizeof division, '\xff');
  group.require(!memcmp(&division, unwritten.data(), sizeof division), "a refused call wrote");
  group.require(call.outputs[0].bytes(0, 1) == "\xff\xff\xff\xff", "a refused call wrote");
}

// Checks that the comparison accepts right numbers and rejects wrong and missing ones.
void self_test(Random &r) {
  for (const Dtype &d : DTYPES) {
    Call call(FORWARD, d, 17, 1, {{2, {{7, 8}, {9, 5}}}}, r);
    const Numbers expected = call.expected()[0];
    Buffer found(d, Int(expected.size()));
    Int largest = 0;
    for (Int i = 0; i < found.size; i++) {
      found.set(i, double(expected[i].value));
      if (fabs(found.get(i)) > fabs(found.get(largest))) largest = i;
    }
    const auto rejects = [&](double v) {
      found.set(largest, v);
      return worst_error(d, found, expected) > 1;
    };
    const double right = found.get(largest), off = std::max(1e-3, ldexp(4, -d.digits));
    doing = d.name;
    if (rejects(right)) fail("a right number was rejected");
    if (!rejects(right * (1 + off)) || !rejects(right * (1 - off))) fail("a wrong number passed");
    if (!rejects(NAN)) fail("NaN passed");
    for (Int i = 0; d.bytes == 2 && i < 1 << 16; i++)
      if (!isnan(decode(d, uint16_t(i))) && encode(d, decode(d, uint16_t(i))) != i) fail("16-bit");
  }
  printf("the comparison rejects what it should\n");
}

// ---- shapes ------------------------------------------------------------------------------------

const std::vector<Int> TOKENS = {0, 1, 2, 5, 15, 16, 17, 33, 47, 48, 49, 97, 130};
const std::vector<Shape> SHAPES = {
    {1, {{1, 1}}}, {3, {{1, 1}, {1, 1}}}, {2, {{1, 1}, {1, 1}, {1, 1}}}, {1, {{33, 31}}},
    {3, {{16, 48}}}, {2, {{1, 257}}}, {1, {{257, 1}}}, {2, {{1, 257}, {257, 1}}},
    {1, {{257, 1}, {1, 257}}}, {1, {{1, 257}, {3, 2}}}, {3, {{2, 3}, {257, 1}}},
    {2, {{7, 5}, {11, 13}}}, {1, {{13, 17}, {3, 19}}}, {1, {{7, 8}, {9, 15}}},
    {2, {{16, 17}, {23, 8}}}, {3, {{8, 9}, {15, 16}}}, {1, {{24, 25}, {31, 33}}},
    {2, {{33, 31}, {25, 24}}}, {2, {{9, 7}, {17, 24}}}, {1, {{15, 23}, {16, 7}}},
    {3, {{31, 7}, {33, 9}}}, {1, {{5, 4}, {7, 48}}}, {1, {{7, 6}, {5, 32}}},
    {1, {{96, 12}, {2, 16}}}, {1, {{48, 48}, {2, 2}}}, {1, {{8, 2}, {48, 48}}},
    {4, {{2, 16}, {96, 12}}}, {1, {{16, 2}, {24, 48}}}, {1, {{1, 1}, {1, 8}}},
    {2, {{3, 5}, {7, 2}, {8, 9}}}, {1, {{16, 4}, {1, 7}, {5, 3}}}, {1, {{2, 3}, {16, 16}, {2, 3}}},
    {1, {{17, 2}, {2, 17}, {3, 3}}}, {1, {{2, 2}, {2, 2}, {2, 2}, {2, 2}, {2, 2}}},
    {2, {{3, 2}, {2, 2}, {2, 2}, {4, 4}, {4, 4}}}, {1, {{3, 3}, {3, 2}, {17, 16}}},
};

typedef std::vector<Int> Sides;
Sides sides_of(const Shape &s, Int Side::*side) {
  Sides all;
  for (const Side &one : s.sides) all.push_back(one.*side);
  return all;
}
// Random sides, with the columns that are given (not 0).
Shape draw_shape(Random &r, const Sides &cols) {
  const Int sides[] = {1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 48};
  for (;;) {
    Shape s = {1 + r.below(3), {}};
    for (Int c : cols) s.sides.push_back({sides[r.below(20)], c ? c : sides[r.below(20)]});
    if (s.product(&Side::rows) * s.product(&Side::cols) < 100000) return s;
  }
}

// The calls that take a shape: all of them, if it has two factors; gradients from two on.
void add_cases(std::vector<Case> &cases, Int i, Int tokens, const Shape &s, Random &r) {
  const Int dtype = i % 4;
  cases.push_back({FORWARD, dtype, tokens, {s}});
  cases.push_back({FORWARD_ALONG, dtype, tokens, {s}});
  if (s.sides.size() < 2) return;
  cases.push_back({BACKWARD, dtype, tokens, {s}});
  if (s.sides.size() > 2) return;
  const Sides hidden = sides_of(s, &Side::rows);
  cases.push_back({FEED_FORWARD_BACKWARD, dtype, tokens, {s, draw_shape(r, hidden)}});
  const Sides others[] = {hidden, {hidden[1], hidden[0]}, {hidden[0] * hidden[1]}};
  cases.push_back({FEED_FORWARD, dtype, tokens, {s, draw_shape(r, others[i / 4 % 3])}});
}

std::vector<Case> chosen_cases(Random &r) {
  std::vector<Case> cases;
  Int i = 0;
  for (const Shape &s : SHAPES)
    for (int dtype = 0; dtype < 4; dtype++, i++) add_cases(cases, i, TOKENS[i % 13], s, r);
  const Shape s = {2, {{7, 16}, {9, 5}}}, same_columns = {1, {{3, 5}, {5, 16}}};
  for (Int tokens : TOKENS) {
    for (int dtype = 0; dtype < 4; dtype++) {
      cases.push_back({FORWARD, dtype, tokens, {s, same_columns}});
      add_cases(cases, dtype, tokens, s, r);
      add_cases(cases, dtype, tokens, {1, {{3, 2}, {20, 17}}}, r);
      add_cases(cases, dtype, tokens, {1, {{3, 2}, {7, 5}}}, r);  // all tokens, at little work
    }
  }
  return cases;
}

std::vector<Case> drawn_cases(Int draws, Random &r) {
  std::vector<Case> cases;
  for (Int i = 0; i < draws; i++) {
    const Int tokens = TOKENS[r.below(13)];
    add_cases(cases, i, tokens, draw_shape(r, {0, 0}), r);
    std::vector<Shape> shapes = {draw_shape(r, Sides(1 + r.below(3)))};
    Sides cols = sides_of(shapes[0], &Side::cols);
    for (Int more = r.below(2) * r.below(4); more > 0; more--) {
      std::rotate(cols.begin(), cols.begin() + 1, cols.end());
      shapes.push_back(draw_shape(r, cols));
    }
    cases.push_back({FORWARD, i % 4, tokens, shapes});
  }
  return cases;
}

// Enough work for several threads, in calls whose reference takes hardly more.
std::vector<Case> divided_cases() {
  std::vector<Case> cases;
  const Shape up = {2, {{2, 1}, {96, 128}}}, down = {2, {{1, 2}, {128, 96}}};
  for (int dtype = 0; dtype < 4; dtype++) {
    cases.push_back({FORWARD, dtype, 97, {{2, {{2, 1}, {128, 160}}}}, true});
    cases.push_back({FORWARD_ALONG, dtype, 30, {{2, {{2, 1}, {128, 160}}}}, true});
    cases.push_back({FORWARD, dtype, 130, {{1, {{8, 8}, {8, 8}, {8, 8}}}}, true});
    cases.push_back({BACKWARD, dtype, 130, {{1, {{8, 8}, {8, 8}, {8, 8}}}}, true});
    cases.push_back({BACKWARD, dtype, 97, {{2, {{2, 1}, {64, 96}}}}, true});
    cases.push_back({FEED_FORWARD, dtype, 97, {up, down}, true});
    cases.push_back({FEED_FORWARD_BACKWARD, dtype, 97, {up, down}, true});
    // Fewer blocks than threads: the outputs are divided. Many terms are little work for the reference.
    for (Int tokens : {5, 16, 23, 40}) {
      for (const Shape &s : {Shape{32, {{2, 2}, {48, 48}}}, Shape{40, {{17, 12}, {16, 9}}}}) {
        cases.push_back({FORWARD, dtype, tokens, {s}, true});
        cases.push_back({BACKWARD, dtype, tokens, {s}, true});
      }
      cases.push_back({FORWARD, dtype, tokens, {{200, {{160, 1}, {1, 160}}}}, true});
      cases.push_back({FORWARD, dtype, tokens, {{40, {{6, 4}, {4, 4}, {4, 6}}}}, true});
      cases.push_back({FORWARD, dtype, tokens,
                       {{32, {{2, 2}, {48, 48}}}, {3, {{32, 24}, {9, 4}}}, {16, {{8, 12}, {15, 8}}}}, true});
      cases.push_back({FEED_FORWARD, dtype, tokens,
                       {{32, {{4, 2}, {24, 48}}}, {33, {{2, 4}, {47, 24}}}}, true});
      cases.push_back({FEED_FORWARD, dtype, tokens, {{40, {{12, 8}, {24, 7}}}, {64, {{13, 18}, {7, 16}}}}, true});
      cases.push_back({FEED_FORWARD_BACKWARD, dtype, tokens,
                       {{32, {{4, 2}, {24, 48}}}, {33, {{2, 4}, {47, 24}}}}, true});
    }
  }
  return cases;
}

} // namespace

int main(int count, char **arguments) {
  const Options options(count, arguments, 200, 1e6);
  Random r;
  if (options.first == "--self-test") return self_test(r), 0;
  if (!options.first.empty()) return no_such(options.first);
  r.bits.seed(uint64_t(options.seed));
  std::vector<Case> cases;
  for (const Case &c : each(options.every, chosen_cases(r))) cases.push_back(c);
  for (const Case &c : drawn_cases(options.draws, r)) cases.push_back(c);
  for (const Case &c : each(options.every, divided_cases())) cases.push_back(c);

  Group groups[] = {{KINDS[0]}, {KINDS[1]}, {KINDS[2]}, {KINDS[3]}, {KINDS[4]}};
  Group rounding{"16-bit rounding"}, refusals{"refusals"};
  for (const Case &c : cases) check(groups[c.kind], c, options.work, r);
  for (int dtype : {KRON_BFLOAT16, KRON_FLOAT16}) check_rounding(rounding, DTYPES[dtype], r);
  check_refusals(refusals, r);
  if (!divided.cases) fail("no work was divided among threads");
  for (const Group &g : groups) g.print();
  for (const Group *g : {&divided, &poisoned, &rounding, &refusals}) g->print();
}
