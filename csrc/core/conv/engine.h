// What an instruction set must provide; every field of a call is checked before it is made.
#pragma once
#include <cstdint>

#include "core/blocked/pool.h"
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

// How the work of one call is cut. A lane computes one virtual image: a strip of rows of a real one, so that
// small batches fill the lanes too. Lanes come in groups; a group's rows come in chunks.
struct Schedule {
  int64_t strips, strip_rows;  // virtual images to an image; output rows of each (the last may have fewer)
  int64_t groups;
  int64_t chunks, chunk_rows;
  int64_t parts;  // output channels are cut too when there is too little else to share
};
// The same on blocked maps. A place is a chunk of rows of a group of images. For each place, channel and sum,
// [places][channels][3]: what blocked::ChannelSums says, except that moments are the sums of the distances
// from `centre` [places][channels] and of their squares.
struct PlaceSums {
  double *sums, *centre;
};

template <class T>
struct BlockedForward {
  blocked::Operand<T> x;
  blocked::Result<T> y;
  const GatherPlan* plan;
  const T* values;
  const T* bias;
  Schedule schedule;
  PlaceSums sums;
  int threads;
  bool* finite;
};

template <class T>
struct BlockedBackward {
  blocked::Operand<T> grad, x;
  const blocked::Result<T>* dx;  // or null
  const Structure* weight;
  const BackwardPlan* plan;
  const T* values;  // of all phases one after the other
  T* dvalues;
  Schedule schedule;
  PlaceSums sums;
  int threads;
  bool* finite;
};

// y = main + other, and without other where its map has no data.
template <class T>
struct BlockedJoin {
  blocked::Operand<T> main, other;
  bool relu;
  blocked::Result<T> y;  // sum: kNothing or kMoments
  Schedule schedule;
  PlaceSums sums;
  int threads;
  bool* finite;
};

// y = grad behind a gate, kStored, or kOpen: nothing is stored then; sum: kGradient.
template <class T>
struct BlockedGate {
  const T* grad;
  blocked::Result<T> y;
  Schedule schedule;
  PlaceSums sums;
  int threads;
  bool* finite;
};

template <class T>
struct BlockedPool {
  blocked::Pooling pool;
  BlockedMap<const T> x;
  BlockedMap<T> y;
  Schedule schedule;  // of the rows of y
  int threads;
};

template <class T>
struct BlockedPoolBackward {
  blocked::Pooling pool;
  BlockedMap<const T> x, grad;
  blocked::Result<T> dx;  // gate: kStored or kOpen; sum: kNothing or kGradient
  Schedule schedule;      // of the rows of x
  PlaceSums sums;
  int threads;
  bool* finite;
};

template <class T>
struct ConvEngine {
  // Output pixels that stay in registers over a list of nonzeros, of ordinary and of blocked maps.
  TileShape tile, blocked_tile;
  void (*gather)(const GatherCall<T>&);
  void (*wgrad)(const WgradCall<T>&);
  void (*blocked_forward)(const BlockedForward<T>&);
  void (*blocked_backward)(const BlockedBackward<T>&);
  void (*blocked_join)(const BlockedJoin<T>&);
  void (*blocked_gate)(const BlockedGate<T>&);
  void (*blocked_pool)(const BlockedPool<T>&);
  void (*blocked_pool_backward)(const BlockedPoolBackward<T>&);
  void (*blocked_enter)(const View4<const T>&, const BlockedMap<T>&, int threads);
  void (*blocked_leave)(const BlockedMap<const T>&, const View4<T>&, int threads);

  template <Isa>
  static const ConvEngine compiled;
};

// most_strips: 1 where the lanes of a group have to be different images.
Schedule schedule_rows(int64_t images, int64_t out_rows, int64_t out_channels, int64_t halo_rows,
                       int64_t lanes, int64_t most_strips, int threads, int64_t chunks_per_thread);

}  // namespace sparsekd
