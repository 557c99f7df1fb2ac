// Topology turned into data the engine streams: offsets into a packed window, sorted for the caches.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/blocked/map.h"
#include "core/conv/conv.h"
#include "core/conv/window.h"
#include "core/panels.h"
#include "core/parallel.h"

namespace sparsekd {

// The outputs of one channel that take their input from one block of channels: offsets [begin, next begin).
// Or of a panel of `rows` channels with equal offsets, which stand there once for each of them. The first
// block has an entry for every channel, if need be an empty one, because it sets the outputs.
struct RowEntry {
  int32_t out_channel, begin, rows;
};

// out[n, o, h, w] = sum of value * in[n, i, h * stride_h + dh, w * stride_w + dw], as a list sorted by
// (block of input channels, output channel). Taps that meet the padding wherever they are have no entry.
struct GatherPlan {
  Window window;
  int64_t out_channels = 0;
  std::vector<int32_t> block_begin;  // entries of block b: [block_begin[b], block_begin[b + 1])
  std::vector<RowEntry> entries;     // one more than used; its begin closes the last
  std::vector<int32_t> offset;       // bytes from the window row and column of the output position
  std::vector<int32_t> slot;         // which value multiplies it
  int64_t out_h = 0, out_w = 0;      // output positions computed; for dgrad those of one phase
  int64_t first_h = 0, first_w = 0;  // where they start in the output,
  int64_t every_h = 1, every_w = 1;  // and how far apart they lie
};

// Output rows and columns that are computed together, see kTilePixels.
struct TileShape {
  int64_t rows, cols;
};

// What a plan depends on besides the structure; the batch is no part of it.
enum class Pass : int64_t { kFprop, kDgrad, kWgrad, kBackward, kBackwardCompact };
PlanKey plan_key(Pass, const ConvGeometry&, TileShape);

// fprop is one gather; dgrad is one for each phase of the stride that has taps. Where phases without taps are
// left out, `covers` is false: their outputs are the bias. Null when a window would be too large to pack: the
// caller then takes the plain loops.
struct GatherPlans {
  std::vector<GatherPlan> phases;
  bool covers = true;
  int64_t bytes() const;
};

// ordered[k] = the value that the k-th nonzero of the plan's lists multiplies by.
template <class T>
void order_values(const GatherPlan& plan, const T* values, T* ordered, int threads) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t nnz = static_cast<int64_t>(plan.slot.size());
  auto order = [&](int part) {
    for (int64_t k = nnz * part / threads; k < nnz * (part + 1) / threads; ++k)
      ordered[k] = values[plan.slot[k]];
  };
  parallel(nnz > kWorthAThread ? threads : 1, threads, order);
}

std::shared_ptr<const GatherPlans> fprop_plan(const ConvGeometry&, const Structure&, TileShape);
std::shared_ptr<const GatherPlans> dgrad_plan(const ConvGeometry&, const Structure&, TileShape);

// The nonzeros of one output channel whose input lies in one block of channels stand together in row-major
// order: list (o, b) is [list_begin[o * blocks + b], list_begin[o * blocks + b + 1]).
struct WgradPlan {
  Window window;
  std::vector<int32_t> offset;  // for every nonzero in row-major order, as in GatherPlan
  std::vector<int32_t> list_begin;
  std::vector<int32_t> outside;     // nonzeros that meet the padding wherever they are
  std::vector<uint8_t> panel_rows;  // see find_panels
  int64_t blocks = 0;
  int64_t strip_pixels = 1;  // positions that a list is summed over before its sums are added up
  int64_t piece_cols = 1;    // at most this many columns of a row at once
  int64_t bytes() const {
    return static_cast<int64_t>((offset.size() + list_begin.size() + outside.size()) * sizeof(int32_t) +
                                panel_rows.size());
  }
};
std::shared_ptr<const WgradPlan> wgrad_plan(const ConvGeometry&, const Structure&);

// Both gradients, from one packed window of the output gradient. dgrad has every phase of the stride, also
// those without taps; `compact` leaves these out and puts the outputs of the only other one side by side.
struct BackwardPlan {
  Window grad;
  GatherPlans dgrad;
  std::shared_ptr<const WgradPlan> wgrad;
  int64_t bytes() const { return dgrad.bytes() + wgrad->bytes(); }
};
std::shared_ptr<const BackwardPlan> backward_plan(const ConvGeometry&, const Structure&, TileShape,
                                                  bool compact);

}  // namespace sparsekd
