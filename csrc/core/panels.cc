// Finds rows with equal columns, and the tiles of a weight, each in one pass over the indices.
//
// find_panels compares the lists of four rows, or of two where the four differ; different lists mostly
// differ early, so an unstructured weight costs next to nothing. tile_size tries no sizes: tiles end where a
// row differs from the one above, or a channel from the one before, so the size is the greatest common
// divisor of all these borders, and for a weight without structure it is 1 after a few rows. Tests:
// panel_tests.cc.
#include "core/panels.h"

#include <numeric>

namespace sparsekd {

std::vector<uint8_t> find_panels(const int32_t* crow, const int32_t* list, int64_t rows) {
  std::vector<uint8_t> found(rows, 1);
  for (int64_t first = 0; first < rows; first += found[first])
    found[first] = static_cast<uint8_t>(panel_rows(first, rows, [&](int64_t r) {
      return std::equal(list + crow[first], list + crow[first + 1], list + crow[r], list + crow[r + 1]);
    }));
  return found;
}

TileSize tile_size(const Structure& s, int64_t taps, int64_t groups) {
  TileSize size{0, 0};
  std::vector<int32_t> kept(s.cols, -1);  // the last row that stores this column
  const auto add = [](int64_t& common, int64_t border) { common = std::gcd(common, border); };
  const auto list = [&](int64_t row) { return s.col.data() + s.crow[row]; };
  for (int64_t row = 0; row < s.rows && (size.rows != 1 || size.channels != 1); ++row) {
    const bool starts = row > 0 && row % (s.rows / groups) == 0;
    const bool same = row > 0 && std::equal(list(row - 1), list(row), list(row), list(row + 1));
    if (starts || !same) add(size.rows, row);
    if (same) continue;
    for (const int32_t* c = list(row); c < list(row + 1); ++c) kept[*c] = static_cast<int32_t>(row);
    for (const int32_t* c = list(row); c < list(row + 1) && size.channels != 1; ++c) {
      if (*c >= taps && kept[*c - taps] != row) add(size.channels, *c / taps);
      if (*c + taps < s.cols && kept[*c + taps] != row) add(size.channels, *c / taps + 1);
    }
  }
  return {size.rows ? size.rows : s.rows, size.channels ? size.channels : s.cols / taps};
}

}  // namespace sparsekd
