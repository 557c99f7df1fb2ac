// What an instruction set provides for inference with frozen networks; every field is checked before a call.
//
// A map of a frozen network holds a row of floats for each channel, the pixels of all images one after the
// other. A row of pixels ends in as many zeros as the widest padding needs, and so does an image, which makes
// every tap of a kernel a constant distance: output pixel p of a convolution is the sum over the nonzeros k
// of values[k] * in[p + offset[k]], whatever the kernel, its dilation or its groups, and a linear layer on
// tokens is the same. Lanes are pixels, so one image fills them as well as many do. Sixteen images may also
// lie side by side, a vector for each pixel: every tap is then a whole vector away.
#pragma once
#include <cstdint>

#include "core/engine.h"

namespace sparsekd::frozen {

constexpr int32_t kMostCoded = 1 << 24;  // channels that fit a word beside a code

enum class Activation : int32_t {
  kNone,
  kRelu,
  kRelu6,
  kSilu,
  kGelu,
  kHardswish,
  kSigmoid,
  kHardsigmoid,
  kCount
};

constexpr int64_t kLanes = 16;  // maps are padded to, and aligned at, this many floats

// Rows of a weight, or of a block of its channels, whose nonzeros have the same offsets. Their list is
// `count` times an offset, where the first output reads, as the bits of an int32_t, and a value for each row:
// kernels read a weight from its first word to its last.
struct Panel {
  int32_t row;    // the first
  int32_t rows;   // 1, 2 or 4
  int64_t first;  // word of the list
  int64_t count;  // of nonzeros in a row
};

// out[r, p] = activation(bias[r] + products + residual[r, p]), and zero where inside[p] is zero, for panels
// [first_panel, last_panel) and vectors [begin, end) of kLanes pixels. The channels of the input may come in
// blocks, a call for each: the first starts from the bias and the others from out, and the last ends with
// what follows the products.
struct ProductCall {
  const Panel* panels;
  const float* list;
  const float* bias;   // [rows]
  const float* scale;  // [rows] of codes
  const float* in;     // what offsets count from
  float* out;
  const float* residual;  // or null
  int64_t out_stride, residual_stride;
  const int32_t* inside;  // all bits or none, [pixels]
  Activation activation;
  int64_t first_panel, last_panel, begin, end;
  bool starts, ends;
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

// out[d, i] = sum over j of softmax over j of (scale * sum over d of q[d, i] * k[d, j] + mask[i, j]) times
// v[d, j]: a head of an image, for i and j in [0, tokens) and d in [0, width). Where the mask is minus
// infinity, keys do not count, and a query without keys gives zeros.
struct AttentionCall {
  const float *q, *k, *v;
  const float* mask;    // or null
  int64_t mask_stride;  // from query to query, 0: all have the same
  float* out;
  float* weights;  // [tokens * kAttentionQueries], aligned to 64 bytes
  int64_t tokens, width, in_stride, out_stride;
  float scale;
};
constexpr int64_t kAttentionQueries = 2 * kLanes;  // computed at once

struct FrozenEngine {
  void (*product)(const ProductCall&);
  // The same on one pixel, of which `in` has the channels side by side: a word of a list is a code, in its
  // upper 8 bits, and a channel. Panels are single rows; there are no blocks.
  void (*dots)(const ProductCall&);
  void (*copy)(const float* in, int64_t vectors, float* out);  // vectors of kLanes; out is aligned
  // out[x] = in[x * step], and the larger, or the sum, of out[x] and in[x * step], for x in [0, count).
  void (*take)(const float* in, int64_t step, int64_t count, float* out);
  void (*larger)(const float* in, int64_t step, int64_t count, float* out);
  void (*sum)(const float* in, int64_t step, int64_t count, float* out);
  void (*pointwise)(const PointwiseCall&);
  void (*layer_norm)(const LayerNormCall&);
  void (*attention)(const AttentionCall&);

  template <Isa>
  static const FrozenEngine compiled;
};

}  // namespace sparsekd::frozen
