// What eager code calls between two layers, where every microsecond is one of a small network's step:
// the key under which the decision for a call is kept, and calls that were prepared for such a key.
//
// Both are C functions of Python, without pybind11's conversions, and both read operands through DLPack. A
// key holds all that a decision may depend on: sizes, strides and types of the operands, the numbers of the
// geometry, and of the indices which known structure they are, so that nobody has to look at them again. A
// prepared call keeps the geometry in C++ and allocates its result; shapes and lengths are checked anew each
// time, by the same functions that all products go through.
#include <pybind11/stl.h>
#include <structmember.h>

#include <cstring>
#include <new>

#include "bindings/products.h"
#include "core/structure.h"

namespace sparsekd {
namespace {

// Runs f and turns what it throws into a Python error.
template <class F>
PyObject* guarded(F f) {
  try {
    return f();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (...) {
    try {
      translate(std::current_exception());
    } catch (const std::exception& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  }
  return nullptr;
}

py::object owned(PyObject* fresh) {
  if (!fresh) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(fresh);
}

// ---- keys

class Key {
 public:
  bool add(int64_t word) {
    if (count_ == kMost) return false;
    words_[count_++] = word;
    return true;
  }

  bool add(const dlpack::Tensor& t) {
    const int64_t type = (int64_t{t.dtype.code} << 32) | (int64_t{t.dtype.bits} << 16) | t.dtype.lanes;
    if (t.device.type != dlpack::kCpu || !add(kTensor) || !add(type) || !add(t.ndim)) return false;
    for (int i = 0; i < t.ndim; ++i)
      if (!add(t.shape[i]) || !add(t.strides[i])) return false;
    return true;
  }

  // A tensor, a number, None, or a list or tuple of numbers.
  bool add(PyObject* argument) {
    if (argument == Py_None) return add(kNone);
    if (PyLong_CheckExact(argument)) return add(kNumber) && add_number(argument);
    if (PyTuple_Check(argument) || PyList_Check(argument)) {
      const Py_ssize_t length = PySequence_Fast_GET_SIZE(argument);
      if (!add(kList) || !add(length)) return false;
      for (Py_ssize_t i = 0; i < length; ++i)
        if (!add_number(PySequence_Fast_GET_ITEM(argument, i))) return false;
      return true;
    }
    dlpack::Tensor view;
    return TorchNames::get().lend(argument, &view) && add(view);
  }

  bool add_text(PyObject* text) {
    if (text == Py_None) return add(kNone);
    Py_ssize_t length = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(text, &length);
    if (!bytes || !add(length)) return false;
    for (Py_ssize_t i = 0; i < length; i += 8) {
      int64_t word = 0;
      std::memcpy(&word, bytes + i, static_cast<size_t>(std::min<Py_ssize_t>(8, length - i)));
      if (!add(word)) return false;
    }
    return true;
  }

  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_),
                                     static_cast<Py_ssize_t>(count_ * sizeof(int64_t)));
  }

 private:
  enum Kind : int64_t { kNone = -1, kNumber = -2, kList = -3, kTensor = -4 };
  static constexpr size_t kMost = 96;

  bool add_number(PyObject* number) {
    if (!PyLong_CheckExact(number)) return false;
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    return overflow == 0 && add(int64_t{value});
  }

  int64_t words_[kMost];
  size_t count_ = 0;
};

// How often a tensor has been written into; -1 where torch does not count, in inference mode.
int64_t version_of(PyObject* tensor) {
  static const py::object& getter =
      *new py::object(py::module_::import("sparsekd._torch").attr("version_of"));
  PyObject* version = PyObject_CallOneArg(getter.ptr(), tensor);
  if (!version) {
    PyErr_Clear();
    return -1;
  }
  const int64_t value = PyLong_AsLongLong(version);
  Py_DECREF(version);
  return value;
}

// Adds the indices of a weight by the number of their structure; false where nobody has asked for it yet.
bool add_structure(PyObject* crow, PyObject* col, Key* key) {
  const TorchNames& names = TorchNames::get();
  dlpack::Tensor rows, columns;
  if (!names.lend(crow, &rows) || !names.lend(col, &columns)) return false;
  const auto address = [](const dlpack::Tensor& t) {
    return reinterpret_cast<const int32_t*>(static_cast<const char*>(t.data) + t.byte_offset);
  };
  const int64_t serial = structure_serial(address(rows), address(columns));
  return serial > 0 && key->add(serial) && key->add(version_of(col)) && key->add(rows) && key->add(columns);
}

constexpr const char* kCallKeyDoc =
    "call_key(backend, threads, operands) -> bytes | None: of equal calls; None where torch's table lends "
    "not "
    "all of the operands, or their structure is new.";

PyObject* call_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 3 || !PyTuple_Check(args[2]) || PyTuple_GET_SIZE(args[2]) < 4)
      throw ShapeError("call_key: expected a backend, a number of threads and the operands of a product");
    Key key;
    PyObject* operands = args[2];
    const Py_ssize_t length = PyTuple_GET_SIZE(operands);
    bool complete = key.add_text(args[0]) && key.add(args[1]) &&
                    add_structure(PyTuple_GET_ITEM(operands, 2), PyTuple_GET_ITEM(operands, 3), &key);
    for (Py_ssize_t i = 0; complete && i < length; i = i == 1 ? 4 : i + 1)
      complete = key.add(PyTuple_GET_ITEM(operands, i));
    if (complete) return key.bytes();
    if (PyErr_Occurred()) PyErr_Clear();
    Py_RETURN_NONE;
  });
}

// ---- prepared calls

