#include "core/densify.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

// Below this many elements a fork costs more than the copy.
constexpr int64_t kElementsPerThread = 1 << 15;

// Calls body(row, first nonzero, last nonzero) for every row, each thread a run of neighbouring rows.
template <class F>
void for_rows(const Structure& weight, int threads, F body) {
  const int64_t wanted = 1 + weight.rows * weight.cols / kElementsPerThread;
  const int slots = static_cast<int>(std::min<int64_t>({threads, wanted, std::max<int64_t>(1, weight.rows)}));
  auto share = [&](int slot) {
    for (int64_t row = weight.rows * slot / slots; row < weight.rows * (slot + 1) / slots; ++row)
      body(row, weight.crow[row], weight.crow[row + 1]);
  };
  parallel(slots, slots, share);
}

std::vector<int32_t> offsets_of_columns(int64_t cols, int64_t taps) {
  if (taps < 1 || cols % taps)
    throw ShapeError("taps: expected a divisor of the " + std::to_string(cols) + " columns, got " +
                     std::to_string(taps));
  const int64_t channels = cols / taps;
  std::vector<int32_t> offsets(cols);
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t k = 0; k < taps; ++k) offsets[i * taps + k] = static_cast<int32_t>(k * channels + i);
  return offsets;
}

}  // namespace

template <class T>
void scatter_weight(const Structure& weight, const T* values, int64_t taps, T* dense, int threads) {
  const std::vector<int32_t> offsets = offsets_of_columns(weight.cols, taps);
  for_rows(weight, threads, [&](int64_t row, int64_t first, int64_t last) {
    T* to = dense + row * weight.cols;
    std::fill_n(to, weight.cols, T(0));
    for (int64_t k = first; k < last; ++k) to[offsets[weight.col[k]]] = values[k];
  });
}

template <class T>
void gather_weight(const Structure& weight, const T* dense, int64_t taps, T* values, int threads) {
  const std::vector<int32_t> offsets = offsets_of_columns(weight.cols, taps);
  for_rows(weight, threads, [&](int64_t row, int64_t first, int64_t last) {
    const T* from = dense + row * weight.cols;
    for (int64_t k = first; k < last; ++k) values[k] = from[offsets[weight.col[k]]];
  });
}

#define SPARSEKD_INSTANTIATE(T)                                                  \
  template void scatter_weight<T>(const Structure&, const T*, int64_t, T*, int); \
  template void gather_weight<T>(const Structure&, const T*, int64_t, T*, int);
SPARSEKD_INSTANTIATE(int16_t)
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd
