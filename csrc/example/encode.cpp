// Embeddings of texts by a saved student, on the CPU, without Python and PyTorch. build.sh compiles
// it.
//
//   encode FILE [THREADS] < IDS
//
// FILE was written by `kroneckerbert export STUDENT FOLDER --format native`. Each line of IDS is a
// text, as the ids of its tokens. For each one the program prints two lines: the last hidden state of
// the first token, and the mean over all tokens.
#include "kron.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <fstream>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string &why) { throw std::runtime_error(why); }

// ---- safetensors -------------------------------------------------------------------------------

// The length of the header (8 bytes, little-endian), the header in JSON, the tensors.
struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape, offsets; // first and last byte
  const char *data = nullptr;
  int64_t count() const {
    return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
  }
};

// The JSON of a header: objects, strings without escapes, lists of integers.
class Json {
public:
  Json(const char *text, const char *end) : at(text), end(end) {}
  // Calls value(key) for each key of an object, which reads the key's value.
  template <class Value> void object(Value value) {
    expect('{');
    if (next('}')) return;
    do {
      const std::string key = string();
      expect(':'), value(key);
    } while (next(','));
    expect('}');
  }
  std::string string() {
    expect('"');
    const char *const first = at;
    while (at < end && *at != '"') {
      if (*at == '\\') fail("the header of the file has an escaped character");
      at++;
    }
    expect('"');
    return std::string(first, at - 1);
  }
  std::vector<int64_t> integers() {
    std::vector<int64_t> all;
    expect('[');
    if (next(']')) return all;
    do {
      int64_t number = 0;
      if (space(), at == end || *at < '0' || *at > '9') fail("the header of the file has no number");
      for (; at < end && *at >= '0' && *at <= '9'; at++) {
        if (number > INT64_MAX / 16) fail("the header of the file has too large a number");
        number = number * 10 + (*at - '0');
      }
      all.push_back(number);
    } while (next(','));
    expect(']');
    return all;
  }

private:
  void space() {
    while (at < end && strchr(" \t\r\n", *at)) at++;
  }
  bool next(char c) {
    space();
    if (at == end || *at != c) return false;
    at++;
    return true;
  }
  void expect(char c) {
    if (!next(c)) fail(std::string("the header of the file lacks ") + c);
  }
  const char *at, *const end;
};

class File {
public:
  explicit File(const char *path) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    const int64_t all = in ? int64_t(in.tellg()) : 0;
    unsigned char length[8] = {};
    in.seekg(0).read(reinterpret_cast<char *>(length), 8);
    if (!in) fail(std::string(path) + " cannot be read");
    uint64_t size = 0;
    for (int i = 7; i >= 0; i--) size = size << 8 | length[i];
    if (size > uint64_t(all - 8)) fail(std::string(path) + " is not a safetensors file");
    std::string header(size, ' ');
    data.resize(size_t(all) - 8 - size);
    in.read(&header[0], int64_t(size)).read(&data[0], int64_t(data.size()));
    if (!in) fail(std::string(path) + " cannot be read");
    Json json(header.data(), header.data() + size);
    json.object([&](const std::string &name) {
      if (name == "__metadata__")
        json.object([&](const std::string &key) { texts[key] = json.string(); });
      else read(json, name);
    });
  }
  bool has(const std::string &name) const { return tensors.count(name) > 0; }
  const Tensor &operator[](const std::string &name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) fail("the file has no tensor " + name);
    return found->second;
  }
  // The `count` numbers of a tensor; for `optional`, null if there is none.
  const int8_t *bytes(const std::string &name, int64_t count) const {
    return reinterpret_cast<const int8_t *>(checked(name, "I8", count));
  }
  const float *floats(const std::string &name, int64_t count) const {
    return reinterpret_cast<const float *>(checked(name, "F32", count));
  }
  const float *optional(const std::string &name, int64_t count) const {
    return has(name) ? floats(name, count) : nullptr;
  }
  const int64_t *integers(const std::string &name, int64_t count) const {
    return reinterpret_cast<const int64_t *>(checked(name, "I64", count));
  }
  std::string text(const std::string &key) const {
    const auto found = texts.find(key);
    if (found == texts.end()) fail("the file does not say its " + key);
    return found->second;
  }
  double number(const std::string &key) const { return strtod(text(key).c_str(), nullptr); }

