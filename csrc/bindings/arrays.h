// What every file of bindings needs: checks of tensors, and views of them.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/array.h"
#include "core/conv/conv.h"
#include "core/error.h"
#include "core/linear/linear.h"
#include "core/structure.h"
#include "core/view.h"

namespace sparsekd {

using Pair = std::array<int64_t, 2>;
using Quad = std::array<int64_t, 4>;
using Indices = Array;

inline std::string shape_text(const Array& a) {
  std::string text = "[";
  for (int i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

inline void check_dims(const char* name, const Array& a, int dims) {
  if (a.ndim() != dims)
    throw ShapeError(std::string(name) + ": expected " + std::to_string(dims) + " dimensions, got shape " +
                     shape_text(a));
}

// int16_t stands for half precision, which is only moved here.
template <class T>
constexpr const char* type_text() {
  if constexpr (std::is_same_v<T, int16_t>) return "bfloat16 or float16";
  if constexpr (std::is_same_v<T, int32_t>) return "int32";
  if constexpr (std::is_same_v<T, int8_t>) return "int8";
  return std::is_same_v<T, double> ? "float64" : "float32";
}

template <class T>
bool holds(const Array& a) {
  if constexpr (std::is_same_v<T, int16_t>) return a.type() == Type::kBfloat16 || a.type() == Type::kFloat16;
  if constexpr (std::is_same_v<T, int32_t>) return a.type() == Type::kInt32;
  if constexpr (std::is_same_v<T, int8_t>) return a.type() == Type::kInt8;
  return a.type() == (std::is_same_v<T, double> ? Type::kFloat64 : Type::kFloat32);
}

template <class T>
T* data_of(const char* name, const Array& a) {
  using Element = std::remove_const_t<T>;
  if (!holds<Element>(a))
    throw UnsupportedError(std::string(name) + ": expected dtype " + type_text<Element>() + ", got " +
                           a.dtype_text());
  return static_cast<T*>(a.data());
}

template <class T>
View4<T> view4(const char* name, const Array& a) {
  check_dims(name, a, 4);
  return {data_of<T>(name, a), a.shape(0),  a.shape(1),  a.shape(2), a.shape(3),
          a.stride(0),         a.stride(1), a.stride(2), a.stride(3)};
}

template <class T>
View2<T> view2(const char* name, const Array& a) {
  check_dims(name, a, 2);
  return {data_of<T>(name, a), a.shape(0), a.shape(1), a.stride(0), a.stride(1)};
}

// A one-dimensional contiguous array of `length` elements.
template <class T>
T* vector_of(const char* name, const Array& a, int64_t length) {
  check_dims(name, a, 1);
  if (a.shape(0) != length)
    throw ShapeError(std::string(name) + ": expected " + std::to_string(length) + " elements, got " +
                     std::to_string(a.shape(0)));
  if (length > 1 && a.stride(0) != 1) throw ShapeError(std::string(name) + ": expected a contiguous array");
  return data_of<T>(name, a);
}

// A contiguous matrix; its shape has been checked.
template <class T>
T* rows_of(const char* name, const Array& a) {
  const View2<T> m = view2<T>(name, a);
  if (m.rows * m.cols > 0 && ((m.cols > 1 && m.stride_col != 1) || (m.rows > 1 && m.stride_row != m.cols)))
    throw ShapeError(std::string(name) + ": expected a contiguous matrix");
  return m.data;
}

inline void expect_shape(const char* name, const Array& a, const std::vector<int64_t>& expected) {
  check_dims(name, a, static_cast<int>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i)
    if (a.shape(i) != expected[i]) {
      std::string text;
      for (int64_t v : expected) text += (text.empty() ? "[" : ", ") + std::to_string(v);
      throw ShapeError(std::string(name) + ": expected shape " + text + "], got " + shape_text(a));
    }
}

// OpenMP ends the process when it cannot start as many threads as it is asked for.
inline int check_threads(int threads) {
  constexpr int kMostThreads = 1024;
  if (threads < 1 || threads > kMostThreads)
    throw ShapeError("num_threads: expected 1 to " + std::to_string(kMostThreads) + ", got " +
                     std::to_string(threads));
  return threads;
}

struct RawIndices {
  const int32_t *crow, *col;
  int64_t crow_length, nnz;
};

inline RawIndices raw(const Indices& crow, const Indices& col) {
  check_dims("crow_indices", crow, 1);
  check_dims("col_indices", col, 1);
  if (crow.shape(0) < 1) throw TopologyError("crow_indices: expected at least one entry, got none");
  return {vector_of<const int32_t>("crow_indices", crow, crow.shape(0)),
          vector_of<const int32_t>("col_indices", col, col.shape(0)), crow.shape(0), col.shape(0)};
}

// The storages of two index tensors.
class StorageOwner : public Owner {
 public:
  StorageOwner(const Indices& crow, const Indices& col) : crow_(crow.storage()), col_(col.storage()) {}
  bool gone() const override { return crow_().is_none() || col_().is_none(); }

 private:
  py::weakref crow_, col_;
};

inline std::shared_ptr<const Structure> structure(const Indices& crow, const Indices& col, int64_t rows,
                                                  int64_t cols) {
  const RawIndices r = raw(crow, col);
  return find_structure(r.crow, r.crow_length, r.col, r.nnz, rows, cols,
                        [&] { return std::make_unique<StorageOwner>(crow, col); });
}

// What a convolution is besides its operands.
struct ConvOptions {
  Quad weight_shape;
  Pair stride;
  Quad padding;  // top, bottom, left, right
  Pair dilation;
  int64_t groups;
};

// For an input [N, C, H, W].
inline ConvGeometry conv_geometry(const Quad& input, const ConvOptions& options) {
  const auto& [weight, stride, padding, dilation, groups] = options;
  ConvGeometry g{};
  g.batch = input[0];
  g.in_channels = input[1];
  g.in_h = input[2];
  g.in_w = input[3];
  g.out_channels = weight[0];
  g.kernel_h = weight[2];
  g.kernel_w = weight[3];
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
  if (weight[1] != g.in_channels / g.groups)
    throw ShapeError("x: expected " + std::to_string(weight[1] * groups) + " channels, got " +
                     std::to_string(g.in_channels));
  return g;
}

inline ConvGeometry conv_geometry(const Array& input, const ConvOptions& options) {
  check_dims("x", input, 4);
  return conv_geometry(Quad{input.shape(0), input.shape(1), input.shape(2), input.shape(3)}, options);
}

// A vector of `length` elements, or null where there is None.
template <class T>
T* optional_vector(const char* name, const py::object& a, int64_t length) {
  return a.is_none() ? nullptr : vector_of<T>(name, a.cast<Array>(), length);
}

// Calls run(float{}) or run(double{}) by the type of `a`.
template <class F>
void by_type(const char* name, const Array& a, F run) {
  if (a.type() == Type::kFloat32) return run(float{});
  if (a.type() == Type::kFloat64) return run(double{});
  throw UnsupportedError(std::string(name) + ": expected float32 or float64, got " + a.dtype_text());
}

}  // namespace sparsekd
