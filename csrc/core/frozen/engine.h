// What an instruction set provides for inference with frozen networks; every field is checked before a call.
//
// A map of a frozen network holds a row of floats for each channel, the pixels of all images one after the
// other. A row of pixels ends in as many zeros as the widest padding needs, and so does an image, which makes
// every tap of a kernel a constant distance: output pixel p of a convolution is the sum over the nonzeros k
// of values[k] * in[p + offset[k]], whatever the kernel, its dilation or its groups, and a linear layer on
// tokens is the same. Lanes are pixels, so one image fills them as well as many do.
#pragma once
#include <cstdint>

#include "core/engine.h"

namespace sparsekd::frozen {

enum class Activation : int32_t { kNone, kRelu, kRelu6, kSilu, kGelu, kHardswish, kCount };

constexpr int64_t kLanes = 16;  // maps are padded to, and aligned at, this many floats

// The rows of a weight as distances from the first pixel of the first channel.
struct Lists {
  const int32_t* begin;       // [rows + 1]
  const int32_t* offset;      // [nnz]
  const float* value;         // [nnz]
  const float* bias;          // [rows]
  const uint8_t* panel_rows;  // at the first row of each panel: how many rows share its offsets
};

// out[r, p] = activation(bias[r] + products + residual[r, p]), and zero where inside[p] is zero, for rows
// [row_begin, row_end) and vectors [begin, end) of kLanes pixels.
struct ProductCall {
  Lists lists;
  const float* in;
  float* out;
  const float* residual;  // or null
  int64_t out_stride, residual_stride;
  const int32_t* inside;  // all bits or none, [pixels]
  Activation activation;
  int64_t row_begin, row_end, begin, end;
};

// out[c, p] = activation(in[c, p] * scale[c] + shift[c] + other[c, p]) inside, for channels [0, channels).
struct PointwiseCall {
  const float *in, *other, *scale, *shift;  // other, and scale with shift, may be null
  float* out;
  int64_t channels, vectors, in_stride, other_stride, out_stride;
  const int32_t* inside;
  Activation activation;
};

// out[c, p] = (in[c, p] - mean[p]) * rsqrt(variance[p] + eps) * scale[c] + shift[c] inside, over the
// channels, for vectors [begin, end).
struct LayerNormCall {
  const float *in, *scale, *shift;  // [channels]
  float* out;
  int64_t channels, in_stride, out_stride, begin, end;
  const int32_t* inside;
  float eps;
};

// out[d, i] = sum over j of softmax over j of (scale * sum over d of q[d, i] * k[d, j]) times v[d, j]: a head
// of an image, for i and j in [0, tokens) and d in [0, width).
struct AttentionCall {
  const float *q, *k, *v;
  float* out;
  float* weights;  // [tokens * kAttentionQueries], aligned to 64 bytes
  int64_t tokens, width, in_stride, out_stride;
  float scale;
};
constexpr int64_t kAttentionQueries = 2 * kLanes;  // computed at once

struct FrozenEngine {
  void (*product)(const ProductCall&);
  void (*pointwise)(const PointwiseCall&);
  void (*layer_norm)(const LayerNormCall&);
  void (*attention)(const AttentionCall&);

  template <Isa>
  static const FrozenEngine compiled;
};

}  // namespace sparsekd::frozen
