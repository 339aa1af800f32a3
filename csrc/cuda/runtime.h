// The GPU runtime that launches need. runtime.cpp implements it by CUDA's, tests/gpu/emulator anew.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace kron {

struct Device {
  int64_t multiprocessors;
  int64_t shared; // bytes that a block may have
};

struct Kernel {
  const char *name;
  const void *entry;
};

struct Launch {
  int64_t grid;
  int threads;
  int64_t shared; // bytes
  void *stream;
};

// Each returns nullptr or an error message (static storage).
const char *device_properties(int64_t index, Device &);
const char *run(const Kernel &, const Launch &, const void *arguments, size_t size);

// Makes a GPU current for the calling thread, and restores the previous one.
class OnDevice {
public:
  explicit OnDevice(int64_t index);
  ~OnDevice();
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;
  const char *error;

private:
  int before;
};

} // namespace kron
