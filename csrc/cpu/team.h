// Threads that work together: stages of items, each stage after the one before it.
#pragma once
#include <stdint.h>
#if defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall SwitchToThread(void); // windows.h defines `small`
#else
#include <sched.h>
#endif

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}
inline void give_way() {
#if defined(_WIN32)
  SwitchToThread();
#else
  sched_yield();
#endif
}

// Items of all stages are numbered in one row, and whoever is free takes the next. An item waits until
// all items before its stage are done. Those were taken earlier, by threads that run: it cannot wait for
// a thread that has not come yet, and one thread alone does everything.
class Team {
public:
  // Stage s has the items starts[s] to starts[s + 1]. Calls body(stage, number in it).
  template <class Body> void work(const int64_t *starts, int64_t stages, Body body) {
    for (int64_t stage = 0;;) {
      const int64_t item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      while (stage < stages && item >= starts[stage + 1]) stage++;
      if (stage == stages) return;
      for (int64_t tries = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < starts[stage]; tries++) {
        if (tries < 4000) relax(); // about 100 us; then there may be more threads than cores
        else give_way();
      }
      body(stage, item - starts[stage]);
      __atomic_fetch_add(&done, 1, __ATOMIC_ACQ_REL);
    }
  }

private:
  alignas(64) int64_t taken = 0; // on a cache line of its own
  alignas(64) int64_t done = 0;
};

} // namespace
