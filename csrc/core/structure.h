// The positions of a weight's nonzeros: compressed rows, validated once, with what kernels derive from them.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/plan_cache.h"

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
  const int64_t serial;  // from 1
  const std::vector<int32_t> crow, col;

  bool same(const int32_t* other_crow, const int32_t* other_col) const;
  bool alike(const Structure& other) const;

  // The plan under `key`, made by `make` unless it is kept, see PlanTable.
  template <class P>
  std::shared_ptr<const P> plan(const PlanKey& key,
                                const std::function<std::shared_ptr<const P>()>& make) const {
    return plans_.get<P>(key, make);
  }
  int64_t index_bytes() const;  // what the private copy occupies
  // What the private copy and the plans occupy.
  int64_t bytes() const;

 private:
  mutable PlanTable plans_;
};

// Whoever owns index arrays, as far as somebody who does not can see.
class Owner {
 public:
  virtual ~Owner() = default;
  virtual bool gone() const = 0;  // called with a lock held: may not call back
};
using FindOwner = std::function<std::unique_ptr<Owner>()>;

// Finds the Structure of index arrays by their addresses and compares the contents, so an array that was
// changed in place, or whose memory now holds another one, is validated again.
//
// What is kept follows what is there: a structure goes with the owner of its arrays, soon after or at the
// latest when as many new ones have come as an eighth of those that are kept. `owner` is asked for the first
// time; structures without owner are few, and go least recently used first.
std::shared_ptr<const Structure> find_structure(const int32_t* crow, int64_t crow_length, const int32_t* col,
                                                int64_t nnz, int64_t rows, int64_t cols,
                                                const FindOwner& owner = nullptr);
// The number of the structure that is kept of index arrays at these addresses, 0 if there is none or its
// owner is gone. It says nothing about what was written into the arrays since; no two structures have the
// same.
int64_t structure_serial(const int32_t* crow, const int32_t* col);
void release_structure(const int32_t* crow, const int32_t* col);

struct CacheUse {
  int64_t structures, bytes, plans;
};
CacheUse cache_use();

}  // namespace sparsekd
