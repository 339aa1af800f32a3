// The Python module. It uses Python's limited API and no torch: one binary for Python 3.11 and later and
// for any torch. Arguments are integers: addresses, sizes and strides in the order of kron.h. The only
// callers, kron_kernels/backends/native.py and cuda.py, must pass memory as large as the sizes say.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "kron.h"
#include "tensors.h"

namespace {

// Reads arguments in order. After an invalid one `failed` is set, and so is a Python error.
class Arguments {
public:
  Arguments(PyObject *const *args, Py_ssize_t count) : next(args), end(args + count) {}

  int64_t integer() {
    if (failed) return 0;
    if (next == end) {
      PyErr_SetString(PyExc_TypeError, "too few arguments");
      failed = true;
      return 0;
    }
    const int64_t value = PyLong_AsLongLong(*next++);
    if (value == -1 && PyErr_Occurred()) failed = true;
    return value;
  }
  double real() {
    if (failed || next == end) return double(integer()); // which fails
    const double value = PyFloat_AsDouble(*next++);
    if (value == -1 && PyErr_Occurred()) failed = true;
    return value;
  }
  void *pointer() { return reinterpret_cast<void *>(static_cast<intptr_t>(integer())); }

  // The address of a tensor that has a signature, or of one just made; null for None.
  void *tensor() {
    if (!failed && next != end && *next == Py_None) return next++, nullptr;
    if (failed || next == end) return pointer(); // sets the error
    kron_tensors::Tensor t = {};
    failed = kron_tensors::read(*next++, &t) != 0;
    return t.data;
  }

  kron_execution execution() {
    kron_execution e;
    e.isa = integer(), e.threads = integer();
    e.parallel_for = reinterpret_cast<kron_parallel_for>(pointer());
    e.bytes = integer(), e.bfloat16 = integer();
    return e;
  }
  kron_product product() {
    kron_product p = {};
    p.rank = integer(), p.n_factors = integer();
    p.bias = pointer(), p.residual = pointer(), p.activation = integer(), p.y = pointer();
    for (int64_t i = 0; i < p.n_factors && i < KRON_MAX_FACTORS; i++) {
      kron_factor &f = p.factors[i];
      f.data = pointer(), f.rows = integer(), f.cols = integer();
      f.rank_stride = integer(), f.row_stride = integer(), f.col_stride = integer();
      p.turns[i] = integer();
      f.scale = static_cast<const float *>(pointer()), f.scale_rank_stride = integer();
    }
    return p;
  }
  kron_cuda_execution gpu() {
    kron_cuda_execution e;
    e.device = integer(), e.stream = pointer(), e.tf32 = integer();
    return e;
  }
  bool complete() {
    if (!failed && next != end) {
      PyErr_SetString(PyExc_TypeError, "too many arguments");
      failed = true;
    }
    return !failed;
  }

private:
  PyObject *const *next, *const *end;
  bool failed = false;
};

// Runs a kernel without the GIL.
template <class Given, class Kernel> PyObject *run(Given &arguments, Kernel kernel) {
  if (!arguments.complete()) return nullptr;
  const char *error;
  Py_BEGIN_ALLOW_THREADS;
  error = kernel();
  Py_END_ALLOW_THREADS;
  if (error) {
    PyErr_SetString(PyExc_RuntimeError, error);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *x = a.pointer();
  const int64_t n_products = a.integer();
  kron_product products[KRON_MAX_PRODUCTS];
  for (int64_t i = 0; i < n_products && i < KRON_MAX_PRODUCTS; i++) products[i] = a.product();
  return run(a, [&] { return kron_cpu_forward(&e, dtype, tokens, x, n_products, products); });
}

PyObject *forward_along(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *x = a.pointer();
  const int64_t tail = a.integer();
  const kron_product product = a.product();
  return run(a, [&] { return kron_cpu_forward_along(&e, dtype, tokens, x, tail, &product); });
}

PyObject *feed_forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *x = a.pointer();
  const kron_product up = a.product(), down = a.product();
  return run(a, [&] { return kron_cpu_feed_forward(&e, dtype, tokens, x, &up, &down); });
}

PyObject *backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *dy = a.pointer(), *x = a.pointer();
  const kron_product product = a.product();
  void *dx = a.pointer(), *da = a.pointer(), *db = a.pointer();
  return run(a, [&] { return kron_cpu_backward(&e, dtype, tokens, dy, x, &product, dx, da, db); });
}

