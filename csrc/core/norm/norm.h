// BatchNorm of dense maps together with the residual and the ReLU that follow it:
//   y = act((x - mean) * weight / sqrt(var + eps) + bias + residual)
// forward and backward, in as few passes over memory as the sums allow.
#pragma once
#include <cstdint>

namespace sparsekd {

// Dense maps in memory order [images, pixels, channels] if channels_last, else [images, channels, pixels].
struct Maps {
  int64_t images, channels, pixels;
  bool channels_last;
};

template <class T>
struct Norm {
  Maps maps;
  const T *mean, *var;     // [channels]; var is the biased variance of the batch, or a running one
  const T *weight, *bias;  // [channels], or null for ones and zeros
  double eps;
  bool relu;
};

// Mean and biased variance of each channel, [channels] each. One pass over x; exact to rounding also where
// the mean is large against the deviation. No images or no pixels: NaN.
template <class T>
void norm_moments(const Maps& maps, const T* x, T* mean, T* var, int threads);

// x, y and residual (null for none) are laid out as `maps` says; y may not overlap the others.
template <class T>
void norm_forward(const Norm<T>& norm, const T* x, const T* residual, T* y, int threads);

template <class T>
struct NormGradients {
  const T *grad, *x;
  const T* y;   // with a residual before a ReLU: the output, whose zeros are the mask; null: no residual
  bool frozen;  // mean and var are constants, not moments of x
  T* dx;
  T* dresidual;        // written if y is given, and then needed
  T *dweight, *dbias;  // [channels]; both null if frozen and not wanted
};

template <class T>
void norm_backward(const Norm<T>& norm, const NormGradients<T>& gradients, int threads);

}  // namespace sparsekd
