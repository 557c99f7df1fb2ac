#include "core/structure.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/error.h"

namespace sparsekd {
namespace {

// A network has a few hundred layers; more entries than this are structures nobody released.
constexpr size_t kMaxCached = 4096;

struct Cached {
  std::shared_ptr<const Structure> structure;
  uint64_t used;
};
struct Cache {
  std::mutex mutex;
  std::map<std::pair<const void*, const void*>, Cached> entries;
  uint64_t clock = 0;
};
Cache& cache() {
  static Cache instance;
  return instance;
}

std::string number(int64_t value) { return std::to_string(value); }

}  // namespace

void validate_csr(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t nnz, int64_t rows,
                  int64_t cols) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (rows < 0 || cols < 0 || rows > kMax - 1 || cols > kMax || nnz > kMax)
    throw TopologyError("topology: rows, columns and nonzeros must fit int32, got " + number(rows) + " x " +
                        number(cols) + " with " + number(nnz) + " nonzeros");
  if (crow_length != rows + 1)
    throw TopologyError("crow_indices: expected length rows + 1 = " + number(rows + 1) + ", got " +
                        number(crow_length));
  if (crow[0] != 0) throw TopologyError("crow_indices: must start at 0, got " + number(crow[0]));
  if (crow[rows] != nnz)
    throw TopologyError("crow_indices: last entry must equal the number of nonzeros " + number(nnz) +
                        ", got " + number(crow[rows]));
  for (int64_t row = 0; row < rows; ++row)
    if (crow[row] > crow[row + 1])
      throw TopologyError("crow_indices: not monotone at row " + number(row) + ": " + number(crow[row]) +
                          " > " + number(crow[row + 1]));
  // Monotone between 0 and nnz, so every read below is in bounds.
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = crow[row]; k < crow[row + 1]; ++k) {
      if (col[k] < 0 || col[k] >= cols)
        throw TopologyError("col_indices: out of range in row " + number(row) + ": expected 0 <= column < " +
                            number(cols) + ", got " + number(col[k]));
      if (k > crow[row] && col[k] <= col[k - 1])
        throw TopologyError(std::string("col_indices: ") +
                            (col[k] == col[k - 1] ? "duplicated" : "unsorted") + " column " + number(col[k]) +
                            " in row " + number(row));
    }
  }
}

// The copy is taken first and validated after, so nothing can change between the check and the use.
Structure::Structure(const int32_t* crow_in, int64_t crow_length, const int32_t* col_in, int64_t nnz_in,
                     int64_t rows_in, int64_t cols_in)
    : rows(rows_in),
      cols(cols_in),
      nnz(nnz_in),
      crow(crow_in, crow_in + crow_length),
      col(col_in, col_in + nnz_in) {
  validate_csr(crow.data(), crow_length, col.data(), nnz, rows, cols);
}

bool Structure::same(const int32_t* other_crow, const int32_t* other_col) const {
  return std::memcmp(crow.data(), other_crow, crow.size() * sizeof(int32_t)) == 0 &&
         (nnz == 0 || std::memcmp(col.data(), other_col, col.size() * sizeof(int32_t)) == 0);
}

int64_t Structure::bytes() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return plan_bytes_ + static_cast<int64_t>((crow.size() + col.size()) * sizeof(int32_t));
}

std::shared_ptr<const Structure> find_structure(const int32_t* crow, int64_t crow_length, const int32_t* col,
                                                int64_t nnz, int64_t rows, int64_t cols) {
  Cache& table = cache();
  const std::pair<const void*, const void*> key{crow, col};
  std::shared_ptr<const Structure> known;
  {
    const std::lock_guard<std::mutex> guard(table.mutex);
    const auto found = table.entries.find(key);
    if (found != table.entries.end()) {
      found->second.used = ++table.clock;
      known = found->second.structure;
    }
  }
  if (known && known->rows == rows && known->cols == cols && known->nnz == nnz && crow_length == rows + 1 &&
      known->same(crow, col))
    return known;
  auto made = std::make_shared<const Structure>(crow, crow_length, col, nnz, rows, cols);
  const std::lock_guard<std::mutex> guard(table.mutex);
  table.entries[key] = {made, ++table.clock};
  if (table.entries.size() > kMaxCached) {
    const auto oldest = std::min_element(table.entries.begin(), table.entries.end(),
                                         [](auto& a, auto& b) { return a.second.used < b.second.used; });
    table.entries.erase(oldest);
  }
  return made;
}

void release_structure(const int32_t* crow, const int32_t* col) {
  Cache& table = cache();
  const std::lock_guard<std::mutex> guard(table.mutex);
  table.entries.erase({crow, col});
}

CacheUse cache_use() {
  Cache& table = cache();
  const std::lock_guard<std::mutex> guard(table.mutex);
  CacheUse use{static_cast<int64_t>(table.entries.size()), 0};
  for (const auto& entry : table.entries) use.bytes += entry.second.structure->bytes();
  return use;
}

}  // namespace sparsekd
