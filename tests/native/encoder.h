// Random encoders and batches, and a slow straightforward definition of kron_cpu_encode.
#pragma once
#include "int8_products.h"

#include <cmath>

namespace oracle {

// ---- encoders ----------------------------------------------------------------------------------

enum LinearKind { DENSE, TERM, SUM, LOW_RANK, PARTS, LINEAR_KINDS };

inline Int divisor(Int n, Random &r) {
  std::vector<Int> all;
  for (Int i = 1; i <= n; i++)
    if (n % i == 0) all.push_back(i);
  return all[size_t(r.below(Int(all.size())))];
}
inline Shape split(Int rank, Int m, Int n, Int a_rows, Int a_cols) {
  return {rank, {{a_rows, a_cols}, {m / a_rows, n / a_cols}}};
}

inline kron_linear linear_of(const std::vector<kron_product> &parts, const void *bias) {
  return {Int(parts.size()), parts.data(), bias};
}

// Puts about half of a weight's factors into int8; entries of the first are up to `size`.
inline void draw_int8(Weight &w, double size, Random &r) {
  for (Int at = 0; at < w.call.n_factors; at++)
    if (r.below(2)) w.make_int8(at, r, at ? 1 : size);
}

// (Σ W_part) x + bias. An entry of x of size 1 gives results of about size `gain`. With `int8`, factors may be
// in int8.
struct Linear {
  Linear(const Dtype &d, Int m, Int n, double gain, const std::vector<Shape> &shapes, bool int8, Random &r)
      : m(m), n(n), bias(d, m), biased(r.below(4) > 0), whole(size_t(m * n)) {
    bias.draw(r, 0.5);
    for (const Shape &s : shapes) {
      // An entry drawn from -1 to 1 has a mean square of 1 / 3.
      const double size = gain * sqrt(pow(3, double(s.sides.size())) /
                                      double(n * s.rank * Int(shapes.size())));
      parts.emplace_back(d, s, r, size);
      Weight &w = parts.back();
      if (w.call.n_factors == 2) w.set_order(r.below(2));
      if (int8) draw_int8(w, size, r);
      const Numbers entries = w.whole();
      for (size_t i = 0; i < whole.size(); i++) whole[i].add(entries[i], 1);
      for (const Side &side : s.sides) terms += double(s.rank * side.cols);
    }
    list();
  }
  Linear(const Dtype &d, Int m, Int n, double gain, Int kind, bool int8, Random &r)
      : Linear(d, m, n, gain, drawn(m, n, kind, r), int8, r) {}
  static std::vector<Shape> drawn(Int m, Int n, Int kind, Random &r) {
    std::vector<Shape> shapes;
    switch (kind) {
    case DENSE: return {{1, {{m, n}}}};
    case LOW_RANK: return {{1 + r.below(8), {{m, 1}, {1, n}}}};
    case TERM: return {split(1, m, n, divisor(m, r), divisor(n, r))};
    case SUM: return {split(2 + r.below(3), m, n, divisor(m, r), divisor(n, r))};
    default:
      for (Int left = 2 + r.below(2); left > 0; left--)
        shapes.push_back(drawn(m, n, r.below(PARTS), r)[0]);
      return shapes;
    }
  }
  void set_order(Int index) { // of all parts
    for (Weight &w : parts) w.set_order(index);
    list();
  }
  void list() {
    calls.clear(), contractions.clear();
    for (const Weight &w : parts) calls.push_back(w.call), contractions.emplace_back(w);
  }
  std::string text() const {
    std::string all = biased ? "with bias" : "without bias";
    for (const Weight &w : parts) all += w.text + w.turns;
    return all;
  }
  bool any_int8() const {
    return std::any_of(parts.begin(), parts.end(), [](const Weight &w) { return w.any_int8(); });
  }
  kron_linear call() const { return linear_of(calls, biased ? bias.data() : nullptr); }

