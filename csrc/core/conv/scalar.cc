#include <algorithm>
#include <cstring>
#include <vector>

#include "core/conv/conv.h"
#include "core/parallel.h"

namespace sparsekd::scalar {
namespace {

struct Tap {
  int64_t channel, dh, dw;  // input row = output row * stride + dh, likewise columns
};

Tap tap(const ConvGeometry& g, int64_t row, int32_t column) {
  const int64_t area = g.kernel_h * g.kernel_w;
  const int64_t group = row / (g.out_channels / g.groups);
  return {group * (g.in_channels / g.groups) + column / area,
          column % area / g.kernel_w * g.dilation_h - g.pad_top,
          column % g.kernel_w * g.dilation_w - g.pad_left};
}

// Calls visit(oh, ow, ih, iw) for every output position whose input position exists.
template <class F>
void for_positions(const ConvGeometry& g, const Tap& t, F visit) {
  for (int64_t oh = 0; oh < g.out_h; ++oh) {
    const int64_t ih = oh * g.stride_h + t.dh;
    if (ih < 0 || ih >= g.in_h) continue;
    for (int64_t ow = 0; ow < g.out_w; ++ow) {
      const int64_t iw = ow * g.stride_w + t.dw;
      if (iw >= 0 && iw < g.in_w) visit(oh, ow, ih, iw);
    }
  }
}

// Runs body(n) for every image, one image in one thread.
template <class F>
void for_images(int64_t images, int threads, F body) {
  const int slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, images)));
  auto work = [&](int slot) {
    for (int64_t n = images * slot / slots; n < images * (slot + 1) / slots; ++n) body(n, slot);
  };
  parallel(slots, slots, work);
}

}  // namespace

template <class T>
void conv_fprop(const ConvGeometry& g, const Structure& s, View4<const T> x, const T* values, const T* bias,
                View4<T> y, int threads) {
  std::vector<double> sums(static_cast<size_t>(std::max(1, threads)) * g.out_h * g.out_w);
  for_images(g.batch, threads, [&](int64_t n, int slot) {
    double* sum = sums.data() + static_cast<size_t>(slot) * g.out_h * g.out_w;
    for (int64_t row = 0; row < s.rows; ++row) {
      std::fill(sum, sum + g.out_h * g.out_w, bias ? static_cast<double>(bias[row]) : 0.0);
      for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) {
        const Tap t = tap(g, row, s.col[k]);
        for_positions(g, t, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw) {
          sum[oh * g.out_w + ow] += static_cast<double>(values[k]) * *x.at(n, t.channel, ih, iw);
        });
      }
      for (int64_t oh = 0; oh < g.out_h; ++oh)
        for (int64_t ow = 0; ow < g.out_w; ++ow)
          *y.at(n, row, oh, ow) = static_cast<T>(sum[oh * g.out_w + ow]);
    }
  });
}

template <class T>
void conv_dgrad(const ConvGeometry& g, const Structure& s, View4<const T> grad, const T* values, View4<T> dx,
                int threads) {
  const int64_t size = g.in_channels * g.in_h * g.in_w;
  std::vector<double> sums(static_cast<size_t>(std::max(1, threads)) * size);
  for_images(g.batch, threads, [&](int64_t n, int slot) {
    double* sum = sums.data() + static_cast<size_t>(slot) * size;
    std::fill(sum, sum + size, 0.0);
    for (int64_t row = 0; row < s.rows; ++row)
      for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) {
        const Tap t = tap(g, row, s.col[k]);
        for_positions(g, t, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw) {
          sum[(t.channel * g.in_h + ih) * g.in_w + iw] +=
              static_cast<double>(values[k]) * *grad.at(n, row, oh, ow);
        });
      }
    for (int64_t c = 0; c < g.in_channels; ++c)
      for (int64_t h = 0; h < g.in_h; ++h)
        for (int64_t w = 0; w < g.in_w; ++w)
          *dx.at(n, c, h, w) = static_cast<T>(sum[(c * g.in_h + h) * g.in_w + w]);
  });
}

template <class T>
void conv_wgrad(const ConvGeometry& g, const Structure& s, View4<const T> grad, View4<const T> x, T* dvalues,
                int threads) {
  const int slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, s.rows)));
  auto work = [&](int slot) {
    for (int64_t row = s.rows * slot / slots; row < s.rows * (slot + 1) / slots; ++row)
      for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) {
        const Tap t = tap(g, row, s.col[k]);
        double sum = 0;
        for (int64_t n = 0; n < g.batch; ++n)
          for_positions(g, t, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw) {
            sum += static_cast<double>(*grad.at(n, row, oh, ow)) * *x.at(n, t.channel, ih, iw);
          });
        dvalues[k] = static_cast<T>(sum);
      }
  };
  parallel(slots, slots, work);
}

#define SPARSEKD_INSTANTIATE(T)                                                                          \
  template void conv_fprop<T>(const ConvGeometry&, const Structure&, View4<const T>, const T*, const T*, \
                              View4<T>, int);                                                            \
  template void conv_dgrad<T>(const ConvGeometry&, const Structure&, View4<const T>, const T*, View4<T>, \
                              int);                                                                      \
  template void conv_wgrad<T>(const ConvGeometry&, const Structure&, View4<const T>, View4<const T>, T*, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::scalar
