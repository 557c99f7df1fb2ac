// Fork-join on the OpenMP runtime that torch already runs, without linking one of our own.
#pragma once

namespace sparsekd {

// Calls body(context, slot) once for every slot in [0, slots), on at most `threads` threads. Which thread
// runs a slot is unspecified, so results must depend on the slot only. The first exception that leaves body
// is thrown again here, after every thread has stopped.
void run_slots(int threads, int slots, void (*body)(void* context, int slot), void* context);

// "libgomp.so.1 (path)" or "std::thread" when the process has no OpenMP runtime.
const char* parallel_runtime();

template <class F>
void parallel(int threads, int slots, F& body) {
  run_slots(threads, slots, [](void* context, int slot) { (*static_cast<F*>(context))(slot); }, &body);
}

// Memory of the calling thread that outlives the call, so that a step does not fault in fresh pages.
// 64-byte aligned, uninitialised, valid until the same thread asks for the same purpose again.
enum class Scratch { kValues, kWindow, kTile, kGradient, kPartial, kPanels, kSums, kCount };
void* scratch(Scratch purpose, unsigned long bytes);

}  // namespace sparsekd
