#include "core/conv/plan.h"

#include <algorithm>
#include <set>

#include "core/cpu.h"

namespace sparsekd {
namespace {

// A window wider than this is not worth packing (huge dilation on huge maps).
constexpr int64_t kMaxWindowBytes = int64_t{1} << 29;

struct Tap {
  int32_t out, in, slot;
  int64_t dh, dw;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls visit(out channel, in channel, kernel row, kernel column, slot) for every nonzero in order.
template <class F>
void for_nonzeros(const ConvGeometry& g, const Structure& s, F visit) {
  const int64_t area = g.kernel_h * g.kernel_w;
  const int64_t outs = g.out_channels / g.groups, ins = g.in_channels / g.groups;
  for (int64_t row = 0; row < s.rows; ++row)
    for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) {
      const int32_t c = s.col[k];
      visit(row, row / outs * ins + c / area, c % area / g.kernel_w, c % g.kernel_w, k);
    }
}

struct Range {
  int64_t lo = 0, hi = 0;
  bool empty = true;
  void add(int64_t v) {
    lo = empty ? v : std::min(lo, v);
    hi = empty ? v : std::max(hi, v);
    empty = false;
  }
};

// step_w counts input columns here; a single tap column packs only the columns it meets.
Window make_window(int64_t channels, const Range& dh, const Range& dw, int64_t out_w, int64_t step_h,
                   int64_t step_w) {
  Window w;
  w.channels = channels;
  w.lo_h = dh.lo;
  w.span_h = dh.hi - dh.lo + 1;
  w.lo_w = dw.lo;
  w.step_h = step_h;
  if (dw.hi == dw.lo) {
    w.pack_step = step_w;
    w.cols = out_w;
  } else {
    w.step_w = step_w;
    w.cols = (out_w - 1) * step_w + dw.hi - dw.lo + 1;
  }
  w.pitch = w.cols | 1;
  return w;
}

// By division: the product of three sizes of a view with stride 0 can exceed 64 bits.
bool fits(const Window& w) { return w.channels <= kMaxWindowBytes / kPixelBytes / w.pitch / w.span_h; }

int32_t window_offset(const Window& w, int64_t in, int64_t dh, int64_t dw) {
  return static_cast<int32_t>((((dh - w.lo_h) * w.channels + in) * w.pitch + (dw - w.lo_w)) * kPixelBytes);
}

// Input channels to a block: the `pixels` of each channel that a tile of outputs reads should stay in L1, but
// a list shorter than a few nonzeros costs more in loading and storing its accumulators than it saves.
int64_t block_channels(const Window& w, int64_t pixels, int64_t outs, int64_t taps) {
  constexpr int64_t kShortestList = 4;
  const int64_t in_l1 = cache_sizes().l1d * 5 / 6 / (pixels * kPixelBytes);
  return std::max({int64_t{1}, in_l1, ceil_div(kShortestList * w.channels * outs, taps)});
}

// Makes one entry of the outputs that have the same list.
void join_panels(GatherPlan& plan) {
  std::vector<RowEntry> joined;
  const RowEntry* entry = plan.entries.data();
  for (size_t b = 0; b + 1 < plan.block_begin.size(); ++b) {
    const RowEntry* const end = plan.entries.data() + plan.block_begin[b + 1];
    plan.block_begin[b] = static_cast<int32_t>(joined.size());
    while (entry < end) {
      const int64_t first = entry->out_channel;
      const auto list = plan.offset.begin() + entry->begin;
      const int32_t count = entry[1].begin - entry->begin;
      const auto same = [&](int64_t out) {
        const RowEntry* const other = entry + (out - first);
        return other->out_channel == out && other[1].begin - other->begin == count &&
               std::equal(list, list + count, plan.offset.begin() + other->begin);
      };
      joined.push_back(*entry);
      joined.back().rows = panel_rows(first, first + (end - entry), same);
      entry += joined.back().rows;
    }
  }
  plan.block_begin.back() = static_cast<int32_t>(joined.size());
  joined.push_back(*entry);
  plan.entries = std::move(joined);
}

// Sorts the taps by (block, out) in linear time; taps come with rising slots.
void fill_lists(GatherPlan& plan, const std::vector<Tap>& taps, int64_t outs, int64_t block) {
  const Window& w = plan.window;
  const int64_t blocks = ceil_div(w.channels, block);
  std::vector<int32_t> count(blocks * outs + 1, 0);
  for (const Tap& t : taps) ++count[t.in / block * outs + t.out + 1];
  plan.block_begin.assign(1, 0);
  for (int64_t key = 0; key < blocks * outs; ++key) {
    if (count[key + 1] || key < outs)
      plan.entries.push_back({static_cast<int32_t>(key % outs), count[key], 1});
    if ((key + 1) % outs == 0) plan.block_begin.push_back(static_cast<int32_t>(plan.entries.size()));
    count[key + 1] += count[key];
  }
  plan.entries.push_back({0, static_cast<int32_t>(taps.size()), 1});
  plan.offset.resize(taps.size());
  plan.slot.resize(taps.size());
  for (const Tap& t : taps) {
    const int32_t to = count[t.in / block * outs + t.out]++;
    plan.offset[to] = window_offset(w, t.in, t.dh, t.dw);
    plan.slot[to] = t.slot;
  }
  join_panels(plan);
}

// False when the window is too large.
bool make_gather(GatherPlan& plan, const std::vector<Tap>& taps, int64_t ins, int64_t outs, int64_t step_h,
                 int64_t step_w, int64_t tile_pixels) {
  if (taps.empty() || plan.out_h <= 0 || plan.out_w <= 0) return true;
  Range dh, dw;
  std::set<int64_t> rows;  // a dilated kernel skips rows of its span
  for (const Tap& t : taps) {
    rows.insert(t.dh);
    dh.add(t.dh);
    dw.add(t.dw);
  }
  plan.window = make_window(ins, dh, dw, plan.out_w, step_h, step_w);
  if (!fits(plan.window)) return false;
  const int64_t pixels = rows.size() * ((tile_pixels - 1) * plan.window.step_w + dw.hi - dw.lo + 1);
  fill_lists(plan, taps, outs, block_channels(plan.window, pixels, outs, taps.size()));
  return true;
}

}  // namespace

int64_t GatherPlans::bytes() const {
  size_t total = 0;
  for (const GatherPlan& p : phases)
    total += (p.block_begin.size() + p.offset.size() + p.slot.size()) * sizeof(int32_t) +
             p.entries.size() * sizeof(RowEntry);
  return static_cast<int64_t>(total);
}

std::shared_ptr<const GatherPlans> fprop_plan(const ConvGeometry& g, const Structure& s,
                                              int64_t tile_pixels) {
  std::vector<Tap> taps;
  taps.reserve(s.nnz);
  for_nonzeros(g, s, [&](int64_t out, int64_t in, int64_t kh, int64_t kw, int32_t slot) {
    taps.push_back({static_cast<int32_t>(out), static_cast<int32_t>(in), slot, kh * g.dilation_h - g.pad_top,
                    kw * g.dilation_w - g.pad_left});
  });
  auto plans = std::make_shared<GatherPlans>();
  GatherPlan& plan = plans->phases.emplace_back();
  plan.out_h = g.out_h;
  plan.out_w = g.out_w;
  if (!make_gather(plan, taps, g.in_channels, g.out_channels, g.stride_h, g.stride_w, tile_pixels))
    return nullptr;
  return plans;
}

std::shared_ptr<const GatherPlans> dgrad_plan(const ConvGeometry& g, const Structure& s,
                                              int64_t tile_pixels) {
  auto plans = std::make_shared<GatherPlans>();
  for (int64_t ph = 0; ph < std::min(g.stride_h, g.in_h); ++ph)
    for (int64_t pw = 0; pw < std::min(g.stride_w, g.in_w); ++pw) {
      // dx row a * stride + ph receives from output row a + dh when kernel row kh meets it exactly.
      std::vector<Tap> taps;
      for_nonzeros(g, s, [&](int64_t out, int64_t in, int64_t kh, int64_t kw, int32_t slot) {
        const int64_t h = ph + g.pad_top - kh * g.dilation_h, w = pw + g.pad_left - kw * g.dilation_w;
        if (h % g.stride_h == 0 && w % g.stride_w == 0)
          taps.push_back(
              {static_cast<int32_t>(in), static_cast<int32_t>(out), slot, h / g.stride_h, w / g.stride_w});
      });
      GatherPlan plan;
      plan.out_h = ceil_div(g.in_h - ph, g.stride_h);
      plan.out_w = ceil_div(g.in_w - pw, g.stride_w);
      plan.first_h = ph;
      plan.first_w = pw;
      plan.every_h = g.stride_h;
      plan.every_w = g.stride_w;
      if (!make_gather(plan, taps, g.out_channels, g.in_channels, 1, 1, tile_pixels)) return nullptr;
      plans->phases.push_back(std::move(plan));
    }
  return plans;
}

std::shared_ptr<const WgradPlan> wgrad_plan(const ConvGeometry& g, const Structure& s) {
  auto plan = std::make_shared<WgradPlan>();
  if (s.nnz == 0 || g.out_h <= 0 || g.out_w <= 0) return plan;
  Range dh, dw;
  for_nonzeros(g, s, [&](int64_t, int64_t, int64_t kh, int64_t kw, int32_t) {
    dh.add(kh * g.dilation_h - g.pad_top);
    dw.add(kw * g.dilation_w - g.pad_left);
  });
  plan->window = make_window(g.in_channels, dh, dw, g.out_w, g.stride_h, g.stride_w);
  if (!fits(plan->window)) return nullptr;
  // Longer strips spread the cost of adding up over more positions; without a halo short ones waste nothing.
  const Window& w = plan->window;
  const int64_t tap_cols = dw.hi - dw.lo + 1, tap_rows = dh.hi - dh.lo + 1;
  plan->strip_pixels = tap_cols * tap_rows > 1 ? 32 : 16;
  plan->piece_cols = std::min(g.out_w, plan->strip_pixels);
  const int64_t rows = std::clamp<int64_t>(plan->strip_pixels / g.out_w, 1, g.out_h);
  const int64_t pixels =
      ((rows - 1) * g.stride_h + tap_rows) * ((plan->piece_cols - 1) * w.step_w + tap_cols);
  const int64_t block = block_channels(w, pixels, g.out_channels, s.nnz);
  plan->blocks = ceil_div(g.in_channels, block);
  plan->offset.resize(s.nnz);
  plan->list_begin.assign(g.out_channels * plan->blocks + 1, 0);
  for_nonzeros(g, s, [&](int64_t out, int64_t in, int64_t kh, int64_t kw, int32_t slot) {
    plan->offset[slot] = window_offset(w, in, kh * g.dilation_h - g.pad_top, kw * g.dilation_w - g.pad_left);
    ++plan->list_begin[out * plan->blocks + in / block + 1];
  });
  for (size_t i = 1; i < plan->list_begin.size(); ++i) plan->list_begin[i] += plan->list_begin[i - 1];
  plan->panel_rows = find_panels(s.crow.data(), plan->offset.data(), s.rows);
  return plan;
}

}  // namespace sparsekd
