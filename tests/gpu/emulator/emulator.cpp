// Runs kernels on the calling thread: one block after another, with a fiber for each thread of a block,
// in an order that depends on a seed.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "engine.h"
#include "fiber.h"
#include "matrices.h"
#include "runtime.h"
#include "sanitizers.h"

namespace kron::emulator {

Index thread_index, block_index, block_size, grid_size;
unsigned char *block_memory;
size_t block_memory_size;

const Collective SYNC_WARP = {"__syncwarp", [](Lanes) {}, false, true};
const Collective SHUFFLE_XOR = {"__shfl_xor_sync", exchange_between_lanes, false, false};
const Collective LOAD_MATRICES = {"ldmatrix", distribute_matrices<false>, true, false};
const Collective LOAD_MATRICES_TRANSPOSED = {"ldmatrix.trans", distribute_matrices<true>, true,
                                             false};
const Collective MULTIPLY_FLOAT16 = {"mma of float16", multiply_matrices<OfFloat16>, true, false};
const Collective MULTIPLY_BFLOAT16 = {"mma of bfloat16", multiply_matrices<OfBfloat16>, true,
                                      false};
const Collective MULTIPLY_TF32 = {"mma of tf32", multiply_matrices<OfTf32>, true, false};

namespace {

constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
constexpr unsigned ALL = ~0u;
// Put the tops of stacks in different sets of the processor's caches.
constexpr size_t STACK = 256 << 10, STACK_STRIDE = STACK + 4096 + 192;
constexpr size_t GUARD = 4096; // around a block's memory

struct Device device = {2, 99 << 10};
typedef const char *(*Intercept)(const char *kernel, int64_t grid, int64_t threads, int64_t shared,
                                 const void *arguments, int64_t size);
Intercept intercept;
const char *const RUN = reinterpret_cast<const char *>(1); // the callback's answer

// ---- the order ---------------------------------------------------------------------------------

uint64_t random_state; // 0: in order
uint64_t draw() {      // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}
bool in_order;

// The threads that can continue. A warp runs until none of its threads can, or for a number of turns
// whose average is random for each block: one warp may be far ahead of another.
class Ready {
public:
  void reset() {
    warps = 0;
    favourite = 0;
    patience = in_order ? 0 : 1 << draw() % 10;
  }
  void add(int warp) {
    threads[warp] = ALL;
    warps |= 1u << warp;
  }
  bool any() const { return warps; }
  int take() {
    if (in_order || !(warps >> favourite & 1) || draw() % patience == 0) favourite = pick(warps);
    unsigned &lanes = threads[favourite];
    const int lane = pick(lanes);
    lanes &= ~(1u << lane);
    if (!lanes) warps &= ~(1u << favourite);
    return favourite * 32 + lane;
  }

private:
  static int pick(unsigned set) {
    if (in_order) return __builtin_ctz(set);
    const int turn = int(draw() % 32);
    return (__builtin_ctz(set >> turn | set << (32 - turn) % 32) + turn) % 32;
  }
  unsigned warps = 0, threads[MAX_WARPS] = {};
  int favourite;
  unsigned patience;
} ready;

// ---- threads, warps and the block --------------------------------------------------------------

struct Thread {
  Fiber fiber;
  void *sanitizer; // ThreadSanitizer's thread
  void *fake_stack;
  bool ended;
  const char *at; // the last function it waited in,
  Place place;    // and the position

  // Counted from the start of the block.
  static constexpr unsigned COPIES = 512, GROUPS = 64;
  Copy copies[COPIES];
  unsigned ends[GROUPS]; // copies issued before each group was committed
  unsigned issued, arrived, groups, waited;
};
Thread threads[MAX_THREADS];
char *stacks;
Thread *running;

struct Warp {
  const Collective *collective;
  Place place;
  unsigned arrived, ended; // lanes
  int first;
  unsigned meetings;
  void *operands[32];
} warps[MAX_WARPS];

struct {
  int threads, arrived, ended, last_ended;
  Place place; // of the barrier
  int first;   // the first thread that arrived
  unsigned barriers;
} block;

bool failed; // the launch

// ThreadSanitizer's keys for a block's barriers and its warps' collective operations. They alternate:
// a late thread must not acquire what was released for the next one. Every block has its own.
constexpr int KEYS = 2 + 2 * MAX_WARPS;
char *keys;
void *block_key() { return keys + 8 * (block.barriers % 2); }
void *warp_key(int warp) { return keys + 8 * (2 + 2 * warp + warps[warp].meetings % 2); }

// The start of a launch happens before its blocks, and they before its end, but blocks are not ordered:
// each has its own threads. A thread takes 1 MB and is slow to create, so threads are reused after a
// few blocks and in the next launch. A race between a block and, for example, the fourth after it is
// missed, but found with another order of blocks.
uint64_t begin_key, end_key;
class SanitizerThreads {
public:
  void *get(int64_t turn, int thread) {
    if (!has_tsan()) return nullptr;
    const int blocks = std::max(2, 1024 / block.threads);
    const size_t i = size_t(turn % blocks * block.threads + thread);
    while (all.size() <= i) all.push_back(create_thread());
    return all[i];
  }
  void forget() {
    for (void *thread : all) destroy_thread(thread);
    all.clear();
  }

private:
  std::vector<void *> all;
} sanitizer_threads;

Fiber main_fiber;
void *main_thread, *main_fake_stack;
const void *main_stack;
size_t main_stack_size;

const char *kernel_name;
void (*kernel_entry)(const void *);
const void *kernel_arguments;

int number_of(const Thread *thread) { return int(thread - threads); }

// ---- errors ------------------------------------------------------------------------------------

char message[1000];

bool same(const Place &a, const Place &b) {
  return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}
const char *file_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}
void set_message(int thread, const Place *place, const char *format, va_list values) {
  failed = true;
  int n = snprintf(message, sizeof message, "%s, block %u, thread %d: ", kernel_name, block_index.x,
                   thread);
  n += vsnprintf(message + n, sizeof message - size_t(n), format, values);
  if (place && n < int(sizeof message))
    snprintf(message + n, sizeof message - size_t(n), " (%s:%d)", file_name(place->file),
             place->line);
}
__attribute__((format(printf, 3, 4))) void report(int thread, const Place *place,
                                                  const char *format, ...) {
  va_list values;
  va_start(values, format);
  set_message(thread, place, format, values);
  va_end(values);
}

// ---- switching between the threads and the main fiber ------------------------------------------

void resume(int number) {
  running = &threads[number];
  thread_index = {unsigned(number), 0, 0};
  start_change(&main_fake_stack, stacks + number * STACK_STRIDE, STACK);
  become_thread(running->sanitizer);
  Fiber::change(main_fiber, running->fiber);
  finish_change(main_fake_stack, nullptr, nullptr);
  running = nullptr;
}

void leave(bool for_ever) {
  Thread *self = running;
  start_change(for_ever ? nullptr : &self->fake_stack, main_stack, main_stack_size);
  become_thread(main_thread);
  Fiber::change(self->fiber, main_fiber);
  finish_change(self->fake_stack, &main_stack, &main_stack_size);
}

void wait(const char *at, Place place) {
  running->at = at, running->place = place;
  leave(false);
}

void check_end() {
  const int number = number_of(running), warp = number / 32;
  if (running->arrived != running->issued)
    report(number, nullptr, "ended with %u copies that it did not wait for",
           running->issued - running->arrived);
  else if (block.arrived)
    report(number, &block.place, "ended, while thread %d waits at __syncthreads", block.first);
  else if (warps[warp].arrived)
    report(number, &warps[warp].place, "ended, while lane %d of its warp waits at %s",
           warps[warp].first, warps[warp].collective->name);
  running->ended = true;
  block.ended++;
  block.last_ended = number;
  warps[warp].ended |= 1u << number % 32;
}

void enter() {
  finish_change(nullptr, &main_stack, &main_stack_size);
  acquire(&begin_key);
  kernel_entry(kernel_arguments);
  check_end();
  leave(true);
}

// ---- blocks ------------------------------------------------------------------------------------

void *map(void *at, size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void *memory = mmap(at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

// The shared memory of a launch, reused by each block.
class BlockMemory {
public:
  explicit BlockMemory(size_t size)
      : size(size), total((2 * GUARD + size + 4095) / 4096 * 4096),
        memory(static_cast<unsigned char *>(map(nullptr, total))) {
    if (memory) block_memory = memory + GUARD, block_memory_size = size;
  }
  ~BlockMemory() {
    if (!memory) return;
    permit(memory, total);
    munmap(memory, total);
  }
  bool exists() const { return memory; }
  // All NaN, and unused for the sanitizers.
  void reset() {
    permit(memory, total);
    if (has_tsan()) map(memory, total); // or accesses of different blocks count as races
    memset(memory, 0xff, total);
    forbid(memory, GUARD);
    forbid(block_memory + size, total - GUARD - size);
  }
  bool intact() const {
    if (has_asan()) return true;
    const auto other = [](unsigned char byte) { return byte != 0xff; };
    return std::none_of(memory, block_memory, other) &&
           std::none_of(block_memory + size, memory + total, other);
  }

private:
  size_t size, total;
  unsigned char *memory;
};

void report_deadlock() {
  int one = 0;
  while (threads[one].ended) one++;
  int other = one;
  const Thread &t = threads[one];
  for (int i = one; i < block.threads && other == one; i++)
    if (!threads[i].ended && (threads[i].at != t.at || threads[i].place.line != t.place.line))
      other = i;
  const Thread &u = threads[other];
  report(one, nullptr, "deadlock: waits at %s, %s:%d, and thread %d at %s, %s:%d", t.at,
         file_name(t.place.file), t.place.line, other, u.at, file_name(u.place.file), u.place.line);
}

void run_block(int64_t turn, int64_t index, BlockMemory &memory) {
  block_index = {unsigned(index), 0, 0};
  memory.reset();
  if (has_tsan()) map(stacks, size_t(block.threads) * STACK_STRIDE);
  block = {block.threads, 0, 0, 0, {}, 0, 0};
  ready.reset();
  const int n_warps = block.threads / 32;
  for (int warp = 0; warp < n_warps; warp++) {
    warps[warp] = {};
    ready.add(warp);
  }
  for (int i = 0; i < block.threads; i++) {
    Thread &t = threads[i];
    t.fiber.prepare(stacks + i * STACK_STRIDE, STACK, enter);
    t.sanitizer = sanitizer_threads.get(turn, i);
    t.ended = false;
    t.issued = t.arrived = t.groups = t.waited = 0;
  }

  release(&begin_key);
  while (ready.any() && !failed) resume(ready.take());
  if (!failed && block.ended < block.threads) report_deadlock();
  if (!failed && !memory.intact())
    report(block.last_ended, nullptr, "some thread of this block wrote beyond its shared memory");

  if (failed) permit(stacks, size_t(block.threads) * STACK_STRIDE); // of interrupted functions
  if (!has_tsan()) return;
  for (int i = 0; i < block.threads; i++) {
    become_thread(threads[i].sanitizer);
    release(&end_key);
  }
  become_thread(main_thread);
}

const char *check_launch(const Launch &launch) {
  const auto refuse = [](const char *format, long long value, long long limit) {
    int n = snprintf(message, sizeof message, "%s: ", kernel_name);
    snprintf(message + n, sizeof message - size_t(n), format, value, limit);
    return message;
  };
  if (launch.grid < 1 || launch.grid > INT32_MAX)
    return refuse("%lld blocks, and a grid has 1 to %lld", launch.grid, INT32_MAX);
  if (launch.threads < 1 || launch.threads > MAX_THREADS)
    return refuse("%lld threads a block, and there may be %lld", launch.threads, MAX_THREADS);
  if (launch.threads % 32)
    return refuse("%lld threads a block, and the emulator runs only whole warps of %lld",
                  launch.threads, 32);
  if (launch.shared < 0 || launch.shared > device.shared)
    return refuse("%lld bytes of shared memory, and a block may have %lld", launch.shared,
                  device.shared);
  return nullptr;
}

const char *run_grid(const Launch &launch) {
  BlockMemory memory(size_t(launch.shared));
  if (!stacks) stacks = static_cast<char *>(map(nullptr, MAX_THREADS * STACK_STRIDE));
  const size_t keys_size = has_tsan() ? size_t(launch.grid) * KEYS * 8 : 0;
  char *all_keys = keys_size ? static_cast<char *>(map(nullptr, keys_size)) : nullptr;
  if (!memory.exists() || !stacks || (keys_size && !all_keys)) return "out of memory";

  block.threads = launch.threads;
  block_size = {unsigned(launch.threads), 1, 1};
  grid_size = {unsigned(launch.grid), 1, 1};
  main_thread = current_thread();
  in_order = random_state == 0;
  failed = false;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < launch.grid; i++) order.push_back(i);
  if (!in_order)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);

  for (int64_t i = 0; i < launch.grid && !failed; i++) {
    keys = all_keys + (keys_size ? i * KEYS * 8 : 0);
    run_block(i, order[size_t(i)], memory);
  }
  acquire(&end_key);
  if (failed) sanitizer_threads.forget(); // they are inside functions
  if (keys_size) munmap(all_keys, keys_size);
  return failed ? message : nullptr;
}

} // namespace

// ---- called by threads -------------------------------------------------------------------------

void fail(Place place, const char *format, ...) {
  va_list values;
  va_start(values, format);
  set_message(number_of(running), &place, format, values);
  va_end(values);
  leave(true);
  __builtin_unreachable();
}

void synchronize_block(Place place) {
  const int number = number_of(running);
  if (block.ended) fail(place, "__syncthreads after thread %d has ended", block.last_ended);
  if (!block.arrived) {
    block.place = place;
    block.first = number;
  } else if (!same(block.place, place)) {
    fail(place, "divergent __syncthreads: thread %d is at that of %s:%d, not at this one",
         block.first, file_name(block.place.file), block.place.line);
  }
  void *key = block_key();
  release(key);
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    block.barriers++;
    for (int warp = 0; warp < block.threads / 32; warp++) ready.add(warp);
  }
  wait("__syncthreads", place);
  acquire(key);
}

