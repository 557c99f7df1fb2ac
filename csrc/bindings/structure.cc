// Bindings of core/structure.h: index tensors of other devices are validated here, on a copy on the host.
#include "core/structure.h"

#include <utility>

#include "bindings/arrays.h"
#include "core/panels.h"

namespace sparsekd {

void bind_structure(py::module_& m) {
  m.def("validate", [](const Indices& crow, const Indices& col, int64_t rows, int64_t cols) {
    const RawIndices r = raw(crow, col);
    validate_csr(r.crow, r.crow_length, r.col, r.nnz, rows, cols);
  });
  m.def("tile_size", [](const Indices& crow, const Indices& col, int64_t rows, int64_t cols, int64_t taps,
                        int64_t groups) {
    if (taps < 1 || cols % taps) throw ShapeError("taps: expected a divisor of the number of columns");
    if (groups < 1 || rows % groups) throw ShapeError("groups: expected a divisor of the number of rows");
    const TileSize size = tile_size(*structure(crow, col, rows, cols), taps, groups);
    return std::make_pair(size.rows, size.channels);
  });
  m.def("release", [](const Indices& crow, const Indices& col) {
    const RawIndices r = raw(crow, col);
    release_structure(r.crow, r.col);
  });
}

}  // namespace sparsekd
