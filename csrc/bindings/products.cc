#include "bindings/products.h"

#include <pybind11/stl.h>

#include <type_traits>

#include "core/conv/conv.h"
#include "core/linear/linear.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

struct Convolution {
  ConvGeometry geometry;
  std::shared_ptr<const Structure> weight;
};

Convolution convolution(const Array& input, const Indices& crow, const Indices& col,
                        const ConvOptions& options) {
  const ConvGeometry g = conv_geometry(input, options);
  auto weight = structure(crow, col, g.out_channels, options.weight_shape[1] * g.kernel_h * g.kernel_w);
  check_weight(g, *weight);
  return {g, weight};
}

// The threads that a product is worth, of those it may have.
int threads_for(const ConvGeometry& g, const Structure& weight, int threads) {
  return conv_threads(g, weight, 1, check_threads(threads));
}

int threads_for(int64_t samples, const Structure& weight, int threads) {
  const int64_t moved = samples * (weight.rows + weight.cols);
  return useful_threads(check_threads(threads), samples * weight.nnz, moved);
}

int64_t features(const char* name, const Array& a) {
  if (a.ndim() < 1) throw ShapeError(std::string(name) + ": expected at least one dimension, got none");
  return a.shape(a.ndim() - 1);
}

int64_t count_samples(const Array& a) {
  int64_t count = 1;
  for (int d = 0; d + 1 < a.ndim(); ++d) count *= a.shape(d);
  return count;
}

void expect_samples(const char* name, const Array& a, const Array& like) {
  if (count_samples(a) != count_samples(like))
    throw ShapeError(std::string(name) + ": expected " + std::to_string(count_samples(like)) +
                     " samples, got shape " + shape_text(a));
}

// The samples as the rows of a matrix.
template <class T>
View2<T> samples(const char* name, const Array& a) {
  if (a.ndim() == 2) return view2<T>(name, a);
  int64_t stride = 1;
  for (int d = a.ndim() - 1; d >= 0; stride *= a.shape(d--))
    if (a.shape(d) > 1 && a.stride(d) != stride && a.size() > 0)
      throw ShapeError(std::string(name) + ": expected a matrix, or an array without gaps");
  return {data_of<T>(name, a), count_samples(a), features(name, a), features(name, a), 1};
}

// As Python calls a product: the options of a convolution one by one, before the number of threads.
template <class... Operands>
auto spread(std::common_type_t<void (*)(Operands..., const ConvOptions&, int)> product) {
  return [product](Operands... operands, const Quad& weight_shape, const Pair& stride, const Quad& padding,
                   const Pair& dilation, int64_t groups, int threads) {
    product(operands..., {weight_shape, stride, padding, dilation, groups}, threads);
  };
}

}  // namespace

namespace products {

void conv2d(const Array& x, const Array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const Array& y, const ConvOptions& options, int threads) {
  const auto [g, weight] = convolution(x, crow, col, options);
  expect_shape("y", y, {g.batch, g.out_channels, g.out_h, g.out_w});
  threads = threads_for(g, *weight, threads);
  by_type("x", x, [&, &g = g, &weight = weight](auto type) {
    using T = decltype(type);
    const auto in = view4<const T>("x", x);
    const auto out = view4<T>("y", y);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    const T* b = optional_vector<const T>("bias", bias, g.out_channels);
    py::gil_scoped_release release;
    conv_fprop<T>(g, *weight, in, v, b, out, threads);
  });
}

void conv2d_dgrad(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                  const Array& dx, const ConvOptions& options, int threads) {
  const auto [g, weight] = convolution(dx, crow, col, options);
  expect_shape("grad", grad, {g.batch, g.out_channels, g.out_h, g.out_w});
  threads = threads_for(g, *weight, threads);
  by_type("grad", grad, [&, &g = g, &weight = weight](auto type) {
    using T = decltype(type);
    const auto in = view4<const T>("grad", grad);
    const auto out = view4<T>("dx", dx);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    py::gil_scoped_release release;
    conv_dgrad<T>(g, *weight, in, v, out, threads);
  });
}

void conv2d_wgrad(const Array& grad, const Array& x, const Indices& crow, const Indices& col,
                  const Array& dvalues, const ConvOptions& options, int threads) {
  const auto [g, weight] = convolution(x, crow, col, options);
  expect_shape("grad", grad, {g.batch, g.out_channels, g.out_h, g.out_w});
  threads = threads_for(g, *weight, threads);
  by_type("grad", grad, [&, &g = g, &weight = weight](auto type) {
    using T = decltype(type);
    const auto upper = view4<const T>("grad", grad);
    const auto in = view4<const T>("x", x);
    T* out = vector_of<T>("dvalues", dvalues, weight->nnz);
    py::gil_scoped_release release;
    conv_wgrad<T>(g, *weight, upper, in, out, threads);
  });
}

void linear(const Array& x, const Array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const Array& y, int threads) {
  const auto weight = structure(crow, col, features("y", y), features("x", x));
  expect_samples("y", y, x);
  threads = threads_for(count_samples(x), *weight, threads);
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const auto in = samples<const T>("x", x);
    const auto out = samples<T>("y", y);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    const T* b = optional_vector<const T>("bias", bias, weight->rows);
    py::gil_scoped_release release;
    linear_fprop<T>(*weight, in, v, b, out, threads);
  });
}

void linear_dgrad(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                  const Array& dx, int threads) {
  const auto weight = structure(crow, col, features("grad", grad), features("dx", dx));
  expect_samples("dx", dx, grad);
  threads = threads_for(count_samples(grad), *weight, threads);
  by_type("grad", grad, [&](auto type) {
    using T = decltype(type);
    const auto in = samples<const T>("grad", grad);
    const auto out = samples<T>("dx", dx);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    py::gil_scoped_release release;
    sparsekd::linear_dgrad<T>(*weight, in, v, out, threads);
  });
}

void linear_wgrad(const Array& grad, const Array& x, const Indices& crow, const Indices& col,
                  const Array& dvalues, int threads) {
  const auto weight = structure(crow, col, features("grad", grad), features("x", x));
  expect_samples("grad", grad, x);
  threads = threads_for(count_samples(grad), *weight, threads);
  by_type("grad", grad, [&](auto type) {
    using T = decltype(type);
    const auto upper = samples<const T>("grad", grad);
    const auto in = samples<const T>("x", x);
    T* out = vector_of<T>("dvalues", dvalues, weight->nnz);
    py::gil_scoped_release release;
    sparsekd::linear_wgrad<T>(*weight, upper, in, out, threads);
  });
}

}  // namespace products

void bind_products(py::module_& m) {
  using A = const Array&;
  m.def("conv2d", spread<A, A, A, A, const py::object&, A>(&products::conv2d));
  m.def("conv2d_dgrad", spread<A, A, A, A, A>(&products::conv2d_dgrad));
  m.def("conv2d_wgrad", spread<A, A, A, A, A>(&products::conv2d_wgrad));
  m.def("linear", &products::linear);
  m.def("linear_dgrad", &products::linear_dgrad);
  m.def("linear_wgrad", &products::linear_wgrad);
}

}  // namespace sparsekd