PyObject *backward_many(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *dy = a.pointer(), *x = a.pointer();
  const kron_product product = a.product();
  void *dx = a.pointer(), *g[KRON_MAX_FACTORS] = {};
  for (int64_t i = 0; i < product.n_factors && i < KRON_MAX_FACTORS; i++) g[i] = a.pointer();
  return run(a, [&] { return kron_cpu_backward_many(&e, dtype, tokens, dy, x, &product, dx, g); });
}

PyObject *feed_forward_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *dy = a.pointer(), *x = a.pointer();
  const kron_product up = a.product(), down = a.product();
  void *g[6];
  for (void *&gradient : g) gradient = a.pointer();
  return run(a, [&] {
    return kron_cpu_feed_forward_backward(&e, dtype, tokens, dy, x, &up, &down, g[0], g[1], g[2],
                                          g[3], g[4], g[5]);
  });
}

// ---- calls like an earlier one

// A call whose addresses are missing.
struct Plan {
  int64_t is_block, dtype, tokens, n_products; // a block is a feed-forward, of two products
  kron_product products[KRON_MAX_PRODUCTS];
};

PyObject *plan(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  Plan p = {};
  p.is_block = a.integer(), p.dtype = a.integer(), p.tokens = a.integer(), p.n_products = a.integer();
  if (p.n_products < 1 || p.n_products > KRON_MAX_PRODUCTS || (p.is_block && p.n_products != 2)) {
    PyErr_SetString(PyExc_ValueError, "there must be 1 to 4 products, or 2 of a block");
    return nullptr;
  }
  for (int64_t i = 0; i < p.n_products; i++) p.products[i] = a.product();
  if (!a.complete()) return nullptr;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char *>(&p), sizeof p);
}

// (plan, isa, threads, parallel_for, bytes, bfloat16, x, and factors, bias, residual and y of each product):
// tensors, or None for no bias, no residual, or no y. A factor in int8 is followed by its scale.
PyObject *run_plan(PyObject *, PyObject *const *args, Py_ssize_t count) {
  char *bytes;
  Py_ssize_t size;
  if (!count || !kron_tensors::read) {
    PyErr_SetString(PyExc_TypeError, "there is no plan, or set_tensors was not called");
    return nullptr;
  }
  if (PyBytes_AsStringAndSize(args[0], &bytes, &size)) return nullptr;
  Plan p;
  if (size != sizeof p) {
    PyErr_SetString(PyExc_TypeError, "the bytes are not those of a plan");
    return nullptr;
  }
  memcpy(&p, bytes, sizeof p);
  Arguments a(args + 1, count - 1);
  const kron_execution e = a.execution();
  const void *x = a.tensor();
  for (int64_t i = 0; i < p.n_products; i++) {
    kron_product &product = p.products[i];
    for (int64_t f = 0; f < product.n_factors && f < KRON_MAX_FACTORS; f++) {
      product.factors[f].data = a.tensor();
      if (product.factors[f].scale) product.factors[f].scale = static_cast<const float *>(a.tensor());
    }
    product.bias = a.tensor(), product.residual = a.tensor(), product.y = a.tensor();
  }
  return run(a, [&] {
    return p.is_block
               ? kron_cpu_feed_forward(&e, p.dtype, p.tokens, x, &p.products[0], &p.products[1])
               : kron_cpu_forward(&e, p.dtype, p.tokens, x, p.n_products, p.products);
  });
}

// ---- encoders: described once, in a capsule

