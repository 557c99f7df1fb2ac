// Patches of outputs, and the windows of maps that they read, in shared memory.
//
// A block computes a patch of at most 32 vectors of outputs, one to a lane: a few rows and columns of a map
// for a few vectors of images, 16 bytes each. The window that the patch reads is loaded a chunk of channels
// at a time, as [channel][vector][y][x] with zeros for padding, so that inner loops need no test and every
// nonzero is one number, how far its input lies from where its output's window starts. Maps have any strides:
// threads walk along channels where these are neighbours in memory, else along rows of pixels. The outputs of
// a patch go back the same way. A channel takes an odd number of vectors: whichever way threads walk, those
// that access shared memory together use all of its banks.
//
// Outputs of a patch are `spacing` apart, and the pixels of its window `pitch`: with a dilation a patch has
// the outputs whose taps lie on one grid, and its window no other pixel.
//
// Tests (tests/emulation): test_ops.py compares with dense torch, test_mutants.py plants mistakes in this
// file.
#pragma once
#include "device.cuh"

namespace sparsekd_cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// More rows would share a window, but the sums of 64 in half precision take half of a thread's registers.
constexpr int kRows = 64;        // of the weight, in a block
constexpr int kRowsAtOnce = 32;  // whose outputs are in shared memory
// Of shared memory that a chunk of a window takes: what the 48 KiB that every GPU has leave beside the
// gradients, nonzeros and sums of sample.cuh.
constexpr int kTileVectors = 1152;
constexpr int kRowVectors = kWarp + 1;  // of a row of outputs in shared memory, odd too

struct Axis {
  int32_t outputs;              // how many there are
  int32_t patch, spacing;       // a patch has so many of them, so far apart
  int32_t start, stride;        // output o reads pixel start + o * stride, and those after it
  int32_t window, pitch;        // a patch reads so many pixels, so far apart
  int32_t out_start, out_step;  // output o is pixel out_start + o * out_step of the result

  __host__ __device__ int64_t patches() const {
    return spacing * ceil_div(ceil_div(outputs, spacing), patch);
  }
  __device__ int32_t first_output(int32_t number) const {
    return number % spacing + number / spacing * patch * spacing;
  }
  // Pixels of the window between two outputs of a patch.
  __device__ int32_t step() const { return spacing * stride / pitch; }
};

struct Patches {
  Axis y, x;
  int32_t vectors;  // of images, in a patch

  __host__ __device__ int64_t pixels() const { return int64_t{y.window} * x.window; }
  // Vectors of a channel in shared memory.
  __host__ __device__ int64_t plane() const { return vectors * pixels() | 1; }
  __host__ __device__ int64_t of_map() const { return y.patches() * x.patches(); }
  __host__ __device__ int64_t count(int64_t batch, int vector) const {
    return ceil_div(batch, int64_t{vectors} * vector) * of_map();
  }
};

template <class T, int kVec>
__device__ inline Vector<T, kVec> zeros() {
  Vector<T, kVec> none;
#pragma unroll
  for (int i = 0; i < kVec; ++i) none.v[i] = from_float<T>(0.0f);
  return none;
}

// Maps of any strides, in elements.
template <class T>
struct Maps {
  T* data;
  int64_t batch, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool channels_fast;  // walk along channels and not along rows of pixels

  // An element of `kVec` images from `image` on, zero for those behind the last.
  template <int kVec>
  __device__ Vector<T, kVec> load(int64_t image, int64_t offset) const {
    const T* from = data + image * stride_n + offset;
    Vector<T, kVec> found = zeros<T, kVec>();
    const int left = batch - image < kVec ? static_cast<int>(batch - image) : kVec;
#pragma unroll
    for (int i = 0; i < kVec; ++i, from += stride_n)
      if (i < left) found.v[i] = *from;
    return found;
  }
  template <int kVec>
  __device__ void store(int64_t image, int64_t offset, Vector<T, kVec> vector) const {
    T* to = data + image * stride_n + offset;
    const int left = batch - image < kVec ? static_cast<int>(batch - image) : kVec;
#pragma unroll
    for (int i = 0; i < kVec; ++i, to += stride_n)
      if (i < left) *to = vector.v[i];
  }
  __device__ bool has(int32_t y, int32_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ int64_t pixel(int32_t y, int32_t x) const { return y * stride_h + x * stride_w; }
};

// A lane's output in the patch, and the vector of the window that the output's own starts at.
struct Output {
  int32_t vector, y, x, source;

  __device__ Output(const Patches& patches, int32_t lane) {
    const int32_t high = patches.y.patch, wide = patches.x.patch;
    vector = lane / (high * wide), y = lane / wide % high, x = lane % wide;
    source = static_cast<int32_t>(vector * patches.pixels()) + y * patches.y.step() * patches.x.window +
             x * patches.x.step();
    if (vector >= patches.vectors) source = 0;  // a lane without an output reads as the first one does
  }
};

// Where a patch begins: its first image, row and column of outputs.
struct Origin {
  int64_t image;
  int32_t y, x;

