// Interfaces of AddressSanitizer and ThreadSanitizer; the symbols are null without them.
#pragma once
#include <stddef.h>

extern "C" {
#define KRON_WEAK __attribute__((weak))
KRON_WEAK void __sanitizer_start_switch_fiber(void **save, const void *stack, size_t size);
KRON_WEAK void __sanitizer_finish_switch_fiber(void *saved, const void **stack, size_t *size);
KRON_WEAK void __asan_poison_memory_region(const volatile void *, size_t);
KRON_WEAK void __asan_unpoison_memory_region(const volatile void *, size_t);
KRON_WEAK void *__tsan_get_current_fiber(void);
KRON_WEAK void *__tsan_create_fiber(unsigned flags);
KRON_WEAK void __tsan_destroy_fiber(void *);
KRON_WEAK void __tsan_switch_to_fiber(void *, unsigned flags);
KRON_WEAK void __tsan_acquire(void *);
KRON_WEAK void __tsan_release(void *);
#undef KRON_WEAK
}

namespace kron::emulator {

// AddressSanitizer must know the current stack.
inline bool has_asan() { return __asan_poison_memory_region; }
inline void start_change(void **save, const void *stack, size_t size) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(save, stack, size);
}
inline void finish_change(void *saved, const void **stack, size_t *size) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(saved, stack, size);
}
inline void forbid(const void *memory, size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(memory, size);
}
inline void permit(const void *memory, size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, size);
}

// For ThreadSanitizer a CUDA thread is a thread, and switching threads orders nothing. What one does
// before release() happens before what another does after acquire() of the same key.
inline bool has_tsan() { return __tsan_create_fiber; }
inline void *current_thread() { return has_tsan() ? __tsan_get_current_fiber() : nullptr; }
inline void *create_thread() { return has_tsan() ? __tsan_create_fiber(0) : nullptr; }
inline void destroy_thread(void *thread) {
  if (has_tsan()) __tsan_destroy_fiber(thread);
}
inline void become_thread(void *thread) {
  const unsigned no_order = 1;
  if (has_tsan()) __tsan_switch_to_fiber(thread, no_order);
}
inline void acquire(void *key) {
  if (has_tsan()) __tsan_acquire(key);
}
inline void release(void *key) {
  if (has_tsan()) __tsan_release(key);
}

} // namespace kron::emulator
