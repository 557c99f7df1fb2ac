// What an instruction set must provide; every field of a call is checked before it is made.
#pragma once
#include <cstdint>

#include "core/conv/plan.h"
#include "core/engine.h"

namespace sparsekd {

template <class T>
struct GatherCall {
  View4<const T> in;
  View4<T> out;
  const GatherPlan* plan;
  const T* values;  // in the plan's order
  const T* bias;    // one for each output channel, or null
  int threads;
  bool* finite;  // becomes false when a result is not, or may not be; set by many threads
};

template <class T>
struct WgradCall {
  View4<const T> grad, x;
  const Structure* weight;
  const WgradPlan* plan;
  T* dvalues;
  int threads;
};

template <class T>
struct ConvEngine {
  int64_t tile_pixels;  // output pixels that stay in registers over a list of nonzeros
  void (*gather)(const GatherCall<T>&);
  void (*wgrad)(const WgradCall<T>&);

  template <Isa>
  static const ConvEngine compiled;
};

// How the work of one call is cut. A lane computes one virtual image: a strip of rows of a real one, so that
// small batches fill the lanes too. Lanes come in groups; a group's rows come in chunks.
struct Schedule {
  int64_t strips, strip_rows;  // virtual images to an image; output rows of each (the last may have fewer)
  int64_t groups;
  int64_t chunks, chunk_rows;
  int64_t parts;  // output channels are cut too when there is too little else to share
};
Schedule schedule_rows(int64_t images, int64_t out_rows, int64_t out_channels, int64_t halo_rows,
                       int64_t lanes, int threads, int64_t chunks_per_thread);

}  // namespace sparsekd
