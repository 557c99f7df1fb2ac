// The Python module sparsekd._C: checks types, shapes and lengths, then calls core without the GIL.
// Arrays are views of the caller's tensors; outputs are written in place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "core/conv/conv.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/grow_topk.h"
#include "core/linear/linear.h"
#include "core/parallel.h"
#include "core/structure.h"

namespace py = pybind11;

namespace sparsekd {
namespace {

using Pair = std::array<int64_t, 2>;
using Quad = std::array<int64_t, 4>;
using Indices = py::array;

std::string shape_text(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

void check_dims(const char* name, const py::array& a, int dims) {
  if (a.ndim() != dims)
    throw ShapeError(std::string(name) + ": expected " + std::to_string(dims) + " dimensions, got shape " +
                     shape_text(a));
}

template <class T>
void check_type(const char* name, const py::array& a) {
  if (!py::isinstance<py::array_t<T>>(a))
    throw UnsupportedError(std::string(name) + ": expected dtype " +
                           std::string(py::str(py::dtype::of<T>())) + ", got " +
                           std::string(py::str(a.dtype())));
}

// Strides in elements. numpy keeps an array's bytes aligned to its elements unless asked otherwise.
int64_t stride(const char* name, const py::array& a, int dim) {
  if (a.strides(dim) % a.itemsize()) throw ShapeError(std::string(name) + ": strides must be whole elements");
  return a.strides(dim) / a.itemsize();
}

template <class T>
T* data_of(const char* name, const py::array& a) {
  check_type<std::remove_const_t<T>>(name, a);
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(a.data());
  else
    return static_cast<T*>(const_cast<py::array&>(a).mutable_data());  // throws when read-only
}

template <class T>
View4<T> view4(const char* name, const py::array& a) {
  check_dims(name, a, 4);
  return {data_of<T>(name, a), a.shape(0),         a.shape(1),         a.shape(2),        a.shape(3),
          stride(name, a, 0),  stride(name, a, 1), stride(name, a, 2), stride(name, a, 3)};
}

template <class T>
View2<T> view2(const char* name, const py::array& a) {
  check_dims(name, a, 2);
  return {data_of<T>(name, a), a.shape(0), a.shape(1), stride(name, a, 0), stride(name, a, 1)};
}

// A one-dimensional contiguous array of `length` elements.
template <class T>
T* vector_of(const char* name, const py::array& a, int64_t length) {
  check_dims(name, a, 1);
  if (a.shape(0) != length)
    throw ShapeError(std::string(name) + ": expected " + std::to_string(length) + " elements, got " +
                     std::to_string(a.shape(0)));
  if (length > 1 && stride(name, a, 0) != 1)
    throw ShapeError(std::string(name) + ": expected a contiguous array");
  return data_of<T>(name, a);
}

void expect_shape(const char* name, const py::array& a, const std::vector<int64_t>& expected) {
  check_dims(name, a, static_cast<int>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i)
    if (a.shape(i) != expected[i]) {
      std::string text;
      for (int64_t v : expected) text += (text.empty() ? "[" : ", ") + std::to_string(v);
      throw ShapeError(std::string(name) + ": expected shape " + text + "], got " + shape_text(a));
    }
}

int check_threads(int threads) {
  if (threads < 1) throw ShapeError("num_threads: expected at least 1, got " + std::to_string(threads));
  return threads;
}

struct RawIndices {
  const int32_t *crow, *col;
  int64_t crow_length, nnz;
};

RawIndices raw(const Indices& crow, const Indices& col) {
  check_dims("crow_indices", crow, 1);
  check_dims("col_indices", col, 1);
  if (crow.shape(0) < 1) throw TopologyError("crow_indices: expected at least one entry, got none");
  return {vector_of<const int32_t>("crow_indices", crow, crow.shape(0)),
          vector_of<const int32_t>("col_indices", col, col.shape(0)), crow.shape(0), col.shape(0)};
}

std::shared_ptr<const Structure> structure(const Indices& crow, const Indices& col, int64_t rows,
                                           int64_t cols) {
  const RawIndices r = raw(crow, col);
  return find_structure(r.crow, r.crow_length, r.col, r.nnz, rows, cols);
}

template <class T>
const T* optional_bias(const py::object& bias, int64_t channels) {
  return bias.is_none() ? nullptr : vector_of<const T>("bias", bias.cast<py::array>(), channels);
}

// Calls run(float{}) or run(double{}) by the type of `a`.
template <class F>
void by_type(const char* name, const py::array& a, F run) {
  if (py::isinstance<py::array_t<float>>(a)) return run(float{});
  if (py::isinstance<py::array_t<double>>(a)) return run(double{});
  throw UnsupportedError(std::string(name) + ": expected float32 or float64, got " +
                         std::string(py::str(a.dtype())));
}

struct Convolution {
  ConvGeometry geometry;
  std::shared_ptr<const Structure> weight;
};

Convolution convolution(const py::array& input, const Indices& crow, const Indices& col,
                        const Quad& weight_shape, const Pair& stride, const Quad& padding,
                        const Pair& dilation, int64_t groups) {
  check_dims("x", input, 4);
  ConvGeometry g{};
  g.batch = input.shape(0);
  g.in_channels = input.shape(1);
  g.in_h = input.shape(2);
  g.in_w = input.shape(3);
  g.out_channels = weight_shape[0];
  g.kernel_h = weight_shape[2];
  g.kernel_w = weight_shape[3];
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.pad_top = padding[0];
  g.pad_bottom = padding[1];
  g.pad_left = padding[2];
  g.pad_right = padding[3];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.groups = groups;
  complete_geometry(g);
  if (weight_shape[1] != g.in_channels / g.groups)
    throw ShapeError("x: expected " + std::to_string(weight_shape[1] * groups) + " channels, got " +
                     std::to_string(g.in_channels));
  auto weight = structure(crow, col, g.out_channels, weight_shape[1] * weight_shape[2] * weight_shape[3]);
  check_weight(g, *weight);
  return {g, weight};
}

void conv2d(const py::array& x, const py::array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const py::array& y, const Quad& weight_shape, const Pair& stride,
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

void conv2d_dgrad(const py::array& grad, const py::array& values, const Indices& crow, const Indices& col,
                  const py::array& dx, const Quad& weight_shape, const Pair& stride, const Quad& padding,
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

void conv2d_wgrad(const py::array& grad, const py::array& x, const Indices& crow, const Indices& col,
                  const py::array& dvalues, const Quad& weight_shape, const Pair& stride, const Quad& padding,
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

void linear(const py::array& x, const py::array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const py::array& y, int threads) {
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

void linear_dgrad_(const py::array& grad, const py::array& values, const Indices& crow, const Indices& col,
                   const py::array& dx, int threads) {
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

void linear_wgrad_(const py::array& grad, const py::array& x, const Indices& crow, const Indices& col,
                   const py::array& dvalues, int threads) {
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

py::array_t<int64_t> grow(const py::array& score, const Indices& crow, const Indices& col, int64_t rows,
                          int64_t cols, int64_t k, int threads) {
  const auto kept = structure(crow, col, rows, cols);
  check_threads(threads);
  std::vector<int64_t> positions;
  by_type("score", score, [&](auto type) {
    using T = decltype(type);
    const T* s = vector_of<const T>("score", score, rows * cols);
    py::gil_scoped_release release;
    positions = grow_topk<T>(s, *kept, k, threads);
  });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(positions.size()), positions.data());
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
  const CacheUse use = cache_use();
  d["cached_structures"] = use.structures;
  d["cached_bytes"] = use.bytes;
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
  m.def("conv2d", &conv2d);
  m.def("conv2d_dgrad", &conv2d_dgrad);
  m.def("conv2d_wgrad", &conv2d_wgrad);
  m.def("linear", &linear);
  m.def("linear_dgrad", &linear_dgrad_);
  m.def("linear_wgrad", &linear_wgrad_);
  m.def("grow_topk", &grow);
  m.def("release", [](const Indices& crow, const Indices& col) {
    const RawIndices r = raw(crow, col);
    release_structure(r.crow, r.col);
  });
  m.def("info", &info);
  m.def("set_isa", &set_isa);
  // For comparing instruction sets without touching code; a wrong name fails the import and says so.
  if (const char* wanted = std::getenv("SPARSEKD_ISA")) set_isa(wanted);
}

}  // namespace sparsekd
