// The maps of a group of images while a network runs, and what is done to them besides arithmetic that an
// engine provides: images in and out, phases of a stride, pools, gates, flattening.
#pragma once
#include <cstdint>

#include "core/frozen/plan.h"
#include "core/parallel.h"

namespace sparsekd::frozen {

class Maps {
 public:
  Maps(const Plan& plan, Workspace& memory, int threads)
      : plan_(plan), memory_(memory), unit_(plan.unit()), threads_(threads) {}

 protected:
  const Node& node(size_t i) const { return plan_.network().nodes()[i]; }
  const Step& step(size_t i) const { return plan_.steps()[i]; }
  const Grid& grid(size_t i) const { return plan_.grids()[step(i).grid]; }
  // The first pixel of channel c.
  float* at(size_t i, int64_t c = 0) const {
    return memory_.data() + plan_.start(step(i).slot) + c * grid(i).length;
  }

  // Calls body(channel) for all of them, on all threads.
  template <class F>
  void channels(int64_t count, int64_t elements, F body) const {
    const int workers = useful_threads(threads_, 0, elements);
    auto part = [&](int slot) {
      for (int64_t c = count * slot / workers; c < count * (slot + 1) / workers; ++c) body(c);
    };
    parallel(workers, workers, part);
  }

  // Calls body(row of pixels, plane, channel, y) for every row of a map.
  template <class F>
  void rows(size_t i, F body) const {
    const Shape& s = node(i).shape;
    const Grid& g = grid(i);
    channels(s.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
      for (int64_t n = 0; n < plan_.planes(); ++n)
        for (int64_t y = 0; y < s.height; ++y) body(at(i, c) + g.image(n) + y * g.stride, n, c, y);
    });
  }

  void read(size_t i, const float* from) const;
  void write(size_t i, float* to) const;
  // Copies every phase of the stride into channels of its own, padding included.
  void split(size_t i) const;
  void gate(size_t i) const;
  void sequence(size_t i) const;
  void pool(size_t i) const;
  void flatten(size_t i) const;

  const Plan& plan_;
  Workspace& memory_;
  const int64_t unit_;
  const int threads_;

 private:
  template <class F>
  void along(F f, const float* in, int64_t step, int64_t count, float* out) const;
  void windows(size_t i, float start, bool mean) const;
  float counted(size_t i, int64_t rows, int64_t x) const;
};

}  // namespace sparsekd::frozen
