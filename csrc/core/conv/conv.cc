#include "core/conv/conv.h"

#include <algorithm>

#include "core/conv/engine.h"
#include "core/conv/exact.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

// A 1x1 convolution does not care where a row ends. In channels_last, rows of few pixels keep a window of all
// channels small; otherwise long runs of each channel are what memory likes. Both views must have rows
// without gaps between them.
template <class A, class B>
void refold(ConvGeometry& g, View4<A>& x, View4<B>& y) {
  constexpr int64_t kWindowPixels = 2048, kShortest = 8, kLongRun = 32;
  const bool pointwise = g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
                         g.in_h == g.out_h && g.in_w == g.out_w && g.pad_top == 0 && g.pad_left == 0;
  if (!pointwise || x.stride_h != x.w * x.stride_w || y.stride_h != y.w * y.stride_w) return;
  const int64_t area = g.out_h * g.out_w, channels = std::max(g.in_channels, g.out_channels);
  int64_t width = x.stride_c == 1 ? std::max(kShortest, kWindowPixels / channels) : kLongRun;
  width = std::min(width, area);
  while (area % width) --width;
  if (width < kShortest && width < g.out_w) return;
  g.in_w = g.out_w = x.w = y.w = width;
  g.in_h = g.out_h = x.h = y.h = area / width;
  x.stride_h = width * x.stride_w;
  y.stride_h = width * y.stride_w;
}

// Writes the bias (or zero) everywhere, walking along whichever of channels and columns lies contiguous.
template <class T>
void fill(const View4<T>& y, const T* bias, int threads) {
  auto fill_image = [&](int slot) {
    const int64_t n = slot;
    const auto start = [&](int64_t c) { return bias ? bias[c] : T(0); };
    for (int64_t h = 0; h < y.h; ++h) {
      if (y.stride_c == 1) {
        for (int64_t w = 0; w < y.w; ++w)
          for (int64_t c = 0; c < y.c; ++c) *y.at(n, c, h, w) = start(c);
      } else {
        for (int64_t c = 0; c < y.c; ++c)
          for (int64_t w = 0; w < y.w; ++w) *y.at(n, c, h, w) = start(c);
      }
    }
  };
  parallel(threads, static_cast<int>(y.n), fill_image);
}

// The output positions that one plan computes.
template <class T>
View4<T> phase_view(const View4<T>& y, const GatherPlan& p) {
  return {y.data + p.first_h * y.stride_h + p.first_w * y.stride_w,
          y.n,
          y.c,
          p.out_h,
          p.out_w,
          y.stride_n,
          y.stride_c,
          p.every_h * y.stride_h,
          p.every_w * y.stride_w};
}

// Returns whether all results are finite.
template <class T>
bool run_plans(const ConvEngine<T>& kernels, const GatherPlans& plans, const View4<const T>& in,
               const T* values, const T* bias, const View4<T>& out, int threads) {
  bool finite = true;
  if (!plans.covers) fill(out, bias, threads);
  for (const GatherPlan& plan : plans.phases) {
    const View4<T> phase = phase_view(out, plan);
    const int64_t nnz = static_cast<int64_t>(plan.slot.size());
    T* ordered = static_cast<T*>(scratch(Scratch::kValues, nnz * sizeof(T)));
    order_values(plan, values, ordered, threads);
    kernels.gather({in, phase, &plan, ordered, bias, threads, &finite});
  }
  return finite;
}

bool empty(const ConvGeometry& g) { return g.batch == 0 || g.out_h == 0 || g.out_w == 0; }

}  // namespace

