// A weight between its two forms: the nonzeros of a Structure, and a dense array of rows x cols elements.
//
// A row of the dense array is either in the structure's own order of columns (taps = 1) or, as channels_last
// weights are, with the kernel positions outermost: column i * taps + k of the structure is element
// k * (cols / taps) + i. Elements are only copied, so T stands for any type of its size.
#pragma once
#include <cstdint>

#include "core/structure.h"

namespace sparsekd {

// values [nnz] -> dense [rows * cols], zero where nothing is stored
template <class T>
void scatter_weight(const Structure& weight, const T* values, int64_t taps, T* dense, int threads);

// dense [rows * cols] -> values [nnz]
template <class T>
void gather_weight(const Structure& weight, const T* dense, int64_t taps, T* values, int threads);

}  // namespace sparsekd