struct Encoder : kron_encoder {
  kron_layer *all_layers;
  kron_product *parts; // of all linear layers, one after another
};
void free_encoder(Encoder *e) { free(e->all_layers), free(e->parts), free(e); }

class EncoderArguments : public Arguments {
public:
  EncoderArguments(PyObject *const *args, Py_ssize_t count, Encoder &e) : Arguments(args, count) {
    e.heads = integer(), e.scale = real(), e.n_tables = integer(), e.n_layers = integer();
    e.parts = next_part = static_cast<kron_product *>(calloc(size_t(count), sizeof(kron_product)));
    parts_end = next_part + count;
    const bool fits = 0 < e.n_layers && e.n_layers < count;
    e.all_layers = static_cast<kron_layer *>(calloc(fits ? size_t(e.n_layers) : 1, sizeof(kron_layer)));
    e.layers = e.all_layers;
    if (!e.parts || !e.all_layers) return;
    for (int64_t t = 0; t < e.n_tables && t < KRON_MAX_TABLES; t++) e.tables[t] = product();
    e.norm = norm(), e.projection = linear();
    for (kron_layer *l = e.all_layers; fits && l < e.all_layers + e.n_layers; l++) {
      l->query = linear(), l->key = linear(), l->value = linear(), l->output = linear();
      l->attention_norm = norm();
      l->up = linear(), l->activation = integer(), l->down = linear();
      l->output_norm = norm();
    }
  }

private:
  kron_norm norm() {
    kron_norm n;
    n.weight = pointer(), n.bias = pointer(), n.epsilon = real();
    return n;
  }
  kron_linear linear() {
    kron_linear l;
    l.n_parts = integer(), l.bias = pointer(), l.parts = next_part;
    for (int64_t i = 0; i < l.n_parts && next_part < parts_end; i++) *next_part++ = product();
    return l;
  }
  kron_product *next_part, *parts_end;
};

const char ENCODER[] = "kron_encoder";
void free_capsule(PyObject *capsule) {
  free_encoder(static_cast<Encoder *>(PyCapsule_GetPointer(capsule, ENCODER)));
}

PyObject *encoder(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Encoder *e = static_cast<Encoder *>(calloc(1, sizeof(Encoder)));
  if (!e) return PyErr_NoMemory();
  EncoderArguments a(args, count, *e);
  PyObject *capsule = nullptr;
  if (!e->parts || !e->all_layers) PyErr_NoMemory();
  else if (a.complete()) capsule = PyCapsule_New(e, ENCODER, free_capsule);
  if (!capsule) free_encoder(e);
  return capsule;
}

// A call of an encoder: the capsule, the execution and the batch.
class BatchArguments : public Arguments {
public:
  BatchArguments(PyObject *const *args, Py_ssize_t count)
      : Arguments(args + (count > 0), count - (count > 0)) {
    e = count > 0 ? static_cast<Encoder *>(PyCapsule_GetPointer(args[0], ENCODER)) : nullptr;
    if (count > 0 && !e) return; // with a Python error
    here = execution(), dtype = integer();
    batch.sequences = integer(), batch.length = integer();
    batch.mask = static_cast<const int64_t *>(pointer());
    for (const int64_t *&ids : batch.ids) ids = static_cast<const int64_t *>(pointer());
    batch.embeddings = pointer(), batch.distance_bias = pointer();
    if (!e) return;
    states = static_cast<void **>(calloc(size_t(e->n_layers) + 1, sizeof(void *)));
    for (int64_t i = 0; states && i <= e->n_layers; i++) states[i] = pointer();
    batch.states = states;
  }
  ~BatchArguments() { free(states); }
  bool complete() { return (e || !PyErr_Occurred()) && Arguments::complete(); }

  Encoder *e;
  kron_execution here = {};
  int64_t dtype = 0;
  kron_batch batch = {};

private:
  void **states = nullptr;
};

