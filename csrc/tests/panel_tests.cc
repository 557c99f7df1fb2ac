// Panels of rows, and the tiles a weight consists of, against what plain loops over its mask find.
#include <algorithm>
#include <string>
#include <vector>

#include "core/conv/plan.h"
#include "core/panels.h"
#include "harness.h"

using namespace sparsekd;

namespace {

std::vector<int32_t> list(const Csr& csr, int64_t row) {
  return {csr.col.begin() + csr.crow[row], csr.col.begin() + csr.crow[row + 1]};
}

// The largest aligned panel that starts at `row`, looked for from the top.
int expected_panel(const Csr& csr, int64_t row, int64_t rows) {
  for (int size : {4, 2}) {
    bool equal = row % size == 0 && row + size <= rows;
    for (int r = 1; equal && r < size; ++r) equal = list(csr, row + r) == list(csr, row);
    if (equal) return size;
  }
  return 1;
}

void test_find_panels() {
  for (int i = 0; i < 300; ++i) {
    const int64_t rows = pick(0, 40), channels = pick(1, 20);
    const Csr csr = any_csr(rows, channels, 1, pick(0, 3) ? 0.3 : 1);
    const auto found = find_panels(csr.crow.data(), csr.col.data(), rows);
    bool right = true;
    for (int64_t r = 0; r < rows; r += found[r]) right &= found[r] == expected_panel(csr, r, rows);
    check(right, "panels are the largest aligned runs of equal rows");
  }
}

bool has_tiles(const Csr& csr, int64_t rows, int64_t channels, int64_t taps, int64_t groups, TileSize size) {
  std::vector<char> mask(rows * channels * taps);
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t c : list(csr, r)) mask[r * channels * taps + c] = 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t top = r / size.rows * size.rows, left = c / size.channels * size.channels;
        if (top / (rows / groups) != r / (rows / groups)) return false;
        if (mask[(r * channels + c) * taps + t] != mask[(top * channels + left) * taps + t]) return false;
      }
  return true;
}

void test_tile_size() {
  for (int i = 0; i < 300; ++i) {
    const int64_t groups = pick(1, 3), rows = groups * pick(1, 20), channels = pick(1, 20), taps = pick(1, 4);
    const Csr csr = any_csr(rows, channels, taps, pick(0, 4) ? 0.4 : 1);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), rows,
                      channels * taps);
    TileSize best{1, 1};  // both sides are found one by one
    for (int64_t n = 1; n <= rows; ++n)
      if (has_tiles(csr, rows, channels, taps, groups, {n, 1})) best.rows = n;
    for (int64_t n = 1; n <= channels; ++n)
      if (has_tiles(csr, rows, channels, taps, groups, {1, n})) best.channels = n;
    const TileSize size = tile_size(s, taps, groups);
    check(size.rows == best.rows && size.channels == best.channels,
          "tiles of " + std::to_string(size.rows) + " x " + std::to_string(size.channels) + ", expected " +
              std::to_string(best.rows) + " x " + std::to_string(best.channels));
  }
}

// Output channels that share lists become one entry in fprop and wgrad, input channels in dgrad; those of
// different groups never do, although their columns are the same.
void test_plans() {
  ConvGeometry g{};
  g.batch = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  g.in_h = g.in_w = 6;
  g.kernel_h = g.kernel_w = 3;
  g.in_channels = g.out_channels = 16;
  for (int64_t groups : {1, 8}) {
    g.groups = groups;
    complete_geometry(g);
    const int64_t channels = g.in_channels / groups, rows = g.out_channels;
    const Csr csr = random_tiles(rows, channels, 9, 16, 16, 0.5);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), rows, channels * 9);
    const int expected = groups == 1 ? 4 : 2;
    const auto all_panels = [&](const GatherPlans& plans) {
      const GatherPlan& plan = plans.phases.at(0);
      return std::all_of(plan.entries.begin(), plan.entries.end() - 1,
                         [&](const RowEntry& entry) { return entry.rows == expected; });
    };
    const auto wgrad = wgrad_plan(g, s);
    bool all = all_panels(*fprop_plan(g, s, {1, 8})) && all_panels(*dgrad_plan(g, s, {1, 8}));
    for (int64_t r = 0; r < rows; r += expected) all &= wgrad->panel_rows[r] == expected;
    check(all, "plans of " + std::to_string(groups) + " groups have panels");
  }
}

}  // namespace

void test_panels() {
  test_find_panels();
  test_tile_size();
  test_plans();
}
