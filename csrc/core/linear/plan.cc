// Rows cut into blocks of columns, and the transpose.
//
// A pass over the indices notes where each row crosses from one block into the next, which the rising
// columns of a row allow without sorting; the transpose is made by counting the nonzeros of each column.
// Both take linear time and are limited by memory. Tests: test_blocks (linear_tests.cc) checks the cuts.
#include "core/linear/plan.h"

#include <algorithm>

namespace sparsekd {
namespace {

void cut(Blocks& blocks) {
  blocks.panel_rows = find_panels(blocks.crow, blocks.col, blocks.rows);
  blocks.count = std::max<int64_t>(1, (blocks.cols + blocks.width - 1) / blocks.width);
  blocks.cuts.resize((blocks.count - 1) * blocks.rows);
  for (int64_t r = 0; r < blocks.rows; ++r) {
    const int32_t* at = blocks.col + blocks.crow[r];
    const int32_t* const last = blocks.col + blocks.crow[r + 1];
    for (int64_t b = 1; b < blocks.count; ++b) {
      while (at < last && *at < blocks.first_col(b)) ++at;
      blocks.cuts[(b - 1) * blocks.rows + r] = static_cast<int32_t>(at - blocks.col);
    }
  }
}

}  // namespace

int64_t block_columns(const Structure& s, bool transposed, int64_t cache_bytes, int64_t input_bytes,
                      int64_t shortest) {
  const int64_t rows = transposed ? s.cols : s.rows, cols = transposed ? s.rows : s.cols;
  const int64_t filled = s.nnz ? (shortest * rows * cols + s.nnz - 1) / s.nnz : cols;
  return std::max({int64_t{8}, cache_bytes / input_bytes, std::min(filled, cols)});
}

std::shared_ptr<const Blocks> row_blocks(const Structure& s, int64_t block) {
  auto blocks =
      std::make_shared<Blocks>(Blocks{s.rows, s.cols, 1, block, s.crow.data(), s.col.data(), {}, {}});
  cut(*blocks);
  return blocks;
}

std::shared_ptr<const Transpose> transpose(const Structure& s, int64_t block) {
  auto t = std::make_shared<Transpose>();
  t->crow.assign(s.cols + 1, 0);
  t->col.resize(s.nnz);
  t->slot.resize(s.nnz);
  for (const int32_t c : s.col) ++t->crow[c + 1];
  for (int64_t c = 0; c < s.cols; ++c) t->crow[c + 1] += t->crow[c];
  std::vector<int32_t> next(t->crow.begin(), t->crow.end() - 1);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int32_t k = s.crow[r]; k < s.crow[r + 1]; ++k) {
      const int32_t to = next[s.col[k]]++;
      t->col[to] = static_cast<int32_t>(r);
      t->slot[to] = k;
    }
  t->blocks = Blocks{s.cols, s.rows, 1, block, t->crow.data(), t->col.data(), {}, {}};
  cut(t->blocks);
  return t;
}

}  // namespace sparsekd
