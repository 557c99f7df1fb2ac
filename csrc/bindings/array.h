// A torch tensor as the bindings see it. libtorch is not linked: address, sizes, strides and dtype are lent
// by torch's table of DLPack functions, in a twentieth of the time that its public attributes take; those are
// read of subclasses, and where there is no such table. Both leave a tensor's storage resizable, which
// Tensor.numpy() does not, and sharded training (FSDP) frees and allocates storages around every layer.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings/dlpack.h"
#include "core/error.h"

namespace sparsekd {

namespace py = pybind11;

enum class Type { kFloat32, kFloat64, kInt32, kInt8, kBfloat16, kFloat16, kOther };

// What reading a tensor needs of Python, looked up once.
struct TorchNames {
  PyTypeObject *tensor, *parameter;
  const dlpack::ExchangeApi* api;   // null where torch has none
  std::array<PyObject*, 5> dtypes;  // in the order of Type
  PyObject *data_ptr, *shape, *stride, *dtype, *is_cpu, *is_neg;

  static const TorchNames& get() { return instance(); }

  // Called once, when the module is imported; the references live as long as the process.
  static void load() {
    const py::module_ torch = py::module_::import("torch");
    TorchNames& names = instance();
    names.tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    names.parameter =
        reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    names.api = exchange_api(torch.attr("Tensor"));
    const std::array<const char*, 5> types{"float32", "float64", "int32", "bfloat16", "float16"};
    for (size_t i = 0; i < types.size(); ++i)
      names.dtypes[i] = py::object(torch.attr(types[i])).release().ptr();
    names.data_ptr = PyUnicode_InternFromString("data_ptr");
    names.shape = PyUnicode_InternFromString("shape");
    names.stride = PyUnicode_InternFromString("stride");
    names.dtype = PyUnicode_InternFromString("dtype");
    names.is_cpu = PyUnicode_InternFromString("is_cpu");
    names.is_neg = PyUnicode_InternFromString("is_neg");
  }

