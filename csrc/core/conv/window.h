// What a convolution packs of its input: the rows and columns that some output reads.
#pragma once
#include <cstdint>

#include "core/blocked/map.h"

namespace sparsekd {

// Where the positions of a packed window, its rows or its columns, lie in the input. Those that no output
// reads are left out: what a long stride passes over, and what lies between the taps of a dilated kernel
// where all outputs pass over it. For the first output, window position p is input position lo + p / run *
// far + p % run * near.
struct WindowAxis {
  static constexpr int64_t kUnbroken = INT64_MAX;
  int64_t lo = 0;      // input position of the first tap
  int64_t stride = 1;  // input positions from one output to the next
  int64_t span = 1;    // window positions from the first tap of an output to its last
  int64_t step = 1;    // window positions from one output to the next, at most span
  int64_t near = 1, far = 0, run = kUnbroken;

  int64_t at(int64_t p) const { return lo + p / run * far + p % run * near; }
  // Of a tap of the first output.
  int64_t position(int64_t tap) const { return (tap - lo) / near; }
};

// The rows and columns of the input that an output row touches, as [row][channel][pitch columns].
struct Window {
  int64_t channels = 0;
  WindowAxis rows, cols;
  int64_t width = 0,
          pitch = 0;  // columns in use, and allocated (odd, so that channels spread over cache sets)

  int64_t row_bytes() const { return channels * pitch * kPixelBytes; }
};

// The taps of one axis, as input positions of the first output.
struct Reach {
  int64_t lo = 0, hi = 0;
  int64_t apart = 0;  // divides the distance between any two
  bool empty = true;

  void add(int64_t tap);
};

WindowAxis make_axis(const Reach& taps, int64_t outputs, int64_t stride);
Window make_window(int64_t channels, const WindowAxis& rows, const WindowAxis& cols, int64_t out_w);

// Whether a window is small enough to pack.
bool fits(const Window&);

}  // namespace sparsekd
