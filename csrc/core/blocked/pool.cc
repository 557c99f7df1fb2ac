#include "core/blocked/pool.h"

#include "core/blocked/norms.h"
#include "core/blocked/places.h"

namespace sparsekd::blocked {

template <class T>
void pool_forward(const Pooling& pool, const BlockedMap<const T>& x, const BlockedMap<T>& y, int threads) {
  threads = useful_threads(threads, 0, x.elements() + y.elements());
  const Schedule schedule = blocked::schedule(y, y.h, y.channels, 0, threads, 4);
  engine<ConvEngine<T>>().blocked_pool({pool, x, y, schedule, threads});
}

template <class T>
bool pool_backward(const Pooling& pool, const BlockedMap<const T>& x, const BlockedMap<const T>& grad, T* dx,
                   const Before<T>* before, int threads) {
  threads = useful_threads(threads, 0, 2 * x.elements() + grad.elements());
  const Schedule schedule = blocked::schedule(x, x.h, x.channels, 0, threads, 4);
  Result<T> y;
  y.out = {dx, x.images, x.channels, x.h, x.w};
  if (before) into(*before, plain<T>(x), y);
  Places<T> places(y, schedule, x.h);
  bool finite = true;
  engine<ConvEngine<T>>().blocked_pool_backward({pool, x, grad, y, schedule, places.out(), threads, &finite});
  if (before) {
    ChannelSums sums;
    places.finish(&sums);
    hand_over(sums, x.channels, *before);
  }
  return finite;
}

#define SPARSEKD_INSTANTIATE(T)                                                                              \
  template void pool_forward<T>(const Pooling&, const BlockedMap<const T>&, const BlockedMap<T>&, int);      \
  template bool pool_backward<T>(const Pooling&, const BlockedMap<const T>&, const BlockedMap<const T>&, T*, \
                                 const Before<T>*, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::blocked
