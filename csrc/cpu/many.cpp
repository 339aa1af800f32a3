// Products of more than two factors and their gradients, compiled once per instruction set and type of computation.
//
// Factors are contracted in passes over memory, the last ones first. A pass is neighbouring factors whose
// vectors fit into the cache; it makes (outer, m, tail) of (outer, n, tail), a unit at a time: some rows
// where the tail is 1, a strip of the tail elsewhere. Lanes run along the axes behind the contracted one,
// in the layout of memory. Only the end of a row has none behind it, in one of two ways:
//
// dense  a matrix of at least a vector's rows multiplies scalars of x: one factor, or small ones multiplied
//        out (four 2x2 are 16 multiply-adds a number instead of 8 and two turns)
// lanes  rows of x are turned, so that a lane is a row, and turned back behind the contractions
//
// Containers and algorithms of the standard library are left out, as in kernels.cpp.
#include "many.h"

#include "product.h"

namespace {

constexpr Int PASS = 1 << 17; // bytes of a vector of a pass, at most
constexpr Int UNIT = 1 << 15; // bytes of a unit, about
constexpr Int CHUNK = 1 << 20; // bytes of the tokens that go through several passes together, about
constexpr double TURN_COST = 4; // multiply-adds, for each number that is turned
constexpr Int DENSE_SIDE = 64; // of factors multiplied out, at most

template <class T> Int padded(Int count) { return vectors_of<T>(count) * LANES<T>; }

// Neighbouring factors: one, or several that are multiplied out.
template <class T> struct Piece {
  Int first, count, rows, cols;
  bool dense;
  T *data;       // (rank, rows, cols), if multiplied out or dense
  T *transposed; // (rank, cols, rows), if dense
  Int size() const { return rows * cols; }
};

// Neighbouring pieces; those from `end_first` on are contracted first, in lanes or dense, if tail is 1.
struct Pass {
  Int first, end_first, end, n, m, tail;
};

enum Kind { TURN, BACK, DENSE, ALONG };

// A part of a unit's computation: TURN and BACK of (pre, cols) to blocks (cols)[lanes] and back, DENSE of
// (pre, cols) to (pre, rows), ALONG of (pre, cols, post) to (pre, rows, post).
struct Step {
  Kind kind;
  Int piece, pre, rows, cols, post;
  Int in, out; // numbers
};
struct Program {
  Step steps[KRON_MAX_FACTORS + 2];
  int count = 0;
  Int largest = 0; // numbers between two steps
  void add(const Step &s) {
    if (count) largest = larger(largest, s.in);
    steps[count++] = s;
  }
};

// out = w in, of (pre, cols, post) to (pre, rows, post) in memory, for post of at least a vector. The last
// vector overlaps the one before it, so `accumulate` needs whole vectors.
template <class T>
void along(const Matrix<T> &w, const T *in, T *out, Int pre, Int post, bool accumulate) {
  constexpr Int L = LANES<T>;
  const Int whole = post / L;
  const auto grid = [&](Int count, Int vectors) {
    return Grid{pre, count, vectors * L, w.cols * post, w.rows * post, post, post, L, L};
  };
  if (whole == 1) {
    contract<T, 1>(w, in, out, grid(1, 1), accumulate);
  } else {
    const Int threes = whole % 3 == 1 ? whole / 3 - 1 : whole / 3, twos = (whole - 3 * threes) / 2;
    const Int done = 3 * threes * L;
    if (threes) contract_grid<T, 3>(w, in, out, grid(threes, 3), accumulate);
    if (twos) contract_grid<T, 2>(w, in + done, out + done, grid(twos, 2), accumulate);
  }
  if (post % L) contract<T, 1>(w, in + post - L, out + post - L, grid(1, 1), accumulate);
}

template <class T> void add_to(T *out, const T *in, Int count) {
  constexpr Int L = LANES<T>;
  Int i = 0;
  for (; i + L <= count; i += L) store(out + i, load(out + i) + load(in + i));
  for (; i < count; i++) out[i] += in[i];
}

// (rows, cols) to blocks (cols)[lanes], a lane a row; lanes without one are zero.
template <class T> void turn(const T *in, Int rows, Int cols, T *out) {
  for (Int r = 0; r < rows; r += LANES<T>) read_some<T, 1>(in, r, rows, cols, {0, cols}, out + r * cols);
}
template <class T> void turn_back(const T *in, Int rows, Int cols, T *out) {
  kron_product y = {};
  y.y = out;
  for (Int r = 0; r < rows; r += LANES<T>) write_run<T, 1>(in + r * cols, r, rows, cols, y, 0, cols);
}

template <class T> class Chain {
public:
  static constexpr Int L = LANES<T>;

  Chain(const Product<T> &p, Int tokens) : p(p) {
    for (Int turn = 0; turn < p.n_factors; turn++) turn_of[p.turns[turn]] = turn;
    Int end = p.n_factors, tail = 1;
    while (end > 0) {
      Int first = end, n = 1, m = 1;
      while (first > 0) {
        const kron_factor &f = p.factors[first - 1];
        const Int width = larger(n * f.cols, m * f.rows) * Int(sizeof(T));
        if (first < end && width > PASS) break;
        n *= f.cols, m *= f.rows, first--;
      }
      add_pass(first, end, n, m, tail, tokens);
      tail *= m, end = first;
    }
  }
  Chain(const Chain &) = delete;
  ~Chain() { free(memory); }

  // Multiplies out what needs it; returns false if memory ran out.
  bool prepare() {
    Int total = 0;
    for (Int i = 0; i < n_pieces; i++) {
      const Piece<T> &q = pieces[i];
      if (q.count > 1 || q.dense) total += p.rank * q.size() * (q.dense ? 2 : 1);
    }
    memory = static_cast<T *>(malloc(size_t(larger(total, 1)) * sizeof(T)));
    if (!memory) return false;
    T *next = memory;
    for (Int i = 0; i < n_pieces; i++) {
      Piece<T> &q = pieces[i];
      if (q.count == 1 && !q.dense) continue;
      q.data = next, next += p.rank * q.size();
      if (q.dense) q.transposed = next, next += p.rank * q.size();
      for (Int k = 0; k < p.rank; k++) {
        for (Int r = 0; r < q.rows; r++) {
          T *const row = q.data + (k * q.rows + r) * q.cols;
          multiply_out(q, k, r, -1, row);
          for (Int c = 0; q.dense && c < q.cols; c++) q.transposed[(k * q.cols + c) * q.rows + r] = row[c];
        }
      }
    }
    return true;
  }

  Matrix<T> matrix(Int piece, Int k) const {
    const Piece<T> &q = pieces[piece];
    if (q.count == 1 && !q.dense) return p.matrix(q.first, k);
    return {q.data + k * q.size(), q.rows, q.cols, q.cols, 1};
  }

  // Rows of a unit, or the width of its strip.
  Int unit(const Pass &pass) const {
    const Int width = larger(pass.n, pass.m);
    const Int count = larger(1, UNIT / Int(sizeof(T)) / width);
    if (pass.tail > 1) return smaller(padded<T>(pass.tail), smaller(8 * L, larger(L, count / L * L)));
    return pass.end_first == pass.first && !pieces[pass.first].dense ? padded<T>(count) : count;
  }

  Program program(const Pass &pass, Int unit) const {
    Int sizes[KRON_MAX_FACTORS], heads = unit;
    Program made;
    for (Int i = pass.first; i < pass.end; i++) sizes[i] = pieces[i].cols;
    const auto product = [&](Int first, Int end) {
      Int size = 1;
      for (Int i = first; i < end; i++) size *= sizes[i];
      return size;
    };
    const auto contract_pieces = [&](Int first, Int end, Int before, Int behind) {
      Int order[KRON_MAX_FACTORS];
      in_turn(first, end, order);
      for (Int i = 0; i < end - first; i++) {
        const Int at = order[i];
        const Piece<T> &q = pieces[at];
        const Int pre = before * product(first, at), post = product(at + 1, end) * behind;
        made.add({ALONG, at, pre, q.rows, q.cols, post, pre * q.cols * post, pre * q.rows * post});
        sizes[at] = q.rows;
      }
    };
    if (pass.tail > 1) {
      contract_pieces(pass.first, pass.end, 1, unit);
      return made;
    }
    heads *= product(pass.first, pass.end_first);
    if (pieces[pass.end_first].dense) {
      const Piece<T> &q = pieces[pass.end_first];
      made.add({DENSE, pass.end_first, heads, q.rows, q.cols, 0, heads * q.cols, heads * q.rows});
      sizes[pass.end_first] = q.rows;
    } else {
      const Int all = padded<T>(heads), n = product(pass.end_first, pass.end);
      made.add({TURN, 0, heads, n, n, 0, heads * n, all * n});
      contract_pieces(pass.end_first, pass.end, all / L, L);
      const Int m = product(pass.end_first, pass.end);
      made.add({BACK, 0, heads, m, m, 0, all * m, heads * m});
    }
    contract_pieces(pass.first, pass.end_first, unit, product(pass.end_first, pass.end));
    return made;
  }

  // A step of term k; `other` has room for its result.
  void forward(const Step &s, Int k, const T *in, T *out, bool add, T *other) const {
    const bool whole = s.kind == ALONG ? s.post % L == 0 : s.kind == DENSE && s.rows % L == 0;
    T *const to = add && !whole ? other : out;
    const bool accumulate = add && whole;
    switch (s.kind) {
    case TURN: turn(in, s.pre, s.cols, to); break;
    case BACK: turn_back(in, s.pre, s.cols, to); break;
    case DENSE:
      along<T>({in, s.pre, s.cols, s.cols, 1}, pieces[s.piece].transposed + k * pieces[s.piece].size(), to,
               1, s.rows, accumulate);
      break;
    case ALONG: along(matrix(s.piece, k), in, to, s.pre, s.post, accumulate); break;
    }
    if (to != out) add_to(out, to, s.out);
  }

  // The gradients of a step from dy of its result: dx of its input, unless null, and of its piece, added to
  // sums, unless null. `other` has room for its input and a piece.
  void backward(const Step &s, Int k, const T *x, const T *dy, T *dx, bool add, T *sums, T *other) const {
    const bool whole = s.kind == ALONG ? s.post % L == 0 : s.kind == DENSE && s.cols % L == 0;
    const Piece<T> &q = pieces[s.piece];
    if (sums && s.kind == DENSE) {
      along<T>({dy, s.rows, s.pre, 1, s.rows}, x, other, 1, s.cols, false);
      add_to(sums + k * q.size(), other, q.size());
    }
    if (sums && s.kind == ALONG)
      correlate<T>({dy, s.rows, s.post, s.rows * s.post}, {x, s.cols, s.post, s.cols * s.post}, s.pre, s.post,
                   sums + k * q.size(), s.cols, 1, true);
    if (!dx) return;
    T *const to = add && !whole ? other : dx;
    const bool accumulate = add && whole;
    switch (s.kind) {
    case TURN: turn_back(dy, s.pre, s.cols, to); break;
    case BACK: turn(dy, s.pre, s.cols, to); break;
    case DENSE:
      along<T>({dy, s.pre, s.rows, s.rows, 1}, matrix(s.piece, k).data, to, 1, s.cols, accumulate);
      break;
    case ALONG: along(matrix(s.piece, k).transposed(), dy, to, s.pre, s.post, accumulate); break;
    }
    if (to != dx) add_to(dx, to, s.in);
  }

  // Adds the gradients of term k of a piece's factors, from those of the piece.
  void split_gradient(const Piece<T> &q, Int k, const T *sums, void *const *gradients) const {
    for (Int j = q.first; j < q.first + q.count; j++) {
      T *const out = static_cast<T *>(gradients[j]);
      if (!out) continue;
      const Int rows = p.factors[j].rows, cols = p.factors[j].cols;
      memset(out + k * rows * cols, 0, size_t(rows * cols) * sizeof(T));
      Int row_step = 1, col_step = 1;
      for (Int i = j + 1; i < q.first + q.count; i++) row_step *= p.factors[i].rows, col_step *= p.factors[i].cols;
      for (Int r = 0; r < q.rows; r++) {
        T others[DENSE_SIDE];
        multiply_out(q, k, r, j, others);
        T *const row = out + (k * rows + r / row_step % rows) * cols;
        for (Int at = 0; at < q.cols;)
          for (Int c = 0; c < cols; c++)
            for (Int i = 0; i < col_step; i++, at++) row[c] += sums[r * q.cols + at] * others[at];
      }
    }
  }

  const Product<T> &p;
  Piece<T> pieces[KRON_MAX_FACTORS];
  Pass passes[KRON_MAX_FACTORS]; // in the order of computation
  Int n_pieces = 0, n_passes = 0;

private:
  // Row r of a piece, with ones in the place of the factor `but`.
  void multiply_out(const Piece<T> &q, Int k, Int r, Int but, T *row) const {
    Int rows = q.rows, count = 1;
    row[0] = 1;
    for (Int i = q.first; i < q.first + q.count; i++) {
      const Matrix<T> w = p.matrix(i, k);
      rows /= w.rows;
      const T *const entries = w.data + r / rows % w.rows * w.row_stride;
      for (Int at = count; at-- > 0;) { // from the back: the row grows in place
        const T entry = row[at];
        for (Int c = w.cols; c-- > 0;) row[at * w.cols + c] = i == but ? entry : entry * entries[c * w.col_stride];
      }
      count *= w.cols;
    }
  }

  // The pieces' indices in the order of contraction.
  void in_turn(Int first, Int end, Int *order) const {
    for (Int i = first; i < end; i++) {
      Int at = i - first;
      for (; at > 0 && turn_of[pieces[order[at - 1]].first] > turn_of[pieces[i].first]; at--)
        order[at] = order[at - 1];
      order[at] = i;
    }
  }

  // Multiply-adds of contracting factors first to end of (before, factors, behind), in vectors that may be
  // partly empty.
  double work(Int first, Int end, double before, Int behind) const {
    double sum = 0;
    Int sizes[KRON_MAX_FACTORS];
    for (Int i = first; i < end; i++) sizes[i] = p.factors[i].cols;
    for (Int turn = 0; turn < p.n_factors; turn++) {
      const Int at = p.turns[turn];
      if (at < first || at >= end) continue;
      double pre = before;
      Int post = behind;
      for (Int i = first; i < at; i++) pre *= double(sizes[i]);
      for (Int i = at + 1; i < end; i++) post *= sizes[i];
      sum += pre * double(sizes[at]) * double(p.factors[at].rows) * double(padded<T>(post));
      sizes[at] = p.factors[at].rows;
    }
    return sum;
  }

  Piece<T> piece(Int first, Int end, bool dense) const {
    Piece<T> q = {first, end - first, 1, 1, dense, nullptr, nullptr};
    for (Int i = first; i < end; i++) q.rows *= p.factors[i].rows, q.cols *= p.factors[i].cols;
    return q;
  }

  void add_pass(Int first, Int end, Int n, Int m, Int tail, Int tokens) {
    Int best = end;
    bool best_dense = false;
    if (tail == 1) {
      double least = 0, heads = double(n);
      Int cols = 1, rows = 1;
      for (Int at = end; at-- > first;) {
        cols *= p.factors[at].cols, rows *= p.factors[at].rows, heads = double(n / cols);
        if (rows < L && at > first) continue;
        const double then = work(first, at, 1, rows);
        const double lanes = double(tokens) * heads, waste = lanes < double(L) ? double(L) / lanes : 1;
        const double turned = waste * (TURN_COST * heads * double(cols + rows) + work(at, end, heads, L) / double(L));
        const bool may = rows >= L && cols >= L && (at == end - 1 || larger(rows, cols) <= DENSE_SIDE);
        const double dense = heads * double(cols) * double(padded<T>(rows));
        const bool is_dense = may && dense <= turned;
        const double cost = then + (is_dense ? dense : turned);
        if (best == end || cost < least) least = cost, best = at, best_dense = is_dense;
      }
    }
    // Pieces are found from the last one on, and stored from the back.
    Piece<T> found[KRON_MAX_FACTORS];
    Int count = 0, at = end, in_end = 0;
    if (best_dense) found[count++] = piece(best, end, true), at = best, in_end = 1;
    while (at > first) {
      const auto is_pair = [&](Int i) { return p.factors[i].rows == 2 && p.factors[i].cols == 2; };
      // Two 2x2 are as many multiply-adds as a 4x4, and twice as many loads and stores.
      const bool pair = at - 2 >= first && (at <= best || at - 2 >= best) && is_pair(at - 1) && is_pair(at - 2);
      found[count++] = piece(at - 1 - pair, at, false);
      at -= 1 + pair;
      in_end += at >= best && !best_dense;
    }
    for (Int i = n_pieces; i-- > 0;) pieces[i + count] = pieces[i];
    for (Int i = 0; i < n_passes; i++) passes[i].first += count, passes[i].end_first += count, passes[i].end += count;
    for (Int i = 0; i < count; i++) pieces[count - 1 - i] = found[i];
    n_pieces += count;
    passes[n_passes++] = {0, count - in_end, count, n, m, tail};
  }

  Int turn_of[KRON_MAX_FACTORS];
  T *memory = nullptr;
};

// (outer, n, tail) to strips (n)[width] and back, zero behind the tail.
template <class T> void read_strip(const T *in, Int n, Int tail, Int at, Int width, T *out) {
  const Int present = smaller(width, tail - at);
  for (Int i = 0; i < n; i++, out += width) {
    memcpy(out, in + i * tail + at, size_t(present) * sizeof(T));
    if (present < width) memset(out + present, 0, size_t(width - present) * sizeof(T));
  }
}
template <class T> void write_strip(const T *in, Int n, Int tail, Int at, Int width, T *out, bool add) {
  const Int present = smaller(width, tail - at);
  for (Int i = 0; i < n; i++, in += width) {
    T *const to = out + i * tail + at;
    if (add) add_to(to, in, present);
    else memcpy(to, in, size_t(present) * sizeof(T));
  }
}

// The units of a pass over `outer` vectors.
struct Units {
  Int size, strips, count; // strips are 0 where the tail is 1
  template <class T> static Units of(const Chain<T> &chain, const Pass &pass, Int outer) {
    const Int size = chain.unit(pass);
    if (pass.tail == 1) return {size, 0, (outer + size - 1) / size};
    const Int strips = (pass.tail + size - 1) / size;
    return {size, strips, outer * strips};
  }
};

// Term k of a pass for units first to end, of in to out, added to it or not.
template <class T>
bool forward_units(const Chain<T> &chain, const Pass &pass, Int k, Int outer, Int first, Int end, const T *in,
                   T *out, bool add) {
  const Units units = Units::of(chain, pass, outer);
  Program program = chain.program(pass, units.size);
  const Int edge = pass.tail > 1 ? larger(pass.n, pass.m) * units.size : add ? pass.m * units.size : 0;
  T *a, *b, *from, *to;
  const Scratch<T> scratch({{&a, program.largest}, {&b, program.largest}, {&from, edge}, {&to, edge}});
  if (!scratch) return false;
  const auto run = [&](const T *x, T *y, bool adds, T *other) {
    for (int i = 0; i < program.count; i++) {
      const bool last = i == program.count - 1;
      T *const next = last ? y : i % 2 ? b : a;
      chain.forward(program.steps[i], k, x, next, adds && last, other);
      x = next;
    }
  };
  for (Int u = first; u < end; u++) {
    if (units.strips) {
      const Int row = u / units.strips, at = u % units.strips * units.size;
      read_strip(in + row * pass.n * pass.tail, pass.n, pass.tail, at, units.size, from);
      run(from, to, false, nullptr);
      write_strip(to, pass.m, pass.tail, at, units.size, out + row * pass.m * pass.tail, add);
    } else {
      const Int at = u * units.size, count = smaller(units.size, outer - at);
      if (count < units.size) program = chain.program(pass, count);
      run(in + at * pass.n, out + at * pass.m, add, to);
    }
  }
  return true;
}

// Term k of the passes' gradients, for units first to end: dx, unless null, is set or added to, sums of each
// piece, unless null, are added to.
template <class T>
bool backward_units(const Chain<T> &chain, const Pass &pass, Int k, Int outer, Int first, Int end, const T *x,
                    const T *dy, T *dx, bool add, T *const *sums) {
  const Units units = Units::of(chain, pass, outer);
  Program program = chain.program(pass, units.size);
  Int inputs = 0, largest = 0, piece = 0;
  for (int i = 0; i < program.count; i++) {
    const Step &s = program.steps[i];
    inputs += s.in, largest = larger(largest, larger(s.in, s.out));
    if (s.kind == DENSE || s.kind == ALONG) piece = larger(piece, s.rows * s.cols);
  }
  const Int other_size = larger(larger(largest, piece), pass.n * units.size);
  const Int strip = pass.tail > 1 ? larger(pass.n, pass.m) * units.size : 0;
  T *saved, *a, *b, *other, *v;
  const Scratch<T> scratch({{&saved, inputs}, {&a, largest}, {&b, largest}, {&other, other_size}, {&v, strip}});
  if (!scratch) return false;
  for (Int u = first; u < end; u++) {
    const Int row = units.strips ? u / units.strips : u * units.size;
    const Int at = units.strips ? u % units.strips * units.size : 0;
    if (!units.strips && outer - row < units.size) program = chain.program(pass, outer - row);
    const T *from[KRON_MAX_FACTORS + 2], *up;
    T *next = saved;
    if (units.strips) {
      read_strip(x + row * pass.n * pass.tail, pass.n, pass.tail, at, units.size, next);
      read_strip(dy + row * pass.m * pass.tail, pass.m, pass.tail, at, units.size, v);
      from[0] = next, up = v, next += pass.n * units.size;
    } else {
      from[0] = x + row * pass.n, up = dy + row * pass.m;
    }
    bool any = false; // of the pieces that need their input
    for (Int i = pass.first; i < pass.end; i++) any = any || sums[i];
    for (int i = 0; any && i + 1 < program.count; i++) {
      chain.forward(program.steps[i], k, from[i], next, false, nullptr);
      from[i + 1] = next, next += program.steps[i].out;
    }
    for (int i = program.count - 1; i >= 0; i--) {
      const Step &s = program.steps[i];
      T *to = i % 2 ? a : b;
      bool adds = false;
      if (!i) {
        if (!dx) to = nullptr;
        else if (!units.strips) to = dx + row * pass.n, adds = add;
      }
      T *const sum = s.kind == DENSE || s.kind == ALONG ? sums[s.piece] : nullptr;
      chain.backward(s, k, any ? from[i] : nullptr, up, to, adds, sum, other);
      up = to;
    }
    if (dx && units.strips)
      write_strip(up, pass.n, pass.tail, at, units.size, dx + row * pass.n * pass.tail, add);
  }
  return true;
}

// The vectors between passes: those before pass i are of size(i) numbers for a token.
template <class T> struct Between {
  Int size[KRON_MAX_FACTORS + 1], outer[KRON_MAX_FACTORS];
  explicit Between(const Chain<T> &chain) {
    Int outer_size = 1;
    for (Int i = chain.n_passes; i-- > 0;) outer[i] = outer_size, outer_size *= chain.passes[i].n;
    for (Int i = 0; i < chain.n_passes; i++)
      size[i] = outer[i] * chain.passes[i].n * chain.passes[i].tail;
    size[chain.n_passes] = chain.p.outputs();
  }
  Int largest(Int count) const { // of the first sizes
    Int most = 0;
    for (Int i = 0; i < count; i++) most = larger(most, size[i]);
    return most;
  }
};

// How the tokens are divided: a product of one pass into chunks of a unit, for the threads; of several into
// chunks, one after another, whose units are for the threads.
template <class T> struct Chunks {
  Int tokens, count, workers;
  Chunks(const kron_execution &e, const Chain<T> &chain, Int all) {
    const Between<T> between(chain);
    const Int bytes = between.largest(chain.n_passes + 1) * Int(sizeof(T));
    tokens = smaller(all, chain.n_passes == 1 ? chain.unit(chain.passes[0]) : larger(1, CHUNK / bytes));
    count = (all + tokens - 1) / tokens;
    workers = workers_of(e, double(all) * double(chain.p.multiply_adds()));
  }
};

// Calls body(first unit, end), of a pass of some tokens, on threads if there are several passes.
template <class T, class Body>
bool split_units(const kron_execution &e, const Chain<T> &chain, const Pass &pass, Int outer, Int workers, Body body) {
  const Int count = Units::of(chain, pass, outer).count;
  if (chain.n_passes == 1) return body(0, 0, count);
  return !split(e, count, parts_of(count, workers),
                [&](Int part, Int first, Int end) { return body(part, first, end); });
}

// Calls body(part, first chunk, end), on threads if there is one pass.
template <class T, class Body>
const char *split_chunks(const kron_execution &e, const Chain<T> &chain, const Chunks<T> &chunks, Body body) {
  const Int parts = chain.n_passes == 1 ? parts_of(chunks.count, chunks.workers) : 1;
  return split(e, chunks.count, parts, body);
}

template <class S>
const char *forward(const kron_execution &e, Int tokens, const void *x, const kron_product &call) {
  typedef Compute<S> T;
  constexpr bool wide = std::is_same_v<S, T>;
  Product<T> p;
  if (!p.set(STORAGE<S>, call)) return OUT_OF_MEMORY;
  Chain<T> chain(p, tokens);
  if (!chain.prepare()) return OUT_OF_MEMORY;
  const Chunks<T> chunks(e, chain, tokens);
  const Between<T> between(chain);
  const Int n = p.inputs(), m = p.outputs(), passes = chain.n_passes;
  const bool ends = !wide || p.bias || p.residual || p.activation;
  return split_chunks(e, chain, chunks, [&](Int, Int first, Int end) {
    const Int middle = passes > 1 ? between.largest(passes) * chunks.tokens : 0;
    T *widened, *a, *b, *result;
    const Scratch<T> scratch({{&widened, wide ? 0 : n * chunks.tokens},
                              {&a, middle},
                              {&b, middle},
                              {&result, wide ? 0 : m * chunks.tokens}});
    if (!scratch) return false;
    for (Int chunk = first; chunk < end; chunk++) {
      const Int token = chunk * chunks.tokens, count = smaller(chunks.tokens, tokens - token);
      const T *in;
      T *out = result;
      if constexpr (wide) {
        in = static_cast<const T *>(x) + token * n, out = static_cast<T *>(p.y) + token * m;
      } else {
        widen_row<S>(static_cast<const S *>(x) + token * n, count * n, 1, widened);
        in = widened;
      }
      for (Int k = 0; k < p.rank; k++) {
        const T *from = in;
        for (Int i = 0; i < passes; i++) {
          const Pass &pass = chain.passes[i];
          const bool last = i == passes - 1;
          T *const to = last ? out : i % 2 ? b : a;
          const Int outer = count * between.outer[i];
          if (!split_units(e, chain, pass, outer, chunks.workers, [&](Int, Int begin, Int stop) {
                return forward_units(chain, pass, k, outer, begin, stop, from, to, last && k > 0);
              }))
            return false;
          from = to;
        }
      }
      if (!ends) continue;
      const S *residual = p.residual ? static_cast<const S *>(p.residual) + token * m : nullptr;
      S *const y = static_cast<S *>(p.y) + token * m;
      with_activation(p.activation, [&](auto kind) {
        for (Int at = 0; at < count * m; at += m)
          finish_row<S, decltype(kind)::value>(out + at, m, p.bias_data(), residual ? residual + at : nullptr,
                                               y + at);
      });
    }
    return true;
  });
}

template <class S>
const char *backward(const kron_execution &e, Int tokens, const void *dy, const void *x, const kron_product &call,
                     void *dx, void *const *gradients) {
  typedef Compute<S> T;
  constexpr bool wide = std::is_same_v<S, T>;
  kron_product bare = call;
  bare.bias = bare.residual = nullptr;
  Product<T> p;
  if (!p.set(STORAGE<S>, bare)) return OUT_OF_MEMORY;
  Chain<T> chain(p, larger(tokens, 1));
  if (!chain.prepare()) return OUT_OF_MEMORY;
  const Chunks<T> chunks(e, chain, larger(tokens, 1));
  const Between<T> between(chain);
  const Int n = p.inputs(), m = p.outputs(), passes = chain.n_passes;
  Int starts[KRON_MAX_FACTORS], all = 0;
  bool wanted[KRON_MAX_FACTORS] = {}, any = false;
  for (Int i = 0; i < chain.n_pieces; i++) {
    const Piece<T> &q = chain.pieces[i];
    for (Int j = q.first; j < q.first + q.count; j++) wanted[i] = wanted[i] || gradients[j];
    starts[i] = all, any = any || wanted[i];
    if (wanted[i]) all += p.rank * q.size();
  }
  const PartialSums<T> sums(chunks.workers, all);
  if (!sums) return OUT_OF_MEMORY;
  const char *error = !tokens || !(any || dx) ? nullptr : split_chunks(e, chain, chunks, [&](Int part, Int first, Int end) {
    // For a chunk: x and what lies between the passes, dy, and two vectors that come back.
    Int offsets[KRON_MAX_FACTORS + 1], kept = 0;
    for (Int i = 0; i < passes; i++)
      offsets[i] = kept, kept += i || !wide ? between.size[i] * chunks.tokens : 0;
    const Int middle = passes > 1 ? between.largest(passes) * chunks.tokens : 0;
    T *own, *up, *a, *b, *back;
    const Scratch<T> scratch({{&own, kept},
                              {&up, wide ? 0 : m * chunks.tokens},
                              {&a, middle},
                              {&b, middle},
                              {&back, wide || !dx ? 0 : n * chunks.tokens}});
    if (!scratch) return false;
    for (Int chunk = first; chunk < end; chunk++) {
      const Int token = chunk * chunks.tokens, count = smaller(chunks.tokens, tokens - token);
      const T *from[KRON_MAX_FACTORS + 1], *top;
      T *down = back;
      if constexpr (wide) {
        from[0] = static_cast<const T *>(x) + token * n, top = static_cast<const T *>(dy) + token * m;
        if (dx) down = static_cast<T *>(dx) + token * n;
      } else {
        widen_row<S>(static_cast<const S *>(x) + token * n, count * n, 1, own);
        widen_row<S>(static_cast<const S *>(dy) + token * m, count * m, 1, up);
        from[0] = own, top = up;
      }
      for (Int k = 0; k < p.rank; k++) {
        for (Int i = 0; i + 1 < passes; i++) {
          T *const to = own + offsets[i + 1];
          const Int outer = count * between.outer[i];
          if (!split_units(e, chain, chain.passes[i], outer, chunks.workers, [&](Int, Int begin, Int stop) {
                return forward_units(chain, chain.passes[i], k, outer, begin, stop, from[i], to, false);
              }))
            return false;
          from[i + 1] = to;
        }
        const T *v = top;
        for (Int i = passes; i-- > 0;) {
          const Int outer = count * between.outer[i];
          T *const to = i ? (i % 2 ? a : b) : dx ? down : nullptr;
          if (!split_units(e, chain, chain.passes[i], outer, chunks.workers, [&](Int inner, Int begin, Int stop) {
                T *at[KRON_MAX_FACTORS];
                for (Int j = 0; j < chain.n_pieces; j++)
                  at[j] = wanted[j] ? sums.of(part + inner) + starts[j] : nullptr;
                return backward_units(chain, chain.passes[i], k, outer, begin, stop, from[i], v, to, !i && k > 0, at);
              }))
            return false;
          v = to;
        }
      }
      if constexpr (!wide)
        if (dx) finish_row<S, KRON_NONE>(back, count * n, nullptr, nullptr, static_cast<S *>(dx) + token * n);
    }
    return true;
  });
  const T *total = sums.total();
  for (Int i = 0; i < chain.n_pieces; i++) {
    const Piece<T> &q = chain.pieces[i];
    if (!wanted[i]) continue;
    if (q.count == 1) {
      memcpy(gradients[q.first], total + starts[i], size_t(p.rank * q.size()) * sizeof(T));
      continue;
    }
    for (Int k = 0; k < p.rank; k++) chain.split_gradient(q, k, total + starts[i] + k * q.size(), gradients);
  }
  return error;
}

template <class S> constexpr Many many_of() {
  if constexpr (std::is_same_v<Compute<S>, KRON_TYPE>)
    return {forward<S>, backward<S>};
  else
    return {};
}

} // namespace

#define KRON_JOIN(isa, type) kron_many_##isa##_##type
#define KRON_TABLE(isa, type) KRON_JOIN(isa, type)

const Many KRON_TABLE(KRON_ISA, KRON_TYPE)[] = {many_of<float>(), many_of<double>(), many_of<bfloat16>(),
                                                many_of<float16>()};
