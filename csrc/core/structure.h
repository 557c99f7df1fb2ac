// The positions of a weight's nonzeros: compressed rows, validated once, with what kernels derive from them.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace sparsekd {

// Throws TopologyError that names the first fault: crow must hold rows + 1 entries, start at 0, never
// fall and end at nnz; the columns of a row must rise strictly and lie in [0, cols).
void validate_csr(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t nnz, int64_t rows,
                  int64_t cols);

// A validated private copy of the index arrays, so that nobody can change them behind a kernel's back,
// and the plans made from them.
class Structure {
 public:
  Structure(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t nnz, int64_t rows,
            int64_t cols);

  const int64_t rows, cols, nnz;
  const std::vector<int32_t> crow, col;

  bool same(const int32_t* other_crow, const int32_t* other_col) const;

  // The plan under `key`, made by `make` on first use. Plans of different types share one table: a key
  // must name the type.
  template <class P>
  std::shared_ptr<const P> plan(const std::vector<int64_t>& key,
                                const std::function<std::shared_ptr<const P>()>& make) const {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return std::static_pointer_cast<const P>(found->second);
    std::shared_ptr<const P> made = make();
    plan_bytes_ += made ? made->bytes() : 0;
    plans_.emplace(key, made);
    return made;
  }
  // What the private copy and the plans occupy.
  int64_t bytes() const;

 private:
  mutable std::mutex mutex_;
  mutable std::map<std::vector<int64_t>, std::shared_ptr<const void>> plans_;
  mutable int64_t plan_bytes_ = 0;
};

// Finds the Structure of index arrays by their addresses and compares the contents, so an array that was
// changed in place, or whose memory now holds another one, is validated again.
std::shared_ptr<const Structure> find_structure(const int32_t* crow, int64_t crow_length, const int32_t* col,
                                                int64_t nnz, int64_t rows, int64_t cols);
void release_structure(const int32_t* crow, const int32_t* col);

struct CacheUse {
  int64_t structures, bytes;
};
CacheUse cache_use();

}  // namespace sparsekd
