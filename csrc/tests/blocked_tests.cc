// Convolutions on blocked maps against the oracle and plain loops in double: every instruction set, operand,
// gate and sum, batches that leave lanes without an image. Those lanes hold NaN, which must not spread.
#include "core/blocked/conv.h"
#include "core/cpu.h"
#include "tests/maps.h"

using namespace sparsekd;
using namespace sparsekd::blocked;

namespace {

template <class T>
std::vector<T> numbers(int64_t count, double low = -1, double high = 1) {
  std::vector<T> v(count);
  for (T& u : v) u = static_cast<T>(low + (high - low) * (uniform() + 1) / 2);
  return v;
}

// Coefficients of a norm, or of the gradient through one.
template <class T>
struct Coefficients {
  std::vector<T> mean, scale, shift, slope;
  explicit Coefficients(int64_t channels)
      : mean(numbers<T>(channels)),
        scale(numbers<T>(channels, 0.5, 2)),
        shift(numbers<T>(channels)),
        slope(numbers<T>(channels)) {}
};

// What is added to a map, and what that is at each place.
template <class T>
struct Added {
  Map<T> map;
  Coefficients<T> k;
  Branch<T> branch;

  Added(int64_t n, int64_t c, int64_t h, int64_t w) : map(n, c, h, w), k(c) {
    branch.map = map.map.data;
    branch.relu = pick(0, 1);
    if (pick(0, 2) == 0) return;
    branch.mean = k.mean.data();
    branch.scale = k.scale.data();
    branch.shift = k.shift.data();
  }
  double at(int64_t b, int64_t ch, int64_t y, int64_t x) const {
    double v = *map.map.at(b, ch, y, x);
    if (branch.mean) v = (v - k.mean[ch]) * k.scale[ch] + k.shift[ch];
    return branch.relu && v < 0 ? 0 : v;
  }
};

// An operand, and what it stands for as an ordinary tensor.
template <class T>
struct Input {
  Map<T> map, normed;
  Coefficients<T> k;
  Added<T> added;
  Operand<T> operand;
  Tensor<T> tensor;

  Input(Read read, int64_t n, int64_t c, int64_t h, int64_t w)
      : map(n, c, h, w), normed(n, c, h, w), k(c), added(n, c, h, w), tensor(n, c, h, w, 0, true) {
    operand.read = read;
    operand.map = map.map;
    operand.mean = k.mean.data();
    operand.scale = k.scale.data();
    operand.shift = k.shift.data();
    operand.slope = k.slope.data();
    operand.normed = normed.map.data;
    operand.relu = pick(0, 1);
    operand.branch = added.branch;
    map.each([&](int64_t b, int64_t ch, int64_t y, int64_t x) {
      double v = *map.map.at(b, ch, y, x);
      if (read == Read::kNormalised || read == Read::kJoined) {
        v = (v - k.mean[ch]) * k.scale[ch] + k.shift[ch];
        if (read == Read::kJoined) v += added.at(b, ch, y, x);
        if (operand.relu && v < 0) v = 0;
      }
      if (read == Read::kGradient)
        v = v * k.scale[ch] + (*normed.map.at(b, ch, y, x) - k.mean[ch]) * k.slope[ch] + k.shift[ch];
      *tensor.view.at(b, ch, y, x) = static_cast<T>(v);
    });
  }
};

double distance(double a, double b) { return std::isnan(a) ? 1e30 : std::fabs(a - b); }

// A result with random work after it, and the check of that work.
template <class T>
struct Output {
  Map<T> out, normed, other, active;
  int64_t every;
  Map<T> residual;
  Coefficients<T> k, k2;
  Added<T> added;
  Result<T> result;
  bool compact;

  Output(Sum sum, Gate gate, int64_t n, int64_t c, int64_t h, int64_t w)
      : out(n, c, h, w, false),
        normed(n, c, h, w),
        other(n, c, h, w),
        active(n, c, h, w),
        every(pick(1, 2)),
        residual(n, c, (h + every - 1) / every, (w + every - 1) / every),
        k(c),
        k2(c),
        added(n, c, h, w) {
    result.out = out.map;
    result.branch = added.branch;
    result.residual = pick(0, 1) ? residual.map.data : nullptr;
    result.residual_every = every;
    result.gate = gate;
    result.sum = sum;
    result.active = active.map.data;
    result.normed = normed.map.data;
    result.other = pick(0, 1) ? other.map.data : nullptr;
    result.mean = k.mean.data();
    result.scale = k.scale.data();
    result.shift = k.shift.data();
    result.other_mean = k2.mean.data();
  }

