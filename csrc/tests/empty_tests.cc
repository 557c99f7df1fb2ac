// Sizes of zero: nothing is divided by them, nothing is written past the end, and empty sums are zero.
#include <initializer_list>

#include "core/cpu.h"
#include "core/densify.h"
#include "core/grow/dense_wgrad.h"
#include "core/grow/largest.h"
#include "core/linear/linear.h"
#include "core/norm/norm.h"
#include "core/panels.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

bool zero(const std::vector<float>& all) {
  return std::all_of(all.begin(), all.end(), [](float v) { return v == 0; });
}

void test_norm(int64_t images, int64_t channels, int64_t pixels, bool last) {
  const Maps maps{images, channels, pixels, last};
  const size_t size = static_cast<size_t>(images * channels * pixels);
  std::vector<float> x(size, 1), y(size, kNan), dx(size, kNan), dresidual(size, kNan);
  std::vector<float> mean(channels), var(channels), dweight(channels, kNan), dbias(channels, kNan);
  norm_moments<float>(maps, x.data(), mean.data(), var.data(), 2);
  const Norm<float> norm{maps, mean.data(), var.data(), nullptr, nullptr, 1e-5, true};
  norm_forward<float>(norm, x.data(), x.data(), y.data(), 2);
  norm_backward<float>(
      norm, {x.data(), x.data(), y.data(), false, dx.data(), dresidual.data(), dweight.data(), dbias.data()},
      2);
  check(size > 0 || (zero(dweight) && zero(dbias)), "gradients of a norm of nothing are zero");
  check(size > 0 || std::all_of(mean.begin(), mean.end(), [](float v) { return std::isnan(v); }),
        "moments of nothing are NaN");
}

void test_linear_of(int64_t batch, int64_t rows, int64_t cols) {
  const Csr csr = random_csr(rows, cols, 0.5);
  const auto s = std::make_shared<const Structure>(csr.crow.data(), rows + 1, csr.col.data(),
                                                   static_cast<int64_t>(csr.col.size()), rows, cols);
  std::vector<float> x(batch * cols, 1), y(batch * rows, kNan), values(s->nnz, 1), dvalues(s->nnz, kNan);
  std::vector<float> dx(batch * cols, kNan), dense(rows * cols, kNan);
  linear_fprop<float>(*s, {x.data(), batch, cols, cols, 1}, values.data(), nullptr,
                      {y.data(), batch, rows, rows, 1}, 2);
  check(cols > 0 || zero(y), "no inputs: the output is zero");
  y.assign(y.size(), 1);
  linear_dgrad<float>(*s, {y.data(), batch, rows, rows, 1}, values.data(), {dx.data(), batch, cols, cols, 1},
                      2);
  check(rows > 0 || zero(dx), "no outputs: the input gradient is zero");
  linear_wgrad<float>(*s, {y.data(), batch, rows, rows, 1}, {x.data(), batch, cols, cols, 1}, dvalues.data(),
                      2);
  check(batch > 0 || zero(dvalues), "no samples: the weight gradient is zero");
  scatter_weight<float>(*s, values.data(), 1, dense.data(), 2);
  gather_weight<float>(*s, dense.data(), 1, dvalues.data(), 2);
  check(dvalues == values, "what was scattered is gathered");
  const TileSize tile = tile_size(*s, 1, 1);
  check(tile.rows >= 0 && tile.rows <= rows && tile.channels >= 0 && tile.channels <= cols, "tile size");
  LargestK<float> best(s, rows * cols - s->nnz, 2);
  best.offer(dense.data(), 0, rows, 0, cols, true);
  check(static_cast<int64_t>(best.positions().size()) == rows * cols - s->nnz, "all free positions grow");
}

void test_convolution_of(int64_t batch, int64_t height, int64_t width, int64_t pad) {
  ConvGeometry g{};
  g.batch = batch;
  g.in_channels = g.out_channels = 2;
  g.in_h = height;
  g.in_w = width;
  g.kernel_h = g.kernel_w = 2;
  g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = g.groups = 1;
  g.pad_top = g.pad_bottom = g.pad_left = g.pad_right = pad;
  complete_geometry(g);
  const Csr csr = random_csr(2, 8, 0.7);
  const Structure s(csr.crow.data(), 3, csr.col.data(), csr.col.size(), 2, 8);
  const std::vector<float> values(s.nnz, 1), bias{3, 3};
  const Tensor<float> x(batch, 2, height, width, 0, false), grad(batch, 2, g.out_h, g.out_w, 0, false);
  Tensor<float> y(batch, 2, g.out_h, g.out_w, 0, true), dx(batch, 2, height, width, 0, true);
  std::vector<float> dvalues(s.nnz, kNan), tile(16);
  conv_fprop<float>(g, s, x.read(), values.data(), bias.data(), y.view, 2);
  conv_dgrad<float>(g, s, grad.read(), values.data(), dx.view, 2);
  conv_wgrad<float>(g, s, grad.read(), x.read(), dvalues.data(), 2);
  conv_wgrad_tile<float>(g, grad.read(), x.read(), {0, 2, 0, 2}, tile.data(), 2);
  conv_wgrad_tile<float>(g, grad.read(), x.read(), {0, 0, 0, 2}, nullptr, 2);
  if (!x.data.empty()) return;
  check(std::all_of(y.data.begin(), y.data.end(), [](float v) { return v == 3; }), "nothing but the bias");
  check(zero(dvalues) && zero(tile), "weight gradients of nothing are zero");
}

}  // namespace

void test_empty() {
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    for (int64_t a : {0, 1, 3})
      for (int64_t b : {0, 1, 3})
        for (int64_t c : {0, 1, 3}) {
          test_norm(a, b, c, false);
          test_norm(a, b, c, true);
          test_linear_of(a, b, c);
          test_convolution_of(a, b, c, 1);
        }
  }
  set_isa("auto");
}
