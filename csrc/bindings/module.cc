// The Python module sparsekd._C: checks types, shapes and lengths, then calls core without the GIL.
// Tensors are the caller's, who holds them; outputs are written in place.
#include <pybind11/stl.h>

#include "bindings/products.h"
#include "core/cpu.h"
#include "core/parallel.h"

namespace sparsekd {

void bind_blocked(py::module_& m);
void bind_blocked_pool(py::module_& m);
void bind_calls(py::module_& m);
void bind_densify(py::module_& m);
void bind_frozen(py::module_& m);
void bind_growth(py::module_& m);
void bind_peak(py::module_& m);
void bind_norm(py::module_& m);
void bind_products(py::module_& m);
void bind_structure(py::module_& m);
void bind_watch(py::module_& m);

namespace {

py::dict info() {
  py::dict d;
  std::vector<std::string> names;
  for (Isa isa : available_isas()) names.push_back(isa_name(isa));
  d["isa"] = isa_name(current_isa());
  d["isas"] = names;
  d["parallel_runtime"] = parallel_runtime();
  d["compiler"] = __VERSION__;
  d["l1d_bytes"] = cache_sizes().l1d;
  d["l2_bytes"] = cache_sizes().l2;
  d["l3_bytes"] = cache_sizes().l3;
  const CacheUse use = cache_use();
  d["cached_structures"] = use.structures;
  d["cached_bytes"] = use.bytes;
  d["cached_plans"] = use.plans;
  return d;
}

}  // namespace

void translate(std::exception_ptr pending) {
  const auto raise = [](const char* name, const std::exception& e) {
    const py::object type = py::module_::import("sparsekd.errors").attr(name);
    PyErr_SetString(type.ptr(), e.what());
  };
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const TopologyError& e) {
    raise("TopologyError", e);
  } catch (const ShapeError& e) {
    raise("ShapeError", e);
  } catch (const UnsupportedError& e) {
    raise("UnsupportedError", e);
  }
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sparsekd; use sparsekd.functional, which calls them.";
  py::register_local_exception_translator(translate);
  TorchNames::load();
  bind_products(m);
  bind_calls(m);
  bind_blocked(m);
  bind_blocked_pool(m);
  bind_densify(m);
  bind_frozen(m);
  bind_growth(m);
  bind_norm(m);
  bind_structure(m);
  bind_watch(m);
  m.def("info", &info);
  m.def("current_isa", [] { return isa_name(current_isa()); });
  m.def("set_isa", &set_isa);
  bind_peak(m);
}

}  // namespace sparsekd
