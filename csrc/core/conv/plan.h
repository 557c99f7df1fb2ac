// Topology turned into data the engine streams: offsets into a packed window, sorted for the caches.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/conv/conv.h"
#include "core/panels.h"

namespace sparsekd {

// One pixel of one channel in a packed window holds kPixelBytes: 16 floats or 8 doubles, one for each of the
// images that are computed together.
constexpr int64_t kPixelBytes = 64;

// The rows and columns of the input that an output row touches. The window stores pixels as
// [row][channel][pitch columns]; output column w with tap column d sits at window column
// (w * step_w + d - lo_w) / pack_step.
struct Window {
  int64_t channels = 0;
  int64_t lo_h = 0, span_h = 0;  // input row of the first window row relative to out_row * step_h; rows
  int64_t lo_w = 0;              // input column of window column 0
  int64_t cols = 0,
          pitch = 0;      // columns in use, and allocated (odd, so that channels spread over cache sets)
  int64_t step_h = 1;     // input rows from one output row to the next
  int64_t step_w = 1;     // window columns from one output column to the next
  int64_t pack_step = 1;  // input columns from one window column to the next

  int64_t row_bytes() const { return channels * pitch * kPixelBytes; }
};

// The outputs of one channel that take their input from one block of channels: offsets [begin, next begin).
// Or of a panel of `rows` channels with equal offsets, which stand there once for each of them. The first
// block has an entry for every channel, if need be an empty one, because it sets the outputs.
struct RowEntry {
  int32_t out_channel, begin, rows;
};

// out[n, o, h, w] = sum of value * in[n, i, h * step_h + dh, w * step + dw], as a list sorted by
// (block of input channels, output channel).
struct GatherPlan {
  Window window;
  std::vector<int32_t> block_begin;  // entries of block b: [block_begin[b], block_begin[b + 1])
  std::vector<RowEntry> entries;     // one more than used; its begin closes the last
  std::vector<int32_t> offset;       // bytes from the window row and column of the output position
  std::vector<int32_t> slot;         // which value multiplies it
  int64_t out_h = 0, out_w = 0;      // output positions computed; for dgrad those of one phase
  int64_t first_h = 0, first_w = 0;  // where they start in the output,
  int64_t every_h = 1, every_w = 1;  // and how far apart they lie
};

// fprop is one gather; dgrad is one for each phase of the stride; empty plans (no taps) fill with the bias.
// Null when a window would be too large to pack: the caller then takes the plain loops.
struct GatherPlans {
  std::vector<GatherPlan> phases;
  int64_t bytes() const;
};
std::shared_ptr<const GatherPlans> fprop_plan(const ConvGeometry&, const Structure&, int64_t tile_pixels);
std::shared_ptr<const GatherPlans> dgrad_plan(const ConvGeometry&, const Structure&, int64_t tile_pixels);

// The nonzeros of one output channel whose input lies in one block of channels stand together in row-major
// order: list (o, b) is [list_begin[o * blocks + b], list_begin[o * blocks + b + 1]).
struct WgradPlan {
  Window window;
  std::vector<int32_t> offset;  // for every nonzero in row-major order, as in GatherPlan
  std::vector<int32_t> list_begin;
  std::vector<uint8_t> panel_rows;  // see find_panels
  int64_t blocks = 0;
  int64_t strip_pixels = 1;  // positions that a list is summed over before its sums are added up
  int64_t piece_cols = 1;    // at most this many columns of a row at once
  int64_t bytes() const {
    return static_cast<int64_t>((offset.size() + list_begin.size()) * sizeof(int32_t) + panel_rows.size());
  }
};
std::shared_ptr<const WgradPlan> wgrad_plan(const ConvGeometry&, const Structure&);

}  // namespace sparsekd
