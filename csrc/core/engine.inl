// What the kernels of all ops share. Each source that CMakeLists.txt compiles once for each instruction set
// includes it first; SPARSEKD_ENGINE (of enum Isa) and SPARSEKD_VECTOR_BYTES come from there.
//
// In these sources everything has internal linkage and no library template is instantiated that could also be
// emitted elsewhere: a function compiled for AVX-512 must never be the one the linker keeps for everybody.
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/engine.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

constexpr Isa kIsa = Isa::SPARSEKD_ENGINE;
constexpr int kVectorBytes = SPARSEKD_VECTOR_BYTES;

// The sums of a panel that are kept at once: registers hold them beside the inputs and a weight.
constexpr int kPanelSums = kVectorBytes == 64 ? 24 : 8;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Streamed stores are not ordered with the ones that tell another thread that the result is there.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Transposes 8 x 8 floats in registers.
#if defined(__AVX2__)
inline void transpose8(__m256 r[8]) {
  const __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 t4 = _mm256_unpacklo_ps(r[4], r[5]), t5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 t6 = _mm256_unpacklo_ps(r[6], r[7]), t7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 u0 = _mm256_shuffle_ps(t0, t2, 0x44), u1 = _mm256_shuffle_ps(t0, t2, 0xEE);
  const __m256 u2 = _mm256_shuffle_ps(t1, t3, 0x44), u3 = _mm256_shuffle_ps(t1, t3, 0xEE);
  const __m256 u4 = _mm256_shuffle_ps(t4, t6, 0x44), u5 = _mm256_shuffle_ps(t4, t6, 0xEE);
  const __m256 u6 = _mm256_shuffle_ps(t5, t7, 0x44), u7 = _mm256_shuffle_ps(t5, t7, 0xEE);
  r[0] = _mm256_permute2f128_ps(u0, u4, 0x20);
  r[1] = _mm256_permute2f128_ps(u1, u5, 0x20);
  r[2] = _mm256_permute2f128_ps(u2, u6, 0x20);
  r[3] = _mm256_permute2f128_ps(u3, u7, 0x20);
  r[4] = _mm256_permute2f128_ps(u0, u4, 0x31);
  r[5] = _mm256_permute2f128_ps(u1, u5, 0x31);
  r[6] = _mm256_permute2f128_ps(u2, u6, 0x31);
  r[7] = _mm256_permute2f128_ps(u3, u7, 0x31);
}
#endif

}  // namespace
}  // namespace sparsekd
