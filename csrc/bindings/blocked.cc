// Bindings of core/blocked: a plan of a residual block for inputs of one shape, and the way into the layout
// and out of it. A blocked map is a contiguous tensor [images / lanes, height, channels, width, lanes].
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "core/blocked/block.h"

namespace sparsekd {
namespace {

using blocked::Block;
using blocked::ConvNorm;
using blocked::ConvNormShape;

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

ConvGeometry geometry_of(const Spec& spec, const Quad& input) {
  ConvGeometry g{};
  const auto& weight = std::get<2>(spec);
  g.batch = input[0];
  g.in_channels = input[1];
  g.in_h = input[2];
  g.in_w = input[3];
  g.out_channels = weight[0];
  g.kernel_h = weight[2];
  g.kernel_w = weight[3];
  g.stride_h = std::get<3>(spec)[0];
  g.stride_w = std::get<3>(spec)[1];
  g.pad_top = std::get<4>(spec)[0];
  g.pad_bottom = std::get<4>(spec)[1];
  g.pad_left = std::get<4>(spec)[2];
  g.pad_right = std::get<4>(spec)[3];
  g.dilation_h = std::get<5>(spec)[0];
  g.dilation_w = std::get<5>(spec)[1];
  g.groups = std::get<6>(spec);
  complete_geometry(g);
  if (weight[1] != g.in_channels / g.groups)
    throw ShapeError("x: expected " + std::to_string(weight[1] * g.groups) + " channels, got " +
                     std::to_string(g.in_channels));
  return g;
}

class BlockPlan {
 public:
  BlockPlan(const std::vector<Spec>& main, const std::optional<Spec>& shortcut, bool identity,
            const Quad& input, int threads)
      : input_(input), identity_(identity), threads_(check_threads(threads)) {
    if (main.empty()) throw ShapeError("main: expected at least one convolution");
    Quad shape = input;
    for (const Spec& spec : main) shape = add(main_, spec, shape);
    out_ = shape;
    if (shortcut && add(shortcut_, *shortcut, input) != shape)
      throw ShapeError("shortcut: expected the shape of the main branch");
    if (identity && (shortcut || input != shape))
      throw ShapeError("identity: expected a block whose output has the shape of its input, and no shortcut");
  }

  // Whether the kernels take all convolutions of the block.
  bool supported() const {
    const auto fits = [](const ConvNormShape& c) { return blocked::supported(c.geometry, *c.weight); };
    return std::all_of(main_.begin(), main_.end(), fits) &&
           std::all_of(shortcut_.begin(), shortcut_.end(), fits);
  }

  // [N, C, H, W] of each convolution's result, the shortcut's last.
  std::vector<Quad> shapes() const {
    std::vector<Quad> all;
    for (const auto* part : {&main_, &shortcut_})
      for (const ConvNormShape& c : *part)
        all.push_back({c.geometry.batch, c.geometry.out_channels, c.geometry.out_h, c.geometry.out_w});
    return all;
  }

  // [N, C, H, W] of the gradient through the shortcut's convolution.
  Quad projected() const {
    const ConvGeometry& g = shortcut_.at(0).geometry;
    if (!blocked::projected_compact(g)) return input_;
    return {g.batch, g.in_channels, g.out_h, g.out_w};
  }

  bool forward(const Array& x, const Array& out, const py::sequence& main,
               const py::sequence& shortcut) const {
    bool finite = true;
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const Block<T> block = block_of<T>(x, out, main, shortcut);
      py::gil_scoped_release release;
      finite = blocked::block_forward<T>(block);
    });
    return finite;
  }

