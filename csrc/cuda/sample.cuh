// Weight gradients at the nonzeros: products of output gradients with maps, sampled by a structure.
//
// A block computes the nonzeros of 32 rows, half of a block of gather.cuh, in one chunk of channels, over one
// part of the patches of outputs. The window of the chunk and the gradients of the rows lie in shared memory
// (patch.cuh). A warp takes 32 nonzeros at a time: each lane multiplies its outputs with what they read
// through every one of the 32, most of which share a row of the gradient, and the warp folds the 32 sums of
// its lanes, which leaves each lane with the total of one nonzero. So, as in gather.cuh, shared memory limits
// the speed. A second kernel adds the parts, in order, so that results do not depend on how warps are
// scheduled. What is not finite is summed up a second time without the padding.
//
// Tests (tests/emulation): test_ops.py compares with dense torch, test_mutants.py plants mistakes in this
// file, test_compiled.py requires vector loads and no spills of what nvcc makes.
//
// Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 6.
#pragma once
#include "gather.cuh"

namespace sparsekd_cuda {

constexpr int kMostNonzeros = 1024;  // that a block computes at once

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

// Lane i gets the sum over the lanes of their value i: in each step a lane gives half of its values away, and
// adds what it gets to the others.
template <int kDistance = kWarp / 2>
__device__ inline float fold(float (&value)[kWarp], int lane) {
  const bool upper = lane & kDistance;
#pragma unroll
  for (int i = 0; i < kDistance; ++i) {
    const float kept = upper ? value[i + kDistance] : value[i];
    const float given = upper ? value[i] : value[i + kDistance];
    value[i] = kept + __shfl_xor_sync(kAllLanes, given, kDistance);
  }
  if constexpr (kDistance > 1) return fold<kDistance / 2>(value, lane);
  return value[0];
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(Matrix<T> matrix, Patches patches, Maps<T> x, Maps<T> grad, int32_t parts, int32_t nnz,
                  float* __restrict__ partial, const float* check) {
  using V = Vector<T, kVec>;
  if (is_right(check)) return;
  SPARSEKD_SHARED(V, tile, [kTileVectors]);
  SPARSEKD_SHARED(V, upper, [kRowsAtOnce * kRowVectors]);
  SPARSEKD_SHARED(int32_t, window, [kTileVectors]);
  SPARSEKD_SHARED(Target, targets, [kWarp]);
  SPARSEKD_SHARED(int32_t, places, [kMostNonzeros]);
  SPARSEKD_SHARED(float, sums, [kMostNonzeros]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t cells = matrix.blocks() * kRows / kRowsAtOnce * matrix.chunks, part = blockIdx.x / cells;
  const int32_t cell = static_cast<int32_t>(blockIdx.x % cells), number = cell % matrix.chunks;
  const int32_t first_row = cell / matrix.chunks * kRowsAtOnce, block = first_row / kRows;
  const int32_t first_channel = matrix.first_channel(block) + number * matrix.chunk;
  const int32_t* const starts = matrix.starts_of(block, number) + first_row % kRows;
  const int32_t from = starts[0], to = starts[kRowsAtOnce];
  const int64_t all = patches.count(x.batch, kVec), begin = part * all / parts,
                end = (part + 1) * all / parts;
  const Output mine(patches, lane);
  const V* const own = tile + mine.source;
  for (int32_t first = from; first < to; first += kMostNonzeros) {
    const int32_t left = to - first, count = left < kMostNonzeros ? left : kMostNonzeros;
    __syncthreads();  // nobody still reads the ones before
    for (int32_t i = threadIdx.x; i < kMostNonzeros; i += kThreads) {
      places[i] = i < count ? matrix.places[first + i] : 0;  // those behind the last are not kept
      sums[i] = 0.0f;
    }
    for (int64_t patch = begin; patch < end; ++patch) {
      const Origin at(patches, patch, kVec);
      find_window(x, patches, at, window);
      find_targets(grad, patches, at, targets);
      __syncthreads();  // nor does anybody still read the patch before
      load_window(x, patches, at, first_channel, matrix.channels(block, number), window, tile);
      for_outputs(grad, at, kVec, first_row, targets, [&](int row, int of, int64_t image, int64_t offset) {
        upper[row * kRowVectors + of] =
            offset < 0 ? zeros<T, kVec>() : grad.template load<kVec>(image, offset);
      });
      __syncthreads();
      for (int32_t i = warp * kWarp; i < count; i += kThreads) {
        float sum[kWarp];
        int32_t place = places[i];
        V above = upper[row_of(place) * kRowVectors + lane];
#pragma unroll
        for (int j = 0; j < kWarp; ++j) {
          const int32_t before = place;
          place = places[i + j];
          if ((place ^ before) >> kRowShift) above = upper[row_of(place) * kRowVectors + lane];
          sum[j] = dot(above, own[vector_of(place)]);
        }
        sums[i + lane] += fold(sum, lane);
      }
    }
    for (int32_t i = warp * kWarp; i < count; i += kThreads) {
      float total = sums[i + lane];
      const unsigned again = __ballot_sync(kAllLanes, i + lane < count && !is_finite(total));
#pragma unroll 1
      for (int j = 0; j < kWarp && again >> j; ++j) {
        if (!(again >> j & 1)) continue;
        SPARSEKD_REPEATS();
        const int32_t place = places[i + j];
        float sum = 0.0f;
#pragma unroll 1
        for (int64_t patch = begin; patch < end; ++patch) {
          const Origin at(patches, patch, kVec);
          const int32_t pixel = output_pixel(grad, patches, at, mine);
          if (pixel < 0) continue;
          const Taps<T, kVec> taps(x, patches, at, mine);
          const int64_t row = first_row + int64_t{row_of(place)};
          const V above = grad.template load<kVec>(taps.image, row * grad.stride_c + pixel);
          taps.with(vector_of(place), first_channel, [&](V of_x) { sum += dot(above, of_x); });
        }
        sum = warp_sum(sum);
        if (lane == j) total = sum;
      }
      if (i + lane < count) partial[part * nnz + first + i + lane] = total;
    }
  }
}

// Adds the parts, and puts each nonzero's gradient where its value is.
template <class T>
__global__ void add_parts_kernel(int32_t nnz, int32_t parts, const float* __restrict__ partial,
                                 const int32_t* __restrict__ slots, T* __restrict__ dvalues,
                                 const float* check) {
  if (is_right(check)) return;
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k >= nnz) return;
  float sum = 0.0f;
  for (int32_t part = 0; part < parts; ++part) sum += partial[int64_t{part} * nnz + k];
  dvalues[slots[k]] = from_float<T>(sum);
}

}  // namespace sparsekd_cuda
