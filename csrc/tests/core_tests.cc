// Tests of core without torch or Python: every engine against the plain loops, structures, growth, threads.
// Run under AddressSanitizer and UndefinedBehaviorSanitizer by `make sanitize`: inputs and outputs are heap
// blocks of exactly the needed size, so a kernel that reads or writes one element too far is caught.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "core/conv/conv.h"
#include "core/conv/engine.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/grow/outer.h"
#include "core/grow/scan.h"
#include "core/linear/engine.h"
#include "core/norm/engine.h"
#include "core/parallel.h"
#include "core/peak/peak.h"
#include "core/structure.h"
#include "tests/harness.h"

using namespace sparsekd;

void test_blocked();
void test_pool();
void test_borders();
void test_caches();
void test_densify();
void test_empty();
void test_files();
void test_frozen();
void test_frozen_refusals();
void test_growth();
void test_linear();
void test_panels();
void test_peak();
void test_norm();

namespace {

template <class T>
void test_convolution(int cases) {
  const double tolerance = std::is_same_v<T, float> ? 2e-5 : 1e-12;
  for (int i = 0; i < cases; ++i) {
    const ConvGeometry g = random_geometry();
    const double densities[] = {0, 0.05, 0.1, 0.3, 1};
    const double density = densities[pick(0, 4)];
    const int64_t taps = g.kernel_h * g.kernel_w, columns = g.in_channels / g.groups * taps;
    const Csr csr = any_csr(g.out_channels, g.in_channels / g.groups, taps, density);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), g.out_channels,
                      columns);
    std::vector<T> values(s.nnz), bias(g.out_channels);
    for (T& v : values) v = static_cast<T>(uniform());
    for (T& v : bias) v = static_cast<T>(uniform());
    const T* b = pick(0, 1) ? bias.data() : nullptr;
    const Tensor<T> x(g.batch, g.in_channels, g.in_h, g.in_w, pick(0, 2), false);
    const Tensor<T> grad(g.batch, g.out_channels, g.out_h, g.out_w, pick(0, 2), false);

    Tensor<T> y0(g.batch, g.out_channels, g.out_h, g.out_w, 0, true),
        dx0(g.batch, g.in_channels, g.in_h, g.in_w, 0, true);
    std::vector<T> dv0(s.nnz);
    scalar::conv_fprop<T>(g, s, x.read(), values.data(), b, y0.view, 1);
    scalar::conv_dgrad<T>(g, s, grad.read(), values.data(), dx0.view, 1);
    scalar::conv_wgrad<T>(g, s, grad.read(), x.read(), dv0.data(), 1);
    for (Isa isa : available_isas()) {
      if (isa == Isa::kScalar) continue;
      set_isa(isa_name(isa));
      const int threads = static_cast<int>(pick(1, 3)), layout = static_cast<int>(pick(0, 2));
      Tensor<T> y(g.batch, g.out_channels, g.out_h, g.out_w, layout, true), again = y;
      again.view.data = again.data.data();
      Tensor<T> dx(g.batch, g.in_channels, g.in_h, g.in_w, layout, true);
      std::vector<T> dv(s.nnz, std::numeric_limits<T>::quiet_NaN()), dv_again = dv;
      conv_fprop<T>(g, s, x.read(), values.data(), b, y.view, threads);
      conv_fprop<T>(g, s, x.read(), values.data(), b, again.view, threads);
      conv_dgrad<T>(g, s, grad.read(), values.data(), dx.view, threads);
      conv_wgrad<T>(g, s, grad.read(), x.read(), dv.data(), threads);
      conv_wgrad<T>(g, s, grad.read(), x.read(), dv_again.data(), threads);
      const std::string what = describe(g, isa_name(isa), density, threads);
      check(largest_difference(y, y0) <= tolerance, "fprop " + what);
      check(largest_difference(dx, dx0) <= tolerance, "dgrad " + what);
      check(largest_difference(dv, dv0) <= tolerance, "wgrad " + what);
      check(y.data.empty() || !std::memcmp(y.data.data(), again.data.data(), y.data.size() * sizeof(T)),
            "fprop not deterministic " + what);
      check(dv.empty() || !std::memcmp(dv.data(), dv_again.data(), dv.size() * sizeof(T)),
            "wgrad not deterministic " + what);
    }
  }
  set_isa("auto");
}

// Of the tables that an op has for each instruction set, no two are the same.
template <class Table>
void test_engines(const char* name) {
  std::set<const Table*> tables;
  for (Isa isa : available_isas()) tables.insert(&engine<Table>(isa));
  // The oracle has the generic one.
  check(tables.size() == available_isas().size() - 1,
        std::string(name) + ": a table for each instruction set");
}

