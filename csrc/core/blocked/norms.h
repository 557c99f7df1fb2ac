// What blocks do with the norms between their convolutions: statistics to coefficients, and the way back.
#pragma once
#include <algorithm>
#include <cmath>

#include "core/blocked/block.h"

namespace sparsekd::blocked {

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

template <class T>
void set_states(const ConvNorm<T>& c, const ChannelSums& moments) {
  for (int64_t ch = 0; ch < c.z.channels; ++ch)
    if (c.frozen)
      set_state<T>(c, ch, c.running_mean[ch], c.running_var[ch]);
    else
      set_state<T>(c, ch, moments.first[ch], moments.second[ch]);
}

// z and state; the moments of the batch stay for the running statistics.
template <class T>
bool conv_norm(const ConvNorm<T>& c, const Operand<T>& x, ChannelSums* moments, int threads) {
  Result<T> z;
  z.out = c.z;
  z.sum = c.frozen ? Sum::kNothing : Sum::kMoments;
  if (!conv_forward(c.shape->geometry, *c.shape->weight, x, c.values, c.bias, z, moments, threads))
    return false;
  set_states(c, *moments);
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

// A gradient on its way through the ReLU behind a norm, with the sums that the norm needs.
template <class T>
void gate_behind(const ConvNorm<T>& norm, bool relu, Result<T>& dx) {
  dx.gate = relu ? Gate::kNormalised : Gate::kOpen;
  dx.sum = Sum::kGradient;
  dx.normed = norm.z.data;
  dx.mean = norm.mean();
  dx.scale = norm.scale();
  dx.shift = norm.shift();
}

// A gradient on its way into the block before, whose result is `active`: through its last ReLU, with the sums
// that its norms need. What is not stored of the result is computed again from what these sums are of.
template <class T>
void into(const Before<T>& before, const Operand<T>& active, Result<T>& dx) {
  dx.gate = !before.relu                       ? Gate::kOpen
            : active.read == Read::kNormalised ? Gate::kNormalised
            : active.read == Read::kJoined     ? Gate::kJoined
                                               : Gate::kStored;
  dx.sum = Sum::kGradient;
  dx.active = active.map.data;
  dx.scale = active.scale;
  dx.shift = active.shift;
  dx.branch = active.branch;
  dx.normed = before.z;
  dx.mean = before.mean;
  dx.other = before.other;
  dx.other_mean = before.other_mean;
}

template <class T>
void hand_over(const ChannelSums& sums, int64_t channels, const Before<T>& before) {
  std::copy(sums.first.begin(), sums.first.end(), before.sums);
  std::copy(sums.second.begin(), sums.second.end(), before.sums + channels);
  std::copy(sums.third.begin(), sums.third.end(), before.sums + 2 * channels);
}

// Rows and columns of the input from one gradient through a shortcut's convolution to the next.
template <class T>
int64_t projected_every(const ConvNorm<T>& c) {
  return projected_compact(c.shape->geometry) ? c.shape->geometry.stride_h : 1;
}

// The gradients of a shortcut's convolution: of its values, and, if `wanted`, of its input, which is like
// `x`.
template <class T>
bool projected_gradient(const ConvNorm<T>& c, const Operand<T>& grad, const Operand<T>& input,
                        const BlockedMap<const T>& x, T* dvalues, T* projected, bool wanted, int threads) {
  const bool compact = projected_compact(c.shape->geometry);
  Result<T> dx;
  dx.out = {projected, x.images, x.channels, compact ? c.z.h : x.h, compact ? c.z.w : x.w};
  return conv_backward<T>(c.shape->geometry, *c.shape->weight, grad, input, c.values, dvalues,
                          wanted ? &dx : nullptr, compact, nullptr, threads);
}

}  // namespace sparsekd::blocked
