// Bindings of core/densify.h: a weight from its nonzeros, and its nonzeros from a dense gradient.
#include "core/densify.h"

#include "bindings/arrays.h"

namespace sparsekd {
namespace {

// Calls run(T{}) for the type of `a`; half precision comes as int16.
template <class F>
void by_size(const char* name, const py::array& a, F run) {
  if (py::isinstance<py::array_t<int16_t>>(a)) return run(int16_t{});
  by_type(name, a, run);
}

void scatter(const py::array& values, const Indices& crow, const Indices& col, const py::array& dense,
             int64_t taps, int threads) {
  check_dims("dense", dense, 2);
  const auto weight = structure(crow, col, dense.shape(0), dense.shape(1));
  check_threads(threads);
  by_size("values", values, [&](auto type) {
    using T = decltype(type);
    const T* from = vector_of<const T>("values", values, weight->nnz);
    T* to = rows_of<T>("dense", dense);
    py::gil_scoped_release release;
    scatter_weight<T>(*weight, from, taps, to, threads);
  });
}

void gather(const py::array& dense, const Indices& crow, const Indices& col, const py::array& values,
            int64_t taps, int threads) {
  check_dims("dense", dense, 2);
  const auto weight = structure(crow, col, dense.shape(0), dense.shape(1));
  check_threads(threads);
  by_size("dense", dense, [&](auto type) {
    using T = decltype(type);
    const T* from = rows_of<const T>("dense", dense);
    T* to = vector_of<T>("values", values, weight->nnz);
    py::gil_scoped_release release;
    gather_weight<T>(*weight, from, taps, to, threads);
  });
}

}  // namespace

void bind_densify(py::module_& m) {
  m.def("scatter", &scatter);
  m.def("gather", &gather);
}

}  // namespace sparsekd
