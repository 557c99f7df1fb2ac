// Products of a weight-sparse matrix with packed maps: forward passes and, on the transpose, input
// gradients.
//
// A warp computes one row at 32 vectors of lanes, one to a thread: 16 bytes, four sums in float32 or eight
// in half precision, which stay in registers over all nonzeros of the row. The nonzeros go through shared
// memory, 32 at a time, and are broadcast from there; each costs a thread one vector load of x and as many
// multiply-adds as it has sums. So reads of x limit the speed, from L2 or, where they hit, from L1. Warps
// therefore take all rows of one tile of positions before the next, whose part of x then stays in the cache,
// and rows in the order of their lengths, so that those of a block end together and the longest start first.
//
// The zeros of the padding are multiplied like everything else, which of finite numbers adds nothing. A
// thread whose sums are not finite goes through its row a second time and leaves the padding out.
//
// Tests (tests/emulation): test_ops.py compares with dense torch, test_mutants.py plants mistakes in this
// file, test_compiled.py requires vector loads and no spills of what nvcc makes.
//
// Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 5.
#pragma once
#include "device.cuh"

namespace sparsekd_cuda {

constexpr int kWarps = 4;  // of a block; they share nothing

// The positions of an output on the pixels of x.
struct Window {
  int32_t height, width;
  int32_t in_row, in_col;  // pixels of x between neighbours
  int32_t vectors;         // of lanes, at each position

  __host__ __device__ int64_t units() const { return int64_t{1} * height * width * vectors; }
  // The pixel of x that unit `u` meets with an offset of 0, and its vector there.
  __device__ int64_t pixel(int32_t u) const {
    const int32_t position = u / vectors;
    return position / width * in_row + position % width * in_col;
  }
  __device__ int64_t source(int32_t u) const { return pixel(u) * vectors + u % vectors; }
};

// Where the positions of a row are in y, in pixels.
struct Target {
  int64_t pixels;  // of a row
  int32_t origin, row, col;

  __device__ int64_t vector(const Window& window, int32_t matrix_row, int32_t u) const {
    const int32_t position = u / window.vectors, vector = u % window.vectors;
    const int64_t pixel =
        origin + int64_t{1} * (position / window.width) * row + int64_t{1} * (position % window.width) * col;
    return (matrix_row * pixels + pixel) * window.vectors + vector;
  }
};

// Which pixels of a packed map belong to the map itself: the rest is padding.
struct Inside {
  int32_t packed_height, packed_width, top, left, height, width;

  __device__ bool has(int64_t pixel) const {
    const uint32_t s = static_cast<uint32_t>(pixel), wide = packed_width, high = packed_height;
    const int32_t y = static_cast<int32_t>(s / wide % high) - top, x = static_cast<int32_t>(s % wide) - left;
    return y >= 0 && y < height && x >= 0 && x < width;
  }
};

template <class T>
struct Matrix {
  int32_t rows;
  const int32_t *crow, *offset, *order, *slots;
  const T *values, *bias;

  __device__ float value(int32_t k) const { return to_float(values[slots ? slots[k] : k]); }
};

struct alignas(8) Nonzero {
  int32_t offset;
  float value;
};

template <class T, int kVec>
__device__ inline void multiply_add(float (&sum)[kVec], float factor, Vector<T, kVec> x) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += factor * to_float(x.v[i]);
}

__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

template <int kVec>
__device__ inline bool are_finite(const float (&sum)[kVec]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kVec; ++i) finite = finite && is_finite(sum[i]);
  return finite;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kWarps* kWarp)
    gather_kernel(Matrix<T> matrix, Window window, Inside inside, Target target,
                  const Vector<T, kVec>* __restrict__ x, Vector<T, kVec>* __restrict__ y) {
  SPARSEKD_SHARED(Nonzero, stage, [kWarps][kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t blocks_of_rows = static_cast<int32_t>(ceil_div(matrix.rows, kWarps));
  const int32_t place = static_cast<int32_t>(blockIdx.x) % blocks_of_rows * kWarps + warp;
  if (place >= matrix.rows) return;  // the whole warp
  const int32_t row = matrix.order[place];
  const int64_t unit = int64_t{blockIdx.x} / blocks_of_rows * kWarp + lane;
  const bool live = unit < window.units();  // the others help with the nonzeros
  const Vector<T, kVec>* source = x + (live ? window.source(static_cast<int32_t>(unit)) : 0);
  float sum[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] = matrix.bias ? to_float(matrix.bias[row]) : 0.0f;
  const int32_t end = matrix.crow[row + 1];
  for (int32_t first = matrix.crow[row]; first < end; first += kWarp) {
    const int count = end - first < kWarp ? end - first : kWarp;
    if (lane < count) stage[warp][lane] = {matrix.offset[first + lane], matrix.value(first + lane)};
    __syncwarp();
    if (live) {
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const Nonzero nonzero = stage[warp][i];
        multiply_add(sum, nonzero.value, source[int64_t{nonzero.offset} * window.vectors]);
      }
    }
    __syncwarp();  // nobody still reads what the next 32 overwrite
  }
  if (!live) return;
  if (!are_finite(sum)) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] = matrix.bias ? to_float(matrix.bias[row]) : 0.0f;
    const int32_t u = static_cast<int32_t>(unit);
#pragma unroll 1
    for (int32_t k = matrix.crow[row]; k < matrix.crow[row + 1]; ++k) {
      const int64_t pixel = window.pixel(u) + matrix.offset[k];
      if (inside.has(pixel))
        multiply_add(sum, matrix.value(k), x[pixel * window.vectors + u % window.vectors]);
    }
  }
  Vector<T, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) result.v[i] = from_float<T>(sum[i]);
  y[target.vector(window, row, static_cast<int32_t>(unit))] = result;
}

}  // namespace sparsekd_cuda
