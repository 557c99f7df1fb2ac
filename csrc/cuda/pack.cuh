// Moving maps between strided tensors and the packed form.
//
// A block of 256 threads transposes a tile of 32 pixels by 32 images through shared memory, so that both
// sides are read and written along their own fast dimension; its rows are one element longer, which spreads
// columns over all banks. Each element is read and written once, and memory bandwidth limits the speed.
//
// Tests (tests/emulation): test_ops.py packs maps of all memory formats, test_mutants.py plants mistakes in
// this file.
#pragma once
#include "device.cuh"

namespace sparsekd_cuda {

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // a block is 32 x 8 threads; each moves four elements of a tile

struct Maps {
  int64_t batch, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t top, left;  // where the maps begin in the packed form
  int64_t packed_height, packed_width;
  int64_t lanes;
  bool channels_fast;  // walk along channels and not along rows of pixels

  __host__ __device__ int64_t pixels() const { return channels * packed_height * packed_width; }
};

struct Pixel {
  int32_t number;  // in the packed form
  int64_t offset;  // in the maps
  bool inside;
};

// The pixel at step q of the walk. There are fewer than 2^31 of them, and divisions of 64 bits would take
// longer than the memory does.
__device__ inline Pixel pixel_at(const Maps& m, uint32_t q) {
  const uint32_t channels = m.channels, high = m.packed_height, wide = m.packed_width;
  uint32_t c, h, w;
  if (m.channels_fast) {
    c = q % channels;
    w = q / channels % wide;
    h = q / channels / wide;
  } else {
    w = q % wide;
    h = q / wide % high;
    c = q / wide / high;
  }
  const int64_t y = int64_t{h} - m.top, x = int64_t{w} - m.left;
  const bool inside = y >= 0 && y < m.height && x >= 0 && x < m.width;
  return {static_cast<int32_t>((c * high + h) * wide + w), c * m.stride_c + y * m.stride_h + x * m.stride_w,
          inside};
}

__host__ __device__ inline int64_t lane_tiles(const Maps& m) { return ceil_div(m.lanes, kTile); }

// A thread finds one pixel of the block's tile, and leaves its number to those that go along the lanes.
template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) pack_kernel(Maps m, const T* maps, T* packed) {
  SPARSEKD_SHARED(T, tile, [kTile][kTile + 1]);
  SPARSEKD_SHARED(int32_t, numbers, [kTile]);
  const uint32_t across = lane_tiles(m), pixels = m.pixels();
  const uint32_t q0 = blockIdx.x / across * kTile, n0 = blockIdx.x % across * kTile;
  const Pixel from = pixel_at(m, q0 + threadIdx.x);
  if (threadIdx.y == 0) numbers[threadIdx.x] = from.number;
  if (q0 + threadIdx.x < pixels) {
    for (int r = threadIdx.y; r < kTile; r += kTileRows) {
      const bool there = from.inside && n0 + r < m.batch;
      tile[r][threadIdx.x] = there ? maps[from.offset + (n0 + r) * m.stride_n] : from_float<T>(0.0f);
    }
  }
  __syncthreads();
  const int64_t n = n0 + threadIdx.x;
  if (n >= m.lanes) return;
  for (int r = threadIdx.y; r < kTile && q0 + r < pixels; r += kTileRows)
    packed[numbers[r] * m.lanes + n] = tile[threadIdx.x][r];
}

template <class T>
__global__ void __launch_bounds__(kTile* kTileRows) unpack_kernel(Maps m, T* maps, const T* packed) {
  SPARSEKD_SHARED(T, tile, [kTile][kTile + 1]);
  SPARSEKD_SHARED(int32_t, numbers, [kTile]);
  const uint32_t across = lane_tiles(m), pixels = m.pixels();
  const uint32_t q0 = blockIdx.x / across * kTile, n0 = blockIdx.x % across * kTile;
  const Pixel to = pixel_at(m, q0 + threadIdx.x);
  if (threadIdx.y == 0) numbers[threadIdx.x] = to.number;
  __syncthreads();
  const int64_t n = n0 + threadIdx.x;
  if (n < m.batch)
    for (int r = threadIdx.y; r < kTile && q0 + r < pixels; r += kTileRows)
      tile[r][threadIdx.x] = packed[numbers[r] * m.lanes + n];
  __syncthreads();
  if (q0 + threadIdx.x >= pixels) return;
  for (int r = threadIdx.y; r < kTile && n0 + r < m.batch; r += kTileRows)
    maps[to.offset + (n0 + r) * m.stride_n] = tile[threadIdx.x][r];
}

}  // namespace sparsekd_cuda
