// Bindings of core/norm/norm.h. All maps of a call have one shape and one dense layout.
#include "core/norm/norm.h"

#include "bindings/arrays.h"

namespace sparsekd {
namespace {

bool dense(const Array& a, const Quad& strides) {
  for (int d = 0; d < 4; ++d)
    if (a.shape(d) > 1 && a.stride(d) != strides[static_cast<size_t>(d)]) return false;
  return true;
}

bool is_channels_last(const Array& a) {
  const int64_t c = a.shape(1), h = a.shape(2), w = a.shape(3);
  return dense(a, {c * h * w, 1, w * c, c});
}

bool is_contiguous(const Array& a) {
  const int64_t c = a.shape(1), h = a.shape(2), w = a.shape(3);
  return dense(a, {c * h * w, h * w, w, 1});
}

// One channel is one long plane, one pixel one row of channels.
Maps maps_of(const Array& x) {
  check_dims("x", x, 4);
  const int64_t pixels = x.shape(2) * x.shape(3);
  const bool contiguous = is_contiguous(x), last = is_channels_last(x);
  if (x.size() > 0 && !contiguous && !last)
    throw ShapeError("x: expected a contiguous or channels_last array without gaps");
  return {x.shape(0), x.shape(1), pixels, last && (!contiguous || pixels == 1)};
}

template <class T>
T* maps_like(const char* name, const Array& a, const Array& x) {
  expect_shape(name, a, {x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
  if (a.size() > 0 &&
      !((is_contiguous(x) && is_contiguous(a)) || (is_channels_last(x) && is_channels_last(a))))
    throw ShapeError(std::string(name) + ": expected the layout of x");
  return data_of<T>(name, a);
}

template <class T>
T* optional_maps(const char* name, const py::object& a, const Array& x) {
  return a.is_none() ? nullptr : maps_like<T>(name, a.cast<Array>(), x);
}

template <class T>
Norm<T> norm_of(const Maps& maps, const Array& mean, const Array& var, const py::object& weight,
                const py::object& bias, double eps, bool relu) {
  return {maps,
          vector_of<const T>("mean", mean, maps.channels),
          vector_of<const T>("var", var, maps.channels),
          optional_vector<const T>("weight", weight, maps.channels),
          optional_vector<const T>("bias", bias, maps.channels),
          eps,
          relu};
}

void moments(const Array& x, const Array& mean, const Array& var, int threads) {
  const Maps maps = maps_of(x);
  check_threads(threads);
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const T* in = data_of<const T>("x", x);
    T* m = vector_of<T>("mean", mean, maps.channels);
    T* v = vector_of<T>("var", var, maps.channels);
    py::gil_scoped_release release;
    norm_moments<T>(maps, in, m, v, threads);
  });
}

void forward(const Array& x, const py::object& residual, const py::object& weight, const py::object& bias,
             const Array& mean, const Array& var, double eps, bool relu, const Array& y, int threads) {
  const Maps maps = maps_of(x);
  check_threads(threads);
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const Norm<T> norm = norm_of<T>(maps, mean, var, weight, bias, eps, relu);
    const T* in = data_of<const T>("x", x);
    const T* added = optional_maps<const T>("residual", residual, x);
    T* out = maps_like<T>("y", y, x);
    py::gil_scoped_release release;
    norm_forward<T>(norm, in, added, out, threads);
  });
}

void backward(const Array& grad, const Array& x, const py::object& y, const py::object& weight,
              const py::object& bias, const Array& mean, const Array& var, double eps, bool relu, bool frozen,
              const Array& dx, const py::object& dresidual, const py::object& dweight,
              const py::object& dbias, int threads) {
  const Maps maps = maps_of(x);
  check_threads(threads);
  if (y.is_none() != dresidual.is_none())
    throw ShapeError("dresidual: expected an array exactly where y is one");
  if (dweight.is_none() != dbias.is_none() || (dweight.is_none() && !frozen))
    throw ShapeError("dweight, dbias: expected both, or neither of a frozen norm");
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const Norm<T> norm = norm_of<T>(maps, mean, var, weight, bias, eps, relu);
    const NormGradients<T> gradients{maps_like<const T>("grad", grad, x),
                                     data_of<const T>("x", x),
                                     optional_maps<const T>("y", y, x),
                                     frozen,
                                     maps_like<T>("dx", dx, x),
                                     optional_maps<T>("dresidual", dresidual, x),
                                     optional_vector<T>("dweight", dweight, maps.channels),
                                     optional_vector<T>("dbias", dbias, maps.channels)};
    py::gil_scoped_release release;
    norm_backward<T>(norm, gradients, threads);
  });
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("norm_moments", &moments);
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
}

}  // namespace sparsekd
