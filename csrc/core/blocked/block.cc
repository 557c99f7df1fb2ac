#include "core/blocked/block.h"

#include <algorithm>
#include <cmath>

namespace sparsekd::blocked {
namespace {

template <class T>
Operand<T> plain(const BlockedMap<const T>& map) {
  Operand<T> x;
  x.map = map;
  return x;
}

template <class T>
Operand<T> normalised(const ConvNorm<T>& c, bool relu) {
  Operand<T> x = plain<T>(c.z);
  x.read = Read::kNormalised;
  x.mean = c.mean();
  x.scale = c.scale();
  x.shift = c.shift();
  x.relu = relu;
  return x;
}

template <class T>
void set_state(const ConvNorm<T>& c, int64_t channel, double mean, double var) {
  const double rstd = 1 / std::sqrt(var + c.eps);
  c.state[channel] = static_cast<T>(mean);
  c.state[c.z.channels + channel] = static_cast<T>(rstd * (c.gamma ? c.gamma[channel] : 1));
  c.state[2 * c.z.channels + channel] = c.beta ? c.beta[channel] : T(0);
  c.state[3 * c.z.channels + channel] = static_cast<T>(rstd);
}

// z and state; the moments of the batch stay for the running statistics.
template <class T>
bool conv_norm(const ConvNorm<T>& c, const Operand<T>& x, ChannelSums* moments, int threads) {
  Result<T> z;
  z.out = c.z;
  z.sum = c.frozen ? Sum::kNothing : Sum::kMoments;
  if (!conv_forward(c.shape->geometry, *c.shape->weight, x, c.values, c.bias, z, moments, threads))
    return false;
  for (int64_t ch = 0; ch < c.z.channels; ++ch)
    if (c.frozen)
      set_state<T>(c, ch, c.running_mean[ch], c.running_var[ch]);
    else
      set_state<T>(c, ch, moments->first[ch], moments->second[ch]);
  return true;
}

// As torch does, with the unbiased variance.
template <class T>
void track(const ConvNorm<T>& c, const ChannelSums& moments) {
  if (c.frozen || !c.running_mean) return;
  const double count = static_cast<double>(c.z.images * c.z.h * c.z.w), unbiased = count / (count - 1);
  const auto move = [&](T& to, double value) { to += static_cast<T>(c.rate) * (static_cast<T>(value) - to); };
  for (int64_t ch = 0; ch < c.z.channels; ++ch) {
    move(c.running_mean[ch], moments.first[ch]);
    move(c.running_var[ch], moments.second[ch] * unbiased);
  }
}

// From the sums of the gradient g behind a norm: what leads g back through it, and the gradients of its
// parameters.
template <class T>
struct Through {
  std::vector<T> slope, shift;
  Operand<T> operand;

  Through(const ConvNorm<T>& c, const T* g, const double* sum, const double* dot,
          const ConvNormGradients<T>& to)
      : slope(c.z.channels), shift(c.z.channels) {
    const double count = static_cast<double>(c.z.images * c.z.h * c.z.w);
    for (int64_t ch = 0; ch < c.z.channels; ++ch) {
      const double scale = c.scale()[ch], rstd = c.rstd()[ch];
      if (!c.frozen) {
        slope[ch] = static_cast<T>(-scale * rstd * rstd * dot[ch] / count);
        shift[ch] = static_cast<T>(-scale * sum[ch] / count);
      }
      if (to.gamma) to.gamma[ch] = static_cast<T>(dot[ch] * rstd);
      if (to.beta) to.beta[ch] = static_cast<T>(sum[ch]);
      // A norm of the batch takes out what a bias adds.
      if (to.bias) to.bias[ch] = c.frozen ? static_cast<T>(scale * sum[ch]) : T(0);
    }
    operand.read = Read::kGradient;
    operand.map = {g, c.z.images, c.z.channels, c.z.h, c.z.w};
    operand.normed = c.z.data;
    operand.mean = c.mean();
    operand.scale = c.scale();
    operand.slope = slope.data();
    operand.shift = shift.data();
  }
};

template <class T>
bool conv_gradients(const ConvNorm<T>& c, const Through<T>& grad, const Operand<T>& x,
                    const ConvNormGradients<T>& to, const Result<T>* dx, bool compact, ChannelSums* sums,
                    int threads) {
  return conv_backward(c.shape->geometry, *c.shape->weight, grad.operand, x, c.values, to.values, dx, compact,
                       sums, threads);
}

}  // namespace

template <class T>
bool block_forward(const Block<T>& b) {
  std::vector<ChannelSums> moments(b.main.size() + 1);
  for (size_t i = 0; i < b.main.size(); ++i) {
    const Operand<T> x = i ? normalised(b.main[i - 1], b.main[i - 1].shape->relu) : plain<T>(b.x);
    if (!conv_norm(b.main[i], x, &moments[i], b.threads)) return false;
  }
  for (const ConvNorm<T>& c : b.shortcut)
    if (!conv_norm(c, plain<T>(b.x), &moments.back(), b.threads)) return false;
  Operand<T> other;
  other.map.data = nullptr;
  if (b.identity) other = plain<T>(b.x);
  if (!b.shortcut.empty()) other = normalised(b.shortcut[0], false);
  Result<T> out;
  out.out = b.out;
  join(normalised(b.main.back(), false), other, b.main.back().shape->relu, out, nullptr, b.threads);
  for (size_t i = 0; i < b.main.size(); ++i) track(b.main[i], moments[i]);
  for (const ConvNorm<T>& c : b.shortcut) track(c, moments.back());
  return true;
}

template <class T>
bool block_backward(const Block<T>& b, const BlockGradients<T>& g) {
  const ConvNorm<T>& last = b.main.back();
  const int64_t channels = b.out.channels;
  ChannelSums sums, projected_sums;
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
    const ConvGeometry& shape = c.shape->geometry;
    const Through<T> through(c, grad, sums.first.data(), sums.third.data(), g.shortcut[0]);
    const bool compact = projected_compact(shape);
    Result<T> dx;
    dx.out = {g.projected, b.x.images, b.x.channels, compact ? c.z.h : b.x.h, compact ? c.z.w : b.x.w};
    if (!conv_gradients(c, through, plain<T>(b.x), g.shortcut[0], g.x ? &dx : nullptr, compact,
                        &projected_sums, b.threads))
      return false;
    residual = g.projected;
    every = compact ? shape.stride_h : 1;
  }
  for (size_t i = b.main.size(); i-- > 0;) {
    const ConvNorm<T>& c = b.main[i];
    const Through<T> through(c, grad, sums.first.data(), sums.second.data(), g.main[i]);
    Result<T> dx;
    if (i > 0) {
      const ConvNorm<T>& before = b.main[i - 1];
      dx.out = before.z;
      dx.out.data = g.main[i - 1].grad;
      dx.gate = before.shape->relu ? Gate::kNormalised : Gate::kOpen;
      dx.sum = Sum::kGradient;
      dx.normed = before.z.data;
      dx.mean = before.mean();
      dx.scale = before.scale();
      dx.shift = before.shift();
    } else {
      dx.out = {g.x, b.x.images, b.x.channels, b.x.h, b.x.w};
      dx.residual = residual;
      dx.residual_every = every;
      if (g.before) {
        dx.gate = g.before->relu ? Gate::kStored : Gate::kOpen;
        dx.sum = Sum::kGradient;
        dx.active = b.x.data;
        dx.normed = g.before->z;
        dx.mean = g.before->mean;
        dx.other = g.before->other;
        dx.other_mean = g.before->other_mean;
      }
    }
    const Operand<T> x = i ? normalised(b.main[i - 1], b.main[i - 1].shape->relu) : plain<T>(b.x);
    if (!conv_gradients(c, through, x, g.main[i], i || g.x ? &dx : nullptr, false, &sums, b.threads))
      return false;
    grad = dx.out.data;
  }
  if (g.before && g.x) {
    std::copy(sums.first.begin(), sums.first.end(), g.before->sums);
    std::copy(sums.second.begin(), sums.second.end(), g.before->sums + b.x.channels);
    std::copy(sums.third.begin(), sums.third.end(), g.before->sums + 2 * b.x.channels);
  }
  return true;
}

#define SPARSEKD_INSTANTIATE(T)                    \
  template bool block_forward<T>(const Block<T>&); \
  template bool block_backward<T>(const Block<T>&, const BlockGradients<T>&);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::blocked
