// What an instruction set must provide to pick the best of many scores.
#pragma once
#include <cstdint>

#include "core/engine.h"

namespace sparsekd {

template <class T>
struct ScanEngine {
  // score[i] = value[i], or its magnitude. Returns how many are NaN.
  int64_t (*prepare)(const T* value, int64_t count, bool magnitude, T* score);
  // Copies the scores of at least `bar`, never NaN, with their positions: position[i], or first + i where
  // `position` is null. Returns how many. The copies may lie over the originals; kScanSlack entries more than
  // are counted may be written.
  int64_t (*collect)(const T* score, const int32_t* position, int32_t first, int64_t count, T bar, T* scores,
                     int32_t* positions);

  template <Isa>
  static const ScanEngine compiled;
};
constexpr int64_t kScanSlack = 16;

}  // namespace sparsekd
