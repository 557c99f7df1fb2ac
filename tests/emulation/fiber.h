// Stacks of their own for the threads of an emulated block, all on one thread of the operating system.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "races.h"

namespace emulation {

constexpr size_t kStackBytes = size_t{kFindRaces ? 32 : 128} << 10;

// Where a suspended computation goes on.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;  // of its stack
  size_t bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* fiber = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves what a function must preserve on the stack at hand, and goes on with what was saved on the other one.
__attribute__((noinline, naked)) inline void swap_stacks(void** /*save*/, void* /*other*/) {
  __asm__ volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#endif

// Goes on with `to` and returns when somebody goes on with `from`, which is never where `last` is set.
inline void switch_context(Context& from, Context& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
  (void)last;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called before the first switch from `context`, on the stack that everything starts from.
inline void prepare_first(Context& context) {
#if defined(__SANITIZE_THREAD__)
  context.fiber = __tsan_get_current_fiber();
#endif
  (void)context;
}

// To be called first on a new stack; says where the stack is that has started it.
inline void arrived(Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes);
#endif
  (void)from;
}

// Prepares `context` to call `entry`, which must not return, on a stack.
inline void prepare(Context& context, char* stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
  context.fake_stack = nullptr;
  context.bottom = stack;
  context.bytes = kStackBytes;
#endif
#if defined(__SANITIZE_THREAD__)
  context.fiber = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStackBytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#endif
}

// To be called when nobody will go on with `context` any more.
inline void finish(Context& context) {
#if defined(__SANITIZE_THREAD__)
  if (context.fiber) __tsan_destroy_fiber(context.fiber);
  context.fiber = nullptr;
#endif
  (void)context;
}

// The stacks of a block; only the pages that are touched take memory, and every launch uses them again.
class Stacks {
 public:
  char* of(unsigned thread) { return memory_ + thread * kStackBytes; }
  void reserve(unsigned threads) {
    // A stack that another block has used would look like a race with it; a new one does not.
    if (threads <= threads_ && !kFindRaces) return;
    void* memory = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (memory_) munmap(memory_, threads_ * kStackBytes);
    memory_ = static_cast<char*>(memory);
    threads_ = threads;
  }

 private:
  char* memory_ = nullptr;
  unsigned threads_ = 0;
};

}  // namespace emulation
