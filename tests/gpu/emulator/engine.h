// The interface between emulated.h and emulator.cpp.
//
// emulator.cpp is compiled without sanitizers: the emulator's own accesses are not the kernel's. The
// accesses of a kernel's instructions are in the headers, which are compiled like the kernel.
#pragma once
#include <stdint.h>

#include <cstddef>

namespace kron::emulator {

// A position in the kernel's source; as a default argument, the caller's.
struct Place {
  const char *file;
  int line;
  static constexpr Place current(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Index {
  unsigned x, y, z;
};
// Of the running thread. Every function below that waits changes them.
extern Index thread_index, block_index, block_size, grid_size;
extern unsigned char *block_memory; // shared memory, of the size that the launch requested:
extern size_t block_memory_size;

// Ends the launch with this error, prefixed by the kernel, block and thread.
[[noreturn]] void fail(Place, const char *format, ...) __attribute__((format(printf, 2, 3)));

void synchronize_block(Place);

// An operation of all lanes of a warp. The last lane to arrive executes it: finish gets every lane's
// operands, and stores the results in them.
struct Collective {
  const char *name;
  void (*finish)(void *const (&operands)[32]);
  bool aligned; // all lanes must be at the same position in the source
  bool orders;  // it orders the accesses of different lanes
};
void meet(const Collective &, unsigned mask, void *operands, Place);

extern const Collective SYNC_WARP, SHUFFLE_XOR;
struct ShuffleXor {
  float value;
  int lanes;
};

extern const Collective LOAD_MATRICES, LOAD_MATRICES_TRANSPOSED;
struct LoadMatrices {
  uint32_t row[4]; // at this lane's address
  uint32_t result[4];
};

extern const Collective MULTIPLY_FLOAT16, MULTIPLY_BFLOAT16, MULTIPLY_TF32;
struct MultiplyAdd {
  float d[4];
  uint32_t a[4], b[2];
};

// A copy that a thread has issued. next_copy returns one pending copy per call from all groups but the
// last `kept`, then nullptr.
struct Copy {
  uint32_t *to;
  const uint32_t *from;
};
void issue_copy(const Copy &, Place);
void commit_copies(Place);
const Copy *next_copy(int kept);

} // namespace kron::emulator
