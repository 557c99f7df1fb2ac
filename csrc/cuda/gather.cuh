// Products of a weight-sparse matrix with maps: forward passes and, on the transpose, input gradients.
//
// A block computes 64 rows at one patch of outputs, chunk by chunk of the channels that these rows read. The
// window of a chunk lies in shared memory (patch.cuh), loaded once for all 64 rows. A warp has eight of the
// rows, and a lane one vector of outputs, whose sums stay in registers over all chunks. The nonzeros go
// through shared memory, four of each row at a time, filled up with zeros, and are broadcast from there; each
// costs a lane one vector load of the window and as many multiply-adds as a vector has elements. So shared
// memory limits the speed, at a quarter or half of the peak of float32, whichever GPU. Blocks of all rows at
// one patch run together, as its window then stays in L2.
//
// Padding is zeros that are multiplied like everything else, which of finite numbers adds nothing. A lane
// whose sums are not finite goes through its row a second time and leaves the padding out.
//
// Tests (tests/emulation): test_ops.py compares with dense torch, test_mutants.py plants mistakes in this
// file, test_compiled.py requires vector loads and no spills of what nvcc makes.
//
// Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 5.
#pragma once
#include "patch.cuh"

namespace sparsekd_cuda {

constexpr int kRowsOfWarp = kRows / kWarps;
constexpr int kAtOnce = kWarp / kRowsOfWarp;  // nonzeros of each row, filled up with zeros

// A place: the vector of the window, and above it the row of the block, of which 32 are computed on at once.
constexpr int kRowShift = 16;
__device__ inline int32_t vector_of(int32_t place) { return place & ((1 << kRowShift) - 1); }
__device__ inline int32_t row_of(int32_t place) { return place >> kRowShift & (kRowsAtOnce - 1); }

struct alignas(8) Nonzero {
  int32_t bytes;  // from where the window of an output starts
  float value;
};

// Nonzeros in the order in which blocks take them: by blocks of 64 rows, by chunks of channels, by rows.
template <class T>
struct Matrix {
  int32_t rows, rows_of_group, channels_of_group;
  int32_t chunk, chunks;  // channels of a chunk, chunks of a block of rows
  const int32_t* starts;  // [blocks of rows * chunks * 64 + 1], of each row's nonzeros in a chunk
  const int32_t* places;  // of each nonzero's input in the window of its chunk, and its row; see above
  const int32_t* slots;   // which value each nonzero has
  const T *values, *bias;

  __host__ __device__ int64_t blocks() const { return ceil_div(rows, kRows); }
  __device__ float value(int32_t k) const { return to_float(values[slots[k]]); }
  // Nonzero k of a row that ends before `end`, for vectors of a size, or one that adds nothing.
  __device__ Nonzero nonzero(int32_t k, int32_t end, int size) const {
    return k < end ? Nonzero{vector_of(places[k]) * size, value(k)} : Nonzero{0, 0.0f};
  }
  // The first channel that a block of rows reads, and the one behind the last.
  __device__ int32_t first_channel(int32_t block) const {
    return block * kRows / rows_of_group * channels_of_group;
  }
  __device__ int32_t end_channel(int32_t block) const {
    const int32_t last = block * kRows + kRows < rows ? block * kRows + kRows - 1 : rows - 1;
    return (last / rows_of_group + 1) * channels_of_group;
  }
  __device__ const int32_t* starts_of(int32_t block, int32_t number) const {
    return starts + (int64_t{block} * chunks + number) * kRows;
  }
  // How many channels a chunk has; the last ones have fewer, or none.
  __device__ int32_t channels(int32_t block, int32_t number) const {
    const int32_t left = end_channel(block) - first_channel(block) - number * chunk;
    return left < 0 ? 0 : left < chunk ? left : chunk;
  }
};

template <class T, int kVec>
__device__ inline void multiply_add(float (&sum)[kVec], float factor, Vector<T, kVec> x) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += factor * to_float(x.v[i]);
}

__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

// Whether there is a result, and it is finite.
__device__ inline bool is_right(const float* check) { return check && is_finite(*check); }

template <int kVec>
__device__ inline bool are_finite(const float (&sum)[kVec]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kVec; ++i) finite = finite && is_finite(sum[i]);
  return finite;
}

// What the output of a lane reads of `maps` through a place of a chunk, if that is not padding.
template <class T, int kVec>
struct Taps {
  const Maps<T>& maps;
  const Patches& patches;
  int64_t image;
  int32_t top, left;  // where the output's own window starts

  __device__ Taps(const Maps<T>& maps, const Patches& patches, Origin at, Output mine)
      : maps(maps),
        patches(patches),
        image(at.image + mine.vector * kVec),
        top(patches.y.start + (at.y + mine.y * patches.y.spacing) * patches.y.stride),
        left(patches.x.start + (at.x + mine.x * patches.x.spacing) * patches.x.stride) {}

