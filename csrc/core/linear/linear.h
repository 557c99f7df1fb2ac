// Weight-sparse linear layer y = x W^T + b, its input gradient (SpMM with the transpose) and its weight
// gradient at the nonzeros (SDDMM).
//
// Strides of the matrices may be anything; contiguous rows, or contiguous columns, are fastest. Every
// function writes its whole output. Results are the same bit for bit for the same inputs and instruction set.
#pragma once
#include <cstdint>

#include "core/structure.h"

namespace sparsekd {

template <class T>
struct View2 {
  T* data;
  int64_t rows, cols;
  int64_t stride_row, stride_col;

  T& at(int64_t row, int64_t col) const { return data[row * stride_row + col * stride_col]; }
};

// x [batch, in], weight out x in, values [nnz], bias [out] or null -> y [batch, out]
template <class T>
void linear_fprop(const Structure& weight, View2<const T> x, const T* values, const T* bias, View2<T> y,
                  int threads);

// grad [batch, out] -> dx [batch, in]
template <class T>
void linear_dgrad(const Structure& weight, View2<const T> grad, const T* values, View2<T> dx, int threads);

// grad [batch, out], x [batch, in] -> dvalues [nnz]
template <class T>
void linear_wgrad(const Structure& weight, View2<const T> grad, View2<const T> x, T* dvalues, int threads);

// The oracle: plain loops on one thread that accumulate in double.
namespace scalar {
template <class T>
void linear_fprop(const Structure& weight, View2<const T> x, const T* values, const T* bias, View2<T> y);
template <class T>
void linear_dgrad(const Structure& weight, View2<const T> grad, const T* values, View2<T> dx);
template <class T>
void linear_wgrad(const Structure& weight, View2<const T> grad, View2<const T> x, T* dvalues);
}  // namespace scalar

}  // namespace sparsekd