void test_validation() {
  const auto validate = [](std::vector<int32_t> crow, std::vector<int32_t> col, int64_t rows, int64_t cols) {
    return [=] { Structure(crow.data(), crow.size(), col.data(), col.size(), rows, cols); };
  };
  validate({0, 2, 2, 3}, {0, 4, 1}, 3, 5)();
  check(true, "a valid structure");
  check_throws<TopologyError>(validate({0, 2}, {0, 1}, 2, 5), "length rows + 1");
  check_throws<TopologyError>(validate({1, 2, 2}, {0, 1}, 2, 5), "start at 0");
  check_throws<TopologyError>(validate({0, 2, 1}, {0}, 2, 5), "not monotone");
  check_throws<TopologyError>(validate({0, 1, 1}, {0, 1}, 2, 5), "number of nonzeros");
  check_throws<TopologyError>(validate({0, -7, 2}, {0, 1}, 2, 5), "not monotone");
  check_throws<TopologyError>(validate({0, 1 << 30, 2}, {0, 1}, 2, 5), "not monotone");
  check_throws<TopologyError>(validate({0, 1, 2}, {0, 5}, 2, 5), "out of range");
  check_throws<TopologyError>(validate({0, 1, 2}, {-1, 0}, 2, 5), "out of range");
  check_throws<TopologyError>(validate({0, 2, 2}, {3, 1}, 2, 5), "unsorted");
  check_throws<TopologyError>(validate({0, 2, 2}, {1, 1}, 2, 5), "duplicated");
  check_throws<TopologyError>(validate({0}, {}, 0, int64_t{1} << 31), "int32");
}

void test_cache() {
  Csr csr = random_csr(20, 30, 0.2);
  const auto find = [&] {
    return find_structure(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), 20, 30);
  };
  const auto first = find();
  check(find() == first, "the same arrays find the same structure");
  const int32_t original = csr.col.back();
  csr.col.back() = 1000;
  check_throws<TopologyError>(find, "out of range");
  csr.col.back() = original;
  check(find() == first, "a restored array finds its structure again");
  release_structure(csr.crow.data(), csr.col.data());
  check(find() != first, "a released structure is made anew");
}

void test_parallel() {
  for (int threads : {1, 2, 3, 8})
    for (int slots : {0, 1, 5, 100}) {
      std::vector<int> ran(slots, 0);
      auto body = [&](int slot) { __atomic_fetch_add(&ran[slot], 1, __ATOMIC_RELAXED); };
      parallel(threads, slots, body);
      check(std::all_of(ran.begin(), ran.end(), [](int n) { return n == 1; }), "every slot runs once");
    }
}

void test_useful_threads() {
  check(useful_threads(8, 0, 0) == 1, "an empty call runs on one thread");
  check(useful_threads(8, 2 * kWorthAThread - 1, 0) == 1, "a small one too");
  check(useful_threads(8, 2 * kWorthAThread, 0) == 2, "two threads from where both are worth it");
  check(useful_threads(8, 0, 2 * kWorthAThread / kProductsAnElement) == 2, "moving numbers is work");
  check(useful_threads(3, 100 * kWorthAThread, 0) == 3, "never more than there are");
}

void test_parallel_errors() {
  for (int threads : {1, 3}) {
    auto body = [&](int slot) {
      if (slot == 4) throw std::bad_alloc();
    };
    try {
      parallel(threads, 9, body);
      check(false, "an error of a slot reaches the caller");
    } catch (const std::bad_alloc&) {
      check(true, "an error of a slot reaches the caller");
    }
  }
}

