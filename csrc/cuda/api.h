// The C functions of the library of CUDA kernels. They know nothing of torch or Python: device addresses,
// sizes and a stream come in, work is queued on the stream, CUDA's error code comes out (0 is success).
//
// A function does all of an op, so that a layer costs one call from Python. Maps are computed on in packed
// form, [channel][y][x][lane]: the lanes of a pixel are the images of the batch, padded with zeros to `lanes`
// of them. Packed maps are in a workspace that the caller provides, aligned as torch's allocator aligns. A
// linear layer is a convolution of maps of one pixel. Every product then is one of two:
//   gather: y[row][position] = bias[row] + sum over the nonzeros k of the row of
//           values[k] * x[pixel(k, position)]
//   sample: dvalues[k] = sum over positions of grad[row(k)][position] * x[pixel(k, position)]
// where pixel(k, position) = offset[k] + y * in_row + x * in_col counts the pixels of all channels of x. The
// caller guarantees that there is such a pixel; padding has made sure of it for every tap. Infinity and NaN
// reach the results that have them among their terms inside the map, and no other.
//
// Results are the same bit for bit for the same inputs and kind of GPU: no floating-point atomics, and work
// is cut by sizes alone. Sums are in float32 and rounded once. Sizes are int64_t; numbers of pixels,
// positions times lanes, rows and nonzeros must be below 2^31 - 1024, or the result is cudaErrorInvalidValue.
#pragma once
#include <stdint.h>

#define SPARSEKD_API extern "C" __attribute__((visibility("default")))

enum { SPARSEKD_FLOAT32 = 0, SPARSEKD_FLOAT16 = 1, SPARSEKD_BFLOAT16 = 2 };

SPARSEKD_API const char* sparsekd_cuda_error(int code);

// Fails where there is no driver, or one too old for the CUDA that this library was built with.
SPARSEKD_API int sparsekd_cuda_driver();

// Maps [batch, channels, height, width] of any strides, in elements.
typedef struct {
  void* data;
  int64_t batch, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
} sparsekd_cuda_maps;

// A product of packed maps: crow [rows + 1], offset [nnz], order [rows] (the rows, the longest first), slots
// [nnz] (which value belongs to each nonzero) or null where they are in order. It computes height * width
// positions; those of every row of the result are out_origin + y * out_row + x * out_col.
typedef struct {
  int64_t rows;
  const int32_t* crow;
  const int32_t* offset;
  const int32_t* order;
  const int32_t* slots;
  int64_t height, width, in_row, in_col, out_origin, out_row, out_col;
} sparsekd_cuda_product;

// How many lanes a batch gets: whole vectors of 16 bytes, except that a batch smaller than one has no
// padding.
SPARSEKD_API int64_t sparsekd_cuda_lanes(int64_t dtype, int64_t batch);

// How many bytes `gather` works in. The data of the maps may be null.
SPARSEKD_API int64_t sparsekd_cuda_gather_bytes(int64_t dtype, const sparsekd_cuda_maps* x, int64_t top,
                                                int64_t bottom, int64_t left, int64_t right,
                                                const sparsekd_cuda_maps* y);

// Packs x with its padding, computes `count` products of it, and unpacks the result into y: values [nnz],
// bias [rows] or null. Unless `whole`, positions that no product writes become 0.
SPARSEKD_API int sparsekd_cuda_gather(int64_t dtype, const sparsekd_cuda_maps* x, int64_t top, int64_t bottom,
                                      int64_t left, int64_t right, int64_t count,
                                      const sparsekd_cuda_product* products, const void* values,
                                      const void* bias, const sparsekd_cuda_maps* y, int64_t whole,
                                      void* workspace, void* stream);

// How many bytes `sample` works in.
SPARSEKD_API int64_t sparsekd_cuda_sample_bytes(int64_t dtype, const sparsekd_cuda_maps* grad,
                                                const sparsekd_cuda_maps* x, int64_t top, int64_t bottom,
                                                int64_t left, int64_t right, int64_t nnz);

// Packs grad, and x with its padding, and computes dvalues [nnz] of a product's nonzeros, whose rows are
// row [nnz].
SPARSEKD_API int sparsekd_cuda_sample(int64_t dtype, const sparsekd_cuda_maps* grad,
                                      const sparsekd_cuda_maps* x, int64_t top, int64_t bottom, int64_t left,
                                      int64_t right, const sparsekd_cuda_product* product, int64_t nnz,
                                      const int32_t* row, void* dvalues, void* workspace, void* stream);

// Growth ranks by keys: the larger key is the better score or, of equal scores, the lower position, whose
// complement is the lower half of the key; 0 is a position that cannot grow.

// scores [rows, cols], contiguous, are those of the rectangle at (row, col) of a weight of `width` columns
// whose nonzeros are at taken_row [nnz], taken_col [nnz] -> keys [rows * cols].
SPARSEKD_API int sparsekd_cuda_grow_keys(int64_t dtype, const void* scores, int64_t row, int64_t rows,
                                         int64_t col, int64_t cols, int64_t width, int64_t magnitude,
                                         int64_t nnz, const int32_t* taken_row, const int32_t* taken_col,
                                         uint64_t* keys, void* stream);

// How many bytes `grow_select` works in.
SPARSEKD_API int64_t sparsekd_cuda_grow_scratch();

// keys [count] -> best [k]: the k largest in any order, then zeros where fewer than k are not zero. `nan`,
// one number, becomes 1 when there are keys of NaN.
SPARSEKD_API int sparsekd_cuda_grow_select(int64_t count, const uint64_t* keys, int64_t k, uint64_t* best,
                                           void* scratch, int32_t* nan, void* stream);

// mask [rows, cols] of bytes that are not 0 at nonzeros -> crow [rows + 1], whose last number is nnz.
SPARSEKD_API int sparsekd_cuda_mask_crow(int64_t rows, int64_t cols, const void* mask, int32_t* crow,
                                         void* stream);

// mask [rows, cols], its crow [rows + 1] -> col [nnz].
SPARSEKD_API int sparsekd_cuda_mask_col(int64_t rows, int64_t cols, const void* mask, const int32_t* crow,
                                        int32_t* col, void* stream);

// How many bytes `transpose` works in; they must be zero.
SPARSEKD_API int64_t sparsekd_cuda_transpose_scratch(int64_t rows, int64_t cols);

// crow [rows + 1], col [nnz], a valid structure -> starts [cols + 1] and, ascending in each column, row [nnz]
// and slot [nnz], where in `col` each nonzero was.
SPARSEKD_API int sparsekd_cuda_transpose(int64_t rows, int64_t cols, const int32_t* crow, const int32_t* col,
                                         void* scratch, int32_t* starts, int32_t* row, int32_t* slot,
                                         void* stream);
