// The k best of many positions: scores become keys that are all different, and a radix select finds the k-th
// largest of them, eight bits at a time from the top.
//
// Each of the eight passes counts one digit of the keys that agree with the digits found so far, in 256 bins
// of shared memory a block, and one block then picks the digit; a last pass collects. So the keys, eight
// bytes each, are read nine times, and memory bandwidth limits the speed. Counting uses integer atomics
// alone, whose sums do not depend on their order; so the chosen set never does.
//
// Tests (tests/emulation): test_growth.py compares with a full sort, test_mutants.py plants mistakes in this
// file.
//
// Source: Alabi et al., Fast K-Selection Algorithms for Graphics Processing Units (JEA 2012), section 3.
#pragma once
#include "device.cuh"

namespace sparsekd_cuda {

constexpr int kBins = 256;  // also the threads of a block
constexpr uint64_t kNan = 0xffffffff00000000ull;

struct Selection {
  uint64_t threshold;  // the bits found so far of the key that is the last to be taken
  uint32_t wanted;     // how many are still to be found among keys that begin with these bits
  uint32_t taken;
  uint32_t bins[kBins];
};

// Rises with the score; only NaN gets all ones.
__device__ inline uint32_t rank_of(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Rectangle {
  int64_t row, rows, col, cols;
  int64_t width;  // columns of the weight
};

template <class T>
__global__ void keys_kernel(Rectangle at, bool magnitude, const T* __restrict__ scores, uint64_t* keys) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= at.rows * at.cols) return;
  const uint32_t position = static_cast<uint32_t>((at.row + i / at.cols) * at.width + at.col + i % at.cols);
  const float score = to_float(scores[i]);
  keys[i] = static_cast<uint64_t>(rank_of(magnitude ? fabsf(score) : score)) << 32 | ~position;
}

// Positions that are taken cannot grow.
__global__ void exclude_kernel(Rectangle at, int32_t nnz, const int32_t* __restrict__ taken_row,
                               const int32_t* __restrict__ taken_col, uint64_t* keys) {
  const int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (k >= nnz) return;
  const int64_t row = taken_row[k] - at.row, col = taken_col[k] - at.col;
  if (row >= 0 && row < at.rows && col >= 0 && col < at.cols) keys[row * at.cols + col] = 0;
}

__global__ void begin_kernel(Selection* selection, uint32_t k) {
  selection->bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    selection->threshold = 0;
    selection->wanted = k;
    selection->taken = 0;
  }
}

// Counts the digits at `shift` of the keys whose higher digits are those of the threshold.
__global__ void __launch_bounds__(kBins) count_kernel(int32_t count, const uint64_t* __restrict__ keys,
                                                      int shift, Selection* selection, int32_t* nan) {
  SPARSEKD_SHARED(uint32_t, bins, [kBins]);
  bins[threadIdx.x] = 0;
  __syncthreads();
  const uint64_t above = shift == 56 ? 0 : ~uint64_t{0} << (shift + 8);
  const uint64_t threshold = selection->threshold;
  for (int64_t i = int64_t{blockIdx.x} * kBins + threadIdx.x; i < count; i += int64_t{gridDim.x} * kBins) {
    const uint64_t key = keys[i];
    if (shift == 56 && key >= kNan) atomicExch(nan, 1);
    if ((key & above) == threshold) atomicAdd(&bins[key >> shift & (kBins - 1)], 1u);
  }
  __syncthreads();
  if (bins[threadIdx.x]) atomicAdd(&selection->bins[threadIdx.x], bins[threadIdx.x]);
}

// One block: finds the digit in which the count from above reaches what is wanted; digit 0 where none does.
__global__ void __launch_bounds__(kBins) choose_kernel(int shift, Selection* selection) {
  SPARSEKD_SHARED(uint32_t, bins, [kBins]);
  const uint32_t digit = threadIdx.x, wanted = selection->wanted;
  bins[digit] = selection->bins[digit];
  selection->bins[digit] = 0;
  __syncthreads();  // everybody has read `wanted`
  uint32_t above = 0;
  for (uint32_t d = digit + 1; d < kBins; ++d) above += bins[d];
  if (above < wanted && (wanted <= above + bins[digit] || digit == 0)) {
    selection->threshold |= static_cast<uint64_t>(digit) << shift;
    selection->wanted = wanted - above;
  }
}

// Writes the keys that are not zero and at least the threshold, in any order; a warp reserves its places at
// once.
__global__ void __launch_bounds__(kBins) take_kernel(int32_t count, const uint64_t* __restrict__ keys,
                                                     uint32_t k, Selection* selection, uint64_t* best) {
  const int lane = threadIdx.x % kWarp;
  const uint64_t threshold = selection->threshold;
  for (int64_t start = int64_t{blockIdx.x} * kBins; start < count; start += int64_t{gridDim.x} * kBins) {
    const int64_t i = start + threadIdx.x;
    const uint64_t key = i < count ? keys[i] : 0;
    const bool take = key != 0 && key >= threshold;
    const unsigned votes = __ballot_sync(kAllLanes, take);
    uint32_t place = 0;
    if (lane == 0) place = atomicAdd(&selection->taken, static_cast<uint32_t>(__popc(votes)));
    place = __shfl_sync(kAllLanes, place, 0) + __popc(votes & ((1u << lane) - 1));
    if (take && place < k) best[place] = key;
  }
}

}  // namespace sparsekd_cuda