private:
  void read(Json &json, const std::string &name) {
    Tensor &t = tensors[name];
    json.object([&](const std::string &key) {
      if (key == "dtype") t.dtype = json.string();
      else (key == "shape" ? t.shape : t.offsets) = json.integers();
    });
    const bool known = t.dtype == "F32" || t.dtype == "I64" || t.dtype == "I8";
    if (!known) fail(name + " is of dtype " + t.dtype);
    const int64_t whole = int64_t(data.size()), bytes = t.dtype == "F32" ? 4 : t.dtype == "I8" ? 1 : 8;
    int64_t size = bytes;
    for (int64_t side : t.shape) {
      if (side > whole || size > whole) fail(name + " is larger than the file");
      size *= side;
    }
    if (t.offsets.size() != 2 || t.offsets[1] > whole || t.offsets[1] - t.offsets[0] != size ||
        t.offsets[0] % bytes)
      fail(name + " is not where the header says");
    t.data = data.data() + t.offsets[0];
  }
  const char *checked(const std::string &name, const char *dtype, int64_t count) const {
    const Tensor &t = (*this)[name];
    if (t.dtype != dtype || t.count() != count)
      fail(name + " must have " + std::to_string(count) + " numbers of dtype " + dtype);
    return t.data;
  }
  std::string data;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> texts;
};

// ---- the encoder -------------------------------------------------------------------------------

kron_factor factor(const File &file, const std::string &name, size_t dimensions) {
  const Tensor &t = file[name]; // (rows, cols) or (rank, rows, cols)
  if (t.shape.size() != dimensions) fail(name + " has another number of dimensions");
  const int64_t rows = t.shape[dimensions - 2], cols = t.shape[dimensions - 1];
  if (!file.has(name + "_scale")) return {file.floats(name, t.count()), rows, cols, rows * cols, cols, 1, nullptr, 0};
  // int8: a scale for each row of each term, or of all terms together.
  const bool shared = file[name + "_scale"].count() == rows;
  const int64_t scales = shared ? rows : t.count() / cols;
  return {file.bytes(name, t.count()), rows, cols, rows * cols, cols, 1,
          file.floats(name + "_scale", scales), shared ? 0 : rows};
}

// A weight is dense, NAME.weight, or a sum of products of NAME.a and NAME.b.
kron_product weight(const File &file, const std::string &name) {
  kron_product p = {};
  p.rank = p.n_factors = 1;
  if (file.has(name + ".weight")) {
    p.factors[0] = factor(file, name + ".weight", 2);
    return p;
  }
  const kron_factor a = factor(file, name + ".a", 3), b = factor(file, name + ".b", 3);
  p.rank = file[name + ".a"].shape[0], p.n_factors = 2;
  if (file[name + ".b"].shape[0] != p.rank) fail(name + " has factors of different ranks");
  p.factors[0] = a, p.factors[1] = b;
  // The order of fewer multiply-adds.
  const int64_t a_first = a.rows * b.cols * (a.cols + b.rows);
  const int64_t b_first = b.rows * a.cols * (b.cols + a.rows);
  p.turns[0] = b_first <= a_first, p.turns[1] = !p.turns[0];
  return p;
}

int64_t product_of(const kron_product &p, int64_t kron_factor::*side) {
  return p.factors[0].*side * (p.n_factors > 1 ? p.factors[1].*side : 1);
}
int64_t rows_of(const kron_linear &l) { return product_of(l.parts[0], &kron_factor::rows); }

// Tensors are read in place: a student is neither copied nor moved.
class Student {
public:
  explicit Student(const char *path) : file(path) {
    for (; encoder.n_tables < KRON_MAX_TABLES; encoder.n_tables++) {
      const std::string name = "tables." + std::to_string(encoder.n_tables);
      if (!has(name)) break;
      encoder.tables[encoder.n_tables] = weight(file, name);
    }
    if (!encoder.n_tables) fail(std::string(path) + " has no table");
    encoder.norm = norm("norm", product_of(encoder.tables[0], &kron_factor::cols));
    if (has("projection.0")) encoder.projection = linear("projection");
    encoder.heads = int64_t(file.number("heads")), encoder.scale = file.number("scale");
    const std::vector<std::string> activations = {"none", "gelu", "gelu_tanh", "relu", "silu"};
    for (int i = 0; has("layers." + std::to_string(i) + ".query.0"); i++) {
      const std::string at = "layers." + std::to_string(i) + ".";
      const std::string name = file.text(at + "activation");
      const auto found = std::find(activations.begin(), activations.end(), name);
      const kron_linear output = linear(at + "output"), down = linear(at + "down");
      layers.push_back({linear(at + "query"), linear(at + "key"), linear(at + "value"), output,
                        linear(at + "up"), down, norm(at + "attention_norm", rows_of(output)),
                        norm(at + "output_norm", rows_of(down)), found - activations.begin()});
    }
    if (layers.empty()) fail(std::string(path) + " has no layers");
    encoder.n_layers = int64_t(layers.size()), encoder.layers = layers.data();
  }
  Student(const Student &) = delete;

  int64_t width() const { return rows_of(layers.back().down); }