  // Lends the view of a plain tensor; false, without an error, for all else and what DLPack cannot lend.
  bool lend(PyObject* tensor, dlpack::Tensor* view) const {
    if (!api || (Py_TYPE(tensor) != this->tensor && Py_TYPE(tensor) != parameter)) return false;
    if (api->tensor_from_py_object(tensor, view) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  static const dlpack::ExchangeApi* exchange_api(const py::object& tensor_type) {
    if (!py::hasattr(tensor_type, dlpack::kAttribute)) return nullptr;
    const py::object capsule = tensor_type.attr(dlpack::kAttribute);
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
    auto* header = static_cast<const dlpack::Header*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    while (header && header->version.major != dlpack::kMajor) header = header->previous;
    const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    return api && api->tensor_from_py_object ? api : nullptr;
  }

  static TorchNames& instance() {
    static TorchNames names{};
    return names;
  }
};

// Valid as long as the caller holds the tensor. Strides count elements.
class Array {
 public:
  static constexpr int kMostDims = 8;

  Array() = default;
  explicit Array(PyObject* tensor) : tensor_(tensor) {
    const TorchNames& names = TorchNames::get();
    dlpack::Tensor view;
    if (names.lend(tensor, &view))
      take(view);
    else
      read_attributes(names);
    // A lazily negated tensor holds other numbers than it stands for.
    if (type_ != Type::kInt32 && type_ != Type::kInt8 &&
        checked(PyObject_CallMethodNoArgs(tensor, names.is_neg)).ptr() != Py_False)
      throw UnsupportedError("expected a tensor without negative bit; call resolve_neg() first");
    check_memory();
  }

  int ndim() const { return ndim_; }
  int64_t shape(int dim) const { return shape_[static_cast<size_t>(dim)]; }
  int64_t stride(int dim) const { return stride_[static_cast<size_t>(dim)]; }
  Type type() const { return type_; }
  void* data() const { return data_; }
  py::object storage() const { return tensor_.attr("untyped_storage")(); }

  int64_t size() const {
    int64_t size = 1;
    for (int i = 0; i < ndim_; ++i) size *= shape(i);
    return size;
  }

  bool same_dtype(const Array& other) const { return dtype().is(other.dtype()); }
  std::string dtype_text() const { return std::string(py::str(dtype())); }

 private:
  py::object dtype() const { return checked(PyObject_GetAttr(tensor_.ptr(), TorchNames::get().dtype)); }

  static void expect_cpu(bool on_cpu) {
    if (!on_cpu) throw UnsupportedError("expected a tensor on the CPU, got one elsewhere");
  }

  static void expect_dims(int64_t count) {
    if (count > kMostDims)
      throw ShapeError("expected at most " + std::to_string(kMostDims) + " dimensions, got " +
                       std::to_string(count));
  }

  static Type type_of(const dlpack::DataType& dtype) {
    if (dtype.lanes != 1) return Type::kOther;
    if (dtype.code == dlpack::kFloat && dtype.bits == 32) return Type::kFloat32;
    if (dtype.code == dlpack::kFloat && dtype.bits == 64) return Type::kFloat64;
    if (dtype.code == dlpack::kFloat && dtype.bits == 16) return Type::kFloat16;
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return Type::kBfloat16;
    if (dtype.code == dlpack::kInt && dtype.bits == 32) return Type::kInt32;
    if (dtype.code == dlpack::kInt && dtype.bits == 8) return Type::kInt8;
    return Type::kOther;
  }

  void take(const dlpack::Tensor& view) {
    expect_cpu(view.device.type == dlpack::kCpu);
    expect_dims(view.ndim);
    type_ = type_of(view.dtype);
    ndim_ = view.ndim;
    for (int i = 0; i < ndim_; ++i) {
      shape_[static_cast<size_t>(i)] = view.shape[i];
      stride_[static_cast<size_t>(i)] = view.strides[i];
    }
    data_ = static_cast<char*>(view.data) + view.byte_offset;
  }

  void read_attributes(const TorchNames& names) {
    PyObject* tensor = tensor_.ptr();
    expect_cpu(checked(PyObject_GetAttr(tensor, names.is_cpu)).ptr() == Py_True);
    const py::object dtype = this->dtype();
    for (size_t i = 0; i < names.dtypes.size(); ++i)
      if (dtype.ptr() == names.dtypes[i]) type_ = static_cast<Type>(i);
    const py::object shape = checked(PyObject_GetAttr(tensor, names.shape));
    const py::object stride = checked(PyObject_CallMethodNoArgs(tensor, names.stride));
    ndim_ = read(shape.ptr(), shape_);
    read(stride.ptr(), stride_);
    const py::object address = checked(PyObject_CallMethodNoArgs(tensor, names.data_ptr));
    data_ = PyLong_AsVoidPtr(address.ptr());
    if (!data_ && PyErr_Occurred()) throw py::error_already_set();
  }

  static py::object checked(PyObject* fresh) {
    if (!fresh) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(fresh);
  }

  static int read(PyObject* sizes, std::array<int64_t, kMostDims>& to) {
    const Py_ssize_t count = PyTuple_Size(sizes);
    if (count < 0) throw py::error_already_set();
    expect_dims(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      to[static_cast<size_t>(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
      if (PyErr_Occurred()) throw py::error_already_set();
    }
    return static_cast<int>(count);
  }

  // FSDP frees storages; the address of a tensor is its offset then. Few real addresses are so low that one
  // has to look twice.
  void check_memory() const {
    if (reinterpret_cast<uintptr_t>(data_) >> 40 || size() == 0) return;
    if (storage().attr("data_ptr")().cast<uintptr_t>() == 0)
      throw UnsupportedError(
          "expected a tensor with memory, got one whose storage has been freed; FSDP frees the weights of a "
          "layer "
          "outside of its own forward and backward pass");
  }

  py::handle tensor_;
  void* data_ = nullptr;
  std::array<int64_t, kMostDims> shape_{}, stride_{};
  int ndim_ = 0;
  Type type_ = Type::kOther;
};

}  // namespace sparsekd

namespace pybind11::detail {

// Takes tensors, Parameters included, and nothing else.
template <>
struct type_caster<sparsekd::Array> {
  PYBIND11_TYPE_CASTER(sparsekd::Array, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!PyObject_TypeCheck(source.ptr(), sparsekd::TorchNames::get().tensor)) return false;
    value = sparsekd::Array(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
