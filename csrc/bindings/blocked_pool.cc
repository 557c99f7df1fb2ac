// Bindings of core/blocked/pool.h.
#include <optional>

#include "bindings/blocked.h"
#include "core/blocked/pool.h"

namespace sparsekd {
namespace {

// (average, kernel, stride, padding, [N, C, H, W] of the input, threads) as a plan for inputs of one shape.
class PoolPlan {
 public:
  PoolPlan(bool average, const Pair& kernel, const Pair& stride, const Pair& padding, const Quad& input,
           int threads)
      : pool_{average, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]},
        input_(input),
        threads_(check_threads(threads)) {
    for (int i = 0; i < 2; ++i) {
      if (kernel[i] < 1 || stride[i] < 1) throw ShapeError("kernel, stride: expected positive numbers");
      if (padding[i] < 0 || padding[i] > kernel[i] / 2)
        throw ShapeError("padding: expected at most half of the kernel");
      if (input[2 + i] < 1 || kernel[i] > input[2 + i] + 2 * padding[i])
        throw ShapeError("kernel: expected one that fits into the map");
    }
  }

  // [N, C, H, W] of the result.
  Quad shape() const { return {input_[0], input_[1], pool_.out_h(input_[2]), pool_.out_w(input_[3])}; }

  void forward(const Array& x, const Array& y) const {
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const auto in = map<const T>("x", x, input_);
      const auto out = map<T>("y", y, shape());
      py::gil_scoped_release release;
      if (out.elements() > 0) blocked::pool_forward<T>(pool_, in, out, threads_);
    });
  }

  // before: see before_of, or None
  bool backward(const Array& x, const Array& grad, const Array& dx, const py::object& before) const {
    bool finite = true;
    by_type("x", x, [&](auto type) {
      using T = decltype(type);
      const auto in = map<const T>("x", x, input_);
      const auto out = map<const T>("grad", grad, shape());
      T* const to = like<T>("dx", dx, in);
      std::optional<blocked::Before<T>> previous;
      if (!before.is_none()) previous = before_of<T>(before.cast<py::tuple>(), in);
      py::gil_scoped_release release;
      finite = blocked::pool_backward<T>(pool_, in, out, to, previous ? &*previous : nullptr, threads_);
    });
    return finite;
  }

 private:
  template <class T>
  static BlockedMap<T> map(const char* name, const Array& a, const Quad& s) {
    return blocked_map<T>(name, a, s[0], s[1], s[2], s[3]);
  }

  blocked::Pooling pool_;
  Quad input_;
  int threads_;
};

}  // namespace

void bind_blocked_pool(py::module_& m) {
  py::class_<PoolPlan>(m, "PoolPlan")
      .def(py::init<bool, const Pair&, const Pair&, const Pair&, const Quad&, int>())
      .def_property_readonly("shape", &PoolPlan::shape)
      .def("forward", &PoolPlan::forward)
      .def("backward", &PoolPlan::backward);
}

}  // namespace sparsekd