  // The largest error of the results and of the sums, where `plain` is what the convolution gives.
  double error(const Tensor<T>& plain, const ChannelSums& sums) {
    double worst = 0, scale = 1;
    const int64_t channels = out.map.channels;
    std::vector<double> count(channels), first(channels), second(channels), third(channels), size(channels);
    out.each([&](int64_t b, int64_t ch, int64_t y, int64_t x) {
      double v = *plain.view.at(b, ch, y, x);
      if (result.residual && y % every == 0 && x % every == 0)
        v += *residual.map.at(b, ch, y / every, x / every);
      const double got = *out.map.at(b, ch, y, x), away = *normed.map.at(b, ch, y, x) - k.mean[ch];
      if (result.gate == Gate::kNormalised || result.gate == Gate::kJoined) {
        double open = away * k.scale[ch] + k.shift[ch];
        if (result.gate == Gate::kJoined) open += added.at(b, ch, y, x);
        if (std::fabs(open) < 1e-5) v = got;  // rounding decides
        if (open <= 0) v = std::fabs(open) < 1e-5 ? got : 0;
      }
      if (result.gate == Gate::kStored && *active.map.at(b, ch, y, x) <= 0) v = 0;
      worst = std::max(worst, distance(got, v));
      scale = std::max(scale, std::fabs(v));
      count[ch] += 1;
      first[ch] += got;
      second[ch] += result.sum == Sum::kMoments ? 0 : got * away;
      third[ch] += got * (*other.map.at(b, ch, y, x) - k2.mean[ch]);
      size[ch] += std::fabs(got);
    });
    for (int64_t c = 0; c < channels && result.sum != Sum::kNothing; ++c) {
      if (result.sum == Sum::kMoments) {
        first[c] /= count[c];
        out.each([&](int64_t b, int64_t ch, int64_t y, int64_t x) {
          if (ch == c) second[c] += std::pow(*out.map.at(b, c, y, x) - first[c], 2);
        });
        second[c] /= count[c];
        size[c] /= count[c];
        third[c] = 0;
      }
      if (result.sum == Sum::kGradient && !result.other) third[c] = 0;
      const double unit = 4 + size[c] * (result.sum == Sum::kMoments ? 4 : 1);
      worst = std::max({worst, distance(sums.first[c], first[c]) / unit,
                        distance(sums.second[c], second[c]) / unit / unit,
                        distance(sums.third[c], third[c]) / unit});
    }
    return worst / scale;
  }
};

template <class T>
void check_conv(const ConvGeometry& g, const Structure& s, int threads, double limit,
                const std::string& name) {
  const std::vector<T> values = numbers<T>(s.nnz), bias = numbers<T>(g.out_channels);
  const T* const added = pick(0, 1) ? bias.data() : nullptr;
  const Read reads[] = {Read::kPlain, Read::kNormalised, Read::kJoined};
  const Input<T> x(reads[pick(0, 2)], g.batch, g.in_channels, g.in_h, g.in_w);
  ChannelSums sums;
  {
    Output<T> y(pick(0, 1) ? Sum::kMoments : Sum::kNothing, Gate::kOpen, g.batch, g.out_channels, g.out_h,
                g.out_w);
    Tensor<T> expected(g.batch, g.out_channels, g.out_h, g.out_w, 0, true);
    scalar::conv_fprop<T>(g, s, x.tensor.read(), values.data(), added, expected.view, 1);
    check(conv_forward<T>(g, s, x.operand, values.data(), added, y.result, &sums, threads), name + " finite");
    const double error = y.error(expected, sums);
    check(error < limit, name + " forward " + std::to_string(error));
    const std::vector<T> first(y.out.map.data, y.out.map.data + y.out.map.elements());
    const ChannelSums before = sums;
    conv_forward<T>(g, s, x.operand, values.data(), added, y.result, &sums, threads);
    bool same = before.first == sums.first && before.second == sums.second;
    y.out.each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
      same = same && *y.out.map.at(b, c, h, w) == first[y.out.map.at(b, c, h, w) - y.out.map.data];
    });
    check(same, name + " forward again");
  }
  const Input<T> grad(pick(0, 1) ? Read::kGradient : Read::kPlain, g.batch, g.out_channels, g.out_h, g.out_w);
  const bool compact = compact_supported(g) && pick(0, 1);
  const Gate gates[] = {Gate::kOpen, Gate::kNormalised, Gate::kStored, Gate::kJoined};
  const Gate gate = gates[pick(0, 3)];
  const Sum sum = gate == Gate::kOpen && pick(0, 1) ? Sum::kNothing : Sum::kGradient;
  Output<T> dx(sum, gate, g.batch, g.in_channels, compact ? g.out_h : g.in_h, compact ? g.out_w : g.in_w);
  Tensor<T> whole(g.batch, g.in_channels, g.in_h, g.in_w, 0, true);
  scalar::conv_dgrad<T>(g, s, grad.tensor.read(), values.data(), whole.view, 1);
  Tensor<T> expected(g.batch, g.in_channels, dx.out.map.h, dx.out.map.w, 0, true);
  dx.out.each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
    *expected.view.at(b, c, h, w) =
        *whole.view.at(b, c, compact ? h * g.stride_h : h, compact ? w * g.stride_w : w);
  });
  std::vector<T> dvalues(s.nnz, std::numeric_limits<T>::quiet_NaN()), right(s.nnz), again(s.nnz);
  scalar::conv_wgrad<T>(g, s, grad.tensor.read(), x.tensor.read(), right.data(), 1);
  check(conv_backward<T>(g, s, grad.operand, x.operand, values.data(), dvalues.data(), &dx.result, compact,
                         &sums, threads),
        name + " finite gradients");
  const double error = dx.error(expected, sums), weight_error = largest_difference(dvalues, right);
  check(error < limit, name + " dgrad " + std::to_string(error));
  check(weight_error < 5 * limit, name + " wgrad " + std::to_string(weight_error));
  conv_backward<T>(g, s, grad.operand, x.operand, values.data(), again.data(), nullptr, compact, nullptr,
                   threads);
  check(largest_difference(again, right) < 5 * limit, name + " wgrad alone");
  std::vector<T> once_more(s.nnz);
  conv_backward<T>(g, s, grad.operand, x.operand, values.data(), once_more.data(), &dx.result, compact, &sums,
                   threads);
  check(once_more == dvalues, name + " wgrad again");
}

