// Weight gradients at the nonzeros: products of packed gradients with packed maps, sampled by a structure.
//
// A warp computes eight consecutive nonzeros over one part of the units (positions times vectors of lanes).
// Its lanes walk along the units, each with eight sums in registers, and load a vector of x for every
// nonzero and one of the gradient for every row, mostly one for all eight. So, as in gather.cuh, reads of x
// limit the speed. At the end the warp adds up its lanes in a fixed order, and a second kernel adds the
// parts, again in order, so that results do not depend on how warps are scheduled. What is not finite is
// summed up a second time without the padding.
//
// Tests (tests/emulation): test_ops.py compares with dense torch, test_mutants.py plants mistakes in this
// file, test_compiled.py requires vector loads and no spills of what nvcc makes.
//
// Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 6.
#pragma once
#include "gather.cuh"

namespace sparsekd_cuda {

constexpr int kTogether = 8;

struct Samples {
  int32_t nnz;
  const int32_t *row, *offset;
};

template <class T, int kVec>
__device__ inline float dot(Vector<T, kVec> a, Vector<T, kVec> b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += to_float(a.v[i]) * to_float(b.v[i]);
  return sum;
}

// All lanes of the warp get the sum over them.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// What one lane adds up for nonzero k, without the padding.
template <class T, int kVec>
__device__ inline float sum_inside(Samples at, int64_t k, Window window, Inside inside, int32_t begin,
                                   int32_t end, const Vector<T, kVec>* __restrict__ grad,
                                   const Vector<T, kVec>* __restrict__ x) {
  const int64_t row = at.row[k], offset = at.offset[k];
  float sum = 0.0f;
#pragma unroll 1
  for (int32_t unit = begin; unit < end; unit += kWarp)
    if (inside.has(window.pixel(unit) + offset))
      sum += dot(grad[row * window.units() + unit], x[window.source(unit) + offset * window.vectors]);
  return sum;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kWarps* kWarp)
    sample_kernel(Samples at, Window window, Inside inside, int32_t parts,
                  const Vector<T, kVec>* __restrict__ grad, const Vector<T, kVec>* __restrict__ x,
                  float* __restrict__ partial) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = blockIdx.x % parts;
  const int64_t first = (int64_t{blockIdx.x} / parts * kWarps + warp) * kTogether;
  if (first >= at.nnz) return;  // the whole warp
  int32_t row[kTogether];
  const Vector<T, kVec>* of_x[kTogether];
  float sum[kTogether];
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    const int64_t k =
        first + j < at.nnz ? first + j : at.nnz - 1;  // the last one again where there are fewer
    row[j] = at.row[k];
    of_x[j] = x + int64_t{at.offset[k]} * window.vectors;
    sum[j] = 0.0f;
  }
  const int32_t begin = static_cast<int32_t>(part * window.units() / parts) + lane;
  const int32_t end = static_cast<int32_t>((part + 1) * window.units() / parts);
  for (int32_t unit = begin; unit < end; unit += kWarp) {
    const int64_t source = window.source(unit);
    Vector<T, kVec> upper = grad[row[0] * window.units() + unit];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (j > 0 && row[j] != row[j - 1]) upper = grad[row[j] * window.units() + unit];
      sum[j] += dot(upper, of_x[j][source]);
    }
  }
  int again = 0;
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    const float total = warp_sum(sum[j]);
    if (lane == j && first + j < at.nnz) partial[part * at.nnz + first + j] = total;
    again |= is_finite(total) ? 0 : 1 << j;  // the same in all lanes
  }
#pragma unroll 1
  for (int j = 0; again >> j; ++j) {
    const int64_t k = first + j;
    if (!(again >> j & 1) || k >= at.nnz) continue;
    const float total = warp_sum(sum_inside(at, k, window, inside, begin, end, grad, x));
    if (lane == j) partial[part * at.nnz + k] = total;
  }
}

template <class T>
__global__ void add_parts_kernel(int32_t nnz, int32_t parts, const float* __restrict__ partial,
                                 T* __restrict__ dvalues) {
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k >= nnz) return;
  float sum = 0.0f;
  for (int32_t part = 0; part < parts; ++part) sum += partial[int64_t{part} * nnz + k];
  dvalues[k] = from_float<T>(sum);
}

}  // namespace sparsekd_cuda
