// The two loops whose speed is a roof, see peak.h.
//
// multiply_add keeps 12 accumulators in registers and touches no memory: enough chains for two fused
// multiply-adds a cycle at a latency of five, and with two operands no more than the 16 registers of AVX2.
// add_up reads once through a buffer into eight sums, so that loads limit it and not the latency of an
// addition. Tests: peak_tests.cc checks their sums.
#include "core/engine.inl"

#include "core/peak/peak.h"

namespace sparsekd {
namespace {

typedef float Vec __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 4;
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
