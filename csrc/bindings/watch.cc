// Watch: whether modules still are what a call was prepared from.
//
// A prepared call rests on hyperparameters, parameters, buffers, hooks and modes of several modules. All of
// them lie in the modules' dicts, so a walk over these, which compares addresses, finds any change in a
// tenth of the time that reading them by name takes. What else can change under a tensor that stays the same
// object is compared as well: its type and sizes, and of indices the count of writes.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/array.h"

namespace sparsekd {
namespace {

class Watch {
 public:
  explicit Watch(const std::vector<py::object>& modules) {
    for (const py::object& module : modules) {
      modules_.emplace_back(module);
      Recorder recorder{this};
      walk(module.ptr(), recorder);
    }
  }

  // Whether nothing has changed; also false where a tensor is none that torch lends.
  bool holds() const {
    if (!complete_) return false;
    Comparer comparer{seen_.data(), seen_.data() + seen_.size()};
    for (const py::weakref& reference : modules_) {
      const py::object module = reference();
      if (module.is_none() || !walk(module.ptr(), comparer)) return false;
    }
    if (comparer.next != comparer.end) return false;
    for (const Held& held : tensors_)
      if (!(Facts::of(held.tensor.ptr()) == held.facts)) return false;
    return true;
  }

 private:
  struct Facts {
    bool known = false;
    uint64_t type = 0;
    int64_t size = 0, version = 0;

    static Facts of(PyObject* tensor) {
      dlpack::Tensor view;
      Facts facts;
      if (!TorchNames::get().lend(tensor, &view) || view.device.type != dlpack::kCpu) return facts;
      facts.known = true;
      facts.type = (uint64_t{view.dtype.code} << 32) | (uint64_t{view.dtype.bits} << 16) | view.dtype.lanes;
      facts.size = 1;
      for (int i = 0; i < view.ndim; ++i) facts.size *= view.shape[i];
      if (view.dtype.code != dlpack::kInt || view.dtype.bits != 32) return facts;
      try {
        facts.version = version_of(tensor);
      } catch (py::error_already_set&) {  // of inference mode: nobody counts
        facts.known = false;
      }
      return facts;
    }

    bool operator==(const Facts& other) const {
      return known && other.known && type == other.type && size == other.size && version == other.version;
    }
  };

  struct Held {
    py::object tensor;
    Facts facts;
  };

  struct Recorder {
    Watch* watch;
    bool operator()(PyObject* object) const {
      watch->record(object);
      return true;
    }
  };

  struct Comparer {
    PyObject *const *next, *const *end;
    bool operator()(PyObject* object) { return next != end && *next++ == object; }
  };

  // Visits the type of a module, and keys and values of its dict and of the dicts in that.
  template <class Visit>
  static bool walk(PyObject* module, Visit& visit) {
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) throw py::error_already_set();
    if (!visit(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
    PyObject *key, *value, *inner_key, *inner;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);) {
      if (!visit(key) || !visit(value)) return false;
      if (!PyDict_Check(value)) continue;
      for (Py_ssize_t inside = 0; PyDict_Next(value, &inside, &inner_key, &inner);)
        if (!visit(inner_key) || !visit(inner)) return false;
    }
    return true;
  }

  static int64_t version_of(PyObject* tensor) {
    static const py::object& getter =
        *new py::object(py::module_::import("sparsekd._torch").attr("version_of"));
    return py::reinterpret_borrow<py::function>(getter)(py::handle(tensor)).cast<int64_t>();
  }

  // What calls read is kept alive, so that no other object can take its address. Modules and whatever may
  // hold one are not: a module that is watched must be free to die.
  static bool plain(PyObject* object) {
    return PyUnicode_Check(object) || PyLong_Check(object) || PyFloat_Check(object) || object == Py_None ||
           PyType_Check(object);
  }

  void record(PyObject* object) {
    seen_.push_back(object);
    const TorchNames& names = TorchNames::get();
    if (Py_TYPE(object) == names.tensor || Py_TYPE(object) == names.parameter) {
      const Facts facts = Facts::of(object);
      complete_ = complete_ && facts.known;
      tensors_.push_back({py::reinterpret_borrow<py::object>(object), facts});
    } else if (plain(object)) {
      kept_.push_back(py::reinterpret_borrow<py::object>(object));
    } else if (PyTuple_Check(object)) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i)
        if (!plain(PyTuple_GET_ITEM(object, i))) return;
      kept_.push_back(py::reinterpret_borrow<py::object>(object));
    }
  }

  std::vector<py::weakref> modules_;
  std::vector<PyObject*> seen_;
  std::vector<py::object> kept_;
  std::vector<Held> tensors_;
  bool complete_ = true;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch").def(py::init<const std::vector<py::object>&>()).def("holds", &Watch::holds);
}

}  // namespace sparsekd
