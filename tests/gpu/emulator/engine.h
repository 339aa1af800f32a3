// What the words of emulated.h are made of; emulator.cpp has the other side.
//
// Everything behind these declarations is compiled without sanitizers: what the emulator does for
// its own sake is no access of the kernel. What a kernel's instructions read and write is read and
// written in the headers, which are compiled like the kernel.
#pragma once
#include <stdint.h>

#include <cstddef>

namespace kron::emulator {

// Where in the kernel's source; as a default argument, the caller's.
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
// Of the thread that runs: they change in every function below that waits.
extern Index thread_index, block_index, block_size, grid_size;
extern unsigned char *block_memory; // of which the launch asked for this:
extern size_t block_memory_size;

// Ends the launch with this error, and the name of kernel, block and thread.
[[noreturn]] void fail(Place, const char *format, ...) __attribute__((format(printf, 2, 3)));

void synchronize_block(Place);

// What a warp's lanes do together. The last lane to arrive does it for all: finish gets every
// lane's operands, and leaves the results in them.
struct Collective {
  const char *name;
  void (*finish)(void *const (&operands)[32]);
  bool aligned; // all lanes have to be at the same place
  bool orders;  // what lanes did before it is over before what others do after it
};
void meet(const Collective &, unsigned mask, void *operands, Place);

extern const Collective SYNC_WARP, SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN;
struct Shuffle {
  uint64_t bits;
  int source; // a lane; itself if that one does not exist
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

// Copies that a thread has issued; next_copy gives those, one a call, that are not in the last
// `kept` groups and have not been given, then nullptr.
struct Copy {
  uint32_t *to;
  const uint32_t *from;
};
void issue_copy(const Copy &, Place);
void commit_copies(Place);
const Copy *next_copy(int kept);

} // namespace kron::emulator
