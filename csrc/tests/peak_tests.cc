// The loops behind the roofs compute what they claim, for every instruction set of this processor; how fast
// they are is not tested.
#include <cstdlib>
#include <memory>

#include "core/cpu.h"
#include "core/peak/peak.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

// A block of exactly `count` floats, so that the sanitizer sees a read past its end.
std::unique_ptr<float, void (*)(void*)> block(int64_t count) {
  void* memory = std::aligned_alloc(64, static_cast<std::size_t>(4 * count));
  return {static_cast<float*>(memory), std::free};
}

}  // namespace

void test_peak() {
  const std::string before = isa_name(current_isa());
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    const std::string name = std::string("peak loops, ") + isa_name(isa);
    const PeakEngine& loops = engine<PeakEngine>();
    // Each of the chains' lanes counts to 1000: half as many additions as operations.
    check(loops.multiply_add(1000) == 1000.0f * static_cast<float>(loops.flops / 2), name + ": multiply-add");
    for (int64_t steps : {1, 2, 7}) {
      const int64_t count = steps * kPeakStep;
      const auto data = block(count);
      for (int64_t i = 0; i < count; ++i) data.get()[i] = static_cast<float>(i % 16);
      check(loops.add_up(data.get(), count) == 7.5f * static_cast<float>(count), name + ": sum");
    }
    for (int threads : {1, 2}) {
      check(peak_flops(threads, 1e-4) > 0, name + ": peak");
      for (int64_t bytes : {1, 5000, 1 << 21})
        check(read_bandwidth(bytes, threads, 1e-4) > 0, name + ": bandwidth");
    }
  }
  set_isa(before);
}
