#include "core/plan_cache.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace sparsekd {

// The plans of all tables in the order of their last use. One lock serves all: it is held for the time of a
// look-up, never while a plan is made, so that a call waits for nobody and a fork finds it free.
class PlanCache {
 public:
  using Entry = PlanTable::Entry;
  using Garbage = std::vector<std::shared_ptr<const void>>;  // freed once the lock is given back

  // Never destroyed: structures that outlive static objects still take their plans out.
  static PlanCache& instance() {
    static PlanCache& cache = *[] {
      pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                     [] { instance().mutex.unlock(); });
      return new PlanCache;
    }();
    return cache;
  }

  std::mutex mutex;
  std::list<Entry> order;  // the latest used first
  int64_t bytes = 0;

  void touch(std::list<Entry>::iterator entry) {
    entry->used = ++clock_;
    order.splice(order.begin(), order, entry);
  }

  void add(Entry entry) {
    PlanTable& owner = *entry.owner;
    entry.used = ++clock_;
    bytes += entry.bytes;
    owner.bytes_ += entry.bytes;
    order.push_front(std::move(entry));
    owner.entries_.emplace(order.front().key, order.begin());
  }

  void drop(std::list<Entry>::iterator entry, Garbage* garbage) {
    PlanTable& owner = *entry->owner;
    bytes -= entry->bytes;
    owner.bytes_ -= entry->bytes;
    garbage->push_back(std::move(entry->plan));
    owner.entries_.erase(entry->key);
    order.erase(entry);
  }

  void trim(PlanTable& table, Garbage* garbage) {
    while (static_cast<int64_t>(table.entries_.size()) > kMostPlans) {
      const auto oldest = std::min_element(table.entries_.begin(), table.entries_.end(),
                                           [](auto& a, auto& b) { return a.second->used < b.second->used; });
      drop(oldest->second, garbage);
    }
    for (auto entry = order.end(); bytes > kMostPlanBytes && entry != order.begin();) {
      --entry;
      if (!among_latest(*entry)) drop(entry++, garbage);
    }
  }

 private:
  static bool among_latest(const Entry& entry) {
    int64_t later = 0;
    for (const auto& other : entry.owner->entries_) later += other.second->used > entry.used;
    return later < kLatestPlans;
  }

  uint64_t clock_ = 0;
};

PlanTable::~PlanTable() {
  if (entries_.empty()) return;
  PlanCache& cache = PlanCache::instance();
  PlanCache::Garbage garbage;
  const std::lock_guard<std::mutex> guard(cache.mutex);
  while (!entries_.empty()) cache.drop(entries_.begin()->second, &garbage);
}

bool PlanTable::find(const PlanKey& key, std::shared_ptr<const void>* plan) {
  PlanCache& cache = PlanCache::instance();
  const std::lock_guard<std::mutex> guard(cache.mutex);
  const auto found = entries_.find(key);
  if (found == entries_.end()) return false;
  cache.touch(found->second);
  *plan = found->second->plan;
  return true;
}

std::shared_ptr<const void> PlanTable::keep(const PlanKey& key, std::shared_ptr<const void> plan,
                                            int64_t bytes) {
  constexpr int64_t kEntryBytes = 128;  // what the tables take, besides the two copies of the key
  PlanCache& cache = PlanCache::instance();
  PlanCache::Garbage garbage;
  const std::lock_guard<std::mutex> guard(cache.mutex);
  const auto found = entries_.find(key);
  if (found != entries_.end()) return found->second->plan;  // another thread was faster
  const int64_t keys = 2 * static_cast<int64_t>(key.size() * sizeof(int64_t));
  cache.add({this, key, plan, bytes + keys + kEntryBytes, 0});
  cache.trim(*this, &garbage);
  return plan;
}

int64_t PlanTable::bytes() const {
  PlanCache& cache = PlanCache::instance();
  const std::lock_guard<std::mutex> guard(cache.mutex);
  return bytes_;
}

PlanUse plan_use() {
  PlanCache& cache = PlanCache::instance();
  const std::lock_guard<std::mutex> guard(cache.mutex);
  return {static_cast<int64_t>(cache.order.size()), cache.bytes};
}

}  // namespace sparsekd
