// What is kept between calls: that it is found again, that it has a bound, and that threads may share it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <thread>

#include "core/grow/largest.h"
#include "core/parallel.h"
#include "core/plan_cache.h"
#include "core/structure.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

struct Plan {
  int64_t value, size;
  int64_t bytes() const { return size; }
};

// Asks a table for a plan and counts how many had to be made.
struct Client {
  PlanTable table;
  int64_t made = 0;
  std::shared_ptr<const Plan> get(int64_t key, int64_t size = 1000) {
    return table.get<Plan>({key}, [&] {
      ++made;
      return std::make_shared<const Plan>(Plan{key, size});
    });
  }
};

void test_plans_of_one_structure() {
  const PlanUse before = plan_use();
  Client client;
  for (int64_t round = 0; round < 3; ++round)
    for (int64_t key = 0; key < kMostPlans; ++key)
      check(client.get(key)->value == key, "the plan of its key");
  check(client.made == kMostPlans, "as many plans as fit are made once");
  const auto held = client.get(0);
  client.get(kMostPlans);
  check(client.made == kMostPlans + 1, "one more is made");
  client.get(0);
  check(client.made == kMostPlans + 1, "the one used since stays");
  client.get(1);
  check(client.made == kMostPlans + 2, "the one used least recently is gone");
  for (int64_t key = 100; key < 300; ++key) client.get(key);
  check(plan_use().plans - before.plans == kMostPlans, "never more than the bound");
  check(client.table.bytes() < kMostPlans * 1500 && client.table.bytes() >= kMostPlans * 1000,
        "bytes add up");
  check(held->value == 0, "a plan in use outlives its place in the table");
  const auto nothing = client.table.get<Plan>({-1}, [] { return std::shared_ptr<const Plan>(); });
  check(!nothing, "that there is no plan is kept too");
  check(!client.table.get<Plan>({-1}, [] { return std::make_shared<const Plan>(); }), "and found");
}

void test_plans_of_all_structures() {
  const PlanUse before = plan_use();
  constexpr int64_t kLarge = kMostPlanBytes / 16;
  {
    std::vector<Client> clients(8);
    for (int64_t key = 0; key < 6; ++key)
      for (Client& client : clients) client.get(key, kLarge);
    const int64_t latest = 8 * kLatestPlans * kLarge;  // twice the bound
    check(plan_use().bytes - before.bytes < latest + 10000, "only the latest plans exceed the bound");
    for (Client& client : clients) {
      client.made = 0;
      for (int64_t key = 6 - kLatestPlans; key < 6; ++key) client.get(key, kLarge);
      check(client.made == 0, "the latest plans of every structure stay");
      client.get(0, kLarge);
      check(client.made == 1, "earlier ones do not");
    }
  }
  check(plan_use().plans == before.plans && plan_use().bytes == before.bytes,
        "plans go with their structure, and their bytes are given back");
}

struct Flag : Owner {
  std::shared_ptr<bool> there;
  explicit Flag(std::shared_ptr<bool> flag) : there(std::move(flag)) {}
  bool gone() const override { return !*there; }
};

void test_structures_go_with_their_owners() {
  const std::vector<int32_t> crow{0, 1};
  const auto find = [&](const int32_t* col, const std::shared_ptr<bool>& there) {
    return find_structure(crow.data(), 2, col, 1, 1, 8, [&] { return std::make_unique<Flag>(there); });
  };
  const int64_t before = cache_use().structures;
  const auto living = std::make_shared<bool>(true), gone = std::make_shared<bool>(false);
  const std::vector<int32_t> kept(500, 3), dropped(10000, 5);
  std::vector<const Structure*> first;
  for (const int32_t& col : kept) first.push_back(find(&col, living).get());
  for (const int32_t& col : dropped) find(&col, gone);
  check(cache_use().structures - before <= 500 + 500 / 8 + 64, "structures without owner are dropped");
  bool same = true;
  for (size_t i = 0; i < kept.size(); ++i) same = same && find(&kept[i], living).get() == first[i];
  check(same, "those of living owners stay");
  for (const int32_t& col : kept) release_structure(crow.data(), &col);
  for (const int32_t& col : dropped) release_structure(crow.data(), &col);
}

