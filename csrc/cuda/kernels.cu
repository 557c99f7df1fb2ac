// The functions of api.h: check sizes, choose the instance of a kernel, start it.
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "api.h"
#include "gather.cuh"
#include "grow.cuh"
#include "patch.cuh"
#include "sample.cuh"
#include "topology.cuh"

namespace sparsekd_cuda {
namespace {

constexpr int64_t kVectorBytes = 16;

// Calls run(T{}) for the type of the code.
template <class F>
int by_type(int64_t dtype, F run) {
  if (dtype == SPARSEKD_FLOAT32) return run(float());
  if (dtype == SPARSEKD_FLOAT16) return run(__half());
  if (dtype == SPARSEKD_BFLOAT16) return run(__nv_bfloat16());
  return cudaErrorInvalidValue;
}

// How many images a vector has: 16 bytes of them, or one where a batch is smaller than that.
int64_t vector_of_images(int64_t dtype, int64_t batch) {
  const int64_t size = kVectorBytes / (dtype == SPARSEKD_FLOAT32 ? 4 : 2);
  return batch < size ? 1 : size;
}

// Calls run(Vector<T, n>{}) for the vectors that a batch is cut into.
template <class F>
int by_vector(int64_t dtype, int64_t batch, F run) {
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = kVectorBytes / sizeof(T);
    return vector_of_images(dtype, batch) == kVec ? run(Vector<T, kVec>()) : run(Vector<T, 1>());
  });
}

// Whether all sizes, whose products do not overflow in double, fit an int32 with room to step past the end.
bool fit(std::initializer_list<double> sizes) {
  for (double size : sizes)
    if (!(size >= 0 && size <= INT32_MAX - 1024)) return false;
  return true;
}

// The pixels of an image are found with 32 bits, images and channels with 64.
bool valid(const sparsekd_cuda_maps& m) {
  return fit({double(m.batch), double(m.channels), double(m.height), double(m.width),
              double(m.height) * m.stride_h + double(m.width) * m.stride_w}) &&
         m.stride_n >= 0 && m.stride_c >= 0 && fit({double(m.stride_h), double(m.stride_w)});
}

// Whether the outputs of an axis lie in maps of a size, and what they read has numbers of 32 bits.
bool valid(const sparsekd_cuda_axis& a, int64_t result) {
  return fit({double(a.outputs), double(a.patch) - 1, double(a.spacing) - 1, double(a.stride),
              double(a.window) - 1, double(a.pitch) - 1, double(a.out_start), double(a.out_step),
              std::abs(double(a.start)) + (double(a.outputs) + double(a.patch) * a.spacing) * a.stride +
                  double(a.window) * a.pitch,
              result - 1 - double(a.out_start) - (double(a.outputs) - 1) * a.out_step}) &&
         a.spacing * a.stride % a.pitch == 0;  // of numbers that are known to be small
}

Axis axis_of(const sparsekd_cuda_axis& a) {
  const auto n = [](int64_t number) { return static_cast<int32_t>(number); };
  return {n(a.outputs), n(a.patch), n(a.spacing),   n(a.start),   n(a.stride),
          n(a.window),  n(a.pitch), n(a.out_start), n(a.out_step)};
}

// The patches of a product whose axes are y and x.
Patches patches_of(const sparsekd_cuda_product& p, const sparsekd_cuda_axis* axes) {
  return {axis_of(axes[0]), axis_of(axes[1]), static_cast<int32_t>(p.images)};
}

// Whether a product of maps x gives maps y. A block has 32 lanes, and its window fits shared memory.
bool valid(const sparsekd_cuda_product& p, const sparsekd_cuda_axis* axes, const sparsekd_cuda_maps& x,
           const sparsekd_cuda_maps& y) {
  if (!valid(x) || !valid(y) || x.batch != y.batch || p.rows != y.channels || !valid(axes[0], y.height) ||
      !valid(axes[1], y.width) ||
      !fit({double(p.rows), double(p.rows_of_group) - 1, double(p.channels_of_group), double(p.chunk) - 1,
            double(p.chunks), double(p.images) - 1}))
    return false;
  return double(ceil_div(p.rows, p.rows_of_group)) * p.channels_of_group <= x.channels &&
         double(p.images) * axes[0].patch * axes[1].patch <= kWarp &&
         double(p.images) * axes[0].window * axes[1].window <= kTileVectors &&
         p.chunk * patches_of(p, axes).plane() <= kTileVectors;
}

