// The dense weight gradient of a convolution, one rectangle at a time, so that nobody has to store all of it.
#pragma once
#include <cstdint>

#include "core/conv/conv.h"
#include "core/view.h"

namespace sparsekd {

// Output channels [row, row + rows) and, of the input channels of each one's group, [channel, channel +
// channels); all taps of the kernel.
struct WeightTile {
  int64_t row, rows;
  int64_t channel, channels;
};

// Throws ShapeError when the tile leaves the weight.
void check_tile(const ConvGeometry&, const WeightTile&);

// grad [batch, Co, out_h, out_w], x [batch, Ci, in_h, in_w] -> out [rows, channels * kernel_h * kernel_w], to
// which the tile's gradient is added. Results are the same bit for bit for the same number of threads. Throws
// ShapeError when the tile leaves the weight.
template <class T>
void conv_wgrad_tile(const ConvGeometry&, View4<const T> grad, View4<const T> x, const WeightTile&, T* out,
                     int threads);

namespace scalar {
template <class T>
void conv_wgrad_tile(const ConvGeometry&, View4<const T> grad, View4<const T> x, const WeightTile&, T* out);
}  // namespace scalar

}  // namespace sparsekd
