// What a topology becomes for one input size: lists of offsets in the order in which the engine reads them.
//
// An axis of the window keeps only the positions that some output reads, so that neither a long stride nor
// dilation makes it large. Every nonzero then is one byte offset from where its output begins to read.
// Offsets are sorted by block of input channels, then by output channel, by counting. A block has as many
// channels as fit 5/6 of L1 with the pixels that a tile reads of them, and more where lists would be too
// short to pay for loading and storing their sums. For dgrad input and output
// channels swap, taps change sign, and each phase of the stride gets its own lists. Neighbouring channels
// whose lists in a block are equal become a panel.
//
// Planning takes linear time, about as long as the product itself, so plans are cached (plan_cache.h).
// Tests: test_far_reach (border_tests.cc) checks that windows and phases hold no more than is read,
// test_enormous_views (core_tests.cc) that sizes do not overflow, panel_tests.cc the panels.
#include "core/conv/plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/conv/window.h"
#include "core/cpu.h"

namespace sparsekd {
namespace {

// A nonzero, and where in the kernel it stands: its `place`, row-major.
struct Tap {
  int32_t out, in, slot, place;
};

// What a place in the kernel reads: the input at the first output plus this, or nothing but padding.
struct Shift {
  int64_t dh, dw;
  bool reaches;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls visit(out channel, in channel, place, slot) for every nonzero in order.
template <class F>
void for_nonzeros(const ConvGeometry& g, const Structure& s, F visit) {
  const int32_t area = static_cast<int32_t>(g.kernel_h * g.kernel_w);
  const int64_t outs = g.out_channels / g.groups, ins = g.in_channels / g.groups;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int32_t out = static_cast<int32_t>(row), group = static_cast<int32_t>(row / outs * ins);
    for (int32_t k = s.crow[row]; k < s.crow[row + 1]; ++k) {
      const int32_t channel = s.col[k] / area;
      visit(out, group + channel, s.col[k] - channel * area, k);
    }
  }
}

void add_places(const std::vector<Shift>& shifts, const std::vector<bool>& used, Reach* dh, Reach* dw) {
  for (size_t p = 0; p < shifts.size(); ++p)
    if (used[p]) dh->add(shifts[p].dh), dw->add(shifts[p].dw);
}

// Whether output * stride + tap lies in [0, inputs) for some output in [0, outputs).
bool meets(int64_t tap, int64_t stride, int64_t outputs, int64_t inputs) {
  const int64_t first = tap < 0 ? ceil_div(-tap, stride) : 0;
  return first < outputs && first * stride + tap < inputs;
}

std::vector<bool> used_places(const std::vector<Tap>& taps, const std::vector<Shift>& shifts) {
  std::vector<bool> used(shifts.size(), false);
  for (const Tap& t : taps) used[t.place] = true;
  return used;
}

// Where the taps of every place that is used lie in a window, in the first channel.
std::vector<int64_t> place_offsets(const Window& w, const std::vector<Shift>& shifts,
                                   const std::vector<bool>& used) {
  std::vector<int64_t> offsets(shifts.size(), 0);
  for (size_t p = 0; p < shifts.size(); ++p)
    if (used[p])
      offsets[p] = (w.rows.position(shifts[p].dh) * w.channels * w.pitch + w.cols.position(shifts[p].dw)) *
                   kPixelBytes;
  return offsets;
}

// Nonzeros below which a list costs more in loading and storing its accumulators than inputs in L1 save.
constexpr int64_t kShortestList = 16;
// The same for the weight gradient, in multiply-adds, since a list costs as much for a short strip: two full
// groups of sample.inl over 32 positions.
constexpr int64_t kShortestSum = 2 * 10 * 32;

// Input channels to a block: the `pixels` of each channel that a tile of outputs reads should stay in L1, but
// lists should not average less than `shortest`.
int64_t block_channels(const Window& w, int64_t pixels, int64_t outs, int64_t taps,
                       int64_t shortest = kShortestList) {
  if (taps == 0) return w.channels;
  const int64_t in_l1 = cache_sizes().l1d * 5 / 6 / (pixels * kPixelBytes);
  return std::max({int64_t{1}, in_l1, ceil_div(shortest * w.channels * outs, taps)});
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
void fill_lists(GatherPlan& plan, const std::vector<Tap>& taps, const std::vector<int64_t>& offsets,
                int64_t outs, int64_t block) {
  const Window& w = plan.window;
  plan.out_channels = outs;
  const int64_t blocks = ceil_div(w.channels, block), channel_bytes = w.pitch * kPixelBytes;
  std::vector<int64_t> first(w.channels);  // list of output 0 in the channel's block
  for (int64_t c = 0; c < w.channels; ++c) first[c] = c / block * outs;
  std::vector<int32_t> count(blocks * outs + 1, 0);
  for (const Tap& t : taps) ++count[first[t.in] + t.out + 1];
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
    const int32_t to = count[first[t.in] + t.out]++;
    plan.offset[to] = static_cast<int32_t>(offsets[t.place] + t.in * channel_bytes);
    plan.slot[to] = t.slot;
  }
  join_panels(plan);
}

// Makes the lists of outputs whose window is there.
void fill_plan(GatherPlan& plan, const std::vector<Tap>& taps, const std::vector<Shift>& shifts, int64_t outs,
               TileShape tile) {
  const WindowAxis &down = plan.window.rows, &cols = plan.window.cols;
  const std::vector<bool> used = used_places(taps, shifts);
  std::set<int64_t> rows;  // a dilated kernel skips rows of its span
  for (size_t p = 0; p < shifts.size(); ++p)
    for (int64_t r = 0; used[p] && r < tile.rows; ++r)
      rows.insert(down.position(shifts[p].dh) + r * down.step);
  const int64_t pixels = rows.size() * ((tile.cols - 1) * cols.step + cols.span);
  fill_lists(plan, taps, place_offsets(plan.window, shifts, used), outs,
             block_channels(plan.window, pixels, outs, taps.size()));
}

// Adds the plan of outputs that have taps; false when its window is too large.
bool add_gather(GatherPlans& plans, GatherPlan plan, const std::vector<Tap>& taps,
                const std::vector<Shift>& shifts, int64_t ins, int64_t outs, int64_t stride_h,
                int64_t stride_w, TileShape tile) {
  Reach dh, dw;
  add_places(shifts, used_places(taps, shifts), &dh, &dw);
  plan.window =
      make_window(ins, make_axis(dh, plan.out_h, stride_h), make_axis(dw, plan.out_w, stride_w), plan.out_w);
  if (!fits(plan.window)) return false;
  fill_plan(plan, taps, shifts, outs, tile);
  plans.phases.push_back(std::move(plan));
  return true;
}

// What every place of the kernel reads of the input.
std::vector<Shift> input_shifts(const ConvGeometry& g) {
  std::vector<Shift> shifts;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh)
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t dh = kh * g.dilation_h - g.pad_top, dw = kw * g.dilation_w - g.pad_left;
      shifts.push_back(
          {dh, dw, meets(dh, g.stride_h, g.out_h, g.in_h) && meets(dw, g.stride_w, g.out_w, g.in_w)});
    }
  return shifts;
}

