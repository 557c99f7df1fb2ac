// The functions of api.h: check sizes, choose the instance of a kernel, start it.
#include <initializer_list>
#include <type_traits>

#include "api.h"
#include "gather.cuh"
#include "grow.cuh"
#include "pack.cuh"
#include "sample.cuh"
#include "topology.cuh"

namespace sparsekd_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kEnoughWarps = 8192;  // fill the largest devices several times over
constexpr int64_t kLeastUnits = 512;    // of a part; fewer are not worth a sum of their own

// Calls run(T{}) for the type of the code.
template <class F>
int by_type(int64_t dtype, F run) {
  if (dtype == SPARSEKD_FLOAT32) return run(float());
  if (dtype == SPARSEKD_FLOAT16) return run(__half());
  if (dtype == SPARSEKD_BFLOAT16) return run(__nv_bfloat16());
  return cudaErrorInvalidValue;
}

// Calls run(Vector<T, n>{}) for the vectors that `lanes` are made of.
template <class F>
int by_vector(int64_t dtype, int64_t lanes, F run) {
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVec = kVectorBytes / sizeof(T);
    return lanes % kVec == 0 ? run(Vector<T, kVec>()) : run(Vector<T, 1>());
  });
}

int64_t vector_size(int64_t dtype) { return kVectorBytes / (dtype == SPARSEKD_FLOAT32 ? 4 : 2); }

int64_t vectors_of(int64_t dtype, int64_t lanes) {
  return lanes % vector_size(dtype) == 0 ? lanes / vector_size(dtype) : lanes;
}

// Whether all sizes, whose products do not overflow in double, fit an int32 with room to step past the end.
bool fit(std::initializer_list<double> sizes) {
  for (double size : sizes)
    if (!(size >= 0 && size <= INT32_MAX - 1024)) return false;
  return true;
}

bool valid(const Maps& m) {
  return fit({double(m.batch), double(m.channels) * m.packed_height * m.packed_width, double(m.lanes)}) &&
         m.height >= 0 && m.width >= 0 && m.top >= 0 && m.left >= 0 && m.lanes >= m.batch;
}

int64_t tiles(const Maps& m) { return ceil_div(m.pixels(), kTile) * lane_tiles(m); }

Window window_of(int64_t dtype, int64_t lanes, int64_t height, int64_t width, int64_t in_row,
                 int64_t in_col) {
  return {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(in_row),
          static_cast<int32_t>(in_col), static_cast<int32_t>(vectors_of(dtype, lanes))};
}

Inside inside_of(int64_t packed_height, int64_t packed_width, int64_t top, int64_t left, int64_t map_height,
                 int64_t map_width) {
  return {static_cast<int32_t>(packed_height), static_cast<int32_t>(packed_width),
          static_cast<int32_t>(top),           static_cast<int32_t>(left),
          static_cast<int32_t>(map_height),    static_cast<int32_t>(map_width)};
}

bool valid_inside(int64_t packed_height, int64_t packed_width, int64_t top, int64_t left, int64_t map_height,
                  int64_t map_width) {
  return fit({double(packed_height) - 1, double(packed_width) - 1, double(top), double(left),
              double(map_height), double(map_width), double(packed_height) * packed_width});
}

bool valid_window(int64_t lanes, int64_t height, int64_t width, int64_t in_row, int64_t in_col) {
  return fit({double(lanes) * height * width, double(height), double(width), double(lanes),
              double(height) * in_row + double(width) * in_col, double(in_row), double(in_col)});
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

dim3 tile_threads() { return dim3(kTile, kTileRows); }

}  // namespace
}  // namespace sparsekd_cuda

using namespace sparsekd_cuda;

const char* sparsekd_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int sparsekd_cuda_driver() {
  int devices;
  return cudaGetDeviceCount(&devices);
}

int64_t sparsekd_cuda_lanes(int64_t dtype, int64_t batch) {
  const int64_t size = vector_size(dtype);
  return batch < size ? batch : ceil_div(batch, size) * size;
}

int sparsekd_cuda_pack(int64_t dtype, const void* maps, int64_t batch, int64_t channels, int64_t height,
                       int64_t width, int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w,
                       int64_t top, int64_t bottom, int64_t left, int64_t right, void* packed, int64_t lanes,
                       void* stream) {
  const Maps m{batch,
               channels,
               height,
               width,
               stride_n,
               stride_c,
               stride_h,
               stride_w,
               top,
               left,
               top + height + bottom,
               left + width + right,
               lanes,
               stride_c < stride_w};
  if (!valid(m) || bottom < 0 || right < 0) return cudaErrorInvalidValue;
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(pack_kernel<T>, tiles(m), tile_threads(), stream, m, static_cast<const T*>(maps),
                  static_cast<T*>(packed));
  });
}

