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
constexpr int64_t kAlignment = 256;     // of the pieces of a workspace
constexpr int64_t kEnoughWarps = 8192;  // fill the largest devices several times over
constexpr int64_t kLeastUnits = 512;    // of a part; fewer are not worth a sum of their own

dim3 tile_threads() { return dim3(kTile, kTileRows); }

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

int64_t element_size(int64_t dtype) { return dtype == SPARSEKD_FLOAT32 ? 4 : 2; }

int64_t vector_size(int64_t dtype) { return kVectorBytes / element_size(dtype); }

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
  return fit({double(m.batch), double(m.channels) * m.packed_height * m.packed_width,
              double(m.packed_height) * m.packed_width, double(m.lanes)}) &&
         fit({double(m.height), double(m.width), double(m.top), double(m.left), double(m.channels),
              double(m.packed_height) - m.top - m.height, double(m.packed_width) - m.left - m.width});
}

// Maps in their packed form, `edges` of zeros around them.
struct Edges {
  int64_t top, bottom, left, right;
};

Maps packed_maps(int64_t dtype, const sparsekd_cuda_maps& m, Edges edges = {}) {
  return {m.batch,
          m.channels,
          m.height,
          m.width,
          m.stride_n,
          m.stride_c,
          m.stride_h,
          m.stride_w,
          edges.top,
          edges.left,
          edges.top + m.height + edges.bottom,
          edges.left + m.width + edges.right,
          sparsekd_cuda_lanes(dtype, m.batch),
          m.stride_c < m.stride_w};
}

int64_t tiles(const Maps& m) { return ceil_div(m.pixels(), kTile) * lane_tiles(m); }

// Pieces of a workspace, one behind the other, each aligned as a whole workspace is.
struct Workspace {
  int64_t used = 0;

  int64_t take(int64_t count, int64_t size) {
    const int64_t at = used;
    used += ceil_div(count * size, kAlignment) * kAlignment;
    return at;
  }
};

