// Rows of a structure with the same columns. Kernels compute such a panel of rows together: an input is
// loaded once for all of them, where single rows load it once for each multiplication.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/structure.h"

namespace sparsekd {

// The most rows that kernels take at once; more rows with one list are several panels.
constexpr int kPanelRows = 4;

// How many rows from `first` on make a panel: kPanelRows, half as many, or one. Panels begin at multiples of
// their size; same(row) says whether a row's list is that of `first`.
template <class F>
int panel_rows(int64_t first, int64_t rows, F same) {
  int size = kPanelRows;
  while (size > 1 && (first % size || first + size > rows)) size /= 2;
  for (int r = 1; r < size; ++r)
    while (r < size && !same(first + r)) size /= 2;
  return size;
}

// At the first row of every panel how many rows it has. The list of row r is list[crow[r]] to
// list[crow[r + 1] - 1].
std::vector<uint8_t> find_panels(const int32_t* crow, const int32_t* list, int64_t rows);

// The last row up to `row` at which work may be cut without cutting a panel.
inline int64_t panel_cut(int64_t row, int64_t rows) {
  return row == rows ? rows : row / kPanelRows * kPanelRows;
}

// The largest tiles that a weight [rows, channels * taps] consists of: `rows` neighbouring rows, within one
// of `groups` equal groups, times `channels` neighbouring channels at one tap are all nonzero or all zero.
// The last tile of an axis may be smaller.
struct TileSize {
  int64_t rows, channels;
};
TileSize tile_size(const Structure&, int64_t taps, int64_t groups);

}  // namespace sparsekd
