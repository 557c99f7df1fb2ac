#include "core/blocked/preactivation.h"

#include <algorithm>

#include "core/blocked/norms.h"

namespace sparsekd::blocked {
namespace {

// What the convolution behind the i-th norm of the main branch reads; i = 0 is the one in front.
template <class T>
Operand<T> input_of(const PreActivation<T>& b, size_t i) {
  if (i > 0) return normalised(b.main[i - 1], b.main[i - 1].shape->relu);
  return b.front.empty() ? plain<T>(b.x) : normalised(b.front[0], true);
}

}  // namespace

template <class T>
bool preactivation_forward(const PreActivation<T>& b) {
  std::vector<ChannelSums> moments(b.main.size());
  ChannelSums of_input, of_output;
  for (const ConvNorm<T>& norm : b.front) {
    if (!norm.frozen) {
      of_input.first.assign(b.moments, b.moments + b.x.channels);
      of_input.second.assign(b.moments + b.x.channels, b.moments + 2 * b.x.channels);
    }
    set_states(norm, of_input);
  }
  for (size_t i = 0; i < b.main.size(); ++i)
    if (!conv_norm(b.main[i], input_of(b, i), &moments[i], b.threads)) return false;
  Result<T> out;
  out.out = b.last.z;
  out.sum = b.out_moments ? Sum::kMoments : Sum::kNothing;
  if (b.identity) out.residual = b.x.data;
  for (const ConvNorm<T>& c : b.shortcut) {
    Result<T> y;
    y.out = c.z;
    if (!conv_forward<T>(c.shape->geometry, *c.shape->weight, input_of(b, 0), c.values, c.bias, y, nullptr,
                         b.threads))
      return false;
    out.residual = c.z.data;
  }
  if (!conv_forward<T>(b.last.shape->geometry, *b.last.shape->weight, input_of(b, b.main.size()),
                       b.last.values, b.last.bias, out, &of_output, b.threads))
    return false;
  if (b.out_moments) {
    std::copy(of_output.first.begin(), of_output.first.end(), b.out_moments);
    std::copy(of_output.second.begin(), of_output.second.end(), b.out_moments + b.last.z.channels);
  }
  for (const ConvNorm<T>& norm : b.front) track(norm, of_input);
  for (size_t i = 0; i < b.main.size(); ++i) track(b.main[i], moments[i]);
  return true;
}

template <class T>
bool preactivation_backward(const PreActivation<T>& b, const PreActivationGradients<T>& g) {
  const size_t norms = b.main.size();
  ChannelSums sums;
  Operand<T> grad = plain<T>({g.out, b.last.z.images, b.last.z.channels, b.last.z.h, b.last.z.w});
  const T* residual = nullptr;
  int64_t every = 1;
  for (const ConvNorm<T>& c : b.shortcut) {
    if (!projected_gradient(c, grad, input_of(b, 0), b.x, g.shortcut.values, g.projected, g.x != nullptr,
                            b.threads))
      return false;
    residual = g.projected;
    every = projected_every(c);
  }
  std::vector<Through<T>> through;  // keeps the coefficients that grad points at
  through.reserve(norms + 1);
  for (size_t i = norms + 1; i-- > 0;) {
    const ConvNorm<T>& c = i == norms ? b.last : b.main[i];
    T* const values = i == norms ? g.last.values : g.main[i].values;
    Result<T> dx;
    if (i > 0) {
      const ConvNorm<T>& before = b.main[i - 1];
      dx.out = before.z;
      dx.out.data = g.main[i - 1].grad;
      gate_behind(before, before.shape->relu, dx);
    } else if (b.front.empty()) {
      dx.out = {g.x, b.x.images, b.x.channels, b.x.h, b.x.w};
    } else if (g.x) {
      dx.out = {g.front.grad, b.x.images, b.x.channels, b.x.h, b.x.w};
      dx.residual = residual;
      dx.residual_every = every;
      gate_behind(b.front[0], true, dx);
    }
    if (!conv_backward<T>(c.shape->geometry, *c.shape->weight, grad, input_of(b, i), c.values, values,
                          dx.out.data ? &dx : nullptr, false, &sums, b.threads))
      return false;
    if (!dx.out.data || (i == 0 && b.front.empty())) return true;
    through.emplace_back(i ? b.main[i - 1] : b.front[0], dx.out.data, sums.first.data(), sums.second.data(),
                         i ? g.main[i - 1] : g.front);
    grad = through.back().operand;
  }
  Operand<T> other;
  if (b.identity) other = plain<T>({g.out, b.x.images, b.x.channels, b.x.h, b.x.w});
  Result<T> dx;
  dx.out = {g.x, b.x.images, b.x.channels, b.x.h, b.x.w};
  return join(grad, other, false, dx, nullptr, b.threads);
}

#define SPARSEKD_INSTANTIATE(T)                                    \
  template bool preactivation_forward<T>(const PreActivation<T>&); \
  template bool preactivation_backward<T>(const PreActivation<T>&, const PreActivationGradients<T>&);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd::blocked
