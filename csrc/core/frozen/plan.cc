#include "core/frozen/plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/panels.h"

namespace sparsekd::frozen {
namespace {

constexpr int64_t kLeastTile = 4, kMostTile = 8, kMostPanelTile = 12;  // vectors
constexpr int64_t kWorthPacking = 8;                                   // loads of a column by single rows
constexpr int64_t kMostWaste = 12;  // part of a row that may be added to it
constexpr int64_t kParts = 8;
constexpr int64_t kLine = 64;

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

Plan::Plan(const Network& network, int64_t images) : network_(network), images_(images) {
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
    grid.stride = grid.width + need.right;
    grid.rows = grid.height + need.below;
    // Rows that begin at vectors leave fewer pieces to pack, see Piece.
    const int64_t rounded = round_up(grid.stride, kLanes);
    if (need.above + need.ahead_rows > 0 && (rounded - grid.stride) * kMostWaste <= grid.stride)
      grid.stride = rounded;
    grid.lead = round_up(need.above * grid.stride + need.left, kLanes);
    const int64_t pixels = grid.image(images_ - 1) + (grid.height - 1) * grid.stride + grid.width;
    grid.vectors = round_up(pixels, kLanes) / kLanes;
    const int64_t end = grid.lead + std::max(grid.vectors * kLanes, grid.image(images_)) +
                        need.ahead_rows * grid.stride + need.ahead;
    // An odd number of cache lines: channels then spread over all sets of the caches.
    grid.length = (round_up(end, kLanes) / kLanes | 1) * kLanes;
    grid.inside.assign(grid.vectors * kLanes, 0);
    for (int64_t n = 0; n < images_; ++n)
      for (int64_t y = 0; y < grid.height; ++y)
        std::fill_n(grid.inside.begin() + grid.image(n) + y * grid.stride, grid.width, -1);
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

// Of every tap how far from the first pixel of a channel the first output reads.
std::vector<int64_t> Plan::taps(const Node& node, const Step& step) const {
  const Window& w = node.window;
  const Grid& grid = grids_[step.grid];
  std::vector<int64_t> taps;
  for (int64_t y = 0; y < w.kernel[0] * w.dilation[0]; y += w.dilation[0])
    for (int64_t x = 0; x < w.kernel[1] * w.dilation[1]; x += w.dilation[1]) {
      if (step.phases.direct) {
        taps.push_back((y - w.padding[0]) * grid.stride + x - w.padding[1]);
        continue;
      }
      const int64_t phase = y % w.stride[0] * step.phases.count[1] + x % w.stride[1];
      taps.push_back(phase * grid.length + y / w.stride[0] * grid.stride + x / w.stride[1]);
    }
  return taps;
}

// Chooses tiles, and whether they are packed; fills panels, and the offsets of all nonzeros.
void Plan::make_panels(const Node& node, Step& step, std::vector<int32_t>& offsets) const {
  const int64_t channels = network_.nodes()[node.inputs[0]].shape.channels;
  const int64_t rows = node.shape.channels, group_rows = rows / node.window.groups;
  const int64_t vectors = grids_[step.grid].vectors, room = cache_sizes().l2 / 3;
  const std::vector<int64_t> distance = taps(node, step);
  const auto count = static_cast<int64_t>(distance.size());
  step.before = std::max<int64_t>(0, -*std::min_element(distance.begin(), distance.end()));
  step.after = std::max<int64_t>(0, *std::max_element(distance.begin(), distance.end()));
  step.map_step = grids_[step.grid].length * step.phases.count[0] * step.phases.count[1];
  const auto write = [&](const std::vector<int64_t>& tap, int64_t channel_step) {
    offsets.clear();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = r / group_rows * (channels / node.window.groups);
      for (int32_t k = node.crow[r]; k < node.crow[r + 1]; ++k)
        offsets.push_back(
            static_cast<int32_t>((first + node.col[k] / count) * channel_step + tap[node.col[k] % count]));
    }
  };
  const auto cut = [&](int64_t bytes, int64_t most) {
    step.tiles = (vectors - 1) / std::clamp<int64_t>(room / bytes, kLeastTile, most) + 1;
    step.width = (vectors - 1) / step.tiles + 1;
  };
  write(distance, step.map_step);
  const std::vector<uint8_t> panel_rows = find_panels(node.crow.data(), offsets.data(), rows);
  int64_t loads = 0;
  for (int32_t r = 0; r < rows; r += panel_rows[r]) {
    step.panels.push_back({r, panel_rows[r], 0, node.crow[r + 1] - node.crow[r]});
    if (panel_rows[r] == 1) loads += step.panels.back().count;
  }
  const bool shared = loads * 2 < static_cast<int64_t>(node.values.size());  // few inputs for many sums
  cut(channels * kLine, shared ? kMostPanelTile : kMostTile);
  if (loads < kWorthPacking * channels * count ||
      channels * count * kLeastTile * kLine > 2 * cache_sizes().l2 ||
      std::all_of(distance.begin(), distance.end(), [](int64_t d) { return d % kLanes == 0; }))
    return;
  cut(channels * count * kLine, kMostTile);
  // Taps at the same place within a vector share a piece, unless a whole tile lies between them.
  std::map<int64_t, std::vector<int64_t>> places;
  for (int64_t t = 0; t < count; ++t) places[(distance[t] % kLanes + kLanes) % kLanes].push_back(t);
  std::vector<int64_t> packed(count);
  for (auto& [shift, taps] : places) {
    std::sort(taps.begin(), taps.end(), [&](int64_t a, int64_t b) { return distance[a] < distance[b]; });
    Piece piece{};
    const auto close = [&] {
      step.packed_step += (step.width + piece.vectors) * kLanes;
      step.pieces.push_back(piece);
    };
    for (const int64_t t : taps) {
      const bool first = t == taps.front();
      if (!first && distance[t] - piece.from >= (step.width + piece.vectors) * kLanes) close();
      if (first || piece.to != step.packed_step) piece = {distance[t], step.packed_step, 0};
      piece.vectors = (distance[t] - piece.from) / kLanes;
      packed[t] = piece.to + distance[t] - piece.from;
    }
    close();
  }
  write(packed, step.packed_step);
}

// One list for all products, in the order in which they run.
void Plan::make_lists() {
  const auto& nodes = network_.nodes();
  std::vector<std::vector<int32_t>> offsets(nodes.size());
  int64_t words = 0;
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].kind != Kind::kProduct) continue;
    Step& step = steps_[i];
    step.bias = nodes[i].bias.empty() ? std::vector<float>(nodes[i].shape.channels, 0.0f) : nodes[i].bias;
    make_panels(nodes[i], step, offsets[i]);
    std::stable_sort(step.panels.begin(), step.panels.end(),
                     [](const Panel& a, const Panel& b) { return a.rows > b.rows; });
    const auto count = static_cast<int64_t>(step.panels.size());
    const auto nnz = static_cast<int64_t>(nodes[i].values.size());
    int64_t done = 0;
    for (int64_t k = 0; k < count; ++k) {
      Panel& panel = step.panels[k];
      while (done * kParts >= nnz * static_cast<int64_t>(step.cuts.size()) &&
             static_cast<int64_t>(step.cuts.size()) < kParts)
        step.cuts.push_back(k);
      panel.first = words;
      words += panel.count * (1 + panel.rows);
      step.words += panel.count * (1 + panel.rows);
      done += panel.count * panel.rows;
    }
    step.cuts.resize(kParts + 1, count);
  }
  list_ = Buffer(words);
  for (size_t i = 0; i < nodes.size(); ++i)
    for (const Panel& panel : steps_[i].panels) {
      const int32_t first = nodes[i].crow[panel.row];
      float* word = list_.data() + panel.first;
      for (int64_t k = 0; k < panel.count; ++k) {
        std::memcpy(word++, &offsets[i][first + k], sizeof(float));
        for (int32_t r = 0; r < panel.rows; ++r) *word++ = nodes[i].values[first + r * panel.count + k];
      }
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
  const int64_t fit = cache_sizes().l2 / (2 * largest_map(network));
  return std::clamp<int64_t>(std::min<int64_t>(fit, 16), 1, std::max<int64_t>(1, batch / threads));
}

}  // namespace sparsekd::frozen