int64_t phase_size(int64_t phase, int64_t size, int64_t stride) {
  return phase < size ? ceil_div(size - phase, stride) : 0;
}

// The inputs that the outputs of a strided convolution reach, by phase, and the taps by which they do: dx
// row a * stride + phase receives from output row a + dh when kernel row kh meets it exactly. A long stride
// has many phases, but a place in the kernel is in one of them only, and a phase without taps has no entry.
struct Phases {
  std::vector<Shift> shifts;
  std::map<std::pair<int64_t, int64_t>, std::vector<Tap>> taps;
};

Phases find_phases(const ConvGeometry& g, const Structure& s) {
  Phases phases;
  const auto phase_of = [](int64_t at, int64_t stride) { return (at % stride + stride) % stride; };
  std::map<std::pair<int64_t, int64_t>, std::vector<Tap>> found;
  std::vector<std::vector<Tap>*> list;  // of each place
  for (int64_t kh = 0; kh < g.kernel_h; ++kh)
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t at_h = kh * g.dilation_h - g.pad_top, at_w = kw * g.dilation_w - g.pad_left;
      const int64_t ph = phase_of(at_h, g.stride_h), pw = phase_of(at_w, g.stride_w);
      const int64_t dh = (ph - at_h) / g.stride_h, dw = (pw - at_w) / g.stride_w;
      phases.shifts.push_back({dh, dw,
                               meets(dh, 1, phase_size(ph, g.in_h, g.stride_h), g.out_h) &&
                                   meets(dw, 1, phase_size(pw, g.in_w, g.stride_w), g.out_w)});
      list.push_back(&found[{ph, pw}]);
    }
  if (found.size() == 1) list[0]->reserve(s.nnz);
  for_nonzeros(g, s, [&](int32_t out, int32_t in, int32_t place, int32_t slot) {
    if (phases.shifts[place].reaches) list[place]->push_back({in, out, slot, place});
  });
  for (auto& [phase, taps] : found)
    if (!taps.empty()) phases.taps.emplace(phase, std::move(taps));
  return phases;
}