  // The last hidden states (texts, length of the longest, width). Other texts are padded.
  std::vector<float> encode(const std::vector<std::vector<int64_t>> &texts, int64_t threads) const {
    size_t longest = 0;
    for (const auto &text : texts) longest = std::max(longest, text.size());
    const int64_t length = int64_t(longest), positions = int64_t(file.number("positions"));
    if (length > positions)
      fail(std::to_string(length) + " tokens are more than the " + std::to_string(positions) +
           " positions of the student");
    std::vector<int64_t> ids(texts.size() * longest), mask(ids.size());
    std::vector<int64_t> others[KRON_MAX_TABLES]; // rows of positions and types, alike in all texts
    for (size_t i = 0; i < texts.size(); i++) {
      std::copy(texts[i].begin(), texts[i].end(), &ids[i * longest]);
      std::fill_n(&mask[i * longest], texts[i].size(), 1);
    }
    std::vector<float> last(ids.size() * size_t(width())), distances;
    std::vector<void *> states(layers.size() + 1);
    states.back() = last.data();
    kron_batch batch = {};
    batch.sequences = int64_t(texts.size()), batch.length = length;
    batch.mask = mask.data(), batch.ids[0] = ids.data(), batch.states = states.data();
    for (int64_t t = 1; t < encoder.n_tables; t++) {
      const auto *rows = file.integers("ids." + std::to_string(t), positions);
      for (size_t i = 0; i < texts.size(); i++)
        others[t].insert(others[t].end(), rows, rows + length);
      batch.ids[t] = others[t].data();
    }
    if (file.has("distance_bias")) { // (heads, 2 * positions - 1); of each row the middle is needed
      const int64_t row = 2 * positions - 1;
      const float *all = file.floats("distance_bias", encoder.heads * row) + positions - length;
      for (int64_t h = 0; h < encoder.heads; h++)
        distances.insert(distances.end(), all + h * row, all + h * row + 2 * length - 1);
      batch.distance_bias = distances.data();
    }
    const kron_execution all = {kron_cpu_isa(), threads, parallel_for, 1, 1};
    if (const char *error = kron_cpu_encode(&all, KRON_FLOAT32, &encoder, &batch)) fail(error);
    return last;
  }

private:
  bool has(const std::string &name) const {
    return file.has(name + ".weight") || file.has(name + ".a");
  }
  kron_norm norm(const std::string &name, int64_t width) const {
    return {file.optional(name + ".weight", width), file.optional(name + ".bias", width),
            file.number(name + ".epsilon")};
  }
  kron_linear linear(const std::string &name) {
    parts.emplace_back();
    for (int i = 0; has(name + "." + std::to_string(i)); i++)
      parts.back().push_back(weight(file, name + "." + std::to_string(i)));
    if (parts.back().empty()) fail("the file has no " + name);
    kron_linear l = {int64_t(parts.back().size()), parts.back().data(), nullptr};
    l.bias = file.optional(name + ".bias", rows_of(l));
    return l;
  }
  // A thread for each number of the range.
  static int32_t parallel_for(int64_t begin, int64_t end, int64_t, kron_range fn, void *context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin + 1; i < end; i++) threads.emplace_back(fn, i, i + 1, context);
    if (begin < end) fn(begin, begin + 1, context);
    for (std::thread &t : threads) t.join();
    return 0;
  }

  const File file;
  std::deque<std::vector<kron_product>> parts; // of each linear layer
  std::vector<kron_layer> layers;
  kron_encoder encoder = {};
};

std::vector<std::vector<int64_t>> read_texts(std::istream &in) {
  std::vector<std::vector<int64_t>> texts;
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    texts.emplace_back();
    for (int64_t id; words >> id;) texts.back().push_back(id);
    if (!words.eof()) fail("line " + std::to_string(texts.size()) + " has something other than ids");
    if (texts.back().empty()) fail("line " + std::to_string(texts.size()) + " has no ids");
  }
  return texts;
}

void print(const char *name, const std::vector<float> &vector) {
  printf("%s", name);
  for (float number : vector) printf(" %.9g", double(number));
  printf("\n");
}

} // namespace

int main(int count, char **arguments) {
  if (count < 2) return puts("usage: encode FILE [THREADS] < IDS"), 2;
  if (kron_abi() != KRON_ABI) return puts("the library was built for another kron.h"), 2;
  try {
    const Student student(arguments[1]);
    const auto texts = read_texts(std::cin);
    const std::vector<float> states = student.encode(texts, count > 2 ? atoi(arguments[2]) : 1);
    const size_t width = size_t(student.width());
    const size_t row = texts.empty() ? 0 : states.size() / texts.size(); // numbers of a text
    for (size_t i = 0; i < texts.size(); i++) {
      const float *at = &states[i * row];
      std::vector<float> mean(width);
      for (size_t n = 0; n < texts[i].size() * width; n++)
        mean[n % width] += at[n] / float(texts[i].size());
      print("first", std::vector<float>(at, at + width));
      print("mean", mean);
    }
  } catch (const std::exception &error) {
    return fprintf(stderr, "%s\n", error.what()), 1;
  }
}
