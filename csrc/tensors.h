// Python's tensors, read through DLPack's exchange functions (DLPack 1.3, in torch from 2.10 on): 0.1 µs a tensor,
// where Python's attributes take 0.5 µs. Included by binding.cpp alone.
#pragma once
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

namespace kron_tensors {

// DLPack's structs, whose layout is fixed for its major version 1.
struct Tensor {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
typedef int (*Read)(void *object, Tensor *out); // not 0: a Python error is set
struct Exchange {
  uint32_t major, minor;
  void *previous, *allocate, *export_tensor, *import_tensor;
  Read read;
  void *stream;
};
constexpr int32_t CPU = 1, MOST_AXES = 8, MOST_TENSORS = 16;
// Without a storage, a tensor's address is the offset into it. Python looks closer at a low address.
constexpr uintptr_t LOW = uintptr_t(1) << 40;

inline Read read = nullptr;
inline PyObject *tensor_type = nullptr, *parameter_type = nullptr;

// (capsule, Tensor, Parameter): how to read tensors, and the types of those that have a signature.
inline PyObject *set_tensors(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "set_tensors takes a capsule and two types");
    return nullptr;
  }
  const void *found = PyCapsule_GetPointer(args[0], "dlpack_exchange_api");
  if (!found) return nullptr;
  const Exchange &exchange = *static_cast<const Exchange *>(found);
  if (exchange.major == 1 && exchange.read) {
    Py_INCREF(args[1]), Py_INCREF(args[2]); // for as long as the process lives
    tensor_type = args[1], parameter_type = args[2], read = exchange.read;
  }
  Py_RETURN_NONE;
}

// Sizes, strides and dtypes of tensors in CPU memory, as bytes; an operand may be None. The result is None,
// without an error, if one is anything else, such as a subclass or a tensor without memory.
inline PyObject *signature(PyObject *, PyObject *const *args, Py_ssize_t count) {
  int64_t key[MOST_TENSORS * (1 + 2 * MOST_AXES)], *next = key;
  if (!read || count > MOST_TENSORS) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (args[i] == Py_None) {
      *next++ = -1;
      continue;
    }
    PyObject *const type = reinterpret_cast<PyObject *>(Py_TYPE(args[i]));
    if (type != tensor_type && type != parameter_type) Py_RETURN_NONE;
    Tensor t;
    if (read(args[i], &t)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (t.device_type != CPU || t.ndim > MOST_AXES || !t.strides) Py_RETURN_NONE;
    if (reinterpret_cast<uintptr_t>(t.data) < LOW) Py_RETURN_NONE;
    *next++ = t.ndim | int64_t(t.code) << 8 | int64_t(t.bits) << 16 | int64_t(t.lanes) << 32;
    for (int32_t axis = 0; axis < t.ndim; axis++) *next++ = t.shape[axis];
    for (int32_t axis = 0; axis < t.ndim; axis++) *next++ = t.strides[axis];
  }
  const char *bytes = reinterpret_cast<const char *>(key);
  return PyBytes_FromStringAndSize(bytes, reinterpret_cast<const char *>(next) - bytes);
}

// Addresses, sizes, strides and dtypes of a list of tensors, as bytes; None if one cannot be read.
inline PyObject *layouts(PyObject *, PyObject *list) {
  const Py_ssize_t count = PyList_Size(list);
  if (count < 0) return nullptr;
  if (!read) Py_RETURN_NONE;
  constexpr Py_ssize_t MOST = 3 + 2 * MOST_AXES;
  int64_t *const numbers = static_cast<int64_t *>(malloc(size_t(count * MOST + 1) * sizeof(int64_t)));
  if (!numbers) return PyErr_NoMemory();
  int64_t *next = numbers;
  bool known = true;
  for (Py_ssize_t i = 0; known && i < count; i++) {
    Tensor t;
    known = read(PyList_GetItem(list, i), &t) == 0 && t.ndim <= MOST_AXES && t.strides;
    if (!known) break;
    *next++ = reinterpret_cast<intptr_t>(t.data) + int64_t(t.byte_offset);
    *next++ = t.device_type | int64_t(t.device_id) << 32;
    *next++ = t.ndim | int64_t(t.code) << 8 | int64_t(t.bits) << 16 | int64_t(t.lanes) << 32;
    for (int32_t axis = 0; axis < t.ndim; axis++) *next++ = t.shape[axis], *next++ = t.strides[axis];
  }
  PyErr_Clear();
  const Py_ssize_t size = (next - numbers) * Py_ssize_t(sizeof(int64_t));
  PyObject *found = known ? PyBytes_FromStringAndSize(reinterpret_cast<char *>(numbers), size) : nullptr;
  free(numbers);
  if (known) return found;
  Py_RETURN_NONE;
}

} // namespace kron_tensors
