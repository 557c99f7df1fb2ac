// Which weights to grow: the k best-scoring positions outside a structure (RigL, arXiv 1911.11134, section
// 3).
#pragma once
#include <cstdint>
#include <vector>

#include "core/structure.h"

namespace sparsekd {

// score has rows * cols elements in row-major order. Returns k flat positions, ascending: those with the
// largest score among the positions not in `kept`; equal scores go to the lower position, as if all
// candidates had been sorted. Throws ShapeError when fewer than k positions are free and
// std::domain_error when a candidate's score is NaN.
template <class T>
std::vector<int64_t> grow_topk(const T* score, const Structure& kept, int64_t k, int threads);

}  // namespace sparsekd
