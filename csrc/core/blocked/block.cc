#include "core/blocked/block.h"

#include "core/blocked/norms.h"

namespace sparsekd::blocked {

template <class T>
bool block_forward(const Block<T>& b) {
  std::vector<ChannelSums> moments(b.main.size() + 1);
  for (size_t i = 0; i < b.main.size(); ++i) {
    const Operand<T> x = i ? normalised(b.main[i - 1], b.main[i - 1].shape->relu) : b.x;
    if (!conv_norm(b.main[i], x, &moments[i], b.threads)) return false;
  }
  for (const ConvNorm<T>& c : b.shortcut)
    if (!conv_norm(c, b.x, &moments.back(), b.threads)) return false;
  if (b.out.data) {
    Operand<T> other;
    if (b.identity) other = b.x;
    if (!b.shortcut.empty()) other = normalised(b.shortcut[0], false);
    Result<T> out;
    out.out = b.out;
    join(normalised(b.main.back(), false), other, b.main.back().shape->relu, out, nullptr, b.threads);
  }
  for (size_t i = 0; i < b.main.size(); ++i) track(b.main[i], moments[i]);
  for (const ConvNorm<T>& c : b.shortcut) track(c, moments.back());
  return true;
}

template <class T>
bool block_backward(const Block<T>& b, const BlockGradients<T>& g) {
  const ConvNorm<T>& last = b.main.back();
  const int64_t channels = b.out.channels;
  const BlockedMap<const T>& in = b.x.map;
  ChannelSums sums;
  const T* grad = g.out;
  if (g.sums) {
    for (auto [to, from] : {std::pair{&sums.first, g.sums},
                            {&sums.second, g.sums + channels},
                            {&sums.third, g.sums + 2 * channels}})
      to->assign(from, from + channels);
  } else {
    const bool relu = last.shape->relu;
    Result<T> y;
    y.out = b.out;
    y.out.data = g.gated;
    y.gate = relu ? Gate::kStored : Gate::kOpen;
    y.sum = Sum::kGradient;
    y.active = b.out.data;
    y.normed = last.z.data;
    y.mean = last.mean();
    if (!b.shortcut.empty()) {
      y.other = b.shortcut[0].z.data;
      y.other_mean = b.shortcut[0].mean();
    }
    if (!gate(g.out, y, &sums, b.threads)) return false;
    if (relu) grad = g.gated;
  }
  const T* residual = b.identity ? grad : nullptr;
  int64_t every = 1;
  if (!b.shortcut.empty()) {
    const ConvNorm<T>& c = b.shortcut[0];
    const Through<T> through(c, grad, sums.first.data(), sums.third.data(), g.shortcut[0]);
    if (!projected_gradient(c, through.operand, b.x, in, g.shortcut[0].values, g.projected, g.x != nullptr,
                            b.threads))
      return false;
    residual = g.projected;
    every = projected_every(c);
  }
  for (size_t i = b.main.size(); i-- > 0;) {
    const ConvNorm<T>& c = b.main[i];
    const Through<T> through(c, grad, sums.first.data(), sums.second.data(), g.main[i]);
    Result<T> dx;
    if (i > 0) {
      const ConvNorm<T>& before = b.main[i - 1];
      dx.out = before.z;
      dx.out.data = g.main[i - 1].grad;
      gate_behind(before, before.shape->relu, dx);
    } else {
      dx.out = {g.x, in.images, in.channels, in.h, in.w};
      dx.residual = residual;
      dx.residual_every = every;
      if (g.before) into(*g.before, b.x, dx);
    }
    const Operand<T> x = i ? normalised(b.main[i - 1], b.main[i - 1].shape->relu) : b.x;
    if (!conv_backward<T>(c.shape->geometry, *c.shape->weight, through.operand, x, c.values, g.main[i].values,
                          i || g.x ? &dx : nullptr, false, &sums, b.threads))
      return false;
    grad = dx.out.data;
  }
  if (g.before && g.x) hand_over(sums, in.channels, *g.before);
  return true;
}

#define SPARSEKD_INSTANTIATE(T)                    \
  template bool block_forward<T>(const Block<T>&); \
  template bool block_backward<T>(const Block<T>&, const BlockGradients<T>&);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::blocked