PyObject *encode(PyObject *, PyObject *const *args, Py_ssize_t count) {
  BatchArguments a(args, count);
  return run(a, [&] { return kron_cpu_encode(&a.here, a.dtype, a.e, &a.batch); });
}

// The numbers of a division, for which `ask` asks.
template <class Given, class Ask> PyObject *division(Given &arguments, Ask ask) {
  kron_division d = {};
  PyObject *done = run(arguments, [&] { return ask(&d); });
  if (!done) return nullptr;
  Py_DECREF(done);
  return Py_BuildValue("LLLLLd", (long long)d.scratch, (long long)d.teams, (long long)d.workers,
                       (long long)d.stages, (long long)d.parts, d.share);
}

PyObject *encode_division(PyObject *, PyObject *const *args, Py_ssize_t count) {
  BatchArguments a(args, count);
  return division(a, [&](kron_division *d) {
    return kron_cpu_encode_division(&a.here, a.dtype, a.e, &a.batch, d);
  });
}

PyObject *forward_division(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer(), n_products = a.integer();
  kron_product products[KRON_MAX_PRODUCTS];
  for (int64_t i = 0; i < n_products && i < KRON_MAX_PRODUCTS; i++) products[i] = a.product();
  return division(a, [&](kron_division *d) {
    return kron_cpu_forward_division(&e, dtype, tokens, n_products, products, d);
  });
}

// Of a feed-forward block, or of its gradients.
template <class Ask> PyObject *block_division(PyObject *const *args, Py_ssize_t count, Ask *ask) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const kron_product up = a.product(), down = a.product();
  return division(a, [&](kron_division *d) { return ask(&e, dtype, tokens, &up, &down, d); });
}
PyObject *feed_forward_division(PyObject *, PyObject *const *args, Py_ssize_t count) {
  return block_division(args, count, kron_cpu_feed_forward_division);
}
PyObject *feed_forward_backward_division(PyObject *, PyObject *const *args, Py_ssize_t count) {
  return block_division(args, count, kron_cpu_feed_forward_backward_division);
}

PyObject *backward_division(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_execution e = a.execution();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const kron_product product = a.product();
  return division(a, [&](kron_division *d) {
    return kron_cpu_backward_division(&e, dtype, tokens, &product, d);
  });
}

PyObject *isa(PyObject *, PyObject *) { return PyLong_FromLongLong(kron_cpu_isa()); }

PyObject *has(PyObject *const *args, Py_ssize_t count, int64_t (*instruction)(int64_t)) {
  Arguments a(args, count);
  const int64_t set = a.integer();
  return a.complete() ? PyLong_FromLongLong(instruction(set)) : nullptr;
}
PyObject *bytes(PyObject *, PyObject *const *args, Py_ssize_t count) {
  return has(args, count, kron_cpu_bytes);
}
PyObject *bfloat16(PyObject *, PyObject *const *args, Py_ssize_t count) {
  return has(args, count, kron_cpu_bfloat16);
}

#if defined(KRON_CUDA_ARCHS)

// None for nullptr, otherwise the text.
PyObject *reason(const char *text) {
  if (!text) Py_RETURN_NONE;
  return PyUnicode_FromString(text);
}

PyObject *cuda_why_not(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const int64_t device = a.integer();
  return a.complete() ? reason(kron_cuda_why_not(device)) : nullptr;
}

PyObject *cuda_unserved(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_product product = a.product();
  return a.complete() ? reason(kron_cuda_unserved(&product)) : nullptr;
}

PyObject *cuda_forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *x = a.pointer();
  const int64_t n_products = a.integer();
  kron_product products[KRON_MAX_PRODUCTS];
  for (int64_t i = 0; i < n_products && i < KRON_MAX_PRODUCTS; i++) products[i] = a.product();
  return run(a, [&] { return kron_cuda_forward(&e, dtype, tokens, x, n_products, products); });
}

PyObject *cuda_backward_workspace(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const kron_product product = a.product();
  if (!a.complete()) return nullptr;
  return PyLong_FromLongLong(kron_cuda_backward_workspace(&e, dtype, tokens, &product));
}

