// The Python module sparsekd._C: checks types, shapes and lengths, then calls core without the GIL.
// Tensors are the caller's, who holds them; outputs are written in place.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "core/conv/conv.h"
#include "core/cpu.h"
#include "core/linear/linear.h"
#include "core/parallel.h"

namespace sparsekd {

void bind_blocked(py::module_& m);
void bind_densify(py::module_& m);
void bind_growth(py::module_& m);
void bind_peak(py::module_& m);
void bind_norm(py::module_& m);
void bind_structure(py::module_& m);

namespace {

struct Convolution {
  ConvGeometry geometry;
  std::shared_ptr<const Structure> weight;
};

Convolution convolution(const Array& input, const Indices& crow, const Indices& col, const Quad& weight_shape,
                        const Pair& stride, const Quad& padding, const Pair& dilation, int64_t groups) {
  const ConvGeometry g = conv_geometry(input, weight_shape, stride, padding, dilation, groups);
  auto weight = structure(crow, col, g.out_channels, weight_shape[1] * weight_shape[2] * weight_shape[3]);
  check_weight(g, *weight);
  return {g, weight};
}

void conv2d(const Array& x, const Array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const Array& y, const Quad& weight_shape, const Pair& stride,
            const Quad& padding, const Pair& dilation, int64_t groups, int threads) {
  const auto [g, weight] = convolution(x, crow, col, weight_shape, stride, padding, dilation, groups);
  expect_shape("y", y, {g.batch, g.out_channels, g.out_h, g.out_w});
  check_threads(threads);
  by_type("x", x, [&, &g = g, &weight = weight](auto type) {
    using T = decltype(type);
    const auto in = view4<const T>("x", x);
    const auto out = view4<T>("y", y);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    const T* b = optional_bias<T>(bias, g.out_channels);
    py::gil_scoped_release release;
    conv_fprop<T>(g, *weight, in, v, b, out, threads);
  });
}

void conv2d_dgrad(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                  const Array& dx, const Quad& weight_shape, const Pair& stride, const Quad& padding,
                  const Pair& dilation, int64_t groups, int threads) {
  const auto [g, weight] = convolution(dx, crow, col, weight_shape, stride, padding, dilation, groups);
  expect_shape("grad", grad, {g.batch, g.out_channels, g.out_h, g.out_w});
  check_threads(threads);
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
                  const Array& dvalues, const Quad& weight_shape, const Pair& stride, const Quad& padding,
                  const Pair& dilation, int64_t groups, int threads) {
  const auto [g, weight] = convolution(x, crow, col, weight_shape, stride, padding, dilation, groups);
  expect_shape("grad", grad, {g.batch, g.out_channels, g.out_h, g.out_w});
  check_threads(threads);
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
  check_dims("x", x, 2);
  check_dims("y", y, 2);
  const auto weight = structure(crow, col, y.shape(1), x.shape(1));
  expect_shape("y", y, {x.shape(0), weight->rows});
  check_threads(threads);
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const auto in = view2<const T>("x", x);
    const auto out = view2<T>("y", y);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    const T* b = optional_bias<T>(bias, weight->rows);
    py::gil_scoped_release release;
    linear_fprop<T>(*weight, in, v, b, out, threads);
  });
}

void linear_dgrad_(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                   const Array& dx, int threads) {
  check_dims("grad", grad, 2);
  check_dims("dx", dx, 2);
  const auto weight = structure(crow, col, grad.shape(1), dx.shape(1));
  expect_shape("dx", dx, {grad.shape(0), weight->cols});
  check_threads(threads);
  by_type("grad", grad, [&](auto type) {
    using T = decltype(type);
    const auto in = view2<const T>("grad", grad);
    const auto out = view2<T>("dx", dx);
    const T* v = vector_of<const T>("values", values, weight->nnz);
    py::gil_scoped_release release;
    linear_dgrad<T>(*weight, in, v, out, threads);
  });
}

void linear_wgrad_(const Array& grad, const Array& x, const Indices& crow, const Indices& col,
                   const Array& dvalues, int threads) {
  check_dims("grad", grad, 2);
  check_dims("x", x, 2);
  const auto weight = structure(crow, col, grad.shape(1), x.shape(1));
  expect_shape("grad", grad, {x.shape(0), weight->rows});
  check_threads(threads);
  by_type("grad", grad, [&](auto type) {
    using T = decltype(type);
    const auto upper = view2<const T>("grad", grad);
    const auto in = view2<const T>("x", x);
    T* out = vector_of<T>("dvalues", dvalues, weight->nnz);
    py::gil_scoped_release release;
    linear_wgrad<T>(*weight, upper, in, out, threads);
  });
}

py::dict info() {
  py::dict d;
  std::vector<std::string> names;
  for (Isa isa : available_isas()) names.push_back(isa_name(isa));
  d["isa"] = isa_name(current_isa());
  d["isas"] = names;
  d["parallel_runtime"] = parallel_runtime();
  d["compiler"] = __VERSION__;
  d["l1d_bytes"] = cache_sizes().l1d;
  d["l2_bytes"] = cache_sizes().l2;
  d["l3_bytes"] = cache_sizes().l3;
  const CacheUse use = cache_use();
  d["cached_structures"] = use.structures;
  d["cached_bytes"] = use.bytes;
  d["cached_plans"] = use.plans;
  return d;
}

// Raises the class of sparsekd.errors that has the same name as the C++ error.
void translate(std::exception_ptr pending) {
  const auto raise = [](const char* name, const std::exception& e) {
    const py::object type = py::module_::import("sparsekd.errors").attr(name);
    PyErr_SetString(type.ptr(), e.what());
  };
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const TopologyError& e) {
    raise("TopologyError", e);
  } catch (const ShapeError& e) {
    raise("ShapeError", e);
  } catch (const UnsupportedError& e) {
    raise("UnsupportedError", e);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sparsekd; use sparsekd.functional, which calls them.";
  py::register_local_exception_translator(translate);
  TorchNames::load();
  m.def("conv2d", &conv2d);
  m.def("conv2d_dgrad", &conv2d_dgrad);
  m.def("conv2d_wgrad", &conv2d_wgrad);
  m.def("linear", &linear);
  m.def("linear_dgrad", &linear_dgrad_);
  m.def("linear_wgrad", &linear_wgrad_);
  bind_blocked(m);
  bind_densify(m);
  bind_growth(m);
  bind_norm(m);
  bind_structure(m);
  m.def("info", &info);
  m.def("current_isa", [] { return isa_name(current_isa()); });
  m.def("set_isa", &set_isa);
  bind_peak(m);
}

}  // namespace sparsekd
