#include "core/frozen/plan.h"

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

constexpr int64_t kTileVectors = 12;
constexpr int64_t kRowParts = 8;

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
  const size_t bytes = static_cast<size_t>(round_up(floats * sizeof(float), 64));
  data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
}

void Buffer::Free::operator()(float* data) const { std::free(data); }

Plan::Plan(const Network& network, int64_t images) : network_(network), images_(images) {
  steps_.resize(network.nodes().size());
  choose_grids();
  choose_slots();
  for (size_t i = 0; i < steps_.size(); ++i)
    if (network.nodes()[i].kind == Kind::kProduct) make_lists(network.nodes()[i], steps_[i]);
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
      slots_.push_back({grid, 0});
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
}

void Plan::make_lists(const Node& node, Step& step) const {
  const Window& w = node.window;
  const Shape& in = network_.nodes()[node.inputs[0]].shape;
  const Grid& grid = grids_[step.grid];
  const int64_t rows = node.shape.channels, group_rows = rows / w.groups,
                group_channels = in.channels / w.groups;
  const int64_t taps = w.kernel[0] * w.kernel[1];
  const auto distance = [&](int64_t channel, int64_t y, int64_t x) {
    y *= w.dilation[0];
    x *= w.dilation[1];
    if (step.phases.direct)
      return channel * grid.length + (y - w.padding[0]) * grid.stride + x - w.padding[1];
    channel = (channel * step.phases.count[0] + y % w.stride[0]) * step.phases.count[1] + x % w.stride[1];
    return channel * grid.length + y / w.stride[0] * grid.stride + x / w.stride[1];
  };
  step.bias = node.bias.empty() ? std::vector<float>(rows, 0.0f) : node.bias;
  step.offset.reserve(node.col.size());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r / group_rows * group_channels;
    for (int32_t k = node.crow[r]; k < node.crow[r + 1]; ++k) {
      const int64_t tap = node.col[k] % taps;
      step.offset.push_back(
          static_cast<int32_t>(distance(first + node.col[k] / taps, tap / w.kernel[1], tap % w.kernel[1])));
    }
  }
  step.panel_rows = find_panels(node.crow.data(), step.offset.data(), rows);
  const int64_t bytes = in.channels * kLanes * static_cast<int64_t>(sizeof(float));  // of a vector
  const int64_t most = std::clamp<int64_t>(cache_sizes().l2 / 2 / bytes, 4, kTileVectors);
  step.tiles = (grid.vectors + most - 1) / most;
  const int64_t nnz = static_cast<int64_t>(node.values.size());
  for (int64_t part = 0; part <= kRowParts; ++part) {
    const auto at = std::lower_bound(node.crow.begin(), node.crow.end(), nnz * part / kRowParts);
    step.row_cuts.push_back(panel_cut(std::min<int64_t>(at - node.crow.begin(), rows), rows));
  }
  step.row_cuts.front() = 0;
  step.row_cuts.back() = rows;
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
  if (!found) {
    found = std::make_unique<Workspace>();
    for (const Slot& slot : slots_) found->emplace_back(slot.channels * grids_[slot.grid].length + kLanes);
  }
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
