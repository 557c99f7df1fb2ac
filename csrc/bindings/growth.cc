// What dynamic sparse training needs to grow weights: dense weight gradients by tiles, and the best
// positions.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <variant>

#include "bindings/arrays.h"
#include "core/grow/dense_wgrad.h"
#include "core/grow/largest.h"

namespace sparsekd {

namespace {

void conv2d_wgrad_tile(const Array& grad, const Array& x, const Quad& tile, const Array& out,
                       const Quad& weight_shape, const Pair& stride, const Quad& padding,
                       const Pair& dilation, int64_t groups, int threads) {
  const ConvGeometry g = conv_geometry(x, {weight_shape, stride, padding, dilation, groups});
  const WeightTile t{tile[0], tile[1], tile[2], tile[3]};
  check_tile(g, t);
  expect_shape("grad", grad, {g.batch, g.out_channels, g.out_h, g.out_w});
  expect_shape("out", out, {t.rows, t.channels * g.kernel_h * g.kernel_w});
  check_threads(threads);
  by_type("grad", grad, [&](auto type) {
    using T = decltype(type);
    const auto upper = view4<const T>("grad", grad);
    const auto in = view4<const T>("x", x);
    T* sums = rows_of<T>("out", out);
    py::gil_scoped_release release;
    conv_wgrad_tile<T>(g, upper, in, t, sums, threads);
  });
}

// LargestK of float or double scores.
class Largest {
 public:
  Largest(const Indices& crow, const Indices& col, int64_t rows, int64_t cols, int64_t k, bool wide,
          int threads)
      : best_(make(structure(crow, col, rows, cols), k, wide, check_threads(threads))) {}

  void offer(const Array& values, int64_t row, int64_t col, bool magnitude) {
    check_dims("values", values, 2);
    std::visit(
        [&](auto& best) {
          using T = typename std::decay_t<decltype(best)>::Score;
          const T* data = rows_of<const T>("values", values);
          const int64_t rows = values.shape(0), cols = values.shape(1);
          py::gil_scoped_release release;
          best.offer(data, row, rows, col, cols, magnitude);
        },
        best_);
  }

  py::array_t<int64_t> positions() const {
    const std::vector<int64_t> found = [&] {
      py::gil_scoped_release release;  // another thread may be at an offer, which ends in taking the GIL
      return std::visit([](const auto& best) { return best.positions(); }, best_);
    }();
    return py::array_t<int64_t>(static_cast<py::ssize_t>(found.size()), found.data());
  }

 private:
  using Either = std::variant<LargestK<float>, LargestK<double>>;
  static Either make(const std::shared_ptr<const Structure>& kept, int64_t k, bool wide, int threads) {
    if (wide) return LargestK<double>(kept, k, threads);
    return LargestK<float>(kept, k, threads);
  }

  Either best_;
};

}  // namespace

void bind_growth(py::module_& m) {
  m.def("conv2d_wgrad_tile", &conv2d_wgrad_tile);
  py::class_<Largest>(m, "LargestK")
      .def(py::init<const Indices&, const Indices&, int64_t, int64_t, int64_t, bool, int>())
      .def("offer", &Largest::offer)
      .def("positions", &Largest::positions);
}

}  // namespace sparsekd
