// What sparsekd needs of DLPack (https://dmlc.github.io/dlpack), version 1.2 and later minor ones: the view
// of a tensor, and the table of C functions through which a package lends its tensors without a Python call.
#pragma once
#include <cstdint>

namespace sparsekd::dlpack {

constexpr uint32_t kMajor = 1;  // a later minor version only appends to what is below

enum DeviceType : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

// Strides count elements.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct Header {
  Version version;
  Header* previous;
};

// The value of the capsule `type(tensor).__dlpack_c_exchange_api__`, whose name is below. Of the functions
// that are not called here only the place is declared. `tensor_from_py_object` lends the view of a tensor as
// long as its object lives; it returns nonzero with a Python error set where it cannot.
struct ExchangeApi {
  Header header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object)();
  void (*managed_tensor_to_py_object)();
  int (*tensor_from_py_object)(void* object, Tensor* view);
  void (*current_work_stream)();
};

constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";

}  // namespace sparsekd::dlpack