void test_structures_of_nobody() {
  const std::vector<int32_t> crow{0, 1}, cols(10000, 5);
  for (const int32_t& col : cols) find_structure(crow.data(), 2, &col, 1, 1, 8);
  check(cache_use().structures <= 300, "structures that nobody owns are few");
  const std::vector<int32_t> large{0, 1 << 20};  // four megabytes each
  std::vector<int32_t> all(64 + (1 << 20));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < 64; ++i) find_structure(large.data(), 2, all.data() + i, 1 << 20, 1, 1 << 21);
  check(cache_use().bytes < int64_t{64} << 20, "and have few bytes");
  for (const int32_t& col : cols) release_structure(crow.data(), &col);
  for (int64_t i = 0; i < 64; ++i) release_structure(large.data(), all.data() + i);
}

template <class F>
void in_threads(int count, F run) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
}

void test_threads_share_plans() {
  Client client;
  std::atomic<int64_t> wrong{0};
  in_threads(4, [&](int seed) {
    for (int64_t i = 0; i < 3000; ++i) {
      const int64_t key = (i * (2 * seed + 1)) % 50;
      const auto plan =
          client.table.get<Plan>({key}, [&] { return std::make_shared<const Plan>(Plan{key, 10}); });
      wrong += plan->value != key;
    }
  });
  check(wrong == 0, "threads find the plans they ask for");
}

void test_threads_share_structures() {
  const std::vector<int32_t> crow{0, 1};
  const std::vector<int32_t> cols(200, 2);
  std::vector<std::vector<std::shared_ptr<const Structure>>> found(4);
  std::atomic<int> ready{0};
  in_threads(4, [&](int thread) {
    for (++ready; ready < 4;) std::this_thread::yield();
    for (const int32_t& col : cols) found[thread].push_back(find_structure(crow.data(), 2, &col, 1, 1, 8));
  });
  check(found[0] == found[1] && found[0] == found[2] && found[0] == found[3],
        "threads that meet new arrays at once get one structure");
  for (const int32_t& col : cols) release_structure(crow.data(), &col);
}

void test_threads_offer() {
  constexpr int64_t kRows = 64, kCols = 500, kWanted = 300;
  const Csr csr = random_csr(kRows, kCols, 0.2);
  const auto kept = std::make_shared<const Structure>(csr.crow.data(), kRows + 1, csr.col.data(),
                                                      static_cast<int64_t>(csr.col.size()), kRows, kCols);
  std::vector<float> score(kRows * kCols);
  for (float& v : score) v = static_cast<float>(uniform());
  LargestK<float> alone(kept, kWanted, 1), shared(kept, kWanted, 2);
  alone.offer(score.data(), 0, kRows, 0, kCols, false);
  in_threads(4, [&](int thread) {
    for (int64_t row = thread; row < kRows; row += 4)
      shared.offer(score.data() + row * kCols, row, 1, 0, kCols, false);
  });
  check(shared.positions() == alone.positions(), "scores that threads offer are merged");
}

// A child has one thread; it must not wait for those of its parent.
[[maybe_unused]] void test_fork() {
  const auto all_ran = [] {
    std::vector<int> ran(9, 0);
    auto body = [&](int slot) { ran[slot] = 1; };
    parallel(3, 9, body);
    return std::all_of(ran.begin(), ran.end(), [](int n) { return n == 1; });
  };
  check(all_ran(), "threads run before a fork");
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    Client client;
    _exit(all_ran() && client.get(1)->value == 1 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "threads run after a fork");
}

}  // namespace

void test_caches() {
  test_plans_of_one_structure();
  test_plans_of_all_structures();
  test_structures_go_with_their_owners();
  test_structures_of_nobody();
  test_threads_share_plans();
  test_threads_share_structures();
  test_threads_offer();
#if !defined(__SANITIZE_THREAD__)  // which ends a child that starts threads
  test_fork();
#endif
}