int64_t parts_of(int64_t nnz, int64_t units) {
  const int64_t wanted = ceil_div(kEnoughWarps, ceil_div(nnz, kTogether) + 1);
  const int64_t most = units / kLeastUnits;
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

// Where in its workspace `gather` has packed maps.
struct GatherWork {
  int64_t x, y, bytes;

  GatherWork(int64_t dtype, const Maps& of_x, const Maps& of_y) {
    Workspace cut;
    x = cut.take(of_x.pixels() * of_x.lanes, element_size(dtype));
    y = cut.take(of_y.pixels() * of_y.lanes, element_size(dtype));
    bytes = cut.used;
  }
};

// The same for `sample`, which sums up in parts.
struct SampleWork {
  int64_t grad, x, partial, parts, bytes;

  SampleWork(int64_t dtype, const Maps& of_grad, const Maps& of_x, int64_t nnz) {
    parts = parts_of(nnz, of_grad.packed_height * of_grad.packed_width * vectors_of(dtype, of_grad.lanes));
    Workspace cut;
    grad = cut.take(of_grad.pixels() * of_grad.lanes, element_size(dtype));
    x = cut.take(of_x.pixels() * of_x.lanes, element_size(dtype));
    partial = cut.take(parts * nnz, sizeof(float));
    bytes = cut.used;
  }
};

bool valid(const sparsekd_cuda_product& p, int64_t lanes, int64_t out_pixels) {
  return fit({double(p.rows), double(p.rows) * out_pixels, double(p.height), double(p.width),
              double(lanes) * p.height * p.width, double(p.in_row), double(p.in_col),
              double(p.height) * p.in_row + double(p.width) * p.in_col, double(p.out_origin),
              double(p.out_row), double(p.out_col)});
}

Window window_of(const sparsekd_cuda_product& p, int64_t vectors) {
  return {static_cast<int32_t>(p.height), static_cast<int32_t>(p.width), static_cast<int32_t>(p.in_row),
          static_cast<int32_t>(p.in_col), static_cast<int32_t>(vectors)};
}

Inside inside_of(const Maps& m) {
  return {static_cast<int32_t>(m.packed_height), static_cast<int32_t>(m.packed_width),
          static_cast<int32_t>(m.top),           static_cast<int32_t>(m.left),
          static_cast<int32_t>(m.height),        static_cast<int32_t>(m.width)};
}

template <class T>
int pack(const Maps& m, const void* maps, void* packed, void* stream) {
  return launch(pack_kernel<T>, tiles(m), tile_threads(), stream, m, static_cast<const T*>(maps),
                static_cast<T*>(packed));
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

int64_t sparsekd_cuda_lanes(int64_t dtype, int64_t batch) {
  const int64_t size = vector_size(dtype);
  return batch < size ? batch : ceil_div(batch, size) * size;
}

int64_t sparsekd_cuda_gather_bytes(int64_t dtype, const sparsekd_cuda_maps* x, int64_t top, int64_t bottom,
                                   int64_t left, int64_t right, const sparsekd_cuda_maps* y) {
  return GatherWork(dtype, packed_maps(dtype, *x, {top, bottom, left, right}), packed_maps(dtype, *y)).bytes;
}

int sparsekd_cuda_gather(int64_t dtype, const sparsekd_cuda_maps* x, int64_t top, int64_t bottom,
                         int64_t left, int64_t right, int64_t count, const sparsekd_cuda_product* products,
                         const void* values, const void* bias, const sparsekd_cuda_maps* y, int64_t whole,
                         void* workspace, void* stream) {
  const Maps from = packed_maps(dtype, *x, {top, bottom, left, right}), to = packed_maps(dtype, *y);
  if (!valid(from) || !valid(to) || from.batch != to.batch) return cudaErrorInvalidValue;
  for (int64_t i = 0; i < count; ++i)
    if (!valid(products[i], from.lanes, to.height * to.width)) return cudaErrorInvalidValue;
  const GatherWork work(dtype, from, to);
  char* const packed_x = static_cast<char*>(workspace) + work.x;
  char* const packed_y = static_cast<char*>(workspace) + work.y;
  return by_vector(dtype, from.lanes, [&](auto vector) -> int {
    using V = decltype(vector);
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(V) / sizeof(T);
    int code = pack<T>(from, x->data, packed_x, stream);
    if (code == cudaSuccess && !whole)
      code =
          cudaMemsetAsync(packed_y, 0, to.pixels() * to.lanes * sizeof(T), static_cast<cudaStream_t>(stream));
    for (int64_t i = 0; i < count && code == cudaSuccess; ++i) {
      const sparsekd_cuda_product& p = products[i];
      const Window window = window_of(p, from.lanes / kVec);
      const Target target{to.height * to.width, static_cast<int32_t>(p.out_origin),
                          static_cast<int32_t>(p.out_row), static_cast<int32_t>(p.out_col)};
      const Matrix<T> matrix{
          static_cast<int32_t>(p.rows), p.crow, p.offset, p.order, p.slots, static_cast<const T*>(values),
          static_cast<const T*>(bias)};
      const int64_t blocks = ceil_div(window.units(), kWarp) * ceil_div(p.rows, kWarps);
      code = launch(gather_kernel<T, kVec>, blocks, dim3(kWarps * kWarp), stream, matrix, window,
                    inside_of(from), target, reinterpret_cast<const V*>(packed_x),
                    reinterpret_cast<V*>(packed_y));
    }
    if (code != cudaSuccess) return code;
    return launch(unpack_kernel<T>, tiles(to), tile_threads(), stream, to, static_cast<T*>(y->data),
                  reinterpret_cast<const T*>(packed_y));
  });
}

int64_t sparsekd_cuda_sample_bytes(int64_t dtype, const sparsekd_cuda_maps* grad, const sparsekd_cuda_maps* x,
                                   int64_t top, int64_t bottom, int64_t left, int64_t right, int64_t nnz) {
  const Maps of_x = packed_maps(dtype, *x, {top, bottom, left, right});
  return SampleWork(dtype, packed_maps(dtype, *grad), of_x, nnz).bytes;
}

int sparsekd_cuda_sample(int64_t dtype, const sparsekd_cuda_maps* grad, const sparsekd_cuda_maps* x,
                         int64_t top, int64_t bottom, int64_t left, int64_t right,
                         const sparsekd_cuda_product* product, int64_t nnz, const int32_t* row, void* dvalues,
                         void* workspace, void* stream) {
  const Maps of_grad = packed_maps(dtype, *grad), of_x = packed_maps(dtype, *x, {top, bottom, left, right});
  if (!valid(of_grad) || !valid(of_x) || of_grad.batch != of_x.batch || !fit({double(nnz)}) ||
      !valid(*product, of_x.lanes, of_grad.height * of_grad.width))
    return cudaErrorInvalidValue;
  const SampleWork work(dtype, of_grad, of_x, nnz);
  char* const packed_grad = static_cast<char*>(workspace) + work.grad;
  char* const packed_x = static_cast<char*>(workspace) + work.x;
  float* const partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + work.partial);
  const Samples samples{static_cast<int32_t>(nnz), row, product->offset};
  const int32_t parts = static_cast<int32_t>(work.parts);
  return by_vector(dtype, of_x.lanes, [&](auto vector) -> int {
    using V = decltype(vector);
    using T = std::remove_reference_t<decltype(vector.v[0])>;
    constexpr int kVec = sizeof(V) / sizeof(T);
    int code = pack<T>(of_grad, grad->data, packed_grad, stream);
    if (code == cudaSuccess) code = pack<T>(of_x, x->data, packed_x, stream);
    const int64_t blocks = ceil_div(nnz, int64_t{kWarps} * kTogether) * parts;
    if (code == cudaSuccess)
      code = launch(sample_kernel<T, kVec>, blocks, dim3(kWarps * kWarp), stream, samples,
                    window_of(*product, of_x.lanes / kVec), inside_of(of_x), parts,
                    reinterpret_cast<const V*>(packed_grad), reinterpret_cast<const V*>(packed_x), partial);
    if (code != cudaSuccess) return code;
    return launch(add_parts_kernel<T>, ceil_div(nnz, kThreads), dim3(kThreads), stream,
                  static_cast<int32_t>(nnz), parts, partial, static_cast<T*>(dvalues));
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