int sparsekd_cuda_unpack(int64_t dtype, void* maps, int64_t batch, int64_t channels, int64_t height,
                         int64_t width, int64_t stride_n, int64_t stride_c, int64_t stride_h,
                         int64_t stride_w, const void* packed, int64_t lanes, void* stream) {
  const Maps m{batch,    channels, height, width,  stride_n, stride_c, stride_h,
               stride_w, 0,        0,      height, width,    lanes,    stride_c < stride_w};
  if (!valid(m)) return cudaErrorInvalidValue;
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(unpack_kernel<T>, tiles(m), tile_threads(), stream, m, static_cast<T*>(maps),
                  static_cast<const T*>(packed));
  });
}

int sparsekd_cuda_gather(int64_t dtype, int64_t rows, const int32_t* crow, const int32_t* offset,
                         const int32_t* order, const void* values, const void* bias, const void* x,
                         int64_t lanes, int64_t packed_height, int64_t packed_width, int64_t top,
                         int64_t left, int64_t map_height, int64_t map_width, int64_t height, int64_t width,
                         int64_t in_row, int64_t in_col, void* y, int64_t out_pixels, int64_t out_origin,
                         int64_t out_row, int64_t out_col, void* stream) {
  if (!valid_window(lanes, height, width, in_row, in_col) ||
      !valid_inside(packed_height, packed_width, top, left, map_height, map_width) ||
      !fit({double(rows), double(rows) * out_pixels, double(out_origin), double(out_row), double(out_col)}))
    return cudaErrorInvalidValue;
  const Window window = window_of(dtype, lanes, height, width, in_row, in_col);
  const Inside inside = inside_of(packed_height, packed_width, top, left, map_height, map_width);
  const Target target{out_pixels, static_cast<int32_t>(out_origin), static_cast<int32_t>(out_row),
                      static_cast<int32_t>(out_col)};
  const int64_t blocks = ceil_div(window.units(), kWarp) * ceil_div(rows, kWarps);
  return by_vector(dtype, lanes, [&](auto vector) {
    using V = decltype(vector);
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(V) / sizeof(T);
    const Matrix<T> matrix{static_cast<int32_t>(rows), crow, offset, order, static_cast<const T*>(values),
                           static_cast<const T*>(bias)};
    return launch(gather_kernel<T, kVec>, blocks, dim3(kWarps * kWarp), stream, matrix, window, inside,
                  target, static_cast<const V*>(x), static_cast<V*>(y));
  });
}

int64_t sparsekd_cuda_parts(int64_t dtype, int64_t nnz, int64_t positions, int64_t lanes) {
  const int64_t wanted = ceil_div(kEnoughWarps, ceil_div(nnz, kTogether) + 1);
  const int64_t most = positions * vectors_of(dtype, lanes) / kLeastUnits;
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

int sparsekd_cuda_sample(int64_t dtype, int64_t nnz, const int32_t* row, const int32_t* offset,
                         const void* grad, const void* x, int64_t lanes, int64_t packed_height,
                         int64_t packed_width, int64_t top, int64_t left, int64_t map_height,
                         int64_t map_width, int64_t height, int64_t width, int64_t in_row, int64_t in_col,
                         float* partial, int64_t parts, void* dvalues, void* stream) {
  if (!valid_window(lanes, height, width, in_row, in_col) ||
      !valid_inside(packed_height, packed_width, top, left, map_height, map_width) || parts < 1 ||
      !fit({double(nnz), double(parts)}))
    return cudaErrorInvalidValue;
  const Window window = window_of(dtype, lanes, height, width, in_row, in_col);
  const Inside inside = inside_of(packed_height, packed_width, top, left, map_height, map_width);
  const Samples samples{static_cast<int32_t>(nnz), row, offset};
  const int64_t blocks = ceil_div(nnz, int64_t{kWarps} * kTogether) * parts;
  const int code = by_vector(dtype, lanes, [&](auto vector) {
    using V = decltype(vector);
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(V) / sizeof(T);
    return launch(sample_kernel<T, kVec>, blocks, dim3(kWarps * kWarp), stream, samples, window, inside,
                  static_cast<int32_t>(parts), static_cast<const V*>(grad), static_cast<const V*>(x),
                  partial);
  });
  if (code != cudaSuccess) return code;
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(add_parts_kernel<T>, ceil_div(nnz, kThreads), dim3(kThreads), stream,
                  static_cast<int32_t>(nnz), static_cast<int32_t>(parts), partial, static_cast<T*>(dvalues));
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
