// A strided 4-D tensor (images, channels, rows, columns); strides count elements and may be anything.
#pragma once
#include <cstdint>

namespace sparsekd {

template <class T>
struct View4 {
  T* data;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;

  T* at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return data + in * stride_n + ic * stride_c + ih * stride_h + iw * stride_w;
  }
};

}  // namespace sparsekd
