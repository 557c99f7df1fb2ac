// Each product of a plan as lists: tiles of pixels, blocks of channels, and the nonzeros of a row as
// distances.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "core/frozen/plan.h"
#include "core/panels.h"

namespace sparsekd::frozen {
namespace {

constexpr int64_t kLeastTile = 4, kMostTile = 8, kMostPanelTile = 12;  // vectors
constexpr int64_t kWorthPacking = 8;                                   // loads of a column by single rows
constexpr int64_t kLeastList = 12;  // nonzeros of a row, on average, in a block of channels
constexpr int64_t kLine = 64;

// Cache lines of a channel that a tile reads.
int64_t lines_read(const std::vector<int64_t>& distance, const Step& step) {
  std::set<int64_t> lines;
  for (const int64_t d : distance)
    for (int64_t line = d; line < d + step.width * kLanes; line += kLanes)
      lines.insert((line + step.map_step) / kLanes);
  return static_cast<int64_t>(lines.size());
}

// How many channels of the input, of which a tile reads `bytes` each, make a block: as many as fit L1, or
// more if lists would get too short for what a row costs besides them.
int64_t block_of(const Node& node, int64_t channels, int64_t bytes) {
  if (node.window.groups > 1) return channels;
  const int64_t nnz = std::max<int64_t>(1, node.crow.back());
  const int64_t fit = cache_sizes().l1d * 3 / 4 / bytes;
  const int64_t least = (kLeastList * channels * node.shape.channels + nnz - 1) / nnz;
  const int64_t blocks = std::max<int64_t>(1, channels / std::max(fit, least));
  return (channels + blocks - 1) / blocks;
}

// Whether an image of one pixel is computed from codes, see FrozenEngine::dots: fetching lists is most of it.
bool takes_codes(const Node& node, const Shape& in, const Step& step) {
  const Window& w = node.window;
  return !node.codes.empty() && in.pixels() == 1 && w.kernel[0] * w.kernel[1] == 1 && w.groups == 1 &&
         node.shape.pixels() == 1 && in.channels <= kMostCoded &&
         std::all_of(step.panels.begin(), step.panels.end(), [](const Panel& p) { return p.rows == 1; });
}

// Where kParts parts of panels begin, and the last ends, that have equally many of `nnz` nonzeros.
std::vector<const Panel*> equal_parts(const std::vector<Panel>& panels, int64_t nnz) {
  std::vector<const Panel*> parts{panels.data()};
  int64_t done = 0;
  for (const Panel& panel : panels) {
    while (done * kParts >= nnz * static_cast<int64_t>(parts.size()) && parts.size() < kParts)
      parts.push_back(&panel);
    done += panel.count * panel.rows;
  }
  parts.resize(kParts + 1, panels.data() + panels.size());
  return parts;
}

}  // namespace

// Of every tap how far from the first pixel of a channel the first output reads.
std::vector<int64_t> Plan::taps(const Node& node, const Step& step) const {
  const Window& w = node.window;
  const Grid& grid = grids_[step.grid];
  std::vector<int64_t> taps;
  for (int64_t y = 0; y < w.kernel[0] * w.dilation[0]; y += w.dilation[0])
    for (int64_t x = 0; x < w.kernel[1] * w.dilation[1]; x += w.dilation[1]) {
      if (step.phases.direct) {
        taps.push_back((y - w.padding[0]) * grid.stride + (x - w.padding[1]) * unit_);
        continue;
      }
      const int64_t phase = y % w.stride[0] * step.phases.count[1] + x % w.stride[1];
      taps.push_back(phase * grid.length + y / w.stride[0] * grid.stride + x / w.stride[1] * unit_);
    }
  return taps;
}

// Chooses tiles, and whether they are packed; fills panels, and the offsets of all nonzeros.
void Plan::make_panels(const Node& node, Step& step, std::vector<int32_t>& offsets) const {
  const int64_t channels = network_.nodes()[node.inputs[0]].shape.channels;
  const int64_t rows = node.shape.channels, group_rows = rows / node.window.groups;
  const int64_t vectors = grids_[step.grid].vectors;
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
  // Tiles whose inputs fit L2, where their channels do not come in blocks; `taps` are copied of each.
  const auto cut = [&](int64_t taps, int64_t most) {
    const int64_t fit = node.window.groups > 1 ? cache_sizes().l2 / 3 / (channels * taps * kLine) : most;
    step.tiles = (vectors - 1) / std::clamp(fit, kLeastTile, most) + 1;
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
  cut(1, shared ? kMostPanelTile : kMostTile);
  if (loads < kWorthPacking * channels * count ||
      (node.window.groups > 1 && channels * count * kLeastTile * kLine > 2 * cache_sizes().l2) ||
      std::all_of(distance.begin(), distance.end(), [](int64_t d) { return d % kLanes == 0; })) {
    step.block = block_of(node, channels, lines_read(distance, step) * kLine);
    return;
  }
  cut(count, kMostTile);
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
  step.block = block_of(node, channels, step.packed_step * static_cast<int64_t>(sizeof(float)));
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
    step.coded = images_ == 1 && takes_codes(nodes[i], nodes[nodes[i].inputs[0]].shape, step);
    if (step.coded) step.block = nodes[nodes[i].inputs[0]].shape.channels;
    for (const Panel& panel : step.panels) step.words += panel.count * (step.coded ? 1 : 1 + panel.rows);
    words += step.words;
  }
  list_ = Buffer(words);
  float* word = list_.data();
  for (size_t i = 0; i < nodes.size(); ++i)
    if (nodes[i].kind == Kind::kProduct) cut_blocks(nodes[i], steps_[i], offsets[i], word);
}

// Cuts the panels of a step into blocks of channels, and writes their lists from `word` on.
void Plan::cut_blocks(const Node& node, Step& step, const std::vector<int32_t>& offsets, float*& word) const {
  const Shape& in = network_.nodes()[node.inputs[0]].shape;
  const int64_t taps = node.window.kernel[0] * node.window.kernel[1];
  const std::vector<Panel> whole = std::exchange(step.panels, {});
  // Those of all blocks have the same rows.
  const std::vector<const Panel*> parts = equal_parts(whole, static_cast<int64_t>(node.values.size()));
  // Lists of one length after the other, so that the ends of loops are foreseen. Where results go to memory
  // it matters more that they do so in order.
  const int64_t result = node.shape.channels * grids_[step.grid].length * static_cast<int64_t>(sizeof(float));
  const bool by_length = result <= cache_sizes().l2 * 3 / 4;
  struct List {
    const Panel* panel;
    int64_t from, to;
  };
  const auto shorter = [](const List& a, const List& b) {
    if (a.panel->rows != b.panel->rows) return a.panel->rows > b.panel->rows;
    return a.to - a.from < b.to - b.from;
  };
  const auto write = [&](const List& list) {
    const Panel& panel = *list.panel;
    step.panels.push_back({panel.row, panel.rows, word - list_.data(), list.to - list.from});
    for (int64_t k = node.crow[panel.row] + list.from; k < node.crow[panel.row] + list.to; ++k) {
      const int32_t head = step.coded ? node.codes[k] * kMostCoded + node.col[k] : offsets[k];
      std::memcpy(word++, &head, sizeof head);
      if (step.coded) continue;
      for (int32_t r = 0; r < panel.rows; ++r) *word++ = node.values[k + r * panel.count];
    }
  };
  std::vector<List> lists;
  for (int64_t first = 0; first < in.channels; first += step.block) {
    const bool ends = first + step.block >= in.channels;
    auto& cuts = step.cuts.emplace_back();
    for (int64_t part = 0; part < kParts; ++part) {
      cuts.push_back(static_cast<int64_t>(step.panels.size()));
      lists.clear();
      for (const Panel* panel = parts[part]; panel != parts[part + 1]; ++panel) {
        const int32_t* const row = node.col.data() + node.crow[panel->row];
        const auto before = [&](int64_t column) {
          return std::lower_bound(row, row + panel->count, column) - row;
        };
        const int64_t from = first == 0 ? 0 : before(first * taps);
        const int64_t to = ends ? panel->count : before((first + step.block) * taps);
        if (from < to || first == 0 || ends) lists.push_back({panel, from, to});
      }
      if (by_length) std::stable_sort(lists.begin(), lists.end(), shorter);
      for (const List& list : lists) write(list);
    }
    cuts.push_back(static_cast<int64_t>(step.panels.size()));
  }
}

}  // namespace sparsekd::frozen