  __device__ Origin(const Patches& patches, int64_t number, int vector) {
    const int64_t of_map = patches.of_map();
    const int32_t place = static_cast<int32_t>(number % of_map), across = patches.x.patches();
    image = number / of_map * patches.vectors * vector;
    y = patches.y.first_output(place / across), x = patches.x.first_output(place % across);
  }
};

// Writes the pixels of the window of a patch, in elements of the maps, or -1 for padding.
template <class T>
__device__ inline void find_window(const Maps<T>& maps, const Patches& patches, Origin at, int32_t* pixels) {
  const int32_t top = patches.y.start + at.y * patches.y.stride;
  const int32_t left = patches.x.start + at.x * patches.x.stride;
  for (int32_t i = threadIdx.x; i < patches.pixels(); i += kThreads) {
    const int32_t y = top + i / patches.x.window * patches.y.pitch;
    const int32_t x = left + i % patches.x.window * patches.x.pitch;
    pixels[i] = maps.has(y, x) ? static_cast<int32_t>(maps.pixel(y, x)) : -1;
  }
}

// A number of three digits that counts in steps of a block's threads, the first digit fastest: threads walk
// through shared memory without a division for every vector.
struct Walk {
  uint32_t radix[2], step[3], digit[3];

  __device__ Walk(uint32_t first, uint32_t second) : radix{first, second} {
    const uint32_t numbers[] = {kThreads, threadIdx.x};
    uint32_t* const digits[] = {step, digit};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      digits[i][0] = numbers[i] % first;
      digits[i][1] = numbers[i] / first % second;
      digits[i][2] = numbers[i] / first / second;
    }
  }
  __device__ void next() {
    uint32_t carry = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      digit[i] += step[i] + carry;
      carry = i < 2 && digit[i] >= radix[i];
      if (carry) digit[i] -= radix[i];
    }
  }
};

// Loads `channels` of the window from `first` on; `pixels` is what find_window has written.
template <class T, int kVec>
__device__ inline void load_window(const Maps<T>& maps, const Patches& patches, Origin at, int32_t first,
                                   uint32_t channels, const int32_t* pixels, Vector<T, kVec>* tile) {
  const uint32_t wide = patches.pixels(), plane = patches.plane(), vectors = patches.vectors;
  const bool by_channel = maps.channels_fast;
  Walk walk(by_channel ? channels : wide, by_channel ? wide : vectors);
  for (; walk.digit[2] < (by_channel ? vectors : channels); walk.next()) {
    const uint32_t channel = by_channel ? walk.digit[0] : walk.digit[2];
    const uint32_t place = by_channel ? walk.digit[1] : walk.digit[0];
    const uint32_t vector = by_channel ? walk.digit[2] : walk.digit[1];
    const int32_t pixel = pixels[place];
    const int64_t offset = (first + int64_t{channel}) * maps.stride_c + pixel;
    tile[channel * plane + vector * wide + place] =
        pixel < 0 ? zeros<T, kVec>() : maps.template load<kVec>(at.image + vector * kVec, offset);
  }
}

// Where an output is in the maps of the result, or -1 for a lane that has none.
template <class T>
__device__ inline int32_t output_pixel(const Maps<T>& maps, const Patches& patches, Origin at, Output mine) {
  const int32_t y = at.y + mine.y * patches.y.spacing, x = at.x + mine.x * patches.x.spacing;
  if (mine.vector >= patches.vectors || y >= patches.y.outputs || x >= patches.x.outputs) return -1;
  return static_cast<int32_t>(
      maps.pixel(patches.y.out_start + y * patches.y.out_step, patches.x.out_start + x * patches.x.out_step));
}

// Where a lane's output is: its pixel, or -1, and its vector of images.
struct alignas(8) Target {
  int32_t pixel, vector;
};

// Writes the targets of a patch.
template <class T>
__device__ inline void find_targets(const Maps<T>& maps, const Patches& patches, Origin at, Target* targets) {
  const int lane = threadIdx.x;
  if (lane >= kWarp) return;
  const Output mine(patches, lane);
  targets[lane] = {output_pixel(maps, patches, at, mine), mine.vector};
}

// Calls act(row, lane, image, offset in the maps) for the outputs of 32 rows; an offset of -1 is none.
template <class T, class F>
__device__ inline void for_outputs(const Maps<T>& maps, Origin at, int vector, int32_t first,
                                   const Target* targets, F act) {
  for (int q = threadIdx.x; q < kRowsAtOnce * kWarp; q += kThreads) {
    const int row = maps.channels_fast ? q % kRowsAtOnce : q / kWarp;
    const int lane = maps.channels_fast ? q / kRowsAtOnce : q % kWarp;
    const Target target = targets[lane];
    const bool there = target.pixel >= 0 && first + row < maps.channels;
    const int64_t offset = (first + int64_t{row}) * maps.stride_c + target.pixel;
    act(row, lane, at.image + target.vector * vector, there ? offset : int64_t{-1});
  }
}

}  // namespace sparsekd_cuda
