// Bindings of core/blocked: plans of residual blocks for inputs of one shape, and the way into the layout and
// out of it.
#include "bindings/blocked.h"

#include <algorithm>
#include <optional>

#include "core/blocked/preactivation.h"

namespace sparsekd {
namespace {

using blocked::Block;
using blocked::ConvNorm;
using blocked::ConvNormShape;

class BlockPlan {
 public:
  BlockPlan(const std::vector<Spec>& main, const std::optional<Spec>& shortcut, bool identity,
            const Quad& input, int threads)
      : input_(input), identity_(identity), threads_(check_threads(threads)) {
    if (main.empty()) throw ShapeError("main: expected at least one convolution");
    Quad shape = input;
    for (const Spec& spec : main) shape = add_convolution(main_, spec, shape);
    out_ = shape;
    if (shortcut && add_convolution(shortcut_, *shortcut, input) != shape)
      throw ShapeError("shortcut: expected the shape of the main branch");
    if (identity && (shortcut || input != shape))
      throw ShapeError("identity: expected a block whose output has the shape of its input, and no shortcut");
  }

  // Whether the kernels take all convolutions of the block.
  bool supported() const { return all_supported({&main_, &shortcut_}, threads_); }
  // [N, C, H, W] of each convolution's result, the shortcut's last.
  std::vector<Quad> shapes() const { return shapes_of({&main_, &shortcut_}); }
  // [N, C, H, W] of the gradient through the shortcut's convolution.
  Quad projected() const { return projected_shape(shortcut_.at(0).geometry, input_); }

  // x: see operand_of; out: None where it is read from what it is made of.
  bool forward(const py::object& x, const py::object& out, const py::sequence& main,
               const py::sequence& shortcut) const {
    bool finite = true;
    by_type("x", first_of(x), [&](auto type) {
      using T = decltype(type);
      const Block<T> block = block_of<T>(x, out, main, shortcut);
      py::gil_scoped_release release;
      finite = blocked::block_forward<T>(block);
    });
    return finite;
  }

  bool backward(const py::object& x, const py::object& out, const py::sequence& main,
                const py::sequence& shortcut, const Array& grad, const py::object& sums,
                const py::object& gated, const py::sequence& main_gradients,
                const py::sequence& shortcut_gradients, const py::object& projected, const py::object& dx,
                const py::object& before) const {
    bool finite = true;
    by_type("x", first_of(x), [&](auto type) {
      using T = decltype(type);
      const Block<T> block = block_of<T>(x, out, main, shortcut);
      blocked::BlockGradients<T> g{};
      g.out = like<T>("grad", grad, block.out);
      const int64_t channels = block.out.channels;
      if (!sums.is_none()) g.sums = vector_of<const double>("sums", sums.cast<Array>(), 3 * channels);
      if (!gated.is_none()) g.gated = like<T>("gated", gated.cast<Array>(), block.out);
      if (!g.sums && !block.out.data) throw ShapeError("out: expected a tensor without sums");
      if (!g.sums && !g.gated && main_.back().relu) throw ShapeError("gated: expected a tensor without sums");
      g.main = gradients_of<T>(block.main, main_gradients);
      g.shortcut = gradients_of<T>(block.shortcut, shortcut_gradients);
      for (size_t i = 0; i + 1 < g.main.size(); ++i)
        if (!g.main[i].grad)
          throw ShapeError("main: expected memory for the gradient of every norm but the last");
      if (!dx.is_none()) g.x = like<T>("dx", dx.cast<Array>(), block.x.map);
      if (g.x && !shortcut_.empty()) {
        const Quad shape = this->projected();
        g.projected =
            blocked_map<T>("projected", projected.cast<Array>(), shape[0], shape[1], shape[2], shape[3]).data;
      }
      std::optional<blocked::Before<T>> previous;
      if (!before.is_none() && g.x) {
        previous = before_of<T>(before.cast<py::tuple>(), block.x.map);
        g.before = &*previous;
      }
      py::gil_scoped_release release;
      finite = blocked::block_backward<T>(block, g);
    });
    return finite;
  }