  Int m, n;
  Buffer bias;
  bool biased;
  std::vector<Weight> parts;
  std::vector<kron_product> calls;
  std::vector<Contractions> contractions;
  Numbers whole; // (m, n)
  double terms = 2;
};

struct Norm {
  Norm(const Dtype &d, Int width, Random &r)
      : weight(d, width), bias(d, width), weighted(r.below(4) > 0), biased(r.below(4) > 0),
        epsilon(r.below(2) ? 1e-12 : 1e-3) {
    for (Int i = 0; i < width; i++) weight.set(i, 1 + 0.5 * r.number());
    bias.draw(r, 0.5);
  }
  kron_norm call() const {
    return {weighted ? weight.data() : nullptr, biased ? bias.data() : nullptr, epsilon};
  }
  Buffer weight, bias;
  bool weighted, biased;
  double epsilon;
};

// What an encoder and a batch are drawn from.
const Int RANDOM = -1;
enum Padding { NO_MASK, RIGHT, LEFT, HOLES, NOTHING_BUT_PADDING, MIXED, PADDINGS };
struct Recipe {
  Int dtype, layers, width, heads, head_size, hidden;
  Int kind; // enum LinearKind of all linear layers, or RANDOM for each
  Int sequences, length, padding;
  bool given = false, distances = false; // embeddings; a bias of the scores
  bool meeting = false; // up and down meet entry by entry
  bool int8 = false;    // about half of the factors
};

enum Role { QUERY, KEY, VALUE, OUTPUT, UP, DOWN, ROLES };
struct Layer {
  Layer(const Recipe &c, Random &r)
      : attention_norm(DTYPES[c.dtype], c.width, r), output_norm(DTYPES[c.dtype], c.width, r),
        activation(r.below(5)) {
    const Dtype &d = DTYPES[c.dtype];
    const Int heads = c.heads * c.head_size, w = c.width, h = c.hidden;
    const Int sizes[ROLES][2] = {{heads, w}, {heads, w}, {heads, w}, {w, heads}, {h, w}, {w, h}};
    const double gains[ROLES] = {r.below(4) ? 1. : 3., 1, 1, 1, 1.5, 1};
    const Int k = divisor(h, r), up_cols = divisor(w, r), down_rows = divisor(w, r);
    for (Int i = 0; i < ROLES; i++) {
      const Int m = sizes[i][0], n = sizes[i][1], kind = c.kind == RANDOM ? r.below(5) : c.kind;
      if (c.meeting && i >= UP) {
        const Shape s = i == UP ? split(1 + r.below(2), m, n, k, up_cols)
                                : split(1 + r.below(2), m, n, down_rows, k);
        linears.emplace_back(d, m, n, gains[i], std::vector<Shape>{s}, c.int8, r);
        linears.back().set_order(i == UP); // up from the right, down from the left
      } else {
        linears.emplace_back(d, m, n, gains[i], kind, c.int8, r);
      }
    }
  }
  kron_layer call() const {
    return {linears[QUERY].call(),  linears[KEY].call(), linears[VALUE].call(),
            linears[OUTPUT].call(), linears[UP].call(),  linears[DOWN].call(),
            attention_norm.call(),  output_norm.call(),  activation};
  }
  std::vector<Linear> linears; // by Role
  Norm attention_norm, output_norm;
  Int activation;
};

struct Model {
  Model(const Recipe &c, Random &r)
      : dtype(DTYPES[c.dtype]), width(c.width), heads(c.heads), head_size(c.head_size),
        first_width(r.below(3) ? c.width : 1 + r.below(2 * c.width)),
        scale(1 / sqrt(double(c.head_size))), norm(dtype, first_width, r) {
    for (Int tables_left = 1 + r.below(KRON_MAX_TABLES); tables_left > 0; tables_left--) {
      const Int rows = 1 + r.below(20), columns = divisor(first_width, r);
      const Shape dense = {1, {{rows, first_width}}};
      const Shape factorised = {1 + r.below(3), {{rows, columns}, {1, first_width / columns}}};
      tables.emplace_back(dtype, r.below(2) ? dense : factorised, r);
      if (tables.back().call.n_factors == 2) tables.back().set_order(r.below(2));
      if (c.int8) draw_int8(tables.back(), 1, r);
      entries.push_back(tables.back().whole());
    }
    if (first_width != width || !r.below(4))
      projection = std::make_unique<Linear>(dtype, width, first_width, 1., r.below(5), c.int8, r);
    for (Int i = 0; i < c.layers; i++) layers.emplace_back(c, r);
    for (const Layer &layer : layers) calls.push_back(layer.call());
  }
  kron_encoder call() const {
    kron_encoder e = {};
    e.n_tables = Int(tables.size());
    for (size_t i = 0; i < tables.size(); i++) e.tables[i] = tables[i].call;
    e.norm = norm.call();
    if (projection) e.projection = projection->call();
    e.n_layers = Int(calls.size()), e.layers = calls.data(), e.heads = heads, e.scale = scale;
    return e;
  }
  std::string text() const {
    std::string all = std::to_string(layers.size()) + " layers of width " + std::to_string(width) +
                      ", " + std::to_string(heads) + " heads of " + std::to_string(head_size) + "; ";
    for (const Weight &t : tables) all += "table" + t.text + "; ";
    if (projection) all += "projection " + projection->text() + "; ";
    const char *const names[ROLES] = {"query", "key", "value", "output", "up", "down"};
    for (const Layer &layer : layers) {
      for (Int i = 0; i < ROLES; i++)
        all += names[i] + (" " + layer.linears[size_t(i)].text()) + "; ";
      all += ACTIVATIONS[layer.activation] + std::string("; ");
    }
    return all;
  }

