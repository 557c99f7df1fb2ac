// The C functions of the library of CUDA kernels. They know nothing of torch or Python: device addresses,
// sizes and a stream come in, work is queued on the stream, CUDA's error code comes out (0 is success).
//
// A function does all of an op, so that a layer costs one call from Python. Maps are read and written as they
// are, whatever their strides. A linear layer is a convolution of maps of one pixel. Every product is one of
// two:
//   gather: y[row][output] = bias[row] + sum over the nonzeros k of the row of
//           values[slots[k]] * x[pixel(k, output)]
//   sample: dvalues[slots[k]] = sum over the outputs of grad[row(k)][output] * x[pixel(k, output)]
// Infinity and NaN reach the results that have them among their terms inside the map, and no other. The same
// functions correct the results of kernels that multiply zeros, too: with a `check`, one number on the
// device, they do all of this where it is not finite, and nothing where it is.
//
// Results are the same bit for bit for the same inputs and kind of GPU: no floating-point atomics, and work
// is cut by sizes alone. Sums are in float32 and rounded once. Sizes are int64_t; rows, nonzeros, and the
// elements that the pixels of one image span must be below 2^31 - 1024, or the result is
// cudaErrorInvalidValue.
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

// The outputs of a product along y or x. Output o reads pixels start + o * stride + t * pitch of x, a tap t
// each, and is pixel out_start + o * out_step of the result. A block has a patch of outputs, `patch` of them
// `spacing` apart, which together read `window` pixels, `pitch` apart; spacing * stride is a multiple of
// pitch.
typedef struct {
  int64_t outputs, patch, spacing, start, stride, window, pitch, out_start, out_step;
} sparsekd_cuda_axis;

// A product: a weight of `rows` in groups that read channels of their own, in blocks of 64 rows, whose
// channels are read in `chunks` of `chunk` at a time. A patch has `images` vectors of them, and at most 32 of
// outputs. starts [blocks * chunks * 64 + 1]: where the nonzeros of each row in each chunk begin; places
// [nnz]: in the low half of each the vector of its input in the window, [channel of the chunk][vector of
// images][y][x] with an odd number of vectors a channel, for an output that is the first of its patch; above
// it the row of the block; slots [nnz]: which value it has.
typedef struct {
  int64_t rows, rows_of_group, channels_of_group, chunk, chunks, images;
  const int32_t* starts;
  const int32_t* places;
  const int32_t* slots;
} sparsekd_cuda_product;

// Computes `count` products of x, each with its axes y and x: values [nnz], bias [rows] or null.
SPARSEKD_API int sparsekd_cuda_gather(int64_t dtype, const sparsekd_cuda_maps* x, int64_t count,
                                      const sparsekd_cuda_product* products, const sparsekd_cuda_axis* axes,
                                      const void* values, const void* bias, const float* check,
                                      const sparsekd_cuda_maps* y, void* stream);

// Computes dvalues [nnz] of a product's nonzeros as sums of `parts`, by way of partial [parts * nnz].
SPARSEKD_API int sparsekd_cuda_sample(int64_t dtype, const sparsekd_cuda_maps* grad,
                                      const sparsekd_cuda_maps* x, const sparsekd_cuda_product* product,
                                      const sparsekd_cuda_axis* axes, int64_t nnz, int64_t parts,
                                      float* partial, const float* check, void* dvalues, void* stream);

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
