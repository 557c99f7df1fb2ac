// Bindings of core/densify.h: a weight from its nonzeros, and its nonzeros from a dense gradient.
#include "core/densify.h"

#include "bindings/arrays.h"

namespace sparsekd {
namespace {

// Calls run(T{}) for a type of the size of the elements, which both tensors hold.
template <class F>
void by_size(const Array& values, const Array& dense, F run) {
  if (!values.same_dtype(dense))
    throw UnsupportedError("dense: expected dtype " + values.dtype_text() + ", got " + dense.dtype_text());
  if (holds<int16_t>(values)) return run(int16_t{});
  by_type("values", values, run);
}

void scatter(const Array& values, const Indices& crow, const Indices& col, const Array& dense, int64_t taps,
             int threads) {
  check_dims("dense", dense, 2);
  const auto weight = structure(crow, col, dense.shape(0), dense.shape(1));
  check_threads(threads);
  by_size(values, dense, [&](auto type) {
    using T = decltype(type);
    const T* from = vector_of<const T>("values", values, weight->nnz);
    T* to = rows_of<T>("dense", dense);
    py::gil_scoped_release release;
    scatter_weight<T>(*weight, from, taps, to, threads);
  });
}

void gather(const Array& dense, const Indices& crow, const Indices& col, const Array& values, int64_t taps,
            int threads) {
  check_dims("dense", dense, 2);
  const auto weight = structure(crow, col, dense.shape(0), dense.shape(1));
  check_threads(threads);
  by_size(values, dense, [&](auto type) {
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
