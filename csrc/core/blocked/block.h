// A residual block on blocked maps: convolutions, each with a BatchNorm and most with a ReLU behind it, whose
// last result is added to the input, or to a projection of it, before the last ReLU.
//
// Of what lies between, only the convolutions' own results z are stored. Normalised maps and masks are
// computed again from z and four numbers for each channel wherever they are read: in the packing of the next
// convolution, in the gates of the backward pass. So may be the map that a block gives, by the block that
// reads it. The backward pass makes one gradient map for each convolution and no other.
//
// Sources: He et al., Deep Residual Learning (2016), figure 5; Ioffe and Szegedy, Batch Normalization (2015),
// algorithm 1 and the derivatives in section 3.
#pragma once
#include <memory>
#include <vector>

#include "core/blocked/conv.h"

namespace sparsekd::blocked {

// A convolution and the norm behind it; z is what the convolution gives.
struct ConvNormShape {
  ConvGeometry geometry;
  std::shared_ptr<const Structure> weight;
  bool relu;  // behind the norm; of the last one in a block, behind the addition
};

template <class T>
struct ConvNorm {
  const ConvNormShape* shape;
  const T *values, *bias;  // bias, gamma, beta: [Co] or null
  const T *gamma, *beta;
  T *running_mean, *running_var;  // [Co] or null
  double eps;
  double rate;  // by which the running statistics move towards those of the batch, if these are used
  bool frozen;  // whether the running statistics normalise
  BlockedMap<T> z;
  T* state;  // [4][Co]: mean, scale, shift, 1 / deviation

  const T* mean() const { return state; }
  const T* scale() const { return state + z.channels; }
  const T* shift() const { return state + 2 * z.channels; }
  const T* rstd() const { return state + 3 * z.channels; }
};

template <class T>
struct Block {
  std::vector<ConvNorm<T>> main;
  std::vector<ConvNorm<T>> shortcut;  // none or one
  bool identity;                      // whether the input itself is added
  Operand<T> x;
  BlockedMap<T> out;  // without data where the result is read from what it is made of
  int threads;
};

// Fills out, z and state. Where something is not finite it returns false, and the running statistics stay as
// they were.
template <class T>
bool block_forward(const Block<T>& block);

// The norms in front of a block, whose results are added, gated by a ReLU or not, to be its input. Their own
// backward pass begins with the sums of the gradient behind that ReLU, which cost nothing here.
template <class T>
struct Before {
  bool relu;
  const T *z, *mean;
  const T *other = nullptr, *other_mean = nullptr;
  double* sums;  // [3][C]
};

template <class T>
struct ConvNormGradients {
  T *values, *bias, *gamma, *beta;  // values [nnz], the others [Co] or null
  T* grad;  // like z: memory for the gradient of the norm's result; unused for the last of a block
};

template <class T>
struct BlockGradients {
  const T* out;        // like the block's
  const double* sums;  // what Before::sums of the next block holds, and out is gated; or null: then the
                       // block's out has data
  T* gated;            // like out: memory for the gradient behind the last ReLU, unless sums are there
  std::vector<ConvNormGradients<T>> main, shortcut;
  T* projected;  // memory for the gradient through the shortcut's convolution, see projected_compact
  T* x;          // like the block's input, or null
  const Before<T>* before;
};

// Returns false where something is not finite.
template <class T>
bool block_backward(const Block<T>& block, const BlockGradients<T>& gradients);

// Whether the gradient through this convolution, of a shortcut, is zero between the outputs and kept without
// these zeros, in the shape of z.
inline bool projected_compact(const ConvGeometry& g) {
  return compact_supported(g) && g.stride_h == g.stride_w;
}

}  // namespace sparsekd::blocked
