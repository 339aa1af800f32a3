// The division of a call's work among threads in two dimensions: tokens, and outputs of a block of tokens.
#pragma once
#include "linear.h"
#include "product.h"

namespace {

// Blocks of tokens in a row, of which each worker takes an equal part. If blocks are cut, a part may begin
// and end inside a block, at a multiple of 1 / workers of its outputs.
struct Division {
  Int workers, blocks, units; // units: vectors of tokens
  bool cut;

  // The first vector of a block.
  Int first(Int block) const { return block * units / blocks; }
  template <class T> Int lanes() const { // of the largest block
    return blocks ? (units + blocks - 1) / blocks * LANES<T> : 0;
  }
  // The parts of a block that is cut, at most: 1 + ceil((workers - gcd(workers, blocks)) / blocks).
  Int parts() const {
    if (!cut) return 1;
    Int gcd = workers, rest = blocks;
    while (rest) {
      const Int next = gcd % rest;
      gcd = rest, rest = next;
    }
    return 1 + (workers - gcd + blocks - 1) / blocks;
  }

  // Calls body(block, cells) for a worker's part of each of its blocks; cells are a range of [0, workers).
  template <class Body> void each_piece(Int worker, Body body) const {
    const Int begin = worker * blocks, end = begin + blocks; // in cells of all blocks
    for (Int block = begin / workers, cell = block * workers; cell < end; block++, cell += workers)
      body(block, Range{larger(0, begin - cell), smaller(workers, end - cell)});
  }
  // Calls body(std::integral_constant<int, NV>(), first token) for a block.
  template <class T, class Body> void with_block(Int block, Body body) const {
    ::blocks<T>(first(block), first(block + 1), body);
  }
};

// At most `most` workers. fits(parts) says whether a block's outputs can be divided into so many parts.
// A block of one vector is hardly slower than one of two, but much slower than one of three: with AVX2
// 16x2 ⊗ 192x384 takes two threads 40 us for two blocks of 8 tokens and 45 us for half of one of 16 each.
template <class Fits> Division divide(Int most, Int units, Fits fits) {
  const Int whole = parts_of(units, most);
  Int blocks = (units + MAX_NV - 1) / MAX_NV;
  // Blocks that are cut are to be equal: of 8 vectors, three blocks of 2, 3 and 3 would give 9 workers shares of
  // 0.135 of the work, more than 8 workers have; four blocks of 2 give 0.12.
  if (most > blocks && units % blocks && units % 2 == 0) blocks = units / 2;
  Division d = {most, blocks, units, true};
  while (d.workers > larger(1, blocks) && !fits(d.parts())) d.workers--;
  const bool even = MAX_NV == 2 && units % whole == 0 && 8 * whole >= 7 * d.workers;
  if (d.workers > blocks ? d.workers >= whole && !even : blocks % d.workers && fits(2)) return d;
  // Whole blocks, as many for each worker.
  return {whole, smaller(units, (blocks + whole - 1) / whole * whole), units, false};
}

// The share of the work that the busiest worker has. work(cells) gives a token's multiply-adds of a piece,
// all of them `total` without what pieces repeat.
template <class Work> double largest_share(const Division &d, double total, Work work) {
  double busiest = 0;
  for (Int worker = 0; worker < d.workers; worker++) {
    double sum = 0;
    d.each_piece(worker, [&](Int block, Range cells) {
      sum += double(d.first(block + 1) - d.first(block)) * work(cells);
    });
    busiest = sum > busiest ? sum : busiest;
  }
  return busiest / (double(d.units) * total);
}

// A product whose outputs are divided into parts by rows of a factor. One of more than two factors is one
// row.
template <class T> class Outputs {
public:
  Outputs(const Product<T> &product, Int parts)
      : product(product), part(product), many(product.n_factors > 2), parts(parts),
        way(many ? BY_SECOND : part.way_alone(parts)) {}

  bool fits() const { return parts == 1 || (!many && way != SHARED && rows() >= 4 * parts); }
  Int rows() const { return many ? 1 : part.rows(way); }
  // Numbers of `spare` for a token.
  Int spare() const { return many ? 2 * product.middle() : part.dense() ? 0 : part.middle(); }
  // Multiply-adds of a range of rows for a token.
  double work(Range r) const {
    if (!r.size()) return 0;
    if (many) return double(product.multiply_adds());
    const double share = double(r.size()) / double(rows()), first = part.dense() ? 0 : part.first_work();
    return share * part.second_work() + (way == BY_FIRST ? share : 1) * first;
  }
  double all_work() const { return work({0, rows()}); }
  Runs runs(Range r) const {
    return many ? Runs{1, 0, 0, product.outputs()} : part.runs(way, r);
  }
  void add_sizes(SpaceSizes &sizes) const {
    if (!many) sizes.include(part);
  }
  // in (n)[tokens] to the outputs of a range of rows in out (m)[tokens].
  template <int NV> void apply(const T *in, T *out, T *spare, const Space<T> &space, Range r) const {
    if (many) return product.template apply<NV>(in, out, spare);
    part.template apply<NV>(way, in, spare, out, NV * LANES<T>, r, false, space);
  }

private:
  const Product<T> &product;
  const Part<T> part;
  const bool many;

public:
  const Int parts;
  const Way way;
};

// Rows from `first` to `end` of [0, rows], in fractions of it, for one of about `parts` parts.
inline Range rows_between(Int rows, Int parts, double first, double end) {
  const Int unit = rows >= 16 * parts ? 4 : 1; // rows of a tile
  const auto row = [=](double at) {
    const double units = double((rows + unit - 1) / unit);
    return smaller(rows, Int((at < 0 ? 0 : at < 1 ? at : 1) * units + 0.5) * unit);
  };
  return {row(first), row(end)};
}

// Products of the same x. A block's outputs are those of one product after another.
template <class T> class Products {
public:
  // Without reading data; widen() does.
  Products(const Storage<T> &stored, Int count, const kron_product *calls)
      : count(count), stored(stored), calls(calls) {
    for (Int i = 0; i < count; i++) {
      all[i].set_shape(stored, calls[i]);
      starts[i + 1] = total += Outputs<T>(all[i], 1).all_work();
    }
  }
  bool widen() { // returns false if memory ran out
    for (Int i = 0; i < count; i++)
      if (!all[i].set(stored, calls[i])) return false;
    return true;
  }

  double multiply_adds() const { return total; } // of a token
  bool fits(Int parts) const {
    for (Int i = 0; i < count; i++)
      if (!outputs(i, parts).fits()) return false;
    return true;
  }
  // Of a block that is divided into so many parts.
  Outputs<T> outputs(Int i, Int parts) const {
    const double own = double(parts) * (starts[i + 1] - starts[i]) / total;
    return Outputs<T>(all[i], count == 1 ? parts : smaller(parts, Int(own) + 2));
  }
  // The rows of product i in some of `of` cells of a block.
  Range rows(Int i, const Outputs<T> &outputs, Range cells, Int of) const {
    const auto at = [=](Int cell) {
      return (double(cell) / double(of) * total - starts[i]) / (starts[i + 1] - starts[i]);
    };
    return rows_between(outputs.rows(), outputs.parts, at(cells.first), at(cells.end));
  }

  const Int count;
  Product<T> all[KRON_MAX_PRODUCTS];

private:
  const Storage<T> &stored;
  const kron_product *const calls;
  double starts[KRON_MAX_PRODUCTS + 1] = {}, total = 0;
};

} // namespace
