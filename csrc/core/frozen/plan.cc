#include "core/frozen/plan.h"

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "core/error.h"

namespace sparsekd::frozen {
namespace {

constexpr int64_t kMostWaste = 12;  // part of a row that may be added to it
constexpr int64_t kLine = 64;
constexpr int64_t kMostMap = int64_t{64} << 20;  // bytes, of interleaved images

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

bool direct(const Window& w, const Shape& in, const Shape& out) {
  return w.stride[0] == 1 && w.stride[1] == 1 && in.same_pixels(out);
}

int64_t largest_map(const Network& network) {
  int64_t most = 0;
  for (const Node& node : network.nodes())
    most = std::max(most, node.shape.channels * (node.shape.height + 1) * (node.shape.width + 1));
  return most * static_cast<int64_t>(sizeof(float));
}

// Attention takes the tokens of an image as lanes.
bool interleaves(const Network& network) {
  return std::none_of(network.nodes().begin(), network.nodes().end(),
                      [](const Node& node) { return node.kind == Kind::kAttention; });
}

}  // namespace

Buffer::Buffer(int64_t floats) {
  // Neighbouring channels of a map are pages apart: with small pages every nonzero is a miss in the TLB.
  constexpr int64_t kHugePage = int64_t{1} << 21;
  int64_t bytes = round_up(std::max<int64_t>(floats * 4, 1), kLine);
  const int64_t page = bytes < kHugePage / 2 ? kLine : kHugePage;
  bytes = round_up(bytes, page);
  data_.reset(static_cast<float*>(std::aligned_alloc(page, bytes)));
  if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (page == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
  std::memset(data_.get(), 0, bytes);
}

void Buffer::Free::operator()(float* data) const { std::free(data); }

Plan::Plan(const Network& network, int64_t images)
    : network_(network), images_(images), unit_(images == kLanes && interleaves(network) ? kLanes : 1) {
  steps_.resize(network.nodes().size());
  choose_grids();
  choose_slots();
  make_lists();
  make_chains();
}

// Every height and width gets one grid, wide enough for all that read maps of that size.
void Plan::choose_grids() {
  struct Need {
    int64_t below = 0, right = 0;       // zeros after a column of pixels, after a row
    int64_t above = 0, left = 0;        // how far taps reach before the first pixel
    int64_t ahead_rows = 0, ahead = 0;  // and after the last
  };
  std::map<std::pair<int64_t, int64_t>, Need> needs;
  const auto& nodes = network_.nodes();
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    Need& own = needs[{node.shape.height, node.shape.width}];
    if (node.kind != Kind::kProduct) continue;
    const Window& w = node.window;
    const Shape& in = nodes[node.inputs[0]].shape;
    Phases& phases = steps_[i].phases;
    phases.direct = direct(w, in, node.shape);
    int64_t before[2], after[2];
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t reach = w.dilation[axis] * (w.kernel[axis] - 1);
      if (phases.direct) {
        before[axis] = w.padding[axis];
        after[axis] = reach - w.padding[axis];
        continue;
      }
      before[axis] = 0;
      after[axis] = reach / w.stride[axis];
      for (int64_t tap = 0; tap < w.kernel[axis]; ++tap)
        phases.count[axis] = std::max(phases.count[axis], tap * w.dilation[axis] % w.stride[axis] + 1);
    }
    own.below = std::max({own.below, before[0], after[0]});
    own.right = std::max({own.right, before[1], after[1]});
    own.above = std::max(own.above, before[0]);
    own.left = std::max(own.left, before[1]);
    own.ahead_rows = std::max(own.ahead_rows, after[0]);
    own.ahead = std::max(own.ahead, after[1]);
  }
  std::map<std::pair<int64_t, int64_t>, int32_t> numbers;
  for (const auto& [size, need] : needs) {
    Grid grid{};
    grid.height = size.first;
    grid.width = size.second;
    grid.stride = (grid.width + need.right) * unit_;
    grid.rows = grid.height + need.below;
    // Rows that begin at vectors leave fewer pieces to pack, see Piece.
    const int64_t rounded = round_up(grid.stride, kLanes);
    if (need.above + need.ahead_rows > 0 && (rounded - grid.stride) * kMostWaste <= grid.stride)
      grid.stride = rounded;
    grid.lead = round_up(need.above * grid.stride + need.left * unit_, kLanes);
    const int64_t pixels = grid.image(planes() - 1) + (grid.height - 1) * grid.stride + grid.width * unit_;
    grid.vectors = round_up(pixels, kLanes) / kLanes;
    const int64_t end = grid.lead + std::max(grid.vectors * kLanes, grid.image(planes())) +
                        need.ahead_rows * grid.stride + need.ahead * unit_;
    // An odd number of cache lines: channels then spread over all sets of the caches.
    grid.length = (round_up(end, kLanes) / kLanes | 1) * kLanes;
    grid.inside.assign(grid.vectors * kLanes, 0);
    for (int64_t n = 0; n < planes(); ++n)
      for (int64_t y = 0; y < grid.height; ++y)
        std::fill_n(grid.inside.begin() + grid.image(n) + y * grid.stride, grid.width * unit_, -1);
    numbers[size] = static_cast<int32_t>(grids_.size());
    grids_.push_back(std::move(grid));
  }
  for (size_t i = 0; i < nodes.size(); ++i)
    steps_[i].grid = numbers[{nodes[i].shape.height, nodes[i].shape.width}];
}

