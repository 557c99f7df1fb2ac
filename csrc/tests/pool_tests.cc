// Pooling on blocked maps against plain loops: every instruction set, windows that overlap and that leave
// gaps, ties, NaN and infinity, batches that leave lanes without an image.
#include "core/blocked/pool.h"
#include "core/cpu.h"
#include "tests/maps.h"

using namespace sparsekd;
using namespace sparsekd::blocked;

namespace {

bool same(double a, double b, double tolerance) {
  if (std::isnan(b) || std::isinf(b)) return std::isnan(b) ? std::isnan(a) : a == b;
  return std::fabs(a - b) <= tolerance;
}

// Calls run(row, column of the map) for the window of an output, in order.
template <class F>
void window(const Pooling& p, int64_t h, int64_t w, int64_t oh, int64_t ow, F run) {
  for (int64_t r = 0; r < p.kernel_h; ++r)
    for (int64_t c = 0; c < p.kernel_w; ++c) {
      const int64_t y = oh * p.stride_h - p.pad_h + r, x = ow * p.stride_w - p.pad_w + c;
      if (y >= 0 && y < h && x >= 0 && x < w) run(y, x);
    }
}

template <class T>
void check_pool(const Pooling& p, int64_t n, int64_t c, int64_t h, int64_t w, int threads, bool special,
                const std::string& name) {
  const double tolerance = 64 * std::numeric_limits<T>::epsilon();
  Map<T> x(n, c, h, w);
  const double specials[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
  x.each([&](int64_t b, int64_t ch, int64_t i, int64_t j) {
    T& v = *x.map.at(b, ch, i, j);
    v = static_cast<T>(pick(-3, 3));  // so that there are ties
    if (special && pick(0, 4) == 0) v = static_cast<T>(specials[pick(0, 2)]);
  });
  Map<T> y(n, c, p.out_h(h), p.out_w(w), false), grad(n, c, p.out_h(h), p.out_w(w)), dx(n, c, h, w, false);
  Map<T> right(n, c, h, w), z(n, c, h, w), other(n, c, h, w);
  right.each([&](int64_t b, int64_t ch, int64_t i, int64_t j) { *right.map.at(b, ch, i, j) = 0; });
  pool_forward<T>(p, x.map, y.map, threads);
  bool equal = true;
  y.each([&](int64_t b, int64_t ch, int64_t i, int64_t j) {
    double sum = 0, most = -HUGE_VAL;
    int64_t top = -1, left = -1;
    window(p, h, w, i, j, [&](int64_t r, int64_t q) {
      const double v = *x.map.at(b, ch, r, q);
      sum += v;
      if (top < 0 || v > most || std::isnan(v)) most = v, top = r, left = q;
    });
    const double area = static_cast<double>(p.kernel_h * p.kernel_w), g = *grad.map.at(b, ch, i, j);
    equal = equal && same(*y.map.at(b, ch, i, j), p.average ? sum / area : most, p.average ? tolerance : 0);
    if (p.average)
      window(p, h, w, i, j,
             [&](int64_t r, int64_t q) { *right.map.at(b, ch, r, q) += static_cast<T>(g / area); });
    else
      *right.map.at(b, ch, top, left) += static_cast<T>(g);
  });
  check(equal, name + " forward");
  check(pool_backward<T>(p, x.map, grad.map, dx.map.data, nullptr, threads), name + " finite");
  equal = true;
  dx.each([&](int64_t b, int64_t ch, int64_t i, int64_t j) {
    equal = equal && same(*dx.map.at(b, ch, i, j), *right.map.at(b, ch, i, j), tolerance);
  });
  check(equal, name + " backward");

  std::vector<T> mean(c), other_mean(c);
  for (T& m : mean) m = static_cast<T>(uniform());
  for (T& m : other_mean) m = static_cast<T>(uniform());
  std::vector<double> sums(3 * c, std::nan("")), expected(3 * c);
  Before<T> before{};
  before.relu = pick(0, 1) == 1;
  before.z = z.map.data;
  before.mean = mean.data();
  if (pick(0, 1)) before.other = other.map.data, before.other_mean = other_mean.data();
  before.sums = sums.data();
  Map<T> gated(n, c, h, w, false);
  check(pool_backward<T>(p, x.map, grad.map, gated.map.data, &before, threads), name + " finite sums");
  equal = true;
  gated.each([&](int64_t b, int64_t ch, int64_t i, int64_t j) {
    const bool shut = before.relu && *x.map.at(b, ch, i, j) <= 0;
    const double g = shut ? 0 : *right.map.at(b, ch, i, j);
    equal = equal && same(*gated.map.at(b, ch, i, j), g, tolerance);
    expected[ch] += g;
    expected[c + ch] += g * (*z.map.at(b, ch, i, j) - mean[ch]);
    if (before.other) expected[2 * c + ch] += g * (*other.map.at(b, ch, i, j) - other_mean[ch]);
  });
  check(equal, name + " gated");
  equal = true;
  for (int64_t i = 0; i < 3 * c; ++i)
    equal = equal && same(sums[i], expected[i], 4 * tolerance * static_cast<double>(n * h * w));
  check(equal, name + " sums");
}

}  // namespace

void test_pool() {
  for (const Isa isa : available_isas()) {
    if (isa == Isa::kScalar) continue;
    set_isa(isa_name(isa));
    for (int i = 0; i < 120; ++i) {
      const int64_t h = pick(1, 9), w = pick(1, 9);
      Pooling p{pick(0, 1) == 1, pick(1, 4), pick(1, 4), pick(1, 3), pick(1, 3), 0, 0};
      if (i % 3 == 0) p = {pick(0, 1) == 1, h, w, h, w, 0, 0};  // of the whole map
      if (i % 3 == 1) p = {false, 3, 3, 2, 2, 1, 1};
      if (i % 3 == 2) p.pad_h = pick(0, p.kernel_h / 2), p.pad_w = pick(0, p.kernel_w / 2);
      if (p.kernel_h > h + 2 * p.pad_h || p.kernel_w > w + 2 * p.pad_w) continue;
      const int64_t n = pick(1, 35), c = pick(1, 5);
      const int threads = static_cast<int>(pick(1, 3));
      const bool special = !p.average && pick(0, 2) == 0;
      const std::string name = std::string("pool ") + isa_name(isa) +
                               (p.average ? " average " : " maximum ") + std::to_string(p.kernel_h) + "x" +
                               std::to_string(p.kernel_w) + " on " + std::to_string(n) + "x" +
                               std::to_string(c) + "x" + std::to_string(h) + "x" + std::to_string(w) +
                               (special ? " with NaN" : "");
      check_pool<float>(p, n, c, h, w, threads, special, name);
      check_pool<double>(p, n, c, h, w, threads, special, name + " double");
    }
  }
  set_isa("auto");
}