// What a join of one operand gives is that operand.
template <class T>
void check_join(double limit, const std::string& name) {
  for (const Read read : {Read::kPlain, Read::kNormalised, Read::kJoined}) {
    const int64_t n = pick(1, 40), c = pick(1, 20), h = pick(1, 6), w = pick(1, 9);
    const Input<T> x(read, n, c, h, w);
    const Map<T> y(n, c, h, w, false);
    Result<T> result;
    result.out = y.map;
    check(join<T>(x.operand, {}, false, result, nullptr, static_cast<int>(pick(1, 3))), name + " join");
    double worst = 0;
    y.each([&](int64_t b, int64_t ch, int64_t row, int64_t col) {
      worst = std::max(worst, distance(*y.map.at(b, ch, row, col), *x.tensor.view.at(b, ch, row, col)));
    });
    check(worst < limit, name + " join " + std::to_string(worst));
  }
}

}  // namespace

void test_blocked() {
  for (const Isa isa : available_isas()) {
    if (isa == Isa::kScalar) continue;
    set_isa(isa_name(isa));
    for (int i = 0; i < 10; ++i) {
      check_join<float>(1e-5, isa_name(isa));
      check_join<double>(1e-12, std::string(isa_name(isa)) + " double");
    }
    for (int i = 0, checked = 0; i < 400 && checked < 120; ++i) {
      ConvGeometry g = random_geometry();
      if (i % 4 == 0) {  // what networks have most
        g.kernel_h = g.kernel_w = pick(0, 1) ? 3 : 1;
        g.pad_top = g.pad_bottom = g.pad_left = g.pad_right = g.kernel_h / 2;
        g.stride_h = g.stride_w = pick(1, 2);
        g.dilation_h = g.dilation_w = 1;
        complete_geometry(g);
      }
      const double densities[] = {0.02, 0.1, 0.5, 1};
      const double density = densities[pick(0, 3)];
      const int64_t taps = g.kernel_h * g.kernel_w;
      const Csr csr = any_csr(g.out_channels, g.in_channels / g.groups, taps, density);
      const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), g.out_channels,
                        g.in_channels / g.groups * taps);
      if (!supported({{&g, &s}}, 2)) continue;
      ++checked;
      const int threads = static_cast<int>(pick(1, 3));
      check_conv<float>(g, s, threads, 1e-5, describe(g, isa_name(isa), density, threads));
      check_conv<double>(g, s, threads, 1e-12, describe(g, isa_name(isa), density, threads) + " double");
    }
  }
  set_isa("auto");
}
