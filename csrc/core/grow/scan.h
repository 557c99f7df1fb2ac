// What an instruction set must provide to pick the best of many scores.
#pragma once
#include <cstdint>

#include "core/conv/engine.h"

namespace sparsekd {

template <class T>
struct ScanKernels {
  // score[i] = value[i], or its magnitude. Returns how many are NaN.
  int64_t (*prepare)(const T* value, int64_t count, bool magnitude, T* score);
  // Copies the scores of at least `bar`, never NaN, with their positions: position[i], or first + i where
  // `position` is null. Returns how many. The copies may lie over the originals; kScanSlack entries more than
  // are counted may be written.
  int64_t (*collect)(const T* score, const int32_t* position, int32_t first, int64_t count, T bar, T* scores,
                     int32_t* positions);
};
constexpr int64_t kScanSlack = 16;

struct ScanEngine {
  ScanKernels<float> f32;
  ScanKernels<double> f64;
};

#define SPARSEKD_DECLARE(name, isa) extern const ScanEngine scan_##name;
SPARSEKD_FOR_EACH_ENGINE(SPARSEKD_DECLARE)
#undef SPARSEKD_DECLARE

}  // namespace sparsekd
