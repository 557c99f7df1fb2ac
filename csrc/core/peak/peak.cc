#include "core/peak/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "core/parallel.h"

namespace sparsekd {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work per second of `work(slot)`, which every thread repeats until the time is over; `amount` is that of
// one call. The first call of each thread is not counted: it meets cold caches and a sleeping thread.
template <class F>
double rate(int threads, double seconds, double amount, F work) {
  std::atomic<double> total{0};
  auto body = [&](int slot) {
    work(slot);
    const double begin = now();
    double calls = 0, end = begin;
    while (end - begin < seconds) {
      work(slot);
      ++calls;
      end = now();
    }
    const double own = calls * amount / (end - begin);
    for (double seen = total; !total.compare_exchange_weak(seen, seen + own);) {
    }
  };
  parallel(threads, threads, body);
  return total;
}

// Keeps the compiler from dropping a loop whose result nobody uses.
void use(float value) {
  static std::atomic<float> sink;
  sink.store(value, std::memory_order_relaxed);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

double peak_flops(int threads, double seconds) {
  const PeakEngine& loops = engine<PeakEngine>();
  constexpr int64_t kRounds = 100000;
  return rate(threads, seconds, static_cast<double>(kRounds * loops.flops),
              [&](int) { use(loops.multiply_add(kRounds)); });
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  const PeakEngine& loops = engine<PeakEngine>();
  const int64_t count = ((bytes + 3) / 4 + kPeakStep - 1) / kPeakStep * kPeakStep;
  // One block: the size of each thread's part is a multiple of 64 bytes, so every part is aligned.
  std::unique_ptr<float, Free> data(
      static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>(4 * count * threads))));
  if (!data) throw std::bad_alloc();
  auto fill = [&](int slot) {
    std::memset(data.get() + slot * count, 0, static_cast<std::size_t>(4 * count));
  };
  parallel(threads, threads, fill);
  // Small buffers are read several times between two looks at the clock.
  const int64_t repeats = std::max<int64_t>(1, (1 << 20) / (4 * count));
  return rate(threads, seconds, static_cast<double>(4 * count * repeats), [&](int slot) {
    for (int64_t i = 0; i < repeats; ++i) use(loops.add_up(data.get() + slot * count, count));
  });
}

}  // namespace sparsekd
