#include "core/blocked/conv.h"

#include <algorithm>

#include "core/blocked/places.h"

namespace sparsekd::blocked {
namespace {

std::shared_ptr<const GatherPlans> forward_plan(const ConvGeometry& g, const Structure& s, TileShape tile) {
  return s.plan<GatherPlans>(plan_key(Pass::kFprop, g, tile), [&] { return fprop_plan(g, s, tile); });
}

std::shared_ptr<const BackwardPlan> gradient_plan(const ConvGeometry& g, const Structure& s, TileShape tile,
                                                  bool compact) {
  const Pass pass = compact ? Pass::kBackwardCompact : Pass::kBackward;
  return s.plan<BackwardPlan>(plan_key(pass, g, tile), [&] { return backward_plan(g, s, tile, compact); });
}

}  // namespace

bool supported(const std::vector<std::pair<const ConvGeometry*, const Structure*>>& convs, int threads) {
  const Isa isa = current_isa();
  for (const auto& [g, s] : convs)
    if (isa == Isa::kScalar || g->batch == 0 || g->out_h == 0 || g->out_w == 0 || s->nnz == 0) return false;
  const TileShape tile = engine<ConvEngine<float>>(isa).blocked_tile;
  std::vector<char> taken(2 * convs.size());  // by both passes of each
  auto make = [&](int slot) {
    const auto& [g, s] = convs[slot / 2];
    if (slot % 2) {
      taken[slot] = gradient_plan(*g, *s, tile, false) != nullptr;
    } else {
      const auto plans = forward_plan(*g, *s, tile);
      taken[slot] = plans && plans->covers;
    }
  };
  parallel(threads, static_cast<int>(taken.size()), make);
  return std::find(taken.begin(), taken.end(), false) == taken.end();
}

bool compact_supported(const ConvGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.pad_top == 0 && g.pad_left == 0 &&
         g.out_h == (g.in_h - 1) / g.stride_h + 1 && g.out_w == (g.in_w - 1) / g.stride_w + 1;
}

template <class T>
bool conv_forward(const ConvGeometry& g, const Structure& s, const Operand<T>& x, const T* values,
                  const T* bias, const Result<T>& y, ChannelSums* sums, int threads) {
  threads = conv_threads(g, s, 1, threads);
  const auto& kernels = engine<ConvEngine<T>>();
  const auto plans = forward_plan(g, s, kernels.blocked_tile);
  const GatherPlan& plan = plans->phases[0];
  T* ordered = static_cast<T*>(scratch(Scratch::kValues, plan.slot.size() * sizeof(T)));
  order_values(plan, values, ordered, threads);
  const WindowAxis& rows = plan.window.rows;
  const Schedule schedule =
      blocked::schedule(y.out, g.out_h, g.out_channels, rows.span - rows.step, threads, 4);
  Places<T> places(y, schedule, g.out_h);
  bool finite = true;
  kernels.blocked_forward({x, y, &plan, ordered, bias, schedule, places.out(), threads, &finite});
  if (y.sum != Sum::kNothing) places.finish(sums);
  return finite;
}

template <class T>
bool conv_backward(const ConvGeometry& g, const Structure& s, const Operand<T>& grad, const Operand<T>& x,
                   const T* values, T* dvalues, const Result<T>* dx, bool compact, ChannelSums* sums,
                   int threads) {
  threads = conv_threads(g, s, dx ? 2 : 1, threads);
  const auto& kernels = engine<ConvEngine<T>>();
  const auto plan = gradient_plan(g, s, kernels.blocked_tile, compact);
  size_t taps = 0;
  for (const GatherPlan& phase : plan->dgrad.phases) taps += phase.slot.size();
  T* const ordered = static_cast<T*>(scratch(Scratch::kValues, taps * sizeof(T)));
  int64_t rows = g.out_h;
  T* next = ordered;
  for (const GatherPlan& phase : plan->dgrad.phases) {
    if (dx) order_values(phase, values, next, threads);
    if (dx) rows = std::max(rows, phase.out_h);
    next += phase.slot.size();
  }
  const WindowAxis &down = plan->wgrad->window.rows, &grads = plan->grad.rows;
  const int64_t halo = std::max(down.span - down.step, grads.span - grads.step);
  const Schedule schedule =
      blocked::schedule(x.map, rows, std::min(g.out_channels, g.in_channels), halo, threads, 2);
  const Result<T> nothing{};
  Places<T> places(dx ? *dx : nothing, schedule, rows);
  bool finite = true;
  kernels.blocked_backward(
      {grad, x, dx, &s, plan.get(), ordered, dvalues, schedule, places.out(), threads, &finite});
  for (const int32_t slot : plan->wgrad->outside) dvalues[slot] = T(0);
  T zero = T(0);
  for (int64_t k = 0; k < s.nnz; ++k) zero += dvalues[k] - dvalues[k];
  if (dx && dx->sum != Sum::kNothing) places.finish(sums);
  return finite && zero == T(0);
}

template <class T>
bool join(const Operand<T>& main, const Operand<T>& other, bool relu, const Result<T>& y, ChannelSums* sums,
          int threads) {
  threads = useful_threads(threads, 0, 2 * y.out.elements());
  const Schedule schedule = blocked::schedule(y.out, y.out.h, y.out.channels, 0, threads, 4);
  Places<T> places(y, schedule, y.out.h);
  bool finite = true;
  engine<ConvEngine<T>>().blocked_join({main, other, relu, y, schedule, places.out(), threads, &finite});
  if (y.sum != Sum::kNothing) places.finish(sums);
  return finite;
}

template <class T>
bool gate(const T* grad, const Result<T>& y, ChannelSums* sums, int threads) {
  threads = useful_threads(threads, 0, 2 * y.out.elements());
  const Schedule schedule = blocked::schedule(y.out, y.out.h, y.out.channels, 0, threads, 4);
  Places<T> places(y, schedule, y.out.h);
  bool finite = true;
  engine<ConvEngine<T>>().blocked_gate({grad, y, schedule, places.out(), threads, &finite});
  places.finish(sums);
  return finite;
}

template <class T>
void enter(const View4<const T>& x, const BlockedMap<T>& y, int threads) {
  engine<ConvEngine<T>>().blocked_enter(x, y, threads);
}

template <class T>
void leave(const BlockedMap<const T>& x, const View4<T>& y, int threads) {
  engine<ConvEngine<T>>().blocked_leave(x, y, threads);
}

#define SPARSEKD_INSTANTIATE(T)                                                                           \
  template bool conv_forward<T>(const ConvGeometry&, const Structure&, const Operand<T>&, const T*,       \
                                const T*, const Result<T>&, ChannelSums*, int);                           \
  template bool conv_backward<T>(const ConvGeometry&, const Structure&, const Operand<T>&,                \
                                 const Operand<T>&, const T*, T*, const Result<T>*, bool, ChannelSums*,   \
                                 int);                                                                    \
  template bool join<T>(const Operand<T>&, const Operand<T>&, bool, const Result<T>&, ChannelSums*, int); \
  template bool gate<T>(const T*, const Result<T>&, ChannelSums*, int);                                   \
  template void enter<T>(const View4<const T>&, const BlockedMap<T>&, int);                               \
  template void leave<T>(const BlockedMap<const T>&, const View4<T>&, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::blocked
