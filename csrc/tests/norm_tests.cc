// BatchNorm of every engine, layout and thread count against plain loops in double.
#include "core/cpu.h"
#include "core/norm/norm.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

double distance(double a, double b) { return std::isnan(a) ? 1e30 : std::fabs(a - b); }

template <class T>
struct Case {
  Maps maps;
  bool relu, frozen, added, affine;
  double eps = 1e-5;
  std::vector<T> x, residual, grad, weight, bias, mean, var;

  Case()
      : maps{pick(1, 9), pick(0, 4) ? pick(1, 70) : pick(250, 300), pick(0, 3) ? pick(1, 40) : 1,
             pick(0, 1) == 1},
        relu(pick(0, 1)),
        frozen(pick(0, 1)),
        added(pick(0, 1)),
        affine(pick(0, 1)) {
    const double centre = pick(0, 1) ? 0 : 100;
    const size_t size = static_cast<size_t>(maps.images * maps.channels * maps.pixels);
    for (auto* v : {&x, &residual, &grad}) v->resize(size);
    for (auto* v : {&weight, &bias, &mean, &var}) v->resize(maps.channels);
    for (T& v : x) v = static_cast<T>(uniform() + centre);
    for (auto* v : {&residual, &grad, &weight, &bias})
      for (T& u : *v) u = static_cast<T>(uniform());
    for (T& v : mean) v = static_cast<T>(uniform() + centre);
    for (T& v : var) v = static_cast<T>(uniform() + 1.5);
  }
  int64_t at(int64_t n, int64_t c, int64_t p) const {
    return maps.channels_last ? (n * maps.pixels + p) * maps.channels + c
                              : (n * maps.channels + c) * maps.pixels + p;
  }
  double count() const { return static_cast<double>(maps.images * maps.pixels); }
  template <class F>
  void each(int64_t c, F f) const {
    for (int64_t n = 0; n < maps.images; ++n)
      for (int64_t p = 0; p < maps.pixels; ++p) f(at(n, c, p));
  }
};

template <class T>
void check_moments(const Case<T>& t, int threads, double limit, std::vector<T>& mean, std::vector<T>& var) {
  norm_moments<T>(t.maps, t.x.data(), mean.data(), var.data(), threads);
  double worst = 0;
  for (int64_t c = 0; c < t.maps.channels; ++c) {
    double sum = 0, squares = 0;
    t.each(c, [&](int64_t i) { sum += t.x[i]; });
    const double centre = sum / t.count();
    t.each(c, [&](int64_t i) { squares += (t.x[i] - centre) * (t.x[i] - centre); });
    // The mean is rounded to T, so its error grows with it; that of the variance must not.
    worst = std::max(worst, distance(mean[c], centre) / (1 + std::fabs(centre)));
    worst = std::max(worst, distance(var[c], squares / t.count()));
  }
  check(worst < limit, "moments differ by " + std::to_string(worst));
}

template <class T>
void check_pass(const Case<T>& t, const Norm<T>& norm, int threads, double limit) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> y(t.x.size(), nan), dx(t.x.size(), nan), dresidual(t.x.size(), nan);
  std::vector<T> dweight(t.maps.channels, nan), dbias(t.maps.channels, nan);
  norm_forward<T>(norm, t.x.data(), t.added ? t.residual.data() : nullptr, y.data(), threads);
  const bool stored = t.relu && t.added;
  norm_backward<T>(norm,
                   {t.grad.data(), t.x.data(), stored ? y.data() : nullptr, t.frozen, dx.data(),
                    stored ? dresidual.data() : nullptr, dweight.data(), dbias.data()},
                   threads);
  double out = 0, in = 0, params = 0;
  for (int64_t c = 0; c < t.maps.channels; ++c) {
    const double rstd = 1 / std::sqrt(double(norm.var[c]) + t.eps), weight = t.affine ? t.weight[c] : 1;
    double sum = 0, dot = 0;
    const auto normal = [&](int64_t i) { return (double(t.x[i]) - norm.mean[c]) * rstd; };
    // The mask of the computed output: a value at the edge may fall on either side of it.
    const auto behind = [&](int64_t i) { return t.relu && !(y[i] > 0) ? 0.0 : double(t.grad[i]); };
    t.each(c, [&](int64_t i) {
      const double z = normal(i) * weight + (t.affine ? t.bias[c] : 0) + (t.added ? t.residual[i] : 0);
      out = std::max(out, distance(y[i], t.relu ? std::max(z, 0.0) : z) / (1 + std::fabs(normal(i))));
      sum += behind(i);
      dot += behind(i) * normal(i);
    });
    params = std::max({params, distance(dbias[c], sum) / t.count(), distance(dweight[c], dot) / t.count()});
    t.each(c, [&](int64_t i) {
      const double spread = t.frozen ? 0 : (sum + normal(i) * dot) / t.count();
      in = std::max(in, distance(dx[i], weight * rstd * (behind(i) - spread)) / rstd);
      if (stored) in = std::max(in, distance(dresidual[i], behind(i)));
    });
  }
  const double large = limit * 100;  // data a hundred deviations from zero
  check(out < large && in < large && params < large,
        "norm differs by " + std::to_string(out) + ", " + std::to_string(in) + ", " + std::to_string(params));
}

template <class T>
void check_case(double limit) {
  const Case<T> t;
  const int threads = static_cast<int>(pick(1, 4));
  std::vector<T> mean(t.maps.channels), var(t.maps.channels), again(t.maps.channels), same(t.maps.channels);
  check_moments(t, threads, limit, mean, var);
  norm_moments<T>(t.maps, t.x.data(), again.data(), same.data(), threads);
  check(again == mean && same == var, "moments are the same on every run");
  const T *m = t.frozen ? t.mean.data() : mean.data(), *v = t.frozen ? t.var.data() : var.data();
  const T *weight = t.affine ? t.weight.data() : nullptr, *bias = t.affine ? t.bias.data() : nullptr;
  check_pass<T>(t, {t.maps, m, v, weight, bias, t.eps, t.relu}, threads, limit);
}

// Enough elements for several threads, and a last row that is short.
void test_threads() {
  for (bool last : {false, true}) {
    const Maps maps{37, 24, 91, last};
    std::vector<float> x(37 * 24 * 91), mean(24), var(24), one(24), alone(24);
    for (float& v : x) v = static_cast<float>(uniform() + 1000);
    norm_moments<float>(maps, x.data(), mean.data(), var.data(), 4);
    norm_moments<float>(maps, x.data(), one.data(), alone.data(), 1);
    check(largest_difference(mean, one) < 1e-6 && largest_difference(var, alone) < 1e-5,
          "moments agree across thread counts");
  }
}

}  // namespace

void test_norm() {
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    for (int i = 0; i < 120; ++i) check_case<float>(1e-5);
    for (int i = 0; i < 60; ++i) check_case<double>(1e-13);
    test_threads();
  }
  set_isa("auto");
  const Maps none{0, 3, 4, true};
  std::vector<float> mean(3), var(3);
  norm_moments<float>(none, nullptr, mean.data(), var.data(), 2);
  check(std::isnan(mean[0]) && std::isnan(var[2]), "moments of nothing are NaN");
}
