// What the bindings of core/blocked share. A blocked map is a contiguous tensor
// [images / lanes, height, channels, width, lanes].
#pragma once
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/arrays.h"
#include "core/blocked/block.h"

namespace sparsekd {

template <class T>
BlockedMap<T> blocked_map(const char* name, const Array& a, int64_t n, int64_t c, int64_t h, int64_t w) {
  BlockedMap<T> map{nullptr, n, c, h, w};
  expect_shape(name, a, {map.groups(), h, c, w, BlockedMap<T>::kLanes});
  int64_t stride = 1;
  for (int d = 4; d >= 0; stride *= a.shape(d), --d)
    if (a.shape(d) > 1 && a.stride(d) != stride)
      throw ShapeError(std::string(name) + ": expected a contiguous tensor");
  map.data = data_of<T>(name, a);
  if (reinterpret_cast<uintptr_t>(map.data) % kPixelBytes)
    throw UnsupportedError(std::string(name) + ": expected memory that is aligned to 64 bytes");
  return map;
}

// (crow, col, weight shape, stride, padding, dilation, groups, relu) of each convolution.
using Spec = std::tuple<Indices, Indices, Quad, Pair, Quad, Pair, int64_t, bool>;

template <class T, class Map>
T* like(const char* name, const Array& a, const Map& map) {
  return blocked_map<T>(name, a, map.images, map.channels, map.h, map.w).data;
}

// A map, or the parts of one that is not stored: ((z, state, branch or None, its state or None), whether the
// branch is rectified, whether the sum is).
template <class T>
blocked::Operand<T> operand_of(const py::object& from, const Quad& s) {
  blocked::Operand<T> x;
  const auto map = [&](const py::handle& a) {
    return blocked_map<const T>("x", a.cast<Array>(), s[0], s[1], s[2], s[3]);
  };
  if (!py::isinstance<py::tuple>(from)) {
    x.map = map(from);
    return x;
  }
  const auto parts = from.cast<py::tuple>();
  const auto t = parts[0].cast<py::sequence>();
  const auto coefficients = [&](const py::handle& state, auto& to) {
    to.mean = vector_of<const T>("state", state.cast<Array>(), 4 * s[1]);
    to.scale = to.mean + s[1];
    to.shift = to.mean + 2 * s[1];
  };
  x.read = t[2].is_none() ? blocked::Read::kNormalised : blocked::Read::kJoined;
  x.map = map(t[0]);
  coefficients(t[1], x);
  x.relu = parts[2].cast<bool>();
  if (t[2].is_none()) return x;
  x.branch.map = map(t[2]).data;
  if (!t[3].is_none()) coefficients(t[3], x.branch);
  x.branch.relu = parts[1].cast<bool>();
  return x;
}

// What tells the type of an operand.
inline Array first_of(const py::object& x) {
  if (!py::isinstance<py::tuple>(x)) return x.cast<Array>();
  return x.cast<py::tuple>()[0].cast<py::sequence>()[0].cast<Array>();
}

// (relu, z, state, other z or None, other state, sums [3 C]) of the block that has made map `x`
template <class T>
blocked::Before<T> before_of(const py::tuple& t, const BlockedMap<const T>& x) {
  blocked::Before<T> before{};
  before.relu = t[0].cast<bool>();
  before.z = like<T>("before", t[1].cast<Array>(), x);
  before.mean = vector_of<const T>("before", t[2].cast<Array>(), 4 * x.channels);
  if (!t[3].is_none()) {
    before.other = like<T>("before", t[3].cast<Array>(), x);
    before.other_mean = vector_of<const T>("before", t[4].cast<Array>(), 4 * x.channels);
  }
  before.sums = vector_of<double>("before", t[5].cast<Array>(), 3 * x.channels);
  return before;
}

inline Quad add_convolution(std::vector<blocked::ConvNormShape>& to, const Spec& spec, const Quad& input) {
  const auto& [crow, col, shape, stride, padding, dilation, groups, relu] = spec;
  const ConvGeometry g = conv_geometry(input, {shape, stride, padding, dilation, groups});
  to.push_back({g, structure(crow, col, g.out_channels, shape[1] * g.kernel_h * g.kernel_w), relu});
  return {g.batch, g.out_channels, g.out_h, g.out_w};
}

using Shapes = std::vector<blocked::ConvNormShape>;

inline bool all_supported(std::initializer_list<const Shapes*> parts, int threads) {
  std::vector<std::pair<const ConvGeometry*, const Structure*>> convs;
  for (const Shapes* part : parts)
    for (const blocked::ConvNormShape& c : *part) convs.push_back({&c.geometry, c.weight.get()});
  return blocked::supported(convs, threads);
}

inline std::vector<Quad> shapes_of(std::initializer_list<const Shapes*> parts) {
  std::vector<Quad> all;
  for (const Shapes* part : parts)
    for (const blocked::ConvNormShape& c : *part)
      all.push_back({c.geometry.batch, c.geometry.out_channels, c.geometry.out_h, c.geometry.out_w});
  return all;
}

inline Quad projected_shape(const ConvGeometry& g, const Quad& input) {
  if (!blocked::projected_compact(g)) return input;
  return {g.batch, g.in_channels, g.out_h, g.out_w};
}

// (gamma, beta, running mean, running variance, eps, rate, frozen) from `first` on
template <class T>
blocked::ConvNorm<T> norm_of(const py::tuple& t, size_t first, int64_t channels) {
  blocked::ConvNorm<T> c{};
  c.gamma = optional_vector<const T>("weight of a norm", t[first], channels);
  c.beta = optional_vector<const T>("bias of a norm", t[first + 1], channels);
  c.running_mean = optional_vector<T>("running_mean", t[first + 2], channels);
  c.running_var = optional_vector<T>("running_var", t[first + 3], channels);
  c.eps = t[first + 4].cast<double>();
  c.rate = t[first + 5].cast<double>();
  c.frozen = t[first + 6].cast<bool>();
  if (!c.running_mean != !c.running_var || (c.frozen && !c.running_mean))
    throw ShapeError("running_mean, running_var: expected both, or neither of a norm that is not frozen");
  return c;
}

// (values, bias, gamma, beta, running mean, running variance, eps, rate, frozen, z, state)
template <class T>
std::vector<blocked::ConvNorm<T>> convolutions(const std::vector<blocked::ConvNormShape>& shapes,
                                               const py::sequence& from) {
  if (from.size() != shapes.size()) throw ShapeError("convolutions: expected as many as in the plan");
  std::vector<blocked::ConvNorm<T>> all;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const ConvGeometry& g = shapes[i].geometry;
    const int64_t channels = g.out_channels;
    const auto t = from[i].cast<py::tuple>();
    blocked::ConvNorm<T> c = norm_of<T>(t, 2, channels);
    c.shape = &shapes[i];
    c.values = vector_of<const T>("values", t[0].cast<Array>(), shapes[i].weight->nnz);
    c.bias = optional_vector<const T>("bias", t[1], channels);
    c.z = blocked_map<T>("z", t[9].cast<Array>(), g.batch, channels, g.out_h, g.out_w);
    c.state = vector_of<T>("state", t[10].cast<Array>(), 4 * channels);
    all.push_back(c);
  }
  return all;
}

// (values, bias, gamma, beta, grad), of which the last four may be None
template <class T>
std::vector<blocked::ConvNormGradients<T>> gradients_of(const std::vector<blocked::ConvNorm<T>>& of,
                                                        const py::sequence& from) {
  if (from.size() != of.size()) throw ShapeError("gradients: expected as many as in the plan");
  std::vector<blocked::ConvNormGradients<T>> all;
  for (size_t i = 0; i < of.size(); ++i) {
    const int64_t channels = of[i].z.channels;
    const auto t = from[i].cast<py::tuple>();
    all.push_back({vector_of<T>("dvalues", t[0].cast<Array>(), of[i].shape->weight->nnz),
                   optional_vector<T>("dbias", t[1], channels), optional_vector<T>("dgamma", t[2], channels),
                   optional_vector<T>("dbeta", t[3], channels),
                   t[4].is_none() ? nullptr : like<T>("grad", t[4].cast<Array>(), of[i].z)});
  }
  return all;
}

}  // namespace sparsekd
