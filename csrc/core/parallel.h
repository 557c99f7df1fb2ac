// Fork-join on the OpenMP runtime that torch already runs, without linking one of our own.
#pragma once
#include <algorithm>
#include <cstdint>

namespace sparsekd {

// Calls body(context, slot) once for every slot in [0, slots), on at most `threads` threads. Which thread
// runs a slot is unspecified, so results must depend on the slot only. The first exception that leaves body
// is thrown again here, after every thread has stopped.
void run_slots(int threads, int slots, void (*body)(void* context, int slot), void* context);

// How many of `threads` a call is worth that makes `products` multiplications and moves `elements` numbers
// from memory to memory. To wake a thread and wait for it takes 5 microseconds where it still spins, 50 where
// it sleeps or another process has its core; a call of fewer than twice kWorthAThread runs on the thread at
// hand, so that a small layer on two threads costs what it does on one. It depends on sizes alone, and so do
// results. Measured on convolutions of 4 to 64 channels on maps of 2x2 to 28x28, in both layouts.
constexpr int64_t kWorthAThread = 600'000;  // products, 20 microseconds of one core
constexpr int64_t kProductsAnElement = 16;  // that take as long as moving one, packing included
inline int useful_threads(int threads, int64_t products, int64_t elements) {
  const int64_t work = products + kProductsAnElement * elements;
  return static_cast<int>(std::clamp<int64_t>(work / kWorthAThread, 1, std::max(threads, 1)));
}

// "libgomp.so.1 (path)" or "std::thread" when the process has no OpenMP runtime.
const char* parallel_runtime();

template <class F>
void parallel(int threads, int slots, F& body) {
  run_slots(threads, slots, [](void* context, int slot) { (*static_cast<F*>(context))(slot); }, &body);
}

// Calls run(slot) for every slot; whoever is free takes the next, so slots must not share outputs.
template <class F>
void share(int threads, int64_t slots, F& run) {
  int64_t next = 0;
  auto work = [&](int) {
    for (;;) {
      const int64_t slot = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (slot >= slots) return;
      run(slot);
    }
  };
  const int workers = threads < slots ? threads : static_cast<int>(slots);
  parallel(workers, workers, work);
}

// Memory of the calling thread that outlives the call, so that a step does not fault in fresh pages.
// 64-byte aligned, uninitialised, valid until the same thread asks for the same purpose again.
enum class Scratch { kValues, kWindow, kTile, kGradient, kPartial, kPanels, kSums, kCount };
void* scratch(Scratch purpose, unsigned long bytes);

}  // namespace sparsekd