template <class T>
Maps<T> maps_of(const sparsekd_cuda_maps& m) {
  return {static_cast<T*>(m.data),
          m.batch,
          m.channels,
          m.height,
          m.width,
          m.stride_n,
          m.stride_c,
          m.stride_h,
          m.stride_w,
          m.stride_c <= m.stride_w};
}

template <class T>
Matrix<T> matrix_of(const sparsekd_cuda_product& p, const void* values, const void* bias) {
  return {static_cast<int32_t>(p.rows),
          static_cast<int32_t>(p.rows_of_group),
          static_cast<int32_t>(p.channels_of_group),
          static_cast<int32_t>(p.chunk),
          static_cast<int32_t>(p.chunks),
          p.starts,
          p.places,
          p.slots,
          static_cast<const T*>(values),
          static_cast<const T*>(bias)};
}

int64_t cells(const sparsekd_cuda_product& p) {
  return ceil_div(p.rows, kRows) * kRows / kRowsAtOnce * p.chunks;
}

bool valid_matrix(int64_t rows, int64_t cols) {
  return fit({double(rows), double(cols), double(rows) * cols});
}

// Calls run(Mask) for the widest vectors that every row is made of.
template <class F>
int by_mask(int64_t rows, int64_t cols, const void* mask, F run) {
  if (cols % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(mask) % kVectorBytes == 0)
    return run(Mask<kVectorBytes>{rows, cols / kVectorBytes,
                                  static_cast<const Vector<uint8_t, kVectorBytes>*>(mask)});
  return run(Mask<1>{rows, cols, static_cast<const Vector<uint8_t, 1>*>(mask)});
}

int64_t row_blocks(int64_t rows) { return ceil_div(rows, kRowWarps); }

dim3 row_threads() { return dim3(kRowWarps * kWarp); }

}  // namespace
}  // namespace sparsekd_cuda

using namespace sparsekd_cuda;

const char* sparsekd_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int sparsekd_cuda_driver() {
  int devices;
  return cudaGetDeviceCount(&devices);
}

int sparsekd_cuda_gather(int64_t dtype, const sparsekd_cuda_maps* x, int64_t count,
                         const sparsekd_cuda_product* products, const sparsekd_cuda_axis* axes,
                         const void* values, const void* bias, const float* check,
                         const sparsekd_cuda_maps* y, void* stream) {
  for (int64_t i = 0; i < count; ++i)
    if (!valid(products[i], axes + 2 * i, *x, *y)) return cudaErrorInvalidValue;
  return by_vector(dtype, x->batch, [&](auto vector) -> int {
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(vector) / sizeof(T);
    int code = cudaSuccess;
    for (int64_t i = 0; i < count && code == cudaSuccess; ++i) {
      const Patches patches = patches_of(products[i], axes + 2 * i);
      const Matrix<T> matrix = matrix_of<T>(products[i], values, bias);
      code = launch(gather_kernel<T, kVec>, patches.count(x->batch, kVec) * matrix.blocks(), dim3(kThreads),
                    stream, matrix, patches, maps_of<T>(*x), maps_of<T>(*y), check);
    }
    return code;
  });
}

int sparsekd_cuda_sample(int64_t dtype, const sparsekd_cuda_maps* grad, const sparsekd_cuda_maps* x,
                         const sparsekd_cuda_product* product, const sparsekd_cuda_axis* axes, int64_t nnz,
                         int64_t parts, float* partial, const float* check, void* dvalues, void* stream) {
  if (!valid(*product, axes, *x, *grad) || !fit({double(nnz), double(parts) - 1}))
    return cudaErrorInvalidValue;
  return by_vector(dtype, x->batch, [&](auto vector) -> int {
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(vector) / sizeof(T);
    const int code =
        launch(sample_kernel<T, kVec>, cells(*product) * parts, dim3(kThreads), stream,
               matrix_of<T>(*product, nullptr, nullptr), patches_of(*product, axes), maps_of<T>(*x),
               maps_of<T>(*grad), static_cast<int32_t>(parts), static_cast<int32_t>(nnz), partial, check);
    if (code != cudaSuccess) return code;
    return launch(add_parts_kernel<T>, ceil_div(nnz, kThreads), dim3(kThreads), stream,
                  static_cast<int32_t>(nnz), static_cast<int32_t>(parts), partial, product->slots,
                  static_cast<T*>(dvalues), check);
  });
}

