// The layout that the convolution kernels compute in, kept from one layer of a network to the next:
// [images / lanes][height][channels][width][lanes], where a pixel of a channel holds kPixelBytes, the same
// pixel of 16 images in float and of 8 in double. A window is packed from it by copying whole cache lines,
// and a tile of results is stored as it lies in registers, so nothing is transposed between layers.
//
// Where the batch is no multiple of the lanes, those without image in the last group hold anything.
#pragma once
#include <cstdint>

namespace sparsekd {

constexpr int64_t kPixelBytes = 64;

template <class T>
struct BlockedMap {
  static constexpr int64_t kLanes = kPixelBytes / static_cast<int64_t>(sizeof(T));
  T* data = nullptr;  // 64-byte aligned
  int64_t images = 0, channels = 0, h = 0, w = 0;

  int64_t groups() const { return (images + kLanes - 1) / kLanes; }
  // Lanes of a group that hold images.
  int64_t lanes(int64_t group) const {
    const int64_t left = images - group * kLanes;
    return left < kLanes ? left : kLanes;
  }
  int64_t row_elements() const { return channels * w * kLanes; }
  int64_t elements() const { return groups() * h * row_elements(); }
  T* row(int64_t group, int64_t y) const { return data + (group * h + y) * row_elements(); }
  T* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return row(n / kLanes, y) + (c * w + x) * kLanes + n % kLanes;
  }
  operator BlockedMap<const T>() const { return {data, images, channels, h, w}; }
};

}  // namespace sparsekd
