// What a weight's structure becomes for the linear kernels: rows cut into blocks of columns, and the
// transpose.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/panels.h"
#include "core/structure.h"

namespace sparsekd {

// Rows of column indices, cut into blocks of columns so that the inputs of one block stay in a cache. Row r
// of block b is [begin(b)[r], end(b)[r]); the block's columns are [first_col(b), first_col(b + 1)).
struct Blocks {
  int64_t rows, cols, count, width;
  const int32_t *crow, *col;        // of the structure or the transpose that this belongs to
  std::vector<int32_t> cuts;        // where a row crosses into block 1, 2, ... : [count - 1][rows]
  std::vector<uint8_t> panel_rows;  // see find_panels

  const int32_t* begin(int64_t block) const { return block ? cuts.data() + (block - 1) * rows : crow; }
  const int32_t* end(int64_t block) const {
    return block + 1 < count ? cuts.data() + block * rows : crow + 1;
  }
  int64_t first_col(int64_t block) const { return block < count ? block * width : cols; }
  int64_t bytes() const { return static_cast<int64_t>(cuts.size() * sizeof(int32_t) + panel_rows.size()); }
};

// The inputs to a block: `cache_bytes` of them at `input_bytes` each, but no less than give a row `shortest`
// nonzeros on average, because every list loads and stores its sums.
int64_t block_columns(const Structure&, bool transposed, int64_t cache_bytes, int64_t input_bytes,
                      int64_t shortest);

// Owned by the structure, as every plan is, so it may point into it.
std::shared_ptr<const Blocks> row_blocks(const Structure&, int64_t block);

// The structure by columns: row c lists, in rising order, the rows in which column c is stored, and where.
struct Transpose {
  std::vector<int32_t> crow, col, slot;
  Blocks blocks;
  int64_t bytes() const {
    return static_cast<int64_t>((crow.size() + col.size() + slot.size()) * sizeof(int32_t)) + blocks.bytes();
  }
};
std::shared_ptr<const Transpose> transpose(const Structure&, int64_t block);

}  // namespace sparsekd
