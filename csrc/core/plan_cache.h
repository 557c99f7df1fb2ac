// The plans that structures keep between calls, and which of them go when there are too many.
#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <vector>

namespace sparsekd {

using PlanKey = std::vector<int64_t>;

// A convolution has three plans for each size of its input, each a few times as large as its indices.
//
// Ten sizes, as multi-scale training has, stay planned; a detector that sees ever new sizes does not fill
// memory with plans that it never uses again.
constexpr int64_t kMostPlans = 32;
// Of one structure. These are what a layer needs for the size at hand, so a model of any size keeps them;
// taking them away would make every step plan anew.
constexpr int64_t kLatestPlans = 4;
// Of all structures together, in bytes, except where the latest plans alone take more.
constexpr int64_t kMostPlanBytes = int64_t{256} << 20;

// The plans of one structure. Any number of threads may use it, and the caller's plan stays alive when the
// table gives it up meanwhile.
class PlanTable {
 public:
  PlanTable() = default;
  PlanTable(const PlanTable&) = delete;
  PlanTable& operator=(const PlanTable&) = delete;
  ~PlanTable();

  // The plan under `key`, made by `make` unless it is there. Plans of different types share one table: a key
  // must name the type. No lock is held while `make` runs: where two threads make the same plan at once, both
  // get the one that is kept first.
  template <class P, class Make>
  std::shared_ptr<const P> get(const PlanKey& key, const Make& make) {
    std::shared_ptr<const void> plan;
    if (!find(key, &plan)) {
      const std::shared_ptr<const P> made = make();
      plan = keep(key, made, made ? made->bytes() : 0);
    }
    return std::static_pointer_cast<const P>(plan);
  }
  int64_t bytes() const;

 private:
  friend class PlanCache;
  struct Entry {
    PlanTable* owner;
    PlanKey key;
    std::shared_ptr<const void> plan;
    int64_t bytes;
    uint64_t used;
  };

  bool find(const PlanKey& key, std::shared_ptr<const void>* plan);
  std::shared_ptr<const void> keep(const PlanKey& key, std::shared_ptr<const void> plan, int64_t bytes);

  std::map<PlanKey, std::list<Entry>::iterator> entries_;
  int64_t bytes_ = 0;
};

struct PlanUse {
  int64_t plans, bytes;
};
PlanUse plan_use();

}  // namespace sparsekd
