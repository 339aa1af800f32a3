// Counts the kernels' allocations, and lets them fail, in programs that are linked with --wrap for each of the
// functions below.
#pragma once
#include "oracle.h"

#include <atomic>

// The linker redirects the kernels' calls to these (--wrap), and new calls malloc.
namespace oracle {
inline std::atomic<Int> allocations, allocated; // their number and bytes
inline Int allowed = INT64_MAX;               // the next ones fail
inline bool count(size_t size) {
  allocated += Int(size);
  return ++allocations <= allowed;
}
} // namespace oracle
extern "C" {
void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_aligned_alloc(size_t, size_t);
void *__wrap_malloc(size_t size) { return oracle::count(size) ? __real_malloc(size) : nullptr; }
void *__wrap_calloc(size_t n, size_t size) {
  return oracle::count(n * size) ? __real_calloc(n, size) : nullptr;
}
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
  return oracle::count(size) ? __real_aligned_alloc(alignment, size) : nullptr;
}
}
void *operator new(size_t size) { return malloc(size); }
void operator delete(void *p) noexcept { free(p); }
void operator delete(void *p, size_t) noexcept { free(p); }