int sparsekd_cuda_grow_keys(int64_t dtype, const void* scores, int64_t row, int64_t rows, int64_t col,
                            int64_t cols, int64_t width, int64_t magnitude, int64_t nnz,
                            const int32_t* taken_row, const int32_t* taken_col, uint64_t* keys,
                            void* stream) {
  if (!fit({double(row), double(rows), double(col), double(width) - col - cols, double(nnz),
            (double(row) + rows) * width}))
    return cudaErrorInvalidValue;
  const Rectangle at{row, rows, col, cols, width};
  const int code = by_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(keys_kernel<T>, ceil_div(rows * cols, kThreads), dim3(kThreads), stream, at, magnitude != 0,
                  static_cast<const T*>(scores), keys);
  });
  if (code != cudaSuccess) return code;
  return launch(exclude_kernel, ceil_div(nnz, kThreads), dim3(kThreads), stream, at,
                static_cast<int32_t>(nnz), taken_row, taken_col, keys);
}

int64_t sparsekd_cuda_grow_scratch() { return sizeof(Selection); }

int sparsekd_cuda_grow_select(int64_t count, const uint64_t* keys, int64_t k, uint64_t* best, void* scratch,
                              int32_t* nan, void* stream) {
  if (!fit({double(count), double(k)})) return cudaErrorInvalidValue;
  const int32_t n = static_cast<int32_t>(count);
  const uint32_t wanted = static_cast<uint32_t>(k);
  Selection* selection = static_cast<Selection*>(scratch);
  const int64_t all = ceil_div(count, kBins), blocks = all < 1024 ? all : 1024;
  int code = launch(begin_kernel, 1, dim3(kBins), stream, selection, wanted);
  for (int shift = 56; shift >= 0 && code == cudaSuccess; shift -= 8) {
    code = launch(count_kernel, blocks, dim3(kBins), stream, n, keys, shift, selection, nan);
    if (k == 0 || code != cudaSuccess) return code;  // one pass has seen whether there is a NaN
    code = launch(choose_kernel, 1, dim3(kBins), stream, shift, selection);
  }
  if (code != cudaSuccess) return code;
  return launch(take_kernel, blocks, dim3(kBins), stream, n, keys, wanted, selection, best);
}

int sparsekd_cuda_mask_crow(int64_t rows, int64_t cols, const void* mask, int32_t* crow, void* stream) {
  if (!valid_matrix(rows, cols)) return cudaErrorInvalidValue;
  const int code = by_mask(rows, cols, mask, [&](auto m) {
    return launch(count_rows_kernel<m.kVector>, row_blocks(rows), row_threads(), stream, m, crow);
  });
  if (code != cudaSuccess) return code;
  return launch(scan_kernel, 1, dim3(kScanners), stream, rows, crow);
}

int sparsekd_cuda_mask_col(int64_t rows, int64_t cols, const void* mask, const int32_t* crow, int32_t* col,
                           void* stream) {
  if (!valid_matrix(rows, cols)) return cudaErrorInvalidValue;
  return by_mask(rows, cols, mask, [&](auto m) {
    return launch(list_columns_kernel<m.kVector>, row_blocks(rows), row_threads(), stream, m, crow, col);
  });
}

int64_t sparsekd_cuda_transpose_scratch(int64_t rows, int64_t cols) {
  return 2 * sizeof(uint32_t) * Rows{rows, cols, nullptr, nullptr}.words();
}

int sparsekd_cuda_transpose(int64_t rows, int64_t cols, const int32_t* crow, const int32_t* col,
                            void* scratch, int32_t* starts, int32_t* row, int32_t* slot, void* stream) {
  if (!valid_matrix(rows, cols)) return cudaErrorInvalidValue;
  const Rows at{rows, cols, crow, col};
  uint32_t* marks = static_cast<uint32_t*>(scratch);
  int32_t* before = static_cast<int32_t*>(scratch) + at.words();
  int code = launch(mark_kernel, row_blocks(rows), row_threads(), stream, at, marks);
  if (code == cudaSuccess)
    code = launch(count_columns_kernel, ceil_div(cols, kThreads), dim3(kThreads), stream, at, marks, before,
                  starts);
  if (code == cudaSuccess) code = launch(scan_kernel, 1, dim3(kScanners), stream, cols, starts);
  if (code != cudaSuccess) return code;
  return launch(place_kernel, row_blocks(rows), row_threads(), stream, at, marks, before, starts, row, slot);
}