Schedule schedule_rows(int64_t images, int64_t out_rows, int64_t out_channels, int64_t halo_rows,
                       int64_t lanes, int64_t most_strips, int threads, int64_t chunks_per_thread) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Schedule best{};
  int64_t best_cost = 0;
  for (int64_t strips = 1; strips <= std::min(most_strips, out_rows); strips *= 2) {
    const int64_t rows = ceil_div(out_rows, strips), groups = ceil_div(images * strips, lanes);
    // Packing the halo again costs about a quarter of computing a row.
    const int64_t cost = groups * (4 * rows + halo_rows);
    if (strips == 1 || cost < best_cost) {
      best = {strips, rows, groups, 1, rows, 1};
      best_cost = cost;
    }
  }
  const int64_t wanted = threads > 1 ? threads * chunks_per_thread : 1;
  const int64_t most = std::max<int64_t>(1, best.strip_rows / std::max<int64_t>(1, 2 * halo_rows));
  best.chunks = std::min(most, ceil_div(wanted, best.groups));
  best.chunk_rows = ceil_div(best.strip_rows, best.chunks);
  best.chunks = ceil_div(best.strip_rows, best.chunk_rows);
  const int64_t items = best.groups * best.chunks;
  if (items < threads)
    best.parts = std::max<int64_t>(1, std::min(ceil_div(threads, items), out_channels / 8));
  return best;
}

template <class T>
void conv_fprop(const ConvGeometry& geometry, const Structure& s, View4<const T> x, const T* values,
                const T* bias, View4<T> y, int threads) {
  ConvGeometry g = geometry;
  if (empty(g)) return;
  if (const Isa isa = current_isa(); isa != Isa::kScalar) {
    const ConvEngine<T>& kernels = engine<ConvEngine<T>>(isa);
    refold(g, x, y);
    const auto plans = s.plan<GatherPlans>(plan_key(Pass::kFprop, g, kernels.tile),
                                           [&] { return fprop_plan(g, s, kernels.tile); });
    if (plans) {
      if (!run_plans(kernels, *plans, x, values, bias, y, threads))
        exact::conv_fprop(g, s, x, values, bias, y, threads);
      return;
    }
  }
  scalar::conv_fprop(g, s, x, values, bias, y, threads);
}

template <class T>
void conv_dgrad(const ConvGeometry& geometry, const Structure& s, View4<const T> grad, const T* values,
                View4<T> dx, int threads) {
  ConvGeometry g = geometry;
  if (g.batch == 0 || g.in_h == 0 || g.in_w == 0) return;
  if (const Isa isa = current_isa(); isa != Isa::kScalar) {
    const ConvEngine<T>& kernels = engine<ConvEngine<T>>(isa);
    refold(g, dx, grad);
    const auto plans = s.plan<GatherPlans>(plan_key(Pass::kDgrad, g, kernels.tile),
                                           [&] { return dgrad_plan(g, s, kernels.tile); });
    if (plans) {
      if (!run_plans<T>(kernels, *plans, grad, values, nullptr, dx, threads))
        exact::conv_dgrad(g, s, grad, values, dx, threads);
      return;
    }
  }
  scalar::conv_dgrad(g, s, grad, values, dx, threads);
}

template <class T>
void conv_wgrad(const ConvGeometry& geometry, const Structure& s, View4<const T> grad, View4<const T> x,
                T* dvalues, int threads) {
  ConvGeometry g = geometry;
  if (empty(g) || s.nnz == 0) return std::fill(dvalues, dvalues + s.nnz, T(0));
  if (const Isa isa = current_isa(); isa != Isa::kScalar) {
    refold(g, x, grad);
    const auto plan = s.plan<WgradPlan>(plan_key(Pass::kWgrad, g, {0, 0}), [&] { return wgrad_plan(g, s); });
    if (plan) {
      if (static_cast<int64_t>(plan->outside.size()) < s.nnz)
        engine<ConvEngine<T>>(isa).wgrad({grad, x, &s, plan.get(), dvalues, threads});
      for (const int32_t slot : plan->outside) dvalues[slot] = T(0);
      return exact::conv_wgrad(g, s, grad, x, dvalues, threads);
    }
  }
  scalar::conv_wgrad(g, s, grad, x, dvalues, threads);
}

#define SPARSEKD_INSTANTIATE(T)                                                                          \
  template void conv_fprop<T>(const ConvGeometry&, const Structure&, View4<const T>, const T*, const T*, \
                              View4<T>, int);                                                            \
  template void conv_dgrad<T>(const ConvGeometry&, const Structure&, View4<const T>, const T*, View4<T>, \
                              int);                                                                      \
  template void conv_wgrad<T>(const ConvGeometry&, const Structure&, View4<const T>, View4<const T>, T*, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd
