// Bindings of core/structure.h: index tensors of other devices are validated here, on a copy on the host.
#include "core/structure.h"

#include "bindings/arrays.h"

namespace sparsekd {

void bind_structure(py::module_& m) {
  m.def("validate", [](const Indices& crow, const Indices& col, int64_t rows, int64_t cols) {
    const RawIndices r = raw(crow, col);
    validate_csr(r.crow, r.crow_length, r.col, r.nnz, rows, cols);
  });
  m.def("release", [](const Indices& crow, const Indices& col) {
    const RawIndices r = raw(crow, col);
    release_structure(r.crow, r.col);
  });
}

}  // namespace sparsekd