  const Dtype &dtype;
  Int width, heads, head_size, first_width;
  double scale;
  std::vector<Weight> tables;
  std::vector<Numbers> entries; // of the tables
  Norm norm;
  std::unique_ptr<Linear> projection;
  std::vector<Layer> layers;
  std::vector<kron_layer> calls;
};

// ---- batches -----------------------------------------------------------------------------------

struct Batch {
  Batch(const Model &model, const Recipe &c, Random &r)
      : sequences(c.sequences), length(c.length), padding(c.padding),
        mask(size_t(sequences * length), 1),
        embeddings(model.dtype, sequences * length * model.first_width),
        distances(model.dtype, model.heads * std::max<Int>(0, 2 * length - 1)), given(c.given),
        biased(c.distances) {
    embeddings.draw(r, 1), distances.draw(r, 2);
    for (const Weight &table : model.tables) {
      ids.emplace_back(mask.size());
      for (Int &id : ids.back()) id = r.below(table.m);
    }
    for (Int s = 0; s < sequences && length; s++) {
      const Int kind = padding == MIXED ? r.below(MIXED) : padding, part = r.below(length + 1);
      for (Int i = 0; i < length; i++) {
        const bool hidden = kind == RIGHT ? i >= part : kind == LEFT ? i < part
                          : kind == HOLES ? r.below(3) == 0 : kind == NOTHING_BUT_PADDING;
        // Any number but 0 is a token.
        mask[size_t(s * length + i)] = hidden ? 0 : r.below(4) ? 1 : -r.below(2) * INT64_MAX + 7;
      }
    }
    for (size_t i = 0; i <= model.layers.size(); i++)
      states.emplace_back(model.dtype, sequences * length * model.width);
  }
  // Writes the states whose bit is set in `wanted`; `list` holds the pointers to them.
  kron_batch call(std::vector<void *> &list, Int wanted) const {
    kron_batch b = {};
    b.sequences = sequences, b.length = length;
    b.mask = padding == NO_MASK ? nullptr : mask.data();
    for (size_t i = given; i < ids.size(); i++) b.ids[i] = ids[i].data();
    b.embeddings = given ? embeddings.data() : nullptr;
    b.distance_bias = biased ? distances.data() : nullptr;
    list.clear();
    for (const Buffer &s : states) list.push_back(wanted >> list.size() & 1 ? s.data() : nullptr);
    b.states = list.data();
    return b;
  }
  bool token(Int sequence, Int i) const {
    return padding == NO_MASK || mask[size_t(sequence * length + i)] != 0;
  }
  // Tokens, and the first position of a sequence that has any.
  bool computed(Int sequence, Int i) const {
    bool any = token(sequence, i);
    for (Int j = 0; i == 0 && j < length; j++) any = any || token(sequence, j);
    return any;
  }
  bool any_token() const {
    return padding == NO_MASK ? !mask.empty()
                              : std::any_of(mask.begin(), mask.end(), [](Int m) { return m != 0; });
  }
  std::string text() const {
    const char *const paddings[] = {"no mask", "right", "left", "holes", "all padding", "mixed"};
    return std::to_string(sequences) + " sequences of " + std::to_string(length) + ", " +
           paddings[padding] + (given ? ", given embeddings" : "") + (biased ? ", distances" : "");
  }

