#include <vector>

#include "core/linear/linear.h"

namespace sparsekd {
namespace scalar {

template <class T>
void linear_fprop(const Structure& s, View2<const T> x, const T* values, const T* bias, View2<T> y) {
  for (int64_t n = 0; n < x.rows; ++n)
    for (int64_t r = 0; r < s.rows; ++r) {
      double sum = bias ? bias[r] : 0;
      for (int32_t k = s.crow[r]; k < s.crow[r + 1]; ++k)
        sum += static_cast<double>(values[k]) * x.at(n, s.col[k]);
      y.at(n, r) = static_cast<T>(sum);
    }
}

template <class T>
void linear_dgrad(const Structure& s, View2<const T> grad, const T* values, View2<T> dx) {
  std::vector<double> sums(s.cols);
  for (int64_t n = 0; n < grad.rows; ++n) {
    sums.assign(s.cols, 0);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int32_t k = s.crow[r]; k < s.crow[r + 1]; ++k)
        sums[s.col[k]] += static_cast<double>(values[k]) * grad.at(n, r);
    for (int64_t c = 0; c < s.cols; ++c) dx.at(n, c) = static_cast<T>(sums[c]);
  }
}

template <class T>
void linear_wgrad(const Structure& s, View2<const T> grad, View2<const T> x, T* dvalues) {
  for (int64_t r = 0; r < s.rows; ++r)
    for (int32_t k = s.crow[r]; k < s.crow[r + 1]; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < x.rows; ++n) sum += static_cast<double>(grad.at(n, r)) * x.at(n, s.col[k]);
      dvalues[k] = static_cast<T>(sum);
    }
}

#define SPARSEKD_INSTANTIATE(T)                                                                  \
  template void linear_fprop<T>(const Structure&, View2<const T>, const T*, const T*, View2<T>); \
  template void linear_dgrad<T>(const Structure&, View2<const T>, const T*, View2<T>);           \
  template void linear_wgrad<T>(const Structure&, View2<const T>, View2<const T>, T*);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace scalar
}  // namespace sparsekd
