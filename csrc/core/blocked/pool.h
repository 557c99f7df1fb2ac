// Pooling on blocked maps: the maximum or the average of a window, for each channel and image.
//
// The way back of a maximum is not stored. The backward pass looks for it again in the input, which is there
// for the ReLU in front of it anyway. A gradient row is finished while it is in the caches: through that ReLU
// and into the sums that the norm before it needs.
#pragma once
#include "core/blocked/block.h"

namespace sparsekd::blocked {

// Windows do not reach over the map by more than the padding, and always hold a pixel of it.
struct Pooling {
  bool average;  // of the whole window, padding included as zeros; otherwise the maximum without padding
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;

  int64_t out_h(int64_t h) const { return (h + 2 * pad_h - kernel_h) / stride_h + 1; }
  int64_t out_w(int64_t w) const { return (w + 2 * pad_w - kernel_w) / stride_w + 1; }
};

// NaN is the largest, as in torch.
template <class T>
void pool_forward(const Pooling&, const BlockedMap<const T>& x, const BlockedMap<T>& y, int threads);

// The gradient of y to that of x. Of equal ones the first in the window gets it, of NaN the last. With
// `before`, it is led through the ReLU and summed up as Before says. Returns false where a sum is not finite.
template <class T>
bool pool_backward(const Pooling&, const BlockedMap<const T>& x, const BlockedMap<const T>& grad, T* dx,
                   const Before<T>* before, int threads);

}  // namespace sparsekd::blocked
