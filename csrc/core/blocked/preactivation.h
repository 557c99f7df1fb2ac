// A residual block that normalises in front of its convolutions, on blocked maps: its input is a sum that has
// not been normalised, and so is its result. Also a convolution alone, in front of such blocks.
//
// The last convolution adds the residual to its results while they are in registers, and sums them up for the
// norm of the next block. The backward pass ends with one pass over the input's gradient, which needs sums
// that are known only then.
//
// Source: He et al., Identity Mappings in Deep Residual Networks (2016), figure 1b.
#pragma once
#include <vector>

#include "core/blocked/block.h"

namespace sparsekd::blocked {

template <class T>
struct PreActivation {
  std::vector<ConvNorm<T>> front;     // none or one: the norm of the input, with a ReLU; z is the input
  const double* moments;              // [2][C], of the input; used unless `front` is frozen
  std::vector<ConvNorm<T>> main;      // convolutions with norms and ReLUs behind them
  ConvNorm<T> last;                   // no norm; z is the block's output
  std::vector<ConvNorm<T>> shortcut;  // none or one, of the normalised input; no norm
  bool identity;                      // whether the input itself is added
  BlockedMap<const T> x;
  double* out_moments;  // [2][Co], or null
  int threads;
};

// Fills the outputs, z, states and out_moments. Where something is not finite it returns false, and the
// running statistics stay as they were.
template <class T>
bool preactivation_forward(const PreActivation<T>& block);

template <class T>
struct PreActivationGradients {
  const T* out;
  ConvNormGradients<T>
      front;  // values: null; grad: memory like the input, unless x is null or there is no front
  std::vector<ConvNormGradients<T>> main;
  ConvNormGradients<T> last, shortcut;
  T* projected;  // memory for the gradient through the shortcut, see projected_compact
  T* x;          // like the input, or null
};

template <class T>
bool preactivation_backward(const PreActivation<T>& block, const PreActivationGradients<T>& gradients);

}  // namespace sparsekd::blocked