  bool backward(const Array& x, const Array& out, const py::sequence& main, const py::sequence& shortcut,
                const Array& grad, const py::object& sums, const py::object& gated,
                const py::sequence& main_gradients, const py::sequence& shortcut_gradients,
                const py::object& projected, const py::object& dx, const py::object& before) const {
    bool finite = true;
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const Block<T> block = block_of<T>(x, out, main, shortcut);
      blocked::BlockGradients<T> g{};
      g.out = like<T>("grad", grad, block.out);
      const int64_t channels = block.out.channels;
      if (!sums.is_none()) g.sums = vector_of<const double>("sums", sums.cast<Array>(), 3 * channels);
      if (!gated.is_none()) g.gated = like<T>("gated", gated.cast<Array>(), block.out);
      if (!g.sums && !g.gated && main_.back().relu) throw ShapeError("gated: expected a tensor without sums");
      g.main = gradients_of<T>(block.main, main_gradients);
      g.shortcut = gradients_of<T>(block.shortcut, shortcut_gradients);
      for (size_t i = 0; i + 1 < g.main.size(); ++i)
        if (!g.main[i].grad)
          throw ShapeError("main: expected memory for the gradient of every norm but the last");
      if (!dx.is_none()) g.x = like<T>("dx", dx.cast<Array>(), block.x);
      if (g.x && !shortcut_.empty()) {
        const Quad shape = this->projected();
        g.projected =
            blocked_map<T>("projected", projected.cast<Array>(), shape[0], shape[1], shape[2], shape[3]).data;
      }
      blocked::Before<T> previous{};
      if (!before.is_none() && g.x) {
        const auto t = before.cast<py::tuple>();
        const int64_t inputs = block.x.channels;
        previous.relu = t[0].cast<bool>();
        previous.z = like<T>("before", t[1].cast<Array>(), block.x);
        previous.mean = vector_of<const T>("before", t[2].cast<Array>(), 4 * inputs);
        if (!t[3].is_none()) {
          previous.other = like<T>("before", t[3].cast<Array>(), block.x);
          previous.other_mean = vector_of<const T>("before", t[4].cast<Array>(), 4 * inputs);
        }
        previous.sums = vector_of<double>("before", t[5].cast<Array>(), 3 * inputs);
        g.before = &previous;
      }
      py::gil_scoped_release release;
      finite = blocked::block_backward<T>(block, g);
    });
    return finite;
  }

 private:
  static Quad add(std::vector<ConvNormShape>& to, const Spec& spec, const Quad& input) {
    const ConvGeometry g = geometry_of(spec, input);
    auto weight = structure(std::get<0>(spec), std::get<1>(spec), g.out_channels,
                            g.in_channels / g.groups * g.kernel_h * g.kernel_w);
    to.push_back({g, weight, std::get<7>(spec)});
    return {g.batch, g.out_channels, g.out_h, g.out_w};
  }

  template <class T, class Map>
  static T* like(const char* name, const Array& a, const Map& map) {
    return blocked_map<T>(name, a, map.images, map.channels, map.h, map.w).data;
  }

  template <class T>
  static T* optional(const char* name, const py::handle& a, int64_t length) {
    return a.is_none() ? nullptr : vector_of<T>(name, a.cast<Array>(), length);
  }

  // (values, bias, gamma, beta, running mean, running variance, eps, rate, frozen, z, state)
  template <class T>
  static std::vector<ConvNorm<T>> convolutions(const std::vector<ConvNormShape>& shapes,
                                               const py::sequence& from) {
    if (from.size() != shapes.size()) throw ShapeError("convolutions: expected as many as in the plan");
    std::vector<ConvNorm<T>> all;
    for (size_t i = 0; i < shapes.size(); ++i) {
      const ConvGeometry& g = shapes[i].geometry;
      const int64_t channels = g.out_channels;
      const auto t = from[i].cast<py::tuple>();
      ConvNorm<T> c{};
      c.shape = &shapes[i];
      c.values = vector_of<const T>("values", t[0].cast<Array>(), shapes[i].weight->nnz);
      c.bias = optional<const T>("bias", t[1], channels);
      c.gamma = optional<const T>("weight of a norm", t[2], channels);
      c.beta = optional<const T>("bias of a norm", t[3], channels);
      c.running_mean = optional<T>("running_mean", t[4], channels);
      c.running_var = optional<T>("running_var", t[5], channels);
      c.eps = t[6].cast<double>();
      c.rate = t[7].cast<double>();
      c.frozen = t[8].cast<bool>();
      if (!c.running_mean != !c.running_var || (c.frozen && !c.running_mean))
        throw ShapeError("running_mean, running_var: expected both, or neither of a norm that is not frozen");
      c.z = blocked_map<T>("z", t[9].cast<Array>(), g.batch, channels, g.out_h, g.out_w);
      c.state = vector_of<T>("state", t[10].cast<Array>(), 4 * channels);
      all.push_back(c);
    }
    return all;
  }

  // (values, bias, gamma, beta, grad), of which the last four may be None
  template <class T>
  static std::vector<blocked::ConvNormGradients<T>> gradients_of(const std::vector<ConvNorm<T>>& of,
                                                                 const py::sequence& from) {
    if (from.size() != of.size()) throw ShapeError("gradients: expected as many as in the plan");
    std::vector<blocked::ConvNormGradients<T>> all;
    for (size_t i = 0; i < of.size(); ++i) {
      const int64_t channels = of[i].z.channels;
      const auto t = from[i].cast<py::tuple>();
      all.push_back({vector_of<T>("dvalues", t[0].cast<Array>(), of[i].shape->weight->nnz),
                     optional<T>("dbias", t[1], channels), optional<T>("dgamma", t[2], channels),
                     optional<T>("dbeta", t[3], channels),
                     t[4].is_none() ? nullptr : like<T>("grad", t[4].cast<Array>(), of[i].z)});
    }
    return all;
  }

  template <class T>
  Block<T> block_of(const Array& x, const Array& out, const py::sequence& main,
                    const py::sequence& shortcut) const {
    return {convolutions<T>(main_, main),
            convolutions<T>(shortcut_, shortcut),
            identity_,
            blocked_map<const T>("x", x, input_[0], input_[1], input_[2], input_[3]),
            blocked_map<T>("out", out, out_[0], out_[1], out_[2], out_[3]),
            threads_};
  }

  std::vector<ConvNormShape> main_, shortcut_;
  Quad input_, out_;
  bool identity_;
  int threads_;
};

void enter(const Array& x, const Array& y, int threads) {
  check_threads(threads);
  by_type("x", x, [&](auto type) {
    using T = decltype(type);
    const auto in = view4<const T>("x", x);
    const auto out = blocked_map<T>("y", y, in.n, in.c, in.h, in.w);
    py::gil_scoped_release release;
    if (out.elements() > 0) blocked::enter<T>(in, out, threads);
  });
}

void leave(const Array& x, const Array& y, int threads) {
  check_threads(threads);
  by_type("y", y, [&](auto type) {
    using T = decltype(type);
    const auto out = view4<T>("y", y);
    const auto in = blocked_map<const T>("x", x, out.n, out.c, out.h, out.w);
    py::gil_scoped_release release;
    if (in.elements() > 0) blocked::leave<T>(in, out, threads);
  });
}

}  // namespace

void bind_blocked(py::module_& m) {
  py::class_<BlockPlan>(m, "BlockPlan")
      .def(py::init<const std::vector<Spec>&, const std::optional<Spec>&, bool, const Quad&, int>())
      .def_property_readonly("supported", &BlockPlan::supported)
      .def_property_readonly("shapes", &BlockPlan::shapes)
      .def_property_readonly("projected", &BlockPlan::projected)
      .def("forward", &BlockPlan::forward)
      .def("backward", &BlockPlan::backward);
  m.def("enter", &enter);
  m.def("leave", &leave);
}

}  // namespace sparsekd
