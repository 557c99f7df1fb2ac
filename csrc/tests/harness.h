// What the tests of core share: checks that count, random numbers, random structures and tensors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/conv/conv.h"
#include "core/error.h"
#include "core/view.h"

namespace sparsekd {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

template <class E, class F>
void check_throws(F run, const std::string& text) {
  try {
    run();
    check(false, "no error, expected: " + text);
  } catch (const E& e) {
    check(std::string(e.what()).find(text) != std::string::npos, std::string(e.what()) + " lacks: " + text);
  }
}

inline std::mt19937_64 rng(7);
inline int64_t pick(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(rng); }
inline double uniform() { return std::uniform_real_distribution<double>(-1, 1)(rng); }

struct Csr {
  std::vector<int32_t> crow{0}, col;
};

inline Csr random_csr(int64_t rows, int64_t cols, double density) {
  Csr s;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c)
      if (std::bernoulli_distribution(density)(rng)) s.col.push_back(static_cast<int32_t>(c));
    s.crow.push_back(static_cast<int32_t>(s.col.size()));
  }
  return s;
}

// Tiles of `height` rows times `width` channels at one of `taps` that are all there or not at all.
inline Csr random_tiles(int64_t rows, int64_t channels, int64_t taps, int64_t height, int64_t width,
                        double density) {
  Csr s;
  const int64_t chunks = (channels + width - 1) / width;
  std::vector<bool> kept(chunks * taps);
  for (int64_t r = 0; r < rows; ++r) {
    if (r % height == 0)
      for (size_t i = 0; i < kept.size(); ++i) kept[i] = std::bernoulli_distribution(density)(rng);
    for (int64_t c = 0; c < channels * taps; ++c)
      if (kept[c / taps / width * taps + c % taps]) s.col.push_back(static_cast<int32_t>(c));
    s.crow.push_back(static_cast<int32_t>(s.col.size()));
  }
  return s;
}

// Without structure every other time, else with tiles of any size.
inline Csr any_csr(int64_t rows, int64_t channels, int64_t taps, double density) {
  constexpr int64_t kSizes[] = {1, 2, 3, 4, 6, 8, 16, 32};
  if (pick(0, 1)) return random_csr(rows, channels * taps, density);
  return random_tiles(rows, channels, taps, kSizes[pick(0, 7)], kSizes[pick(0, 7)], density);
}

// A random tensor of the given sizes in contiguous, channels_last or batch-innermost order.
template <class T>
struct Tensor {
  std::vector<T> data;
  View4<T> view;
  Tensor(int64_t n, int64_t c, int64_t h, int64_t w, int layout, bool poison) : data(n * c * h * w) {
    for (T& v : data) v = poison ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(uniform());
    view = {data.data(), n, c, h, w, c * h * w, h * w, w, 1};
    if (layout == 1) view.stride_n = c * h * w, view.stride_c = 1, view.stride_h = w * c, view.stride_w = c;
    if (layout == 2) view.stride_n = 1, view.stride_c = n, view.stride_h = n * c * w, view.stride_w = n * c;
  }
  View4<const T> read() const {
    return {view.data,     view.n,        view.c,        view.h,       view.w,
            view.stride_n, view.stride_c, view.stride_h, view.stride_w};
  }
};

template <class T>
double largest_difference(const Tensor<T>& a, const Tensor<T>& b) {
  double difference = 0, scale = 1e-30;
  for (int64_t n = 0; n < a.view.n; ++n)
    for (int64_t c = 0; c < a.view.c; ++c)
      for (int64_t h = 0; h < a.view.h; ++h)
        for (int64_t w = 0; w < a.view.w; ++w) {
          const double d = std::fabs(*a.view.at(n, c, h, w) - *b.view.at(n, c, h, w));
          difference = d <= difference ? difference : d;  // keeps NaN
          scale = std::max<double>(scale, std::fabs(*b.view.at(n, c, h, w)));
        }
  return difference / scale;
}

template <class T>
double largest_difference(const std::vector<T>& a, const std::vector<T>& b) {
  double difference = 0, scale = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(a[i] - b[i]);
    difference = d <= difference ? difference : d;
    scale = std::max<double>(scale, std::fabs(b[i]));
  }
  return difference / scale;
}

inline ConvGeometry random_geometry() {
  for (;;) {
    ConvGeometry g{};
    g.groups = pick(0, 3) ? 1 : pick(2, 3);
    g.in_channels = g.groups * pick(1, 20);
    g.out_channels = g.groups * pick(1, 20);
    if (pick(0, 9) == 0) g.groups = g.out_channels = g.in_channels;  // depthwise
    const int64_t batches[] = {0, 1, 2, 7, 16, 17, 33};
    g.batch = batches[pick(0, 6)];
    g.in_h = pick(1, 12);
    g.in_w = pick(1, 20);
    g.kernel_h = pick(1, 4);
    g.kernel_w = pick(1, 4);
    g.stride_h = pick(1, 3);
    g.stride_w = pick(1, 3);
    g.dilation_h = pick(1, 2);
    g.dilation_w = pick(1, 3);
    g.pad_top = pick(0, 3);
    g.pad_bottom = pick(0, 3);
    g.pad_left = pick(0, 3);
    g.pad_right = pick(0, 3);
    try {
      complete_geometry(g);
      return g;
    } catch (const ShapeError&) {  // the kernel does not fit: draw again
    }
  }
}

inline std::string describe(const ConvGeometry& g, const char* isa, double density, int threads) {
  std::string text = isa;
  for (int64_t v :
       {g.batch, g.in_channels, g.in_h, g.in_w, g.out_channels, g.kernel_h, g.kernel_w, g.stride_h,
        g.stride_w, g.pad_top, g.pad_bottom, g.pad_left, g.pad_right, g.dilation_h, g.dilation_w, g.groups})
    text += " " + std::to_string(v);
  return text + " density " + std::to_string(density) + " threads " + std::to_string(threads);
}

}  // namespace sparsekd