// A map keeps its memory until its last reader has run. Maps of one grid take turns in a slot, so that what
// lies between pixels stays zero; copies of phases, which fill it, have slots of their own.
void Plan::choose_slots() {
  const auto& nodes = network_.nodes();
  const size_t count = nodes.size();
  std::vector<size_t> last(count, 0);
  for (size_t i = 0; i < count; ++i) {
    last[i] = std::max(last[i], i);
    for (const int32_t input : nodes[i].inputs) last[input] = i;
  }
  for (const int32_t output : network_.outputs()) last[output] = count;
  std::map<std::pair<int32_t, bool>, std::vector<int32_t>> idle;
  const auto take = [&](int32_t grid, bool copy, int64_t channels) {
    auto& slots = idle[{grid, copy}];
    if (slots.empty()) {
      slots_.push_back({grid, 0, 0});
      slots.push_back(static_cast<int32_t>(slots_.size()) - 1);
    }
    const int32_t slot = slots.back();
    slots.pop_back();
    slots_[slot].channels = std::max(slots_[slot].channels, channels);
    if (slots_[slot].channels * grids_[grid].length >= int64_t{1} << 31)
      throw ShapeError("network: a map of " + std::to_string(images_) + " images is too large");
    return slot;
  };
  for (size_t i = 0; i < count; ++i) {
    Step& step = steps_[i];
    step.slot = take(step.grid, false, nodes[i].shape.channels);
    if (nodes[i].kind == Kind::kProduct && !step.phases.direct) {
      const int64_t channels = nodes[nodes[i].inputs[0]].shape.channels;
      step.phases.slot = take(step.grid, true, channels * step.phases.count[0] * step.phases.count[1]);
      idle[{step.grid, true}].push_back(step.phases.slot);
    }
    for (size_t j = 0; j <= i; ++j)
      if (last[j] == i) idle[{steps_[j].grid, false}].push_back(steps_[j].slot);
  }
  for (Slot& slot : slots_) {
    slot.first = workspace_length_;
    workspace_length_ += slot.channels * grids_[slot.grid].length + kLanes;
  }
}

// Whether the node after the chain, whose lists have `words`, runs with it.
bool Plan::joins(const Chain& chain, int64_t words) const {
  if (chain.last == steps_.size()) return false;
  const Node& node = network_.nodes()[chain.last];
  const Step &step = steps_[chain.last], &first = steps_[chain.first];
  if (node.kind != Kind::kProduct || !step.phases.direct) return false;
  if ((words + step.words) * 4 > cache_sizes().l2 / 4) return false;
  if (step.tiles == 1 || step.grid != first.grid || step.tiles != first.tiles) return false;
  const int64_t channels = node.shape.channels + network_.nodes()[node.inputs[0]].shape.channels;
  return channels * grids_[step.grid].length * 4 > cache_sizes().l2 / 2;
}

// A map is worth reading back soon if it and the one before would fill half of L2. Every lag is the least
// that is right: after the producers of what a node reads, as far ahead as its taps reach, and after those
// who read what lies in its slot, as far back as theirs do.
void Plan::make_chains() {
  const auto& nodes = network_.nodes();
  for (size_t i = 0; i < nodes.size();) {
    Chain chain{i, i, {}};
    int64_t words = 0;
    for (; joins(chain, words); ++chain.last) {
      const Node& node = nodes[chain.last];
      const Step& step = steps_[chain.last];
      words += step.words;
      const int64_t tile = grids_[step.grid].vectors / step.tiles * kLanes;  // the narrowest
      const auto tiles = [&](int64_t pixels) { return (pixels + tile - 1) / tile; };
      int64_t lag = 0;
      for (size_t k = 0; k < chain.lag.size(); ++k) {
        const auto before = static_cast<int32_t>(chain.first + k);
        for (size_t j = 0; j < node.inputs.size(); ++j)
          if (node.inputs[j] == before) lag = std::max(lag, chain.lag[k] + (j ? 0 : tiles(step.after)));
        for (size_t j = 0; j < nodes[before].inputs.size(); ++j)
          if (steps_[nodes[before].inputs[j]].slot == step.slot)
            lag = std::max(lag, chain.lag[k] + (j ? 0 : tiles(steps_[before].before)));
        if (steps_[before].slot == step.slot) lag = std::max(lag, chain.lag[k]);
      }
      chain.lag.push_back(lag);
    }
    i = std::max(chain.last, i + 1);
    if (chain.lag.size() > 1) chains_.push_back(std::move(chain));
  }
}

std::shared_ptr<Workspace> Plan::workspace() const {
  std::unique_ptr<Workspace> found;
  {
    const std::lock_guard<std::mutex> hold(lock_);
    if (!free_.empty()) {
      found = std::move(free_.back());
      free_.pop_back();
    }
  }
  if (!found) found = std::make_unique<Workspace>(workspace_length_);
  return {found.release(), [this](Workspace* used) {
            const std::lock_guard<std::mutex> hold(lock_);
            free_.emplace_back(used);
          }};
}

int64_t best_group(const Network& network, int64_t batch, int threads) {
  if (interleaves(network) && batch >= kLanes * threads && kLanes * largest_map(network) <= kMostMap)
    return kLanes;
  const int64_t fit = cache_sizes().l2 / (2 * largest_map(network));
  return std::clamp<int64_t>(std::min<int64_t>(fit, 16), 1, std::max<int64_t>(1, batch / threads));
}

}  // namespace sparsekd::frozen
