#include "core/linear/linear.h"

#include <algorithm>
#include <vector>

#include "core/conv/conv.h"

namespace sparsekd {
namespace {

// Batch rows to an image: as many as leave a full group of lanes for each thread, at most 16. The rest of
// the batch, less than one image, is computed as images of one row.
int64_t rows_per_image(int64_t batch, int threads) {
  constexpr int64_t kLanes = 16;
  int64_t rows = 1;
  while (rows < 16 && batch / (2 * rows) >= kLanes * threads) rows *= 2;
  return rows;
}

template <class T>
View4<T> as_images(const View2<T>& m, int64_t first, int64_t images, int64_t rows) {
  return {m.data + first * m.stride_row, images,       m.cols, 1,           rows,
          rows * m.stride_row,           m.stride_col, 0,      m.stride_row};
}

ConvGeometry geometry(const Structure& weight, int64_t images, int64_t rows) {
  ConvGeometry g{};
  g.batch = images;
  g.in_channels = weight.cols;
  g.out_channels = weight.rows;
  g.in_h = g.out_h = 1;
  g.in_w = g.out_w = rows;
  g.kernel_h = g.kernel_w = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = g.groups = 1;
  return g;
}

// Calls run(first row, images, rows to an image) for the bulk of the batch and for its rest.
template <class F>
void for_images(int64_t batch, int threads, F run) {
  const int64_t rows = rows_per_image(batch, threads), images = batch / rows;
  if (images) run(int64_t{0}, images, rows);
  if (batch % rows) run(images * rows, batch % rows, int64_t{1});
}

}  // namespace

template <class T>
void linear_fprop(const Structure& weight, View2<const T> x, const T* values, const T* bias, View2<T> y,
                  int threads) {
  for_images(x.rows, threads, [&](int64_t first, int64_t images, int64_t rows) {
    conv_fprop<T>(geometry(weight, images, rows), weight, as_images(x, first, images, rows), values, bias,
                  as_images(y, first, images, rows), threads);
  });
}

template <class T>
void linear_dgrad(const Structure& weight, View2<const T> grad, const T* values, View2<T> dx, int threads) {
  for_images(grad.rows, threads, [&](int64_t first, int64_t images, int64_t rows) {
    conv_dgrad<T>(geometry(weight, images, rows), weight, as_images(grad, first, images, rows), values,
                  as_images(dx, first, images, rows), threads);
  });
}

template <class T>
void linear_wgrad(const Structure& weight, View2<const T> grad, View2<const T> x, T* dvalues, int threads) {
  std::fill(dvalues, dvalues + weight.nnz, T(0));
  std::vector<T> rest;
  for_images(x.rows, threads, [&](int64_t first, int64_t images, int64_t rows) {
    T* out = dvalues;
    if (first) {
      rest.resize(weight.nnz);
      out = rest.data();
    }
    conv_wgrad<T>(geometry(weight, images, rows), weight, as_images(grad, first, images, rows),
                  as_images(x, first, images, rows), out, threads);
  });
  for (size_t k = 0; k < rest.size(); ++k) dvalues[k] += rest[k];
}

#define SPARSEKD_INSTANTIATE(T)                                                                       \
  template void linear_fprop<T>(const Structure&, View2<const T>, const T*, const T*, View2<T>, int); \
  template void linear_dgrad<T>(const Structure&, View2<const T>, const T*, View2<T>, int);           \
  template void linear_wgrad<T>(const Structure&, View2<const T>, View2<const T>, T*, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd
