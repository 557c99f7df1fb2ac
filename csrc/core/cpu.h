// Which instruction set runs: the best the processor has, unless a caller pins one.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparsekd {

// Ordered: a later one is preferred. kScalar is the oracle and is never chosen by itself.
enum class Isa { kScalar, kGeneric, kAvx2, kAvx512 };

// One entry for each instruction set that the engines are compiled for; dispatch and tests read this table.
#if defined(__x86_64__)
#define SPARSEKD_FOR_EACH_ENGINE(X) X(generic, kGeneric) X(avx2, kAvx2) X(avx512, kAvx512)
#else
#define SPARSEKD_FOR_EACH_ENGINE(X) X(generic, kGeneric)
#endif

// prefix joined with the SPARSEKD_ENGINE that a source defines: the name of its table entry.
#define SPARSEKD_JOIN(a, b) a##b
#define SPARSEKD_EXPAND(a, b) SPARSEKD_JOIN(a, b)
#define SPARSEKD_ENGINE_NAME(prefix) SPARSEKD_EXPAND(prefix, SPARSEKD_ENGINE)

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
