// A stack with a suspended function.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && !defined(KRON_UCONTEXT)

// ucontext saves the signal mask at every change, by a system call. This saves only the callee-saved
// registers.
extern "C" void kron_emulator_change(void **from, void *to);
asm(R"(
    .text
    .hidden kron_emulator_change
    .globl kron_emulator_change
    .type kron_emulator_change, @function
kron_emulator_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size kron_emulator_change, .-kron_emulator_change
)");

namespace kron::emulator {

class Fiber {
public:
  // The first change to this fiber calls `entry`, which never returns.
  void prepare(char *stack, size_t size, void (*entry)()) {
    void **top = reinterpret_cast<void **>(uintptr_t(stack + size) / 16 * 16);
    *--top = nullptr; // no return address: debuggers stop here
    *--top = reinterpret_cast<void *>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Fiber &from, Fiber &to) {
    kron_emulator_change(&from.stack_pointer, to.stack_pointer);
  }

private:
  void *stack_pointer;
};

} // namespace kron::emulator

#else
#include <ucontext.h>

namespace kron::emulator {

class Fiber {
public:
  void prepare(char *stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }

private:
  ucontext_t context;
};

} // namespace kron::emulator
#endif