GatherPlan phase_plan(const ConvGeometry& g, std::pair<int64_t, int64_t> phase) {
  GatherPlan plan;
  plan.first_h = phase.first;
  plan.first_w = phase.second;
  plan.out_h = phase_size(plan.first_h, g.in_h, g.stride_h);
  plan.out_w = phase_size(plan.first_w, g.in_w, g.stride_w);
  plan.every_h = g.stride_h;
  plan.every_w = g.stride_w;
  return plan;
}

}  // namespace

PlanKey plan_key(Pass pass, const ConvGeometry& g, TileShape tile) {
  return {static_cast<int64_t>(pass),
          tile.rows,
          tile.cols,
          g.in_channels,
          g.in_h,
          g.in_w,
          g.kernel_h,
          g.kernel_w,
          g.stride_h,
          g.stride_w,
          g.pad_top,
          g.pad_bottom,
          g.pad_left,
          g.pad_right,
          g.dilation_h,
          g.dilation_w,
          g.groups};
}

int64_t GatherPlans::bytes() const {
  size_t total = 0;
  for (const GatherPlan& p : phases)
    total += (p.block_begin.size() + p.offset.size() + p.slot.size()) * sizeof(int32_t) +
             p.entries.size() * sizeof(RowEntry);
  return static_cast<int64_t>(total);
}

std::shared_ptr<const GatherPlans> fprop_plan(const ConvGeometry& g, const Structure& s, TileShape tile) {
  const std::vector<Shift> shifts = input_shifts(g);
  std::vector<Tap> taps;
  taps.reserve(s.nnz);
  for_nonzeros(g, s, [&](int32_t out, int32_t in, int32_t place, int32_t slot) {
    if (shifts[place].reaches) taps.push_back({out, in, slot, place});
  });
  auto plans = std::make_shared<GatherPlans>();
  plans->covers = !taps.empty();
  GatherPlan plan;
  plan.out_h = g.out_h;
  plan.out_w = g.out_w;
  if (plans->covers && !add_gather(*plans, std::move(plan), taps, shifts, g.in_channels, g.out_channels,
                                   g.stride_h, g.stride_w, tile))
    return nullptr;
  return plans;
}

std::shared_ptr<const GatherPlans> dgrad_plan(const ConvGeometry& g, const Structure& s, TileShape tile) {
  const Phases phases = find_phases(g, s);
  auto plans = std::make_shared<GatherPlans>();
  plans->covers =
      static_cast<int64_t>(phases.taps.size()) == std::min(g.stride_h, g.in_h) * std::min(g.stride_w, g.in_w);
  for (const auto& [phase, taps] : phases.taps)
    if (!add_gather(*plans, phase_plan(g, phase), taps, phases.shifts, g.out_channels, g.in_channels, 1, 1,
                    tile))
      return nullptr;
  return plans;
}

