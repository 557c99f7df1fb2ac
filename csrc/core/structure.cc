// Validated copies of index arrays, found by the addresses of the arrays.
//
// Each call compares its arrays with the copy, which reads both at memory speed; that is the price of not
// trusting them. What is new is copied first and validated after, outside the lock, so nothing can change in
// between; of several threads that do so, the first to finish gives all the others its copy and so its
// plans. Whenever new copies amount to an eighth of all, those of tensors that are gone are removed. Tests:
// test_validation and test_cache (core_tests.cc) for faults and arrays changed in place, cache_tests.cc for
// owners, bounds and threads.
#include "core/structure.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/error.h"

namespace sparsekd {
namespace {

// Structures that nobody owns, as numpy arrays have: those of a few networks, and no more bytes of indices.
constexpr int64_t kMostUnowned = 256;
constexpr int64_t kMostUnownedBytes = int64_t{32} << 20;
// So many bytes of new indices are reason enough to look who is gone.
constexpr int64_t kSweepBytes = int64_t{16} << 20;

using Shared = std::shared_ptr<const Structure>;

struct Cached {
  Shared structure;
  std::shared_ptr<const Owner> owner;
  uint64_t used;
};

// Structures and owners leave it by way of `garbage`, which its caller frees after giving the lock back: an
// owner may free a Python object.
struct Cache {
  using Garbage = std::vector<Cached>;

  std::mutex mutex;
  std::map<std::pair<const void*, const void*>, Cached> entries;
  uint64_t clock = 0;
  size_t added = 0;  // since the last sweep
  int64_t added_bytes = 0;

  using Entries = decltype(entries);

  Entries::iterator drop(Entries::iterator entry, Garbage* garbage) {
    garbage->push_back(std::move(entry->second));
    return entries.erase(entry);
  }

  void add(const Entries::key_type& key, Cached made, Garbage* garbage) {
    ++added;
    added_bytes += made.structure->index_bytes();
    const auto found = entries.find(key);
    if (found != entries.end()) drop(found, garbage);
    entries.emplace(key, std::move(made));
    if (8 * added > entries.size() || added_bytes > kSweepBytes) sweep(garbage);
  }

  void sweep(Garbage* garbage) {
    std::vector<std::pair<uint64_t, Entries::iterator>> unowned;
    int64_t bytes = 0;
    for (auto entry = entries.begin(); entry != entries.end();) {
      if (entry->second.owner && entry->second.owner->gone()) {
        entry = drop(entry, garbage);
        continue;
      }
      if (!entry->second.owner) {
        unowned.emplace_back(entry->second.used, entry);
        bytes += entry->second.structure->index_bytes();
      }
      ++entry;
    }
    const auto older = [](const auto& a, const auto& b) { return a.first < b.first; };
    std::sort(unowned.begin(), unowned.end(), older);
    int64_t count = static_cast<int64_t>(unowned.size());
    for (auto oldest = unowned.begin(); count > 1 && (count > kMostUnowned || bytes > kMostUnownedBytes);
         ++oldest, --count) {
      bytes -= oldest->second->second.structure->index_bytes();
      drop(oldest->second, garbage);
    }
    added = 0;
    added_bytes = 0;
  }
};

// Never destroyed: owners may be Python objects, which must not be freed once the interpreter is gone.
Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

int64_t next_serial() {
  static std::atomic<int64_t> latest{0};
  return ++latest;
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
      serial(next_serial()),
      crow(crow_in, crow_in + crow_length),
      col(col_in, col_in + nnz_in) {
  validate_csr(crow.data(), crow_length, col.data(), nnz, rows, cols);
}

bool Structure::alike(const Structure& other) const {
  return rows == other.rows && cols == other.cols && crow == other.crow && col == other.col;
}

bool Structure::same(const int32_t* other_crow, const int32_t* other_col) const {
  return std::memcmp(crow.data(), other_crow, crow.size() * sizeof(int32_t)) == 0 &&
         (nnz == 0 || std::memcmp(col.data(), other_col, col.size() * sizeof(int32_t)) == 0);
}

int64_t Structure::index_bytes() const {
  return static_cast<int64_t>((crow.size() + col.size()) * sizeof(int32_t));
}

int64_t Structure::bytes() const { return index_bytes() + plans_.bytes(); }

Shared find_structure(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t nnz, int64_t rows,
                      int64_t cols, const FindOwner& owner) {
  Cache& table = cache();
  const std::pair<const void*, const void*> key{crow, col};
  Shared known;
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
  // The arrays are compared, copied and checked without the lock. Another thread may do the same: the first
  // one's structure is the one that all go on with, so that plans are not made twice.
  auto made = std::make_shared<const Structure>(crow, crow_length, col, nnz, rows, cols);
  std::shared_ptr<const Owner> owned = owner ? owner() : nullptr;
  Cache::Garbage garbage;
  const std::lock_guard<std::mutex> guard(table.mutex);
  const auto found = table.entries.find(key);
  if (found != table.entries.end() && found->second.structure->alike(*made)) return found->second.structure;
  table.add(key, {made, std::move(owned), ++table.clock}, &garbage);
  return made;
}

int64_t structure_serial(const int32_t* crow, const int32_t* col) {
  Cache& table = cache();
  const std::lock_guard<std::mutex> guard(table.mutex);
  const auto found = table.entries.find({crow, col});
  if (found == table.entries.end()) return 0;
  const Cached& kept = found->second;
  return kept.owner && kept.owner->gone() ? 0 : kept.structure->serial;
}

void release_structure(const int32_t* crow, const int32_t* col) {
  Cache& table = cache();
  Cache::Garbage garbage;
  const std::lock_guard<std::mutex> guard(table.mutex);
  const auto found = table.entries.find({crow, col});
  if (found != table.entries.end()) table.drop(found, &garbage);
}

CacheUse cache_use() {
  Cache& table = cache();
  const PlanUse plans = plan_use();
  const std::lock_guard<std::mutex> guard(table.mutex);
  CacheUse use{static_cast<int64_t>(table.entries.size()), plans.bytes, plans.plans};
  for (const auto& entry : table.entries) use.bytes += entry.second.structure->index_bytes();
  return use;
}

}  // namespace sparsekd
