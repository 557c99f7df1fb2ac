// Recomputes results that are not finite, term by term; exact.h says why the engines need it.
//
// The lists of taps are made as for a plan, but by channel only and with the tap's position instead of an
// offset, so that each term can be asked whether it lies inside the map. Nothing is tiled: the scan for what
// is not finite reads the result once, at memory speed, and fprop and dgrad skip it where the engine has
// found none; a sum stops as soon as it is NaN. Tests: test_nonfinite (border_tests.cc) compares with
// scalar.cc.
#include "core/conv/exact.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"

namespace sparsekd::exact {
namespace {

// A nonzero: the channel at its other end, and the input position of the first output.
struct Tap {
  int32_t channel, slot;
  int64_t dh, dw;
};

// The taps of each output channel, or of each input channel, one list after another.
struct Lists {
  std::vector<int64_t> begin;
  std::vector<Tap> taps;
};

Tap tap(const ConvGeometry& g, int64_t row, int32_t column, int32_t slot) {
  const int64_t area = g.kernel_h * g.kernel_w, group = row / (g.out_channels / g.groups);
  return {static_cast<int32_t>(group * (g.in_channels / g.groups) + column / area), slot,
          column % area / g.kernel_w * g.dilation_h - g.pad_top,
          column % g.kernel_w * g.dilation_w - g.pad_left};
}

Lists by_output(const ConvGeometry& g, const Structure& s) {
  Lists lists{{s.crow.begin(), s.crow.end()}, {}};
  lists.taps.reserve(s.nnz);
  for (int64_t row = 0; row < s.rows; ++row)
    for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) lists.taps.push_back(tap(g, row, s.col[k], k));
  return lists;
}

Lists by_input(const ConvGeometry& g, const Structure& s) {
  const Lists from = by_output(g, s);
  Lists lists{std::vector<int64_t>(g.in_channels + 1, 0), std::vector<Tap>(s.nnz)};
  for (const Tap& t : from.taps) ++lists.begin[t.channel + 1];
  for (int64_t c = 0; c < g.in_channels; ++c) lists.begin[c + 1] += lists.begin[c];
  std::vector<int64_t> next(lists.begin.begin(), lists.begin.end() - 1);
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t k = from.begin[row]; k < from.begin[row + 1]; ++k) {
      Tap t = from.taps[k];
      Tap& to = lists.taps[next[t.channel]++];
      to = t;
      to.channel = static_cast<int32_t>(row);
    }
  return lists;
}

// Calls redo(n, c, h, w) for every element that is not finite, along memory; threads take rows in turns.
template <class T, class F>
void for_nonfinite(const View4<T>& out, int threads, F redo) {
  const auto visit = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    if (T* const at = out.at(n, c, h, w); !std::isfinite(*at)) *at = static_cast<T>(redo(n, c, h, w));
  };
  auto rows = [&](int slot) {
    for (int64_t row = slot; row < out.n * out.h; row += threads) {
      const int64_t n = row / out.h, h = row % out.h;
      if (out.stride_c == 1) {
        for (int64_t w = 0; w < out.w; ++w)
          for (int64_t c = 0; c < out.c; ++c) visit(n, c, h, w);
      } else {
        for (int64_t c = 0; c < out.c; ++c)
          for (int64_t w = 0; w < out.w; ++w) visit(n, c, h, w);
      }
    }
  };
  parallel(threads, threads, rows);
}

// Outputs [begin, end) of an axis whose input position out * stride + tap lies in [0, inputs).
struct Span {
  int64_t begin, end;
  Span(int64_t tap, int64_t stride, int64_t outputs, int64_t inputs) {
    const auto up = [&](int64_t a) { return a > 0 ? (a + stride - 1) / stride : 0; };
    begin = up(-tap);
    end = std::min(outputs, up(inputs - tap));
  }
};

}  // namespace

template <class T>
void conv_fprop(const ConvGeometry& g, const Structure& s, View4<const T> x, const T* values, const T* bias,
                View4<T> y, int threads) {
  const Lists lists = by_output(g, s);
  for_nonfinite(y, threads, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = bias ? static_cast<double>(bias[c]) : 0.0;
    for (int64_t k = lists.begin[c]; k < lists.begin[c + 1] && !std::isnan(sum); ++k) {
      const Tap& t = lists.taps[k];
      const int64_t ih = h * g.stride_h + t.dh, iw = w * g.stride_w + t.dw;
      if (ih >= 0 && ih < g.in_h && iw >= 0 && iw < g.in_w)
        sum += static_cast<double>(values[t.slot]) * *x.at(n, t.channel, ih, iw);
    }
    return sum;
  });
}

template <class T>
void conv_dgrad(const ConvGeometry& g, const Structure& s, View4<const T> grad, const T* values, View4<T> dx,
                int threads) {
  const Lists lists = by_input(g, s);
  const auto meets = [](int64_t at, int64_t stride, int64_t outputs) {
    return at >= 0 && at % stride == 0 && at / stride < outputs;
  };
  for_nonfinite(dx, threads, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    for (int64_t k = lists.begin[c]; k < lists.begin[c + 1] && !std::isnan(sum); ++k) {
      const Tap& t = lists.taps[k];
      if (meets(h - t.dh, g.stride_h, g.out_h) && meets(w - t.dw, g.stride_w, g.out_w))
        sum += static_cast<double>(values[t.slot]) *
               *grad.at(n, t.channel, (h - t.dh) / g.stride_h, (w - t.dw) / g.stride_w);
    }
    return sum;
  });
}

template <class T>
void conv_wgrad(const ConvGeometry& g, const Structure& s, View4<const T> grad, View4<const T> x, T* dvalues,
                int threads) {
  const auto redo = [&](int64_t row, const Tap& t) {
    const Span rows(t.dh, g.stride_h, g.out_h, g.in_h), cols(t.dw, g.stride_w, g.out_w, g.in_w);
    double sum = 0;
    for (int64_t n = 0; n < g.batch; ++n)
      for (int64_t h = rows.begin; h < rows.end && !std::isnan(sum); ++h)
        for (int64_t w = cols.begin; w < cols.end; ++w)
          sum += static_cast<double>(*grad.at(n, row, h, w)) *
                 *x.at(n, t.channel, h * g.stride_h + t.dh, w * g.stride_w + t.dw);
    return sum;
  };
  auto rows = [&](int slot) {
    for (int64_t row = slot; row < s.rows; row += threads)
      for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k)
        if (!std::isfinite(dvalues[k])) dvalues[k] = static_cast<T>(redo(row, tap(g, row, s.col[k], k)));
  };
  parallel(s.nnz > 4096 ? threads : 1, threads, rows);
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

}  // namespace sparsekd::exact