PyObject *cuda_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *dy = a.pointer(), *x = a.pointer();
  const kron_product product = a.product();
  void *dx = a.pointer(), *da = a.pointer(), *db = a.pointer(), *workspace = a.pointer();
  return run(a, [&] {
    return kron_cuda_backward(&e, dtype, tokens, dy, x, &product, dx, da, db, workspace);
  });
}

PyObject *cuda_feed_forward_unserved(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer();
  const kron_product up = a.product(), down = a.product();
  if (!a.complete()) return nullptr;
  return reason(kron_cuda_feed_forward_unserved(&e, dtype, &up, &down));
}

PyObject *cuda_feed_forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *x = a.pointer();
  const kron_product up = a.product(), down = a.product();
  return run(a, [&] { return kron_cuda_feed_forward(&e, dtype, tokens, x, &up, &down); });
}

PyObject *cuda_feed_forward_backward_workspace(PyObject *, PyObject *const *args,
                                               Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const kron_product up = a.product(), down = a.product();
  if (!a.complete()) return nullptr;
  return PyLong_FromLongLong(
      kron_cuda_feed_forward_backward_workspace(&e, dtype, tokens, &up, &down));
}

PyObject *cuda_feed_forward_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
  Arguments a(args, count);
  const kron_cuda_execution e = a.gpu();
  const int64_t dtype = a.integer(), tokens = a.integer();
  const void *dy = a.pointer(), *x = a.pointer();
  const kron_product up = a.product(), down = a.product();
  void *g[7];
  for (void *&gradient : g) gradient = a.pointer();
  return run(a, [&] {
    return kron_cuda_feed_forward_backward(&e, dtype, tokens, dy, x, &up, &down, g[0], g[1], g[2],
                                           g[3], g[4], g[5], g[6]);
  });
}

#endif

// ---- whether a module is as it was

// (modules, their attributes, keys, dictionaries), all lists: the modules' types, the number of their
// attributes and those of these keys, and the dictionaries' values, by address, as bytes. Objects that
// have left the cache are read side by side here, and one after another in Python.
PyObject *identities(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "identities takes four lists");
    return nullptr;
  }
  const Py_ssize_t modules = PyList_Size(args[0]), attributes = PyList_Size(args[1]);
  const Py_ssize_t keys = PyList_Size(args[2]), dictionaries = PyList_Size(args[3]);
  if (PyErr_Occurred()) return nullptr;
  Py_ssize_t size = modules + (1 + keys) * attributes + dictionaries;
  for (Py_ssize_t i = 0; i < dictionaries; i++) size += PyDict_Size(PyList_GetItem(args[3], i));
  const void **const all = static_cast<const void **>(malloc(size_t(size + 1) * sizeof(void *)));
  if (!all) return PyErr_NoMemory();
  const void **next = all;
  for (Py_ssize_t i = 0; i < modules; i++) *next++ = Py_TYPE(PyList_GetItem(args[0], i));
  for (Py_ssize_t i = 0; i < attributes; i++) {
    PyObject *const own = PyList_GetItem(args[1], i);
    *next++ = reinterpret_cast<const void *>(intptr_t(PyDict_Size(own)));
    for (Py_ssize_t key = 0; key < keys; key++)
      *next++ = PyDict_GetItemWithError(own, PyList_GetItem(args[2], key));
  }
  for (Py_ssize_t i = 0; i < dictionaries; i++) {
    PyObject *const dictionary = PyList_GetItem(args[3], i), *key, *value;
    *next++ = dictionary;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary, &at, &key, &value);) *next++ = value;
  }
  PyObject *found = PyBytes_FromStringAndSize(reinterpret_cast<const char *>(all),
                                              (next - all) * Py_ssize_t(sizeof(void *)));
  free(all);
  if (PyErr_Occurred()) Py_CLEAR(found);
  return found;
}

