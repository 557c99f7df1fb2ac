// Weight-sparse 2-D convolution: forward, input gradient, weight gradient at the nonzeros.
//
// The weight [Co, Ci/groups, kh, kw] is a Structure of Co rows and Ci/groups*kh*kw columns with one value for
// each nonzero in row-major order. Every function writes its whole output. Results are the same bit for bit
// for the same inputs, instruction set and number of threads.
//
// A result is the sum over those nonzeros whose input, or output gradient, lies inside its map. Nothing else
// takes part: what the padding holds is never multiplied, nor is a weight that is not stored, so infinity and
// NaN reach exactly the results that have them among their terms. A result that is not finite is summed up in
// double.
#pragma once
#include <cstdint>

#include "core/structure.h"
#include "core/view.h"

namespace sparsekd {

struct ConvGeometry {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w, groups;
};

// Fills out_h and out_w and checks every field; throws ShapeError naming the argument.
void complete_geometry(ConvGeometry& geometry);
// Throws ShapeError unless the structure is that of a weight of this geometry.
void check_weight(const ConvGeometry& geometry, const Structure& weight);

// How many of `threads` are worth waking for `passes` passes over its maps.
int conv_threads(const ConvGeometry& geometry, const Structure& weight, int64_t passes, int threads);

// x [batch, Ci, in_h, in_w], values [nnz], bias [Co] or null -> y [batch, Co, out_h, out_w]
template <class T>
void conv_fprop(const ConvGeometry&, const Structure&, View4<const T> x, const T* values, const T* bias,
                View4<T> y, int threads);

// grad [batch, Co, out_h, out_w], values [nnz] -> dx [batch, Ci, in_h, in_w]
template <class T>
void conv_dgrad(const ConvGeometry&, const Structure&, View4<const T> grad, const T* values, View4<T> dx,
                int threads);

// grad, x -> dvalues [nnz]
template <class T>
void conv_wgrad(const ConvGeometry&, const Structure&, View4<const T> grad, View4<const T> x, T* dvalues,
                int threads);

// The oracle: plain loops that accumulate in double, slow and independent of plans and packing.
namespace scalar {
template <class T>
void conv_fprop(const ConvGeometry&, const Structure&, View4<const T> x, const T* values, const T* bias,
                View4<T> y, int threads);
template <class T>
void conv_dgrad(const ConvGeometry&, const Structure&, View4<const T> grad, const T* values, View4<T> dx,
                int threads);
template <class T>
void conv_wgrad(const ConvGeometry&, const Structure&, View4<const T> grad, View4<const T> x, T* dvalues,
                int threads);
}  // namespace scalar

}  // namespace sparsekd
