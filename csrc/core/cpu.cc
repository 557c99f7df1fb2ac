#include "core/cpu.h"

#include <unistd.h>

#include <atomic>

#include "core/error.h"

namespace sparsekd {
namespace {

Isa best_isa() { return available_isas().back(); }

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kScalar, Isa::kGeneric};
#if defined(__x86_64__)
  __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::kAvx2);
#if defined(SPARSEKD_WIDE_AVX2)
  if (isas.back() == Isa::kAvx2) isas.push_back(Isa::kAvx512);  // whose engine needs no more in this build
#else
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    isas.push_back(Isa::kAvx512);
#endif
#endif
  return isas;
}

Isa current_isa() { return selected().load(); }

void set_isa(const std::string& name) {
  if (name == "auto") {
    selected() = best_isa();
    return;
  }
  std::string known = "auto";
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) {
      selected() = isa;
      return;
    }
    known += std::string(", ") + isa_name(isa);
  }
  throw UnsupportedError("isa: expected one of " + known + " on this processor, got '" + name + "'");
}

CacheSizes cache_sizes() {
  static const CacheSizes sizes = [] {
    CacheSizes found{0, 0, 0};
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    found = {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)};
#endif
    if (found.l1d <= 0) found.l1d = 32 << 10;
    if (found.l2 <= 0) found.l2 = 512 << 10;
    if (found.l3 <= 0) found.l3 = 16 << 20;
    return found;
  }();
  return sizes;
}

bool outgrows_caches(int64_t bytes) { return bytes > cache_sizes().l3 / 2; }

}  // namespace sparsekd