template <class F> PyCFunction method(F *f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"forward", method(forward), METH_FASTCALL, "kron_cpu_forward"},
    {"forward_along", method(forward_along), METH_FASTCALL, "kron_cpu_forward_along"},
    {"feed_forward", method(feed_forward), METH_FASTCALL, "kron_cpu_feed_forward"},
    {"backward", method(backward), METH_FASTCALL, "kron_cpu_backward"},
    {"backward_many", method(backward_many), METH_FASTCALL, "kron_cpu_backward_many"},
    {"feed_forward_backward", method(feed_forward_backward), METH_FASTCALL,
     "kron_cpu_feed_forward_backward"},
    {"forward_division", method(forward_division), METH_FASTCALL, "kron_cpu_forward_division"},
    {"feed_forward_division", method(feed_forward_division), METH_FASTCALL,
     "kron_cpu_feed_forward_division"},
    {"feed_forward_backward_division", method(feed_forward_backward_division), METH_FASTCALL,
     "kron_cpu_feed_forward_backward_division"},
    {"backward_division", method(backward_division), METH_FASTCALL, "kron_cpu_backward_division"},
    {"encoder", method(encoder), METH_FASTCALL, "kron_encoder, in a capsule"},
    {"encode", method(encode), METH_FASTCALL, "kron_cpu_encode"},
    {"encode_division", method(encode_division), METH_FASTCALL, "kron_cpu_encode_division"},
    {"isa", isa, METH_NOARGS, "kron_cpu_isa"},
    {"bytes", method(bytes), METH_FASTCALL, "kron_cpu_bytes"},
    {"bfloat16", method(bfloat16), METH_FASTCALL, "kron_cpu_bfloat16"},
    {"set_tensors", method(kron_tensors::set_tensors), METH_FASTCALL, "how to read tensors"},
    {"signature", method(kron_tensors::signature), METH_FASTCALL, "of tensors, or None"},
    {"layouts", kron_tensors::layouts, METH_O, "of a list of tensors, or None"},
    {"identities", method(identities), METH_FASTCALL, "of modules and their children"},
    {"plan", method(plan), METH_FASTCALL, "a call without addresses, as bytes"},
    {"run_plan", method(run_plan), METH_FASTCALL, "kron_cpu_forward or kron_cpu_feed_forward"},
#if defined(KRON_CUDA_ARCHS)
    {"cuda_why_not", method(cuda_why_not), METH_FASTCALL, "kron_cuda_why_not"},
    {"cuda_unserved", method(cuda_unserved), METH_FASTCALL, "kron_cuda_unserved"},
    {"cuda_forward", method(cuda_forward), METH_FASTCALL, "kron_cuda_forward"},
    {"cuda_backward_workspace", method(cuda_backward_workspace), METH_FASTCALL,
     "kron_cuda_backward_workspace"},
    {"cuda_backward", method(cuda_backward), METH_FASTCALL, "kron_cuda_backward"},
    {"cuda_feed_forward_unserved", method(cuda_feed_forward_unserved), METH_FASTCALL,
     "kron_cuda_feed_forward_unserved"},
    {"cuda_feed_forward", method(cuda_feed_forward), METH_FASTCALL, "kron_cuda_feed_forward"},
    {"cuda_feed_forward_backward_workspace", method(cuda_feed_forward_backward_workspace),
     METH_FASTCALL, "kron_cuda_feed_forward_backward_workspace"},
    {"cuda_feed_forward_backward", method(cuda_feed_forward_backward), METH_FASTCALL,
     "kron_cuda_feed_forward_backward"},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "csrc/kron.h for Python", 0, methods,
                      nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject *m = PyModule_Create(&module);
  if (m && PyModule_AddIntConstant(m, "abi", KRON_ABI)) Py_CLEAR(m);
#if defined(KRON_CUDA_ARCHS)
  if (m && PyModule_AddStringConstant(m, "cuda_archs", KRON_CUDA_ARCHS)) Py_CLEAR(m);
#endif
  return m;
}
