#include <algorithm>
#include <limits>
#include <string>

#include "core/conv/conv.h"
#include "core/error.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

void at_least(const char* name, int64_t value, int64_t least) {
  if (value < least)
    throw ShapeError(std::string(name) + ": expected at least " + std::to_string(least) + ", got " +
                     std::to_string(value));
}

int64_t output_size(const char* name, int64_t in, int64_t before, int64_t after, int64_t kernel,
                    int64_t dilation, int64_t stride) {
  const int64_t room = in + before + after - dilation * (kernel - 1) - 1;
  if (room < 0)
    throw ShapeError(std::string(name) + ": padded input " + std::to_string(in + before + after) +
                     " is smaller than the dilated kernel " + std::to_string(dilation * (kernel - 1) + 1));
  return room / stride + 1;
}

}  // namespace

void complete_geometry(ConvGeometry& g) {
  at_least("batch", g.batch, 0);
  at_least("in_channels", g.in_channels, 1);
  at_least("out_channels", g.out_channels, 1);
  at_least("input height", g.in_h, 0);
  at_least("input width", g.in_w, 0);
  at_least("kernel_size", std::min(g.kernel_h, g.kernel_w), 1);
  at_least("stride", std::min(g.stride_h, g.stride_w), 1);
  at_least("dilation", std::min(g.dilation_h, g.dilation_w), 1);
  at_least("padding", std::min(std::min(g.pad_top, g.pad_bottom), std::min(g.pad_left, g.pad_right)), 0);
  at_least("groups", g.groups, 1);
  // Every product of sizes below stays far inside int64.
  const int64_t largest = std::max({g.batch, g.in_channels, g.out_channels, g.in_h, g.in_w, g.kernel_h,
                                    g.kernel_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.pad_top,
                                    g.pad_bottom, g.pad_left, g.pad_right, g.groups});
  if (largest > (int64_t{1} << 30))
    throw ShapeError("convolution: a size exceeds 2^30, got " + std::to_string(largest));
  if (g.in_channels % g.groups || g.out_channels % g.groups)
    throw ShapeError("groups: must divide in_channels " + std::to_string(g.in_channels) +
                     " and out_channels " + std::to_string(g.out_channels) + ", got " +
                     std::to_string(g.groups));
  if (g.in_channels / g.groups > std::numeric_limits<int32_t>::max() / g.kernel_h / g.kernel_w)
    throw ShapeError("weight: in_channels / groups * kernel height * kernel width must fit int32");
  g.out_h =
      output_size("input height", g.in_h, g.pad_top, g.pad_bottom, g.kernel_h, g.dilation_h, g.stride_h);
  g.out_w = output_size("input width", g.in_w, g.pad_left, g.pad_right, g.kernel_w, g.dilation_w, g.stride_w);
}

void check_weight(const ConvGeometry& g, const Structure& weight) {
  const int64_t columns = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
  if (weight.rows != g.out_channels || weight.cols != columns)
    throw ShapeError("weight: expected " + std::to_string(g.out_channels) + " rows and " +
                     std::to_string(columns) + " columns, got " + std::to_string(weight.rows) + " and " +
                     std::to_string(weight.cols));
}

int conv_threads(const ConvGeometry& g, const Structure& weight, int64_t passes, int threads) {
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  const int64_t moved = g.batch * g.in_channels * g.in_h * g.in_w + pixels * g.out_channels;
  return useful_threads(threads, passes * pixels * weight.nnz, passes * moved);
}

}  // namespace sparsekd