 private:
  template <class T>
  Block<T> block_of(const py::object& x, const py::object& out, const py::sequence& main,
                    const py::sequence& shortcut) const {
    BlockedMap<T> to{nullptr, out_[0], out_[1], out_[2], out_[3]};
    if (!out.is_none()) to.data = like<T>("out", out.cast<Array>(), to);
    return {convolutions<T>(main_, main),
            convolutions<T>(shortcut_, shortcut),
            identity_,
            operand_of<T>(x, input_),
            to,
            threads_};
  }

  std::vector<ConvNormShape> main_, shortcut_;
  Quad input_, out_;
  bool identity_;
  int threads_;
};

// Convolutions of which the last has no norm, see core/blocked/preactivation.h.
class PreActivationPlan {
 public:
  PreActivationPlan(bool front, const std::vector<Spec>& main, const std::optional<Spec>& shortcut,
                    bool identity, const Quad& input, int threads)
      : input_(input), front_(front), identity_(identity), threads_(check_threads(threads)) {
    if (main.empty()) throw ShapeError("main: expected at least one convolution");
    Quad shape = input;
    for (const Spec& spec : main) shape = add_convolution(main_, spec, shape);
    last_.push_back(main_.back());
    main_.pop_back();
    if (shortcut && add_convolution(shortcut_, *shortcut, input) != shape)
      throw ShapeError("shortcut: expected the shape of the main branch");
    if (identity && (shortcut || input != shape))
      throw ShapeError("identity: expected a block whose output has the shape of its input, and no shortcut");
    if (!front && (identity || shortcut)) throw ShapeError("front: expected a norm before the branches part");
  }

  bool supported() const { return all_supported({&main_, &last_, &shortcut_}, threads_); }
  std::vector<Quad> shapes() const { return shapes_of({&main_, &last_, &shortcut_}); }
  Quad projected() const { return projected_shape(shortcut_.at(0).geometry, input_); }

  // front: (gamma, beta, running mean, running variance, eps, rate, frozen, state) or None; moments: [2 C] or
  // None; last, shortcut: (values, bias, result); out_moments: [2 Co] or None.
  bool forward(const Array& x, const py::object& front, const py::object& moments, const py::sequence& main,
               const py::tuple& last, const py::object& shortcut, const py::object& out_moments) const {
    bool finite = true;
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const PreActivation<T> block = block_of<T>(x, front, moments, main, last, shortcut, out_moments);
      if (front_ && !block.front[0].frozen && !block.moments)
        throw ShapeError("moments: expected those of the input");
      py::gil_scoped_release release;
      finite = blocked::preactivation_forward<T>(block);
    });
    return finite;
  }

