#include "core/engine.inl"

#include "core/peak/peak.h"

namespace sparsekd {
namespace {

typedef float Vec __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 4;
// Enough for two fused multiply-adds a cycle at a latency of five, and no more than AVX2 has registers.
constexpr int kChains = 12;

inline float sum_of(const Vec* vectors, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i)
    for (int lane = 0; lane < kLanes; ++lane) sum += vectors[i][lane];
  return sum;
}

float multiply_add(int64_t rounds) {
  Vec chain[kChains] = {};
  Vec factor = Vec{} + 1.0f, term = Vec{} + 1.0f;
  asm volatile("" : "+m"(factor), "+m"(term));  // the compiler must not know that they are 1
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
  }
  return sum_of(chain, kChains);
}

float add_up(const float* data, int64_t count) {
  constexpr int kSums = 8;
  constexpr int64_t kStep = kSums * kLanes;
  static_assert(kPeakStep % kStep == 0, "a step of the loop divides what callers round up to");
  Vec sum[kSums] = {};
  for (int64_t i = 0; i < count; i += kStep) {
    const Vec* at = reinterpret_cast<const Vec*>(data + i);
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) sum[s] += at[s];
  }
  return sum_of(sum, kSums);
}

}  // namespace

template <Isa>
const PeakEngine PeakEngine::compiled{sparsekd::multiply_add, 2 * kChains * kLanes, sparsekd::add_up};
template const PeakEngine PeakEngine::compiled<kIsa>;

}  // namespace sparsekd