  Int sequences, length, padding;
  std::vector<Int> mask;
  std::vector<std::vector<Int>> ids; // of each table
  Buffer embeddings, distances;
  bool given, biased;
  std::vector<Buffer> states;
};

// ---- the definition ----------------------------------------------------------------------------

// A number without a bound of its error: the definition in the arithmetic of T.
template <class T> struct Plain {
  T value = 0;
  Plain() = default;
  Plain(Real v) : value(T(v)) {}
  void add(const Plain &p, const Plain &q) { value += p.value * q.value; }
  Plain rounded(double) const { return *this; }
};
template <class N> constexpr bool BOUNDED = false;
template <> constexpr bool BOUNDED<Number> = true;
template <class N> N as(const Number &n) {
  if constexpr (BOUNDED<N>) return n;
  else return N(n.value);
}

// Mistakes that an encoder could make, for the self-test.
enum Fault {
  NO_FAULT, PADDING_ATTENDED, LAST_KEY_LOST, DISTANCES_REVERSED, SCALE_OFF, SCORES_IN_16_BITS,
  STATES_IN_16_BITS, HEADS_SWAPPED, BIAS_LOST, TABLE_LOST, RESIDUAL_LOST, EPSILON_LOST,
  VARIANCE_OF_N_MINUS_1, NORM_WEIGHT_LOST, OTHER_GELU, SUM_NOT_DIVIDED, FAULTS,
  // with factors in int8
  INTEGERS_BELOW = FAULTS, NOT_ROUNDED, LARGEST_OF_TWO, FIRST_ROWS_SCALE, ALL_FAULTS
};

// Contractions in which int8 factors multiply vectors that are rounded to integers.
template <class N> struct Rounding {
  typedef decltype(N::value) T;
  const Dtype &dtype;
  const Int fault = NO_FAULT;

  std::vector<N> times(const Matrix &m, const std::vector<N> &x) const {
    std::vector<N> y(static_cast<size_t>(m.rows));
    const Vector v = m.is_int8() ? rounded(x) : Vector{};
    for (Int r = 0; r < m.rows; r++) {
      N &sum = y[size_t(r)];
      if (!m.is_int8()) {
        for (Int c = 0; c < m.cols; c++) sum.add(N(m(r, c)), x[size_t(c)]);
        sum = sum.rounded(double(m.cols));
        continue;
      }
      T integer = 0;
      double away = 0;
      for (Int c = 0; c < m.cols; c++) {
        integer += T(m(r, c)) * v.integers[size_t(c)];
        if constexpr (BOUNDED<N>) away += fabs(m(r, c)) * v.away[size_t(c)];
      }
      const double scale = m.scales[size_t(fault == FIRST_ROWS_SCALE ? 0 : r)];
      sum = N(integer * v.unit * T(scale));
      if constexpr (BOUNDED<N>) {
        // All integers at once depend on the error of the unit; rounding adds four eps. Rows share what is away,
        // and later sums of them take errors for independent: so twice as much (in 3000 random encoders, 0.94 of
        // the bound without that).
        const double unit = MARGIN * epsilon(dtype), value = double(sum.value);
        sum.error = pow(2 * away * scale / unit, 2) + value * value * (pow(v.error / unit, 2) + 4);
      }
    }
    return y;
  }
  static N plus(const N &a, const N &b) {
    N sum = a;
    sum.add(b, N(1));
    return sum.rounded(1);
  }

private:
  // Integers and what 1 stands for, its relative error, and how far a kernel's integer times its unit may be from
  // these: where the error of a number can carry it past a half.
  struct Vector {
    std::vector<T> integers;
    T unit = 0;
    double error = 0;
    std::vector<double> away;
  };
  Vector rounded(const std::vector<N> &x) const {
    Vector v;
    T largest = 0;
    for (const N &n : x) largest = std::max(largest, std::abs(n.value));
    if (fault == LARGEST_OF_TWO) largest *= 2;
    const bool used = largest >= T(LEAST);
    const T inverse = used ? 127 / largest : 0;
    v.unit = used ? largest / 127 : 0;
    double most = 0; // error of a number
    if constexpr (BOUNDED<N>)
      for (const N &n : x) most = std::max(most, error_of(n));
    v.error = used ? most / double(largest) : 0;
    for (const N &n : x) {
      const T place = n.value * inverse;
      const T integer = fault == NOT_ROUNDED    ? place
                        : fault == INTEGERS_BELOW ? std::floor(place)
                                                : std::nearbyint(place);
      v.integers.push_back(integer);
      if constexpr (BOUNDED<N>) {
        const double p = fabs(double(place)), to_half = 0.5 - fabs(double(place - integer));
        const double off = error_of(n) * double(inverse) + p * (v.error + 0x1p-22);
        const bool zero = double(largest) - most < LEAST;
        v.away.push_back(zero            ? fabs(double(n.value)) + 2 * most
                         : off < to_half ? 0
                                         : double(v.unit) * (1 + floor(off)));
      }
    }
    return v;
  }
  double error_of(const Number &n) const { return MARGIN * epsilon(dtype) * sqrt(n.error); }
};

// Every state (sequences, length, width), with Number or Plain.
//
// Errors of Number are propagated to first order, and as if those of all operands were independent: a
// result's is the root of the sum of (derivative * error)². Rounding adds what is said of each step.
template <class N> struct Definition {
  typedef decltype(N::value) T;
  typedef std::vector<N> Row; // of one token
  const Model &model;
  const Batch &batch;
  const Int fault = NO_FAULT;
  std::vector<std::vector<N>> states = {};

  static double in_16_bits(T v) { return decode(DTYPES[3], encode(DTYPES[3], double(v))); }
  static N product(const N &p, const N &q) {
    N all;
    all.add(p, q);
    return all;
  }

  Row linear(const Linear &l, const Row &x) const {
    Row y(size_t(l.m));
    if (l.any_int8()) return linear_in_int8(l, x);
    for (Int o = 0; o < l.m; o++) {
      N sum;
      for (Int i = 0; i < l.n; i++) sum.add(as<N>(l.whole[size_t(o * l.n + i)]), x[size_t(i)]);
      if (l.biased && fault != BIAS_LOST) sum.add(N(l.bias.get(o)), N(1));
      y[size_t(o)] = sum.rounded(l.terms);
    }
    return y;
  }

  Row linear_in_int8(const Linear &l, const Row &x) const {
    const Rounding<N> arithmetic{model.dtype, fault};
    Row y(size_t(l.m));
    for (const Contractions &part : l.contractions) {
      const Row added = part.multiply(x, arithmetic);
      for (size_t o = 0; o < y.size(); o++) y[o] = arithmetic.plus(y[o], added[o]);
    }
    for (Int o = 0; o < l.m; o++)
      if (l.biased && fault != BIAS_LOST) y[size_t(o)] = arithmetic.plus(y[size_t(o)], N(l.bias.get(o)));
    return y;
  }

  void normalise(const Norm &norm, Row &x) const {
    const Int n = Int(x.size());
    T mean = 0, variance = 0;
    for (const N &v : x) mean += v.value / T(n);
    for (const N &v : x) variance += (v.value - mean) * (v.value - mean) / T(n);
    if (fault == VARIANCE_OF_N_MINUS_1) variance *= T(n) / T(n - 1);
    const T scale = 1 / std::sqrt(variance + T(fault == EPSILON_LOST ? 0 : norm.epsilon));
    const std::vector<double> errors = norm_errors(x, double(mean), double(scale));
    for (Int i = 0; i < n; i++) {
      N y((x[size_t(i)].value - mean) * scale);
      if constexpr (BOUNDED<N>) y.error = errors[size_t(i)];
      N all;
      all.add(y, N(norm.weighted && fault != NORM_WEIGHT_LOST ? norm.weight.get(i) : 1));
      if (norm.biased) all.add(N(norm.bias.get(i)), N(1));
      x[size_t(i)] = all.rounded(2);
    }
  }
  // For y = (x - mean) scale, dy_i = scale (dx_i - Σ_j dx_j (1 + y_i y_j) / n). The mean is a sum of n
  // terms, as is the variance, an error of which is half as large in y. If a deviation is so small that
  // rounding changes it by a tenth, y may be anything: no entry exceeds √n.
  std::vector<double> norm_errors(const Row &x, double mean, double scale) const {
    std::vector<double> errors(x.size());
    if constexpr (BOUNDED<N>) {
      const double n = double(x.size()), unit = MARGIN * epsilon(model.dtype), s2 = scale * scale;
      double squares = 0, e0 = 0, e1 = 0, e2 = 0; // Σ x², Σ dx² yᵏ
      const auto y = [&](const Number &v) { return (double(v.value) - mean) * scale; };
      for (const Number &v : x) {
        squares += double(v.value * v.value);
        e0 += v.error, e1 += v.error * y(v), e2 += v.error * y(v) * y(v);
      }
      const double of_mean = n * mean * mean + squares / n;
      const bool lost = unit * sqrt(s2 * (e2 + of_mean) / n) > 0.1;
      for (size_t i = 0; i < x.size(); i++) {
        const double yi = y(x[i]), own = x[i].error * (1 - 2 * (1 + yi * yi) / n);
        const double passed = own + (e0 + 2 * yi * e1 + yi * yi * e2) / (n * n);
        const double rounding = of_mean + double(x[i].value * x[i].value);
        errors[i] = s2 * (std::max(0., passed) + rounding) + (n / 4 + 8) * yi * yi;
        if (lost) errors[i] = 4 * n / (unit * unit);
      }
    }
    return errors;
  }

  // Of query i of a head: Σ_k softmax(scores)_k v_k.
  void attend(Int head, Int i, const std::vector<Row> &q, const std::vector<Row> &k,
              const std::vector<Row> &v, const std::vector<Int> &positions,
              const std::vector<size_t> &keys, Row &context) const {
    const size_t size = size_t(model.head_size), at = size_t(head) * size;
    Row scores;
    T top = -INFINITY, total = 0;
    for (size_t key : keys) {
      N s;
      for (size_t f = at; f < at + size; f++) s.add(q[size_t(i)][f], k[key][f]);
      s = product(s.rounded(double(size)), N(model.scale * (fault == SCALE_OFF ? 0.999 : 1)));
      if (batch.biased) {
        const Int between = positions[size_t(i)] - positions[key];
        const Int place = batch.length - 1 + (fault == DISTANCES_REVERSED ? -between : between);
        s.add(N(batch.distances.get(head * (2 * batch.length - 1) + place)), N(1));
      }
      if (fault == SCORES_IN_16_BITS) s.value = T(in_16_bits(s.value));
      scores.push_back(s.rounded(2)), top = std::max(top, s.value);
    }
    for (const N &s : scores) total += std::exp(s.value - top);
    if (fault == SUM_NOT_DIVIDED) total = 1;
    for (size_t f = at; f < at + size; f++) {
      N sum;
      for (size_t j = 0; j < keys.size(); j++)
        sum.add(N(std::exp(scores[j].value - top) / total), v[keys[j]][f]);
      if constexpr (BOUNDED<N>) {
        // The derivative by a score is p_k (v_k - sum). e^x is within 2 eps, its argument is rounded.
        for (size_t j = 0; j < keys.size(); j++) {
          const double s = double(scores[j].value);
          const double p = double(std::exp(scores[j].value - top) / total);
          const double slope = p * double(v[keys[j]][f].value - sum.value);
          sum.error += slope * slope * (scores[j].error + 2 * (s * s + double(top * top)) + 8);
        }
      }
      context[f] = sum.rounded(double(keys.size() + 8));
    }
  }

  std::vector<Row> attention(const std::vector<Row> &q, const std::vector<Row> &k,
                             const std::vector<Row> &v, const std::vector<Int> &positions,
                             const std::vector<size_t> &keys) const {
    std::vector<Row> context(q.size(), Row(q[0].size()));
    for (size_t i = 0; i < q.size(); i++)
      for (Int head = 0; head < model.heads; head++)
        attend(head, Int(i), q, k, v, positions, keys, context[i]);
    if (fault == HEADS_SWAPPED)
      for (Row &row : context) std::rotate(row.begin(), row.begin() + model.head_size, row.end());
    return context;
  }

  void layer(const Layer &layer, const std::vector<Int> &positions, const std::vector<size_t> &keys,
             std::vector<Row> &x) const {
    const auto every = [&](const Linear &l, const std::vector<Row> &in) {
      std::vector<Row> out;
      for (const Row &row : in) out.push_back(linear(l, row));
      return out;
    };
    const auto add_and_normalise = [&](const std::vector<Row> &y, const Norm &norm) {
      for (size_t t = 0; t < x.size(); t++) {
        for (size_t i = 0; i < x[t].size(); i++) {
          N sum = y[t][i];
          if (fault != RESIDUAL_LOST) sum.add(x[t][i], N(1));
          x[t][i] = sum.rounded(1);
        }
        normalise(norm, x[t]);
      }
    };
    const std::vector<Linear> &l = layer.linears;
    const std::vector<Row> context = attention(every(l[QUERY], x), every(l[KEY], x),
                                               every(l[VALUE], x), positions, keys);
    add_and_normalise(every(l[OUTPUT], context), layer.attention_norm);
    std::vector<Row> hidden = every(l[UP], x);
    const Int kind = layer.activation, other = fault == OTHER_GELU && kind == KRON_GELU;
    for (Row &row : hidden) {
      for (N &v : row) {
        const Int chosen = other ? Int(KRON_GELU_TANH) : kind;
        v = as<N>(activate(model.dtype, chosen, bounded(v)).first).rounded(1);
      }
    }
    add_and_normalise(every(l[DOWN], hidden), layer.output_norm);
  }
  static Number bounded(const N &v) {
    if constexpr (BOUNDED<N>) return v;
    else return Number(v.value);
  }

  Row embedding(Int token) const {
    Row x(size_t(model.first_width));
    double terms = 2;
    for (const Weight &w : model.tables) terms += double(w.shape.rank);
    for (size_t i = 0; i < x.size(); i++) {
      for (size_t t = fault == TABLE_LOST; t < model.tables.size(); t++) {
        if (t == 0 && batch.given) {
          x[i].add(N(batch.embeddings.get(token * Int(x.size()) + Int(i))), N(1));
        } else {
          const size_t row = size_t(batch.ids[t][size_t(token)]);
          x[i].add(as<N>(model.entries[t][row * x.size() + i]), N(1));
        }
      }
      x[i] = x[i].rounded(terms);
    }
    normalise(model.norm, x);
    return model.projection ? linear(*model.projection, x) : x;
  }

  void write(size_t state, Int sequence, const std::vector<Int> &positions, std::vector<Row> &x) {
    for (size_t t = 0; t < x.size(); t++) {
      for (size_t i = 0; i < x[t].size(); i++) {
        N &v = x[t][i];
        if (fault == STATES_IN_16_BITS) v = N(in_16_bits(v.value));
        states[state][size_t(sequence * batch.length + positions[t]) * x[t].size() + i] = v;
      }
    }
  }

  const std::vector<std::vector<N>> &run() {
    states.assign(model.layers.size() + 1,
                  std::vector<N>(size_t(batch.sequences * batch.length * model.width)));
    for (Int s = 0; s < batch.sequences && batch.length; s++) {
      std::vector<Int> positions; // that are computed
      std::vector<size_t> keys;   // indices of those that are attended to
      std::vector<Row> x;
      for (Int i = 0; i < batch.length; i++) {
        if (!batch.computed(s, i)) continue;
        if (batch.token(s, i) || fault == PADDING_ATTENDED) keys.push_back(positions.size());
        positions.push_back(i);
        x.push_back(embedding(s * batch.length + i));
      }
      if (x.empty()) continue;
      if (fault == LAST_KEY_LOST && keys.size() > 1) keys.pop_back();
      write(0, s, positions, x);
      for (size_t l = 0; l < model.layers.size(); l++) {
        layer(model.layers[l], positions, keys, x);
        write(l + 1, s, positions, x);
      }
    }
    return states;
  }
};

} // namespace oracle