enum class Product { kConv2d, kConv2dDgrad, kConv2dWgrad, kLinear, kLinearDgrad, kLinearWgrad };
constexpr const char* kProducts[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad",
                                     "linear", "linear_dgrad", "linear_wgrad"};

struct Prepared {
  Product product;
  py::object shape, dtype, made_in, layout;  // of the result: made in one memory format, returned in another
  ConvOptions options;
  int threads;
};

struct TorchCalls {
  py::object empty, contiguous;
  py::tuple dtype_and_format, format;
  static const TorchCalls& get() {
    static const TorchCalls& instance =
        *new TorchCalls{py::module_::import("torch").attr("empty"), py::str("contiguous"),
                        py::make_tuple("dtype", "memory_format"), py::make_tuple("memory_format")};
    return instance;
  }
};

py::object empty(const Prepared& p) {
  const TorchCalls& torch = TorchCalls::get();
  PyObject* const arguments[] = {p.shape.ptr(), p.dtype.ptr(), p.made_in.ptr()};
  return owned(PyObject_Vectorcall(torch.empty.ptr(), arguments, 1, torch.dtype_and_format.ptr()));
}

py::object in_layout(const Prepared& p, py::object result) {
  if (p.made_in.is(p.layout)) return result;
  const TorchCalls& torch = TorchCalls::get();
  PyObject* const arguments[] = {result.ptr(), p.layout.ptr()};
  return owned(PyObject_VectorcallMethod(torch.contiguous.ptr(), arguments, 1, torch.format.ptr()));
}

py::object run(const Prepared& p, PyObject* const* args, Py_ssize_t count) {
  const bool biased = p.product == Product::kConv2d || p.product == Product::kLinear;
  if (count < (biased ? 5 : 4)) throw ShapeError("operands: expected those of the schema");
  const Array first(args[0]), second(args[1]), crow(args[2]), col(args[3]);
  const py::object result = empty(p);
  const Array out(result.ptr());
  const auto bias = [&] { return py::reinterpret_borrow<py::object>(args[4]); };
  switch (p.product) {
    case Product::kConv2d:
      products::conv2d(first, second, crow, col, bias(), out, p.options, p.threads);
      break;
    case Product::kConv2dDgrad:
      products::conv2d_dgrad(first, second, crow, col, out, p.options, p.threads);
      break;
    case Product::kConv2dWgrad:
      products::conv2d_wgrad(first, second, crow, col, out, p.options, p.threads);
      break;
    case Product::kLinear:
      products::linear(first, second, crow, col, bias(), out, p.threads);
      break;
    case Product::kLinearDgrad:
      products::linear_dgrad(first, second, crow, col, out, p.threads);
      break;
    case Product::kLinearWgrad:
      products::linear_wgrad(first, second, crow, col, out, p.threads);
      break;
  }
  return in_layout(p, result);
}

struct CallObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  Prepared* prepared;
};

PyObject* call(PyObject* self, PyObject* const* args, size_t count, PyObject* keywords) {
  return guarded([&]() -> PyObject* {
    if (keywords && PyTuple_GET_SIZE(keywords)) throw ShapeError("operands: expected no keywords");
    return run(*reinterpret_cast<CallObject*>(self)->prepared, args, PyVectorcall_NARGS(count))
        .release()
        .ptr();
  });
}

void free_call(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<CallObject*>(self)->prepared;
  type->tp_free(self);
  Py_DECREF(type);
}

py::object call_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(CallObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(free_call)},
                                {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_members, members},
                                {0, nullptr}};
  static PyType_Spec spec = {
      "sparsekd._C.Call", sizeof(CallObject), 0,
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static const py::object& type = *new py::object(owned(PyType_FromSpec(&spec)));
  return type;
}

// A function of a product's operands. Those of the geometry count as when it was prepared.
py::object prepare(const std::string& product, const py::tuple& shape, const py::object& dtype,
                   const py::object& made_in, const py::object& layout,
                   const std::optional<ConvOptions>& conv, int threads) {
  for (size_t i = 0; i < std::size(kProducts); ++i) {
    if (product != kProducts[i]) continue;
    const auto which = static_cast<Product>(i);
    if (conv.has_value() != (which < Product::kLinear))
      throw ShapeError("geometry: expected one for a convolution only");
    auto* type = reinterpret_cast<PyTypeObject*>(call_type().ptr());
    py::object made = owned(type->tp_alloc(type, 0));
    auto* object = reinterpret_cast<CallObject*>(made.ptr());
    object->vectorcall = call;
    object->prepared = new Prepared{
        which, shape, dtype, made_in, layout, conv.value_or(ConvOptions{}), check_threads(threads)};
    return made;
  }
  throw ShapeError("product: got the unknown name " + product);
}

PyMethodDef key_method = {"call_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_key)),
                          METH_FASTCALL, kCallKeyDoc};

}  // namespace

void bind_calls(py::module_& m) {
  m.attr("call_key") = owned(PyCFunction_New(&key_method, nullptr));
  m.def("prepare", [](const std::string& product, const py::tuple& shape, const py::object& dtype,
                      const py::object& made_in, const py::object& layout, int threads) {
    return prepare(product, shape, dtype, made_in, layout, std::nullopt, threads);
  });
  m.def("prepare",
        [](const std::string& product, const py::tuple& shape, const py::object& dtype,
           const py::object& made_in, const py::object& layout, const Quad& weight_shape, const Pair& stride,
           const Quad& padding, const Pair& dilation, int64_t groups, int threads) {
          return prepare(product, shape, dtype, made_in, layout,
                         ConvOptions{weight_shape, stride, padding, dilation, groups}, threads);
        });
}

}  // namespace sparsekd