  // gradients: (dvalues, dbias = None, dgamma, dbeta, memory) of the norms, dvalues of what has none
  bool backward(const Array& x, const py::object& front, const py::sequence& main, const py::tuple& last,
                const py::object& shortcut, const Array& grad, const py::object& front_gradients,
                const py::sequence& main_gradients, const Array& last_values,
                const py::object& shortcut_values, const py::object& projected, const py::object& dx) const {
    bool finite = true;
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const PreActivation<T> block = block_of<T>(x, front, py::none(), main, last, shortcut, py::none());
      blocked::PreActivationGradients<T> g{};
      g.out = like<T>("grad", grad, block.last.z);
      g.main = gradients_of<T>(block.main, main_gradients);
      for (const auto& of_norm : g.main)
        if (!of_norm.grad) throw ShapeError("main: expected memory for the gradient of every norm");
      g.last.values = vector_of<T>("dvalues", last_values, last_[0].weight->nnz);
      if (!shortcut_.empty())
        g.shortcut.values = vector_of<T>("dvalues", shortcut_values.cast<Array>(), shortcut_[0].weight->nnz);
      if (!dx.is_none()) g.x = like<T>("dx", dx.cast<Array>(), block.x);
      if (g.x && front_) {
        const auto t = front_gradients.cast<py::tuple>();
        const int64_t channels = block.x.channels;
        g.front.gamma = optional_vector<T>("dgamma", t[0], channels);
        g.front.beta = optional_vector<T>("dbeta", t[1], channels);
        g.front.grad = like<T>("memory", t[2].cast<Array>(), block.x);
      }
      if (g.x && !shortcut_.empty()) {
        const Quad shape = this->projected();
        g.projected =
            blocked_map<T>("projected", projected.cast<Array>(), shape[0], shape[1], shape[2], shape[3]).data;
      }
      py::gil_scoped_release release;
      finite = blocked::preactivation_backward<T>(block, g);
    });
    return finite;
  }

 private:
  template <class T>
  using PreActivation = blocked::PreActivation<T>;

  // A convolution without norm: (values, bias, result).
  template <class T>
  static ConvNorm<T> bare(const ConvNormShape& shape, const py::tuple& t) {
    const ConvGeometry& g = shape.geometry;
    ConvNorm<T> c{};
    c.shape = &shape;
    c.values = vector_of<const T>("values", t[0].cast<Array>(), shape.weight->nnz);
    c.bias = optional_vector<const T>("bias", t[1], g.out_channels);
    c.z = blocked_map<T>("result", t[2].cast<Array>(), g.batch, g.out_channels, g.out_h, g.out_w);
    return c;
  }

  template <class T>
  PreActivation<T> block_of(const Array& x, const py::object& front, const py::object& moments,
                            const py::sequence& main, const py::tuple& last, const py::object& shortcut,
                            const py::object& out_moments) const {
    PreActivation<T> b{};
    b.x = blocked_map<const T>("x", x, input_[0], input_[1], input_[2], input_[3]);
    const int64_t channels = b.x.channels;
    if (front_ != !front.is_none()) throw ShapeError("front: expected what the plan was made for");
    if (front_) {
      const auto t = front.cast<py::tuple>();
      ConvNorm<T> c = norm_of<T>(t, 0, channels);
      c.z = {const_cast<T*>(b.x.data), b.x.images, channels, b.x.h, b.x.w};
      c.state = vector_of<T>("state", t[7].cast<Array>(), 4 * channels);
      b.front.push_back(c);
    }
    b.moments = optional_vector<const double>("moments", moments, 2 * channels);
    b.main = convolutions<T>(main_, main);
    b.last = bare<T>(last_[0], last);
    if (!shortcut_.empty()) b.shortcut.push_back(bare<T>(shortcut_[0], shortcut.cast<py::tuple>()));
    b.identity = identity_;
    b.out_moments = optional_vector<double>("out_moments", out_moments, 2 * b.last.z.channels);
    b.threads = threads_;
    return b;
  }

  std::vector<ConvNormShape> main_, last_, shortcut_;
  Quad input_;
  bool front_, identity_;
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

// The map that parts make: see operand_of.
void join(const py::object& x, const Array& y, const Quad& shape, int threads) {
  check_threads(threads);
  by_type("y", y, [&](auto type) {
    using T = decltype(type);
    const auto from = operand_of<T>(x, shape);
    blocked::Result<T> to;
    to.out = blocked_map<T>("y", y, shape[0], shape[1], shape[2], shape[3]);
    py::gil_scoped_release release;
    if (to.out.elements() > 0) blocked::join<T>(from, {}, false, to, nullptr, threads);
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
  py::class_<PreActivationPlan>(m, "PreActivationPlan")
      .def(py::init<bool, const std::vector<Spec>&, const std::optional<Spec>&, bool, const Quad&, int>())
      .def_property_readonly("supported", &PreActivationPlan::supported)
      .def_property_readonly("shapes", &PreActivationPlan::shapes)
      .def_property_readonly("projected", &PreActivationPlan::projected)
      .def("forward", &PreActivationPlan::forward)
      .def("backward", &PreActivationPlan::backward);
  m.def("enter", &enter);
  m.def("leave", &leave);
  m.def("join", &join);
}

}  // namespace sparsekd
