// What this processor can do at best, measured: the roofs that a kernel's speed is held against.
#pragma once
#include <cstdint>

#include "core/engine.h"

namespace sparsekd {

// Float32 operations per second of `threads` threads that do nothing but independent fused multiply-adds
// (two operations each) in the vectors of the current instruction set. Runs for about `seconds`.
double peak_flops(int threads, double seconds);

// Bytes per second that `threads` threads read, each from `bytes` of its own, over and over for about
// `seconds`. The size chooses the level: half of L2 measures L2, several times L3 measures memory. `bytes`
// is rounded up to whole steps of the reading loop.
double read_bandwidth(int64_t bytes, int threads, double seconds);

// The two loops.
struct PeakEngine {
  // Adds 1 to every accumulator `rounds` times by fused multiply-adds and returns their sum.
  float (*multiply_add)(int64_t rounds);
  int64_t flops;  // of one round
  // Adds up `count` floats at a 64-byte boundary; `count` is a multiple of kPeakStep.
  float (*add_up)(const float* data, int64_t count);

  template <Isa>
  static const PeakEngine compiled;
};
constexpr int64_t kPeakStep = 256;

}  // namespace sparsekd