  template <class F>
  __device__ void with(int32_t vector, int32_t first, F act) const {
    const int32_t plane = patches.plane(), wide = patches.x.window;
    const int32_t y = top + vector % plane / wide * patches.y.pitch;
    const int32_t x = left + vector % plane % wide * patches.x.pitch;
    if (!maps.has(y, x)) return;
    const int64_t channel = first + vector / plane;
    act(maps.template load<kVec>(image, channel * maps.stride_c + maps.pixel(y, x)));
  }
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 2)
    gather_kernel(Matrix<T> matrix, Patches patches, Maps<T> x, Maps<T> y, const float* check) {
  using V = Vector<T, kVec>;
  if (is_right(check)) return;
  SPARSEKD_SHARED(V, tile, [kTileVectors]);
  SPARSEKD_SHARED(int32_t, window, [kTileVectors]);
  SPARSEKD_SHARED(Target, targets, [kWarp]);
  SPARSEKD_SHARED(Nonzero, stage, [kWarps][kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t block = static_cast<int32_t>(blockIdx.x % matrix.blocks());
  const Origin at(patches, blockIdx.x / matrix.blocks(), kVec);
  const Output mine(patches, lane);
  const char* const own = reinterpret_cast<const char*>(tile + mine.source);
  const int32_t first_row = block * kRows + warp * kRowsOfWarp, first_channel = matrix.first_channel(block);
  find_window(x, patches, at, window);
  find_targets(y, patches, at, targets);
  float sum[kRowsOfWarp][kVec];
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r)
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      sum[r][i] = matrix.bias && first_row + r < matrix.rows ? to_float(matrix.bias[first_row + r]) : 0.0f;

  for (int32_t number = 0; number < matrix.chunks; ++number) {
    const int32_t* const starts = matrix.starts_of(block, number);
    if (starts[0] == starts[kRows]) continue;  // nobody reads this chunk
    __syncthreads();                           // nobody still reads the one before
    load_window(x, patches, at, first_channel + number * matrix.chunk, matrix.channels(block, number), window,
                tile);
    const int32_t row = warp * kRowsOfWarp + lane / kAtOnce, end = starts[row + 1];
    int32_t k = starts[row] + lane % kAtOnce;
    Nonzero next = matrix.nonzero(k, end, sizeof(V));
    __syncthreads();
    while (const unsigned left = __ballot_sync(kAllLanes, k < end)) {
      stage[warp][lane] = next;
      __syncwarp();
      next = matrix.nonzero(k += kAtOnce, end, sizeof(V));  // on its way meanwhile
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        if (!(left >> r * kAtOnce & 1)) continue;  // all of the warp
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const Nonzero nonzero = stage[warp][r * kAtOnce + i];
          multiply_add(sum[r], nonzero.value, *reinterpret_cast<const V*>(own + nonzero.bytes));
        }
      }
      __syncwarp();  // nobody still reads what the next ones overwrite
    }
  }
  const int32_t rows = matrix.rows - first_row;  // that the warp has, if these are not too many
  unsigned again = 0;
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r)
    if (!are_finite(sum[r]) && r < rows && targets[lane].pixel >= 0) again |= 1u << r;
  const Taps<T, kVec> taps(x, patches, at, mine);
#pragma unroll 1
  for (int r = 0; again >> r; ++r) {
    if (!(again >> r & 1)) continue;
    SPARSEKD_REPEATS();
    float exact[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) exact[i] = matrix.bias ? to_float(matrix.bias[first_row + r]) : 0.0f;
#pragma unroll 1
    for (int32_t number = 0; number < matrix.chunks; ++number) {
      const int32_t* const starts = matrix.starts_of(block, number) + warp * kRowsOfWarp + r;
#pragma unroll 1
      for (int32_t k = starts[0]; k < starts[1]; ++k)
        taps.with(vector_of(matrix.places[k]), first_channel + number * matrix.chunk,
                  [&](V of_x) { multiply_add(exact, matrix.value(k), of_x); });
    }
#pragma unroll
    for (int s = 0; s < kRowsOfWarp; ++s)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[s][i] = s == r ? exact[i] : sum[s][i];
  }
  // The outputs take the place of the window, 32 rows at a time.
#pragma unroll 1
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    __syncthreads();  // nobody still reads what was there
    const int place = warp * kRowsOfWarp - first;
    if (place >= 0 && place < kRowsAtOnce)
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        V result;
#pragma unroll
        for (int i = 0; i < kVec; ++i) result.v[i] = from_float<T>(sum[r][i]);
        tile[(place + r) * kRowVectors + lane] = result;
      }
    __syncthreads();
    for_outputs(y, at, kVec, block * kRows + first, targets,
                [&](int row, int of, int64_t image, int64_t offset) {
                  if (offset >= 0) y.store(image, offset, tile[row * kRowVectors + of]);
                });
  }
}

}  // namespace sparsekd_cuda
