// Which instruction set runs: the best the processor has, unless a caller pins one.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparsekd {

// Ordered: a later one is preferred. kScalar is the oracle and is never chosen by itself.
enum class Isa { kScalar, kGeneric, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
std::vector<Isa> available_isas();
Isa current_isa();

// "auto" or a name from available_isas(); throws UnsupportedError naming what this processor has.
void set_isa(const std::string& name);

struct CacheSizes {
  long l1d, l2;  // bytes, for one core
  long l3;       // bytes, shared
};
CacheSizes cache_sizes();

// Whether a result of so many bytes will have left the caches when somebody reads it.
bool outgrows_caches(int64_t bytes);

}  // namespace sparsekd
