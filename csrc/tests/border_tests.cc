// What lies outside the maps: infinity and NaN next to padding, and geometries that are mostly outside.
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "core/conv/conv.h"
#include "core/conv/plan.h"
#include "core/cpu.h"
#include "core/structure.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

// The same number, the same infinity, or both NaN.
template <class T>
bool alike(T a, T b, double tolerance) {
  if (std::isnan(b) || std::isinf(b)) return std::isnan(b) ? std::isnan(a) : a == b;
  return std::fabs(a - b) <= tolerance;
}

template <class T>
bool alike(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!alike(a[i], b[i], tolerance)) return false;
  return true;
}

template <class T>
bool alike(const Tensor<T>& a, const Tensor<T>& b, double tolerance) {
  for (int64_t n = 0; n < a.view.n; ++n)
    for (int64_t c = 0; c < a.view.c; ++c)
      for (int64_t h = 0; h < a.view.h; ++h)
        for (int64_t w = 0; w < a.view.w; ++w)
          if (!alike(*a.view.at(n, c, h, w), *b.view.at(n, c, h, w), tolerance)) return false;
  return true;
}

template <class T>
void spoil(std::vector<T>& data) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const T kinds[] = {kInfinity, -kInfinity, std::numeric_limits<T>::quiet_NaN()};
  for (int64_t i = pick(0, 2); i > 0 && !data.empty(); --i)
    data[pick(0, data.size() - 1)] = kinds[pick(0, 2)];
}

template <class T>
void test_nonfinite(int cases) {
  const double tolerance = std::is_same_v<T, float> ? 1e-3 : 1e-9;
  for (int i = 0; i < cases; ++i) {
    const ConvGeometry g = random_geometry();
    const int64_t taps = g.kernel_h * g.kernel_w, columns = g.in_channels / g.groups * taps;
    const double density = pick(0, 1) ? 0.2 : 1;
    const Csr csr = any_csr(g.out_channels, g.in_channels / g.groups, taps, density);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), g.out_channels,
                      columns);
    std::vector<T> values(s.nnz), bias(g.out_channels);
    for (T& v : values) v = static_cast<T>(uniform());
    for (T& v : bias) v = static_cast<T>(uniform());
    Tensor<T> x(g.batch, g.in_channels, g.in_h, g.in_w, pick(0, 2), false);
    Tensor<T> grad(g.batch, g.out_channels, g.out_h, g.out_w, pick(0, 2), false);
    spoil(values);
    spoil(x.data);
    spoil(grad.data);
    if (pick(0, 3) == 0) spoil(bias);

    Tensor<T> y0(g.batch, g.out_channels, g.out_h, g.out_w, 0, true),
        dx0(g.batch, g.in_channels, g.in_h, g.in_w, 0, true);
    std::vector<T> dv0(s.nnz);
    scalar::conv_fprop<T>(g, s, x.read(), values.data(), bias.data(), y0.view, 1);
    scalar::conv_dgrad<T>(g, s, grad.read(), values.data(), dx0.view, 1);
    scalar::conv_wgrad<T>(g, s, grad.read(), x.read(), dv0.data(), 1);
    for (Isa isa : available_isas()) {
      if (isa == Isa::kScalar) continue;
      set_isa(isa_name(isa));
      const int threads = static_cast<int>(pick(1, 3)), layout = static_cast<int>(pick(0, 2));
      Tensor<T> y(g.batch, g.out_channels, g.out_h, g.out_w, layout, false);
      Tensor<T> dx(g.batch, g.in_channels, g.in_h, g.in_w, layout, false);
      std::vector<T> dv(s.nnz);
      conv_fprop<T>(g, s, x.read(), values.data(), bias.data(), y.view, threads);
      conv_dgrad<T>(g, s, grad.read(), values.data(), dx.view, threads);
      conv_wgrad<T>(g, s, grad.read(), x.read(), dv.data(), threads);
      const std::string what = describe(g, isa_name(isa), density, threads);
      check(alike(y, y0, tolerance), "fprop of numbers that are not finite " + what);
      check(alike(dx, dx0, tolerance), "dgrad of numbers that are not finite " + what);
      check(alike(dv, dv0, tolerance), "wgrad of numbers that are not finite " + what);
    }
  }
  set_isa("auto");
}

ConvGeometry square(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  ConvGeometry g{};
  g.batch = 3;
  g.in_channels = 4;
  g.out_channels = 6;
  g.groups = 2;
  g.in_h = g.in_w = size;
  g.kernel_h = g.kernel_w = kernel;
  g.stride_h = g.stride_w = stride;
  g.pad_top = g.pad_bottom = g.pad_left = g.pad_right = padding;
  g.dilation_h = g.dilation_w = dilation;
  complete_geometry(g);
  return g;
}

