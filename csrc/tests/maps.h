// Blocked maps for tests. Lanes without an image, and results before they are computed, hold NaN.
#pragma once
#include <cstdlib>
#include <memory>

#include "core/blocked/map.h"
#include "tests/harness.h"

namespace sparsekd {

template <class T>
struct Map {
  BlockedMap<T> map;
  std::unique_ptr<T, void (*)(void*)> data{nullptr, std::free};

  Map(int64_t n, int64_t c, int64_t h, int64_t w, bool fill = true) : map{nullptr, n, c, h, w} {
    const size_t bytes = (map.elements() * sizeof(T) + 63) / 64 * 64 + 64;
    data.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    map.data = data.get();
    for (int64_t i = 0; i < map.elements(); ++i) map.data[i] = std::numeric_limits<T>::quiet_NaN();
    if (fill)
      each([&](int64_t b, int64_t ch, int64_t y, int64_t x) {
        *map.at(b, ch, y, x) = static_cast<T>(uniform());
      });
  }
  template <class F>
  void each(F f) const {
    for (int64_t b = 0; b < map.images; ++b)
      for (int64_t ch = 0; ch < map.channels; ++ch)
        for (int64_t y = 0; y < map.h; ++y)
          for (int64_t x = 0; x < map.w; ++x) f(b, ch, y, x);
  }
};

}  // namespace sparsekd