std::shared_ptr<const WgradPlan> wgrad_plan(const ConvGeometry& g, const Structure& s) {
  auto plan = std::make_shared<WgradPlan>();
  const std::vector<Shift> shifts = input_shifts(g);
  std::vector<bool> used(shifts.size(), false);
  for_nonzeros(g, s, [&](int32_t, int32_t, int32_t place, int32_t slot) {
    used[place] = shifts[place].reaches;
    if (!used[place]) plan->outside.push_back(slot);
  });
  Reach dh, dw;
  add_places(shifts, used, &dh, &dw);
  if (dh.empty) return plan;
  plan->window = make_window(g.in_channels, make_axis(dh, g.out_h, g.stride_h),
                             make_axis(dw, g.out_w, g.stride_w), g.out_w);
  if (!fits(plan->window)) return nullptr;
  // Longer strips spread the cost of adding up over more positions; without a halo short ones waste nothing.
  const Window& w = plan->window;
  plan->strip_pixels = w.cols.span * w.rows.span > 1 ? 32 : 16;
  plan->piece_cols = std::min(g.out_w, plan->strip_pixels);
  const int64_t rows = std::clamp<int64_t>(plan->strip_pixels / g.out_w, 1, g.out_h);
  const int64_t pixels =
      ((rows - 1) * w.rows.step + w.rows.span) * ((plan->piece_cols - 1) * w.cols.step + w.cols.span);
  const int64_t shortest = ceil_div(kShortestSum, rows * plan->piece_cols);
  const int64_t block = block_channels(w, pixels, g.out_channels, s.nnz, shortest);
  plan->blocks = ceil_div(g.in_channels, block);
  plan->offset.resize(s.nnz);
  plan->list_begin.assign(g.out_channels * plan->blocks + 1, 0);
  // A place that meets nothing but padding stands for the first: what its nonzeros sum up is not kept.
  const std::vector<int64_t> offsets = place_offsets(w, shifts, used);
  const int64_t channel_bytes = w.pitch * kPixelBytes;
  for_nonzeros(g, s, [&](int32_t out, int32_t in, int32_t place, int32_t slot) {
    plan->offset[slot] = static_cast<int32_t>(offsets[place] + in * channel_bytes);
    ++plan->list_begin[out * plan->blocks + in / block + 1];
  });
  for (size_t i = 1; i < plan->list_begin.size(); ++i) plan->list_begin[i] += plan->list_begin[i - 1];
  plan->panel_rows = find_panels(s.crow.data(), plan->offset.data(), s.rows);
  return plan;
}

std::shared_ptr<const BackwardPlan> backward_plan(const ConvGeometry& g, const Structure& s, TileShape tile,
                                                  bool compact) {
  auto plan = std::make_shared<BackwardPlan>();
  plan->wgrad = wgrad_plan(g, s);
  if (!plan->wgrad) return nullptr;
  const Phases phases = find_phases(g, s);
  Reach dh, dw;  // of all phases; the weight gradient needs the outputs themselves
  dh.add(0);
  dw.add(0);
  for (const auto& [phase, taps] : phases.taps)
    add_places(phases.shifts, used_places(taps, phases.shifts), &dh, &dw);
  const auto axis = [](const Reach& reach) {
    WindowAxis a;
    a.lo = reach.lo;
    a.span = reach.hi - reach.lo + 1;
    return a;
  };
  const int64_t widest = std::max(g.out_w, phase_size(0, g.in_w, g.stride_w));
  plan->grad = make_window(g.out_channels, axis(dh), axis(dw), widest);
  if (!fits(plan->grad)) return nullptr;
  const int64_t rows = compact ? 1 : std::min(g.stride_h, g.in_h),
                cols = compact ? 1 : std::min(g.stride_w, g.in_w);
  for (int64_t ph = 0; ph < rows; ++ph)
    for (int64_t pw = 0; pw < cols; ++pw) {
      GatherPlan phase = phase_plan(g, {ph, pw});
      if (compact) phase.every_h = phase.every_w = 1;
      phase.window = plan->grad;
      const auto taps = phases.taps.find({ph, pw});
      fill_plan(phase, taps == phases.taps.end() ? std::vector<Tap>{} : taps->second, phases.shifts,
                g.in_channels, tile);
      plan->dgrad.phases.push_back(std::move(phase));
    }
  return plan;
}

}  // namespace sparsekd