// Bytes of a window with all the rows that an output reaches.
int64_t window_bytes(const Window& w) { return w.rows.span * w.row_bytes(); }

// Where strides, padding and dilation reach far beyond a small map, windows stay as small as the map and its
// outputs, and an input gradient has no phases without taps.
void test_far_reach() {
  constexpr int64_t kFar = 1'000'000, kWindowBytes = 1 << 20;
  std::vector<ConvGeometry> all;
  for (int64_t stride : {int64_t{10'000}, kFar, int64_t{1} << 30}) {
    all.push_back(square(1, 3, stride, 1, 1));
    all.push_back(square(1, 1, stride, 0, 1));
    all.push_back(square(7, 2, stride, 0, 2));
  }
  all.push_back(square(300, 3, 100, 1, 1));         // ten thousand phases, nine with taps
  all.push_back(square(8, 3, kFar, kFar, 1));       // three outputs, the middle one inside
  all.push_back(square(8, 3, 1, kFar, kFar));       // the middle tap inside
  all.push_back(square(8, 3, 7, kFar + 10, kFar));  // likewise, with a stride
  all.push_back(square(5, 301, 1, 150, 1));         // a kernel larger than the map
  all.push_back(square(9, 3, 1000, 3000, 1000));    // outputs and taps on one grid
  all.push_back(square(2001, 2, 1, 0, 2000));       // two taps at the ends of the map
  for (ConvGeometry& g : all) {
    if (g.in_h > 1000) g.in_w = 1, g.kernel_w = g.dilation_w = 1, complete_geometry(g);
    const int64_t columns = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
    const Csr csr = random_csr(g.out_channels, columns, columns > 1000 ? 0.02 : 0.7);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), g.out_channels,
                      columns);
    const std::string what = describe(g, "any", 0.7, 1);

    const auto fprop = fprop_plan(g, s, {1, 4}), dgrad = dgrad_plan(g, s, {1, 4});
    const auto wgrad = wgrad_plan(g, s);
    check(fprop && dgrad && wgrad, "a plan " + what);
    if (!fprop || !dgrad || !wgrad) continue;
    for (const auto& plans : {fprop, dgrad}) {
      check(static_cast<int64_t>(plans->phases.size()) <= g.kernel_h * g.kernel_w, "few phases " + what);
      for (const GatherPlan& plan : plans->phases)
        check(window_bytes(plan.window) <= kWindowBytes, "a small window " + what);
    }
    check(window_bytes(wgrad->window) <= kWindowBytes, "a small window of wgrad " + what);

    std::vector<double> values(s.nnz), dv(s.nnz), dv0(s.nnz);
    for (double& v : values) v = uniform();
    const Tensor<double> x(g.batch, g.in_channels, g.in_h, g.in_w, pick(0, 1), false);
    const Tensor<double> grad(g.batch, g.out_channels, g.out_h, g.out_w, pick(0, 1), false);
    Tensor<double> y(g.batch, g.out_channels, g.out_h, g.out_w, pick(0, 1), true), y0 = y;
    Tensor<double> dx(g.batch, g.in_channels, g.in_h, g.in_w, pick(0, 1), true), dx0 = dx;
    y0.view.data = y0.data.data();
    dx0.view.data = dx0.data.data();
    scalar::conv_fprop<double>(g, s, x.read(), values.data(), nullptr, y0.view, 1);
    scalar::conv_dgrad<double>(g, s, grad.read(), values.data(), dx0.view, 1);
    scalar::conv_wgrad<double>(g, s, grad.read(), x.read(), dv0.data(), 1);
    for (int threads : {1, 2}) {
      conv_fprop<double>(g, s, x.read(), values.data(), nullptr, y.view, threads);
      conv_dgrad<double>(g, s, grad.read(), values.data(), dx.view, threads);
      conv_wgrad<double>(g, s, grad.read(), x.read(), dv.data(), threads);
      check(largest_difference(y, y0) <= 1e-12, "fprop " + what);
      check(largest_difference(dx, dx0) <= 1e-12, "dgrad " + what);
      check(largest_difference(dv, dv0) <= 1e-12, "wgrad " + what);
    }
  }
}

}  // namespace

void test_borders() {
  test_far_reach();
  test_nonfinite<float>(250);
  test_nonfinite<double>(130);
}
