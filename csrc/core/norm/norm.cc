#include "core/norm/norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/norm/engine.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

// How many threads the work is worth; a slot is one thread's share, so that each reads in its second pass
// what it read in the first.
int slots_for(const Maps& m, int threads) {
  constexpr int64_t kWorthAThread = 1 << 14;  // elements
  const int64_t useful = elements(m) / kWorthAThread;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, useful, rows(m)})));
}

template <class T>
bool streams(const Maps& m) {
  return outgrows_caches(elements(m) * static_cast<int64_t>(sizeof(T)));
}

template <class F>
void for_slots(const Maps& m, int slots, F run) {
  const int64_t all = rows(m);
  auto body = [&](int slot) { run(slot, Range{all * slot / slots, all * (slot + 1) / slots}); };
  parallel(slots, slots, body);
}

// What the passes multiply by, made from the parameters in the same way forward and backward, so that a
// recomputed mask is that of the output.
template <class T>
struct Coefficients {
  std::vector<double> rstd;  // [channels], the others [columns]
  std::vector<T> mean, scale, shift;
  explicit Coefficients(const Norm<T>& n)
      : rstd(n.maps.channels), mean(columns(n.maps)), scale(mean.size()), shift(mean.size()) {
    const size_t channels = rstd.size();
    for (size_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(static_cast<double>(n.var[c]) + n.eps);
    for (size_t k = 0; k < mean.size(); ++k) {
      const size_t c = k % channels;
      mean[k] = n.mean[c];
      scale[k] = static_cast<T>(rstd[c] * (n.weight ? n.weight[c] : 1));
      shift[k] = n.bias ? n.bias[c] : 0;
    }
  }
};

}  // namespace

template <class T>
void norm_moments(const Maps& maps, const T* x, T* mean, T* var, int threads) {
  if (elements(maps) == 0) {
    std::fill_n(mean, maps.channels, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(var, maps.channels, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const int64_t width = columns(maps);
  const int slots = slots_for(maps, threads);
  std::vector<double> partial(3 * width * slots);
  const auto of = [&](int64_t slot) {
    double* at = partial.data() + 3 * width * slot;
    return Moments{at, at + width, at + 2 * width};
  };
  for_slots(maps, slots,
            [&](int slot, Range range) { engine<NormEngine<T>>().moments(maps, range, x, of(slot)); });
  for (int64_t channel = 0; channel < maps.channels; ++channel) {
    double count = 0, centre = 0, squares = 0;
    for (int slot = 0; slot < slots; ++slot)
      for (int64_t c = channel; c < width; c += maps.channels) {
        const Moments m = of(slot);
        if (m.count[c] == 0) continue;
        const double total = count + m.count[c], away = m.mean[c] - centre;
        centre += away * m.count[c] / total;
        squares += m.squares[c] + away * away * count * m.count[c] / total;
        count = total;
      }
    mean[channel] = static_cast<T>(centre);
    var[channel] = static_cast<T>(squares / count);
  }
}

template <class T>
void norm_forward(const Norm<T>& n, const T* x, const T* residual, T* y, int threads) {
  if (elements(n.maps) == 0) return;
  const Coefficients<T> k(n);
  const ApplyPass<T> pass{
      x, residual, k.mean.data(), k.scale.data(), k.shift.data(), n.relu, streams<T>(n.maps), y};
  for_slots(n.maps, slots_for(n.maps, threads),
            [&](int, Range range) { engine<NormEngine<T>>().apply(n.maps, range, pass); });
}

template <class T>
void norm_backward(const Norm<T>& n, const NormGradients<T>& g, int threads) {
  const int64_t channels = n.maps.channels, width = columns(n.maps);
  const bool empty = elements(n.maps) == 0, stream = streams<T>(n.maps);
  const int slots = empty ? 0 : slots_for(n.maps, threads);
  const Coefficients<T> k(n);
  const Mask mask = !n.relu ? Mask::kNone : g.y ? Mask::kStored : Mask::kRecomputed;
  std::vector<double> sum(channels), dot(channels);
  if (!empty && (!g.frozen || g.dweight || mask == Mask::kStored)) {
    std::vector<double> partial(2 * width * slots);
    for_slots(n.maps, slots, [&](int slot, Range range) {
      double* at = partial.data() + 2 * width * slot;
      engine<NormEngine<T>>().reduce(n.maps, range,
                                     {g.grad, g.x, g.y, k.mean.data(), k.scale.data(), k.shift.data(), mask,
                                      stream, g.dresidual, at, at + width});
    });
    for (int slot = 0; slot < slots; ++slot)
      for (int64_t c = 0; c < width; ++c) {
        sum[c % channels] += partial[2 * width * slot + c];
        dot[c % channels] += partial[2 * width * slot + width + c];
      }
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (g.dbias) g.dbias[c] = static_cast<T>(sum[c]);
    // The deviation of nothing is NaN, the gradient of nothing is zero.
    if (g.dweight) g.dweight[c] = empty ? T(0) : static_cast<T>(dot[c] * k.rstd[c]);
  }
  if (empty) return;
  std::vector<T> slope(width), offset(width);
  for (int64_t i = 0; i < width && !g.frozen; ++i) {
    const int64_t c = i % channels;
    const double scale = k.scale[i] / static_cast<double>(n.maps.images * n.maps.pixels);
    slope[i] = static_cast<T>(-scale * k.rstd[c] * k.rstd[c] * dot[c]);
    offset[i] = static_cast<T>(-scale * sum[c]);
  }
  const bool behind_mask = mask == Mask::kStored;
  const SpreadPass<T> pass{behind_mask ? g.dresidual : g.grad,
                           g.x,
                           k.mean.data(),
                           k.scale.data(),
                           k.shift.data(),
                           slope.data(),
                           offset.data(),
                           behind_mask ? Mask::kNone : mask,
                           stream,
                           g.dx};
  for_slots(n.maps, slots, [&](int, Range range) { engine<NormEngine<T>>().spread(n.maps, range, pass); });
}

#define SPARSEKD_INSTANTIATE(T)                                               \
  template void norm_moments<T>(const Maps&, const T*, T*, T*, int);          \
  template void norm_forward<T>(const Norm<T>&, const T*, const T*, T*, int); \
  template void norm_backward<T>(const Norm<T>&, const NormGradients<T>&, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd
