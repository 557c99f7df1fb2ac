#include "core/cpu.h"

#include <atomic>
#include <cstdlib>
#include <fstream>

#include "core/error.h"

namespace sparsekd {
namespace {

Isa best_isa() { return available_isas().back(); }

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// Adds the cache that Linux lists under `index`, if it holds data. Not sysconf, which counts the last level
// of every core complex of the package and not the one that a thread can fill.
void read_cache(int index, CacheSizes* sizes) {
  const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
  const auto read = [&](const char* name) {
    std::string text;
    std::ifstream(folder + name) >> text;
    return text;
  };
  const std::string level = read("level"), size = read("size");
  if (size.empty() || read("type") == "Instruction") return;
  const long unit = size.back() == 'K' ? 1L << 10 : size.back() == 'M' ? 1L << 20 : 1L;
  const long bytes = std::strtol(size.c_str(), nullptr, 10) * unit;
  if (level == "1") sizes->l1d = bytes;
  if (level == "2") sizes->l2 = bytes;
  if (level == "3") sizes->l3 = bytes;
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
    for (int index = 0; index < 8; ++index) read_cache(index, &found);
    if (found.l1d <= 0) found.l1d = 32 << 10;
    if (found.l2 <= 0) found.l2 = 512 << 10;
    if (found.l3 <= 0) found.l3 = 16 << 20;
    return found;
  }();
  return sizes;
}

bool outgrows_caches(int64_t bytes) { return bytes > cache_sizes().l3 / 2; }

}  // namespace sparsekd