void meet(const Collective &collective, unsigned mask, void *operands, Place place) {
  const int number = number_of(running), lane = number % 32;
  Warp &warp = warps[number / 32];
  if (mask != ALL)
    fail(place, "%s with mask %08x: the emulator knows only whole warps", collective.name, mask);
  if (warp.ended)
    fail(place, "lane %d of the warp has ended and never comes to %s", __builtin_ctz(warp.ended),
         collective.name);
  if (!warp.arrived) {
    warp.collective = &collective;
    warp.place = place;
    warp.first = lane;
  } else if (warp.collective != &collective ||
             (collective.aligned && !same(warp.place, place))) {
    fail(place, "divergent warp: lane %d is at %s of %s:%d, this one at %s", warp.first,
         warp.collective->name, file_name(warp.place.file), warp.place.line, collective.name);
  }
  void *key = collective.orders ? warp_key(number / 32) : nullptr;
  if (key) release(key);
  warp.operands[lane] = operands;
  warp.arrived |= 1u << lane;
  if (warp.arrived == ALL) {
    warp.arrived = 0;
    if (key) warp.meetings++;
    collective.finish(warp.operands);
    ready.add(number / 32);
  }
  wait(collective.name, place);
  if (key) acquire(key);
}

void issue_copy(const Copy &copy, Place place) {
  Thread &t = *running;
  if (t.issued - t.arrived == Thread::COPIES)
    fail(place, "the emulator keeps %u copies of a thread, and no more", Thread::COPIES);
  t.copies[t.issued++ % Thread::COPIES] = copy;
}

