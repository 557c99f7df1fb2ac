// Where nonzeros are: a mask becomes rows of columns, and these become columns of rows.
//
// A warp takes a row of the mask, in vectors of 16 bytes where rows allow, and ballots say how many nonzeros
// the lower lanes have. For the transpose, a column has a word of marks for every 32 rows, a bit for each of
// them. The place of a nonzero in its column is the number of marks in the words before, and below its row
// in its own: every nonzero finds it by itself, and nothing is sorted. Nothing is reused, so memory limits
// the speed: the mask is read twice, to count and to list, and the marks are scattered accesses, one to set
// and one to read a nonzero.
//
// Tests (tests/emulation): test_cuda_topology.py compares with the mask and with torch's ops,
// test_mutants.py plants mistakes in this file.
#pragma once
#include "device.cuh"

namespace sparsekd_cuda {

constexpr int kRowWarps = 8;    // of a block; each takes a row, and they share nothing
constexpr int kScanners = 256;  // threads of the one block that scans
constexpr int kMarkRows = 32;   // bits of a word of marks

__device__ inline uint32_t bits_below(int bit) { return (1u << bit) - 1; }

__device__ inline int64_t row_of_warp() {
  return int64_t{blockIdx.x} * kRowWarps + static_cast<int>(threadIdx.x) / kWarp;
}

// Rows of bytes, in vectors of kVec of them.
template <int kVec>
struct Mask {
  static constexpr int kVector = kVec;
  int64_t rows, vectors;  // of a row
  const Vector<uint8_t, kVec>* bytes;

  // Bit i says whether entry i of the vector is a nonzero; there are none past the end of the row.
  __device__ uint32_t bits(int64_t row, int64_t vector) const {
    if (vector >= vectors) return 0;
    const Vector<uint8_t, kVec> entries = bytes[row * vectors + vector];
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) found |= uint32_t{entries.v[i] != 0} << i;
    return found;
  }
};

struct Rank {
  int32_t below, total;  // set bits in lower lanes, in the whole warp
};

// One ballot for each binary digit of the lanes' counts, which are at most kVec.
template <int kVec>
__device__ inline Rank rank_in_warp(uint32_t bits) {
  const uint32_t count = __popc(bits), lower = bits_below(threadIdx.x % kWarp);
  Rank rank{0, 0};
#pragma unroll
  for (int digit = 0; kVec >> digit; ++digit) {
    const uint32_t votes = __ballot_sync(kAllLanes, count >> digit & 1);
    rank.below += __popc(votes & lower) << digit;
    rank.total += __popc(votes) << digit;
  }
  return rank;
}

// crow[row + 1] becomes the number of nonzeros of the row.
template <int kVec>
__global__ void __launch_bounds__(kRowWarps* kWarp) count_rows_kernel(Mask<kVec> mask, int32_t* crow) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = row_of_warp();
  if (row >= mask.rows) return;  // the whole warp
  int32_t sum = 0;
  for (int64_t first = 0; first < mask.vectors; first += kWarp)
    sum += rank_in_warp<kVec>(mask.bits(row, first + lane)).total;
  if (lane == 0) crow[row + 1] = sum;
}

template <int kVec>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    list_columns_kernel(Mask<kVec> mask, const int32_t* __restrict__ crow, int32_t* __restrict__ col) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = row_of_warp();
  if (row >= mask.rows) return;  // the whole warp
  int32_t start = crow[row];
  for (int64_t first = 0; first < mask.vectors; first += kWarp) {
    const uint32_t bits = mask.bits(row, first + lane);
    const Rank rank = rank_in_warp<kVec>(bits);
    int32_t place = start + rank.below;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (bits >> i & 1) col[place++] = static_cast<int32_t>((first + lane) * kVec + i);
    start += rank.total;
  }
}

// starts[1 ... count], numbers of nonzeros, become where each of them ends. One block: every thread adds up a
// part, and then goes over it again from the sum of the parts before.
__global__ void __launch_bounds__(kScanners) scan_kernel(int64_t count, int32_t* starts) {
  SPARSEKD_SHARED(int32_t, sums, [kScanners]);
  const int part = threadIdx.x;
  const int64_t first = part * count / kScanners, end = (part + 1) * count / kScanners;
  int32_t sum = 0;
  for (int64_t i = first; i < end; ++i) sum += starts[i + 1];
  sums[part] = sum;
  __syncthreads();
  sum = 0;
  for (int before = 0; before < part; ++before) sum += sums[before];
  for (int64_t i = first; i < end; ++i) starts[i + 1] = sum += starts[i + 1];
  if (part == 0) starts[0] = 0;
}

struct Rows {
  int64_t rows, cols;
  const int32_t *crow, *col;

  __host__ __device__ int64_t words() const { return ceil_div(rows, kMarkRows) * cols; }
  __device__ int64_t word(int64_t row, int32_t column) const { return row / kMarkRows * cols + column; }
};

__global__ void __launch_bounds__(kRowWarps* kWarp) mark_kernel(Rows at, uint32_t* marks) {
  const int64_t row = row_of_warp();
  if (row >= at.rows) return;
  const int32_t end = at.crow[row + 1];
  for (int32_t k = at.crow[row] + static_cast<int>(threadIdx.x) % kWarp; k < end; k += kWarp)
    atomicOr(&marks[at.word(row, at.col[k])], 1u << row % kMarkRows);
}

// before [words] becomes how many nonzeros of the word's column earlier words mark, starts[column + 1] how
// many there are.
__global__ void count_columns_kernel(Rows at, const uint32_t* __restrict__ marks,
                                     int32_t* __restrict__ before, int32_t* __restrict__ starts) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= at.cols) return;
  int32_t sum = 0;
  for (int64_t word = column; word < at.words(); word += at.cols) {
    before[word] = sum;
    sum += __popc(marks[word]);
  }
  starts[column + 1] = sum;
}

__global__ void __launch_bounds__(kRowWarps* kWarp)
    place_kernel(Rows at, const uint32_t* __restrict__ marks, const int32_t* __restrict__ before,
                 const int32_t* __restrict__ starts, int32_t* __restrict__ row_of,
                 int32_t* __restrict__ slot_of) {
  const int64_t row = row_of_warp();
  if (row >= at.rows) return;
  const uint32_t lower = bits_below(row % kMarkRows);
  const int32_t end = at.crow[row + 1];
  for (int32_t k = at.crow[row] + static_cast<int>(threadIdx.x) % kWarp; k < end; k += kWarp) {
    const int32_t column = at.col[k];
    const int64_t word = at.word(row, column);
    const int32_t place = starts[column] + before[word] + __popc(marks[word] & lower);
    row_of[place] = static_cast<int32_t>(row);
    slot_of[place] = k;
  }
}

}  // namespace sparsekd_cuda