// Views with stride 0 have enormous sizes without any memory behind them.
void test_enormous_views() {
  const int64_t rows = int64_t{1} << 28, cols = int64_t{1} << 29;  // a window of over 2^63 bytes
  ConvGeometry far{};  // one output whose four taps lie at the corners
  far.batch = far.out_channels = far.stride_h = far.stride_w = far.groups = 1;
  far.in_channels = 1;
  far.in_h = rows;
  far.in_w = cols;
  far.kernel_h = far.kernel_w = 2;
  far.dilation_h = rows - 1;
  far.dilation_w = cols - 1;
  ConvGeometry sparse_rows{};  // two output rows, half a million input rows apart
  sparse_rows.batch = sparse_rows.in_channels = sparse_rows.out_channels = sparse_rows.groups = 1;
  sparse_rows.in_h = 1 << 20;
  sparse_rows.in_w = 1000;
  sparse_rows.kernel_h = sparse_rows.kernel_w = sparse_rows.stride_w = 1;
  sparse_rows.dilation_h = sparse_rows.dilation_w = 1;
  sparse_rows.stride_h = 1 << 19;
  for (ConvGeometry g : {far, sparse_rows}) {
    complete_geometry(g);
    const int64_t columns = g.in_channels * g.kernel_h * g.kernel_w;
    const Csr csr = random_csr(1, columns, 1.0);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), 1, columns);
    const std::vector<float> values(s.nnz, 0.5f), x{3.0f}, grad{2.0f};
    const View4<const float> xv{x.data(), 1, g.in_channels, g.in_h, g.in_w, 0, 0, 0, 0};
    const View4<const float> gv{grad.data(), 1, 1, g.out_h, g.out_w, 0, 0, 0, 0};
    Tensor<float> y(1, 1, g.out_h, g.out_w, 0, true);
    std::vector<float> dv(s.nnz, std::numeric_limits<float>::quiet_NaN());
    conv_fprop<float>(g, s, xv, values.data(), nullptr, y.view, 2);
    conv_wgrad<float>(g, s, gv, xv, dv.data(), 2);
    const float positions = static_cast<float>(g.out_h * g.out_w), sum = 1.5f * static_cast<float>(columns);
    check(std::all_of(y.data.begin(), y.data.end(), [=](float v) { return v == sum; }), "enormous fprop");
    check(std::all_of(dv.begin(), dv.end(), [=](float v) { return v == 6 * positions; }), "enormous wgrad");
  }
}

void test_schedule() {
  for (int i = 0; i < 500; ++i) {
    const int64_t images = pick(1, 70), rows = pick(1, 60), channels = pick(1, 600), halo = pick(0, 6);
    const int threads = static_cast<int>(pick(1, 9));
    const Schedule s = schedule_rows(images, rows, channels, halo, 16, 16, threads, 4);
    check(s.strips * s.strip_rows >= rows && s.groups * 16 >= images * s.strips &&
              s.chunks * s.chunk_rows >= s.strip_rows && s.parts >= 1 &&
              s.parts <= std::max<int64_t>(1, channels),
          "a schedule covers every row of every image");
  }
}

void test_geometry() {
  ConvGeometry g{};
  g.batch = g.in_channels = g.out_channels = g.kernel_h = g.kernel_w = g.stride_h = g.stride_w = 1;
  g.in_h = g.in_w = 2;
  g.dilation_h = g.dilation_w = g.groups = 1;
  const auto with = [&](auto change) {
    return [=]() mutable {
      change(g);
      complete_geometry(g);
    };
  };
  check_throws<ShapeError>(with([](ConvGeometry& c) { c.kernel_h = 3; }), "smaller than the dilated kernel");
  check_throws<ShapeError>(with([](ConvGeometry& c) { c.groups = 2; }), "groups");
  check_throws<ShapeError>(with([](ConvGeometry& c) { c.stride_w = 0; }), "stride");
  check_throws<ShapeError>(with([](ConvGeometry& c) { c.pad_left = -1; }), "padding");
  check_throws<ShapeError>(with([](ConvGeometry& c) { c.dilation_h = int64_t{1} << 40; }), "2^30");
  check_throws<ShapeError>(with([](ConvGeometry& c) {
                             c.in_channels = c.kernel_h = c.kernel_w = int64_t{1} << 22;
                             c.pad_top = c.pad_left = int64_t{1} << 22;
                           }),
                           "int32");
  check_throws<UnsupportedError>([] { set_isa("mmx"); }, "expected one of auto, scalar");
}

}  // namespace

int main() {
  test_validation();
  test_cache();
  test_caches();
  test_empty();
  test_files();
  test_frozen();
  test_frozen_refusals();
  test_growth();
  test_parallel();
  test_useful_threads();
  test_parallel_errors();
  test_enormous_views();
  test_schedule();
  test_geometry();
  test_borders();
  test_densify();
  test_panels();
  test_peak();
  test_norm();
  test_blocked();
  test_pool();
  test_engines<ConvEngine<float>>("convolution");
  test_engines<LinearEngine<float>>("linear");
  test_engines<NormEngine<float>>("norm");
  test_engines<OuterEngine<float>>("dense weight gradient");
  test_engines<ScanEngine<float>>("growth");
  test_engines<PeakEngine>("peak");
  test_convolution<float>(250);
  test_convolution<double>(130);
  test_linear();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