void commit_copies(Place place) {
  Thread &t = *running;
  if (t.groups - t.waited == Thread::GROUPS)
    fail(place, "the emulator keeps %u groups of copies, and no more", Thread::GROUPS);
  t.ends[t.groups++ % Thread::GROUPS] = t.issued;
}

const Copy *next_copy(int kept) {
  Thread &t = *running;
  for (; t.groups - t.waited > unsigned(kept); t.waited++)
    if (t.arrived != t.ends[t.waited % Thread::GROUPS])
      return &t.copies[t.arrived++ % Thread::COPIES];
  return nullptr;
}

} // namespace kron::emulator

// ---- the host's side ---------------------------------------------------------------------------

namespace kron {
using namespace emulator;

namespace {
thread_local int current_device = 0;

const char *no_device(int64_t index) {
  thread_local char text[60];
  snprintf(text, sizeof text, "there is no GPU %lld", (long long)index);
  return text;
}
} // namespace

const char *device_properties(int64_t index, Device &properties) {
  if (index != 0) return no_device(index);
  properties = device;
  return nullptr;
}

const char *run(const Kernel &kernel, const Launch &launch, const void *arguments, size_t size) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  kernel_name = kernel.name;
  kernel_entry = reinterpret_cast<void (*)(const void *)>(const_cast<void *>(kernel.entry));
  kernel_arguments = arguments;
  if (const char *error = check_launch(launch)) return error;
  if (intercept) {
    const char *answer = intercept(kernel.name, launch.grid, launch.threads, launch.shared,
                                   arguments, int64_t(size));
    if (answer != RUN) return answer;
  }
  return run_grid(launch);
}

OnDevice::OnDevice(int64_t index)
    : error(index == 0 ? nullptr : no_device(index)), before(current_device) {
  if (!error) current_device = int(index);
}
OnDevice::~OnDevice() { current_device = before; }

} // namespace kron

#define KRON_EXPORT extern "C" __attribute__((visibility("default"))) void

// Seeds the order of threads and blocks; 0: numerical order.
KRON_EXPORT kron_emulator_seed(uint64_t seed) {
  kron::emulator::random_state = seed;
}
KRON_EXPORT kron_emulator_device(int64_t multiprocessors, int64_t shared) {
  kron::emulator::device = {multiprocessors, shared};
}
// The callback replaces running kernels; null removes it.
KRON_EXPORT kron_emulator_intercept(kron::emulator::Intercept callback) {
  kron::emulator::intercept = callback;
}
