// Scores in order, the kernels of largest.cc: magnitudes and a count of NaN, then those that reach a bar,
// with their positions.
//
// Nothing stays in registers but the bar and a count. With AVX-512 one compare rejects 16 scores, or a
// compressing store keeps those that pass; elsewhere every score is written and the end moves only past good
// ones, so there is no branch to predict. What limits the speed is reading the scores from memory the first
// time: largest.cc cuts chunks that the second pass finds in L1. Tests: test_largest (growth_tests.cc)
// compares with a full sort, ties and NaN included.
#include "core/grow/scan.h"

#include "core/engine.inl"

namespace sparsekd {
namespace {

template <class T>
int64_t prepare(const T* value, int64_t count, bool magnitude, T* score) {
  int nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T v = value[i];
    score[i] = magnitude && !(v > 0) ? -v : v;
    nan += v != v;
  }
  return nan;
}

// Every entry is written and only the good ones counted: no branch to predict.
template <class T>
int64_t collect_tail(const T* score, const int32_t* position, int32_t first, int64_t from, int64_t count,
                     T bar, T* scores, int32_t* positions, int64_t size) {
  for (int64_t i = from; i < count; ++i) {
    const T s = score[i];
    const int32_t p = position ? position[i] : first + static_cast<int32_t>(i);
    scores[size] = s;
    positions[size] = p;
    size += s >= bar;
  }
  return size;
}

template <class T>
int64_t collect(const T* score, const int32_t* position, int32_t first, int64_t count, T bar, T* scores,
                int32_t* positions) {
  return collect_tail(score, position, first, 0, count, bar, scores, positions, 0);
}

#if defined(__AVX512F__)
template <>
int64_t collect<float>(const float* score, const int32_t* position, int32_t first, int64_t count, float bar,
                       float* scores, int32_t* positions) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 least = _mm512_set1_ps(bar);
  int64_t size = 0, i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 s = _mm512_loadu_ps(score + i);
    const __mmask16 good = _mm512_cmp_ps_mask(s, least, _CMP_GE_OQ);
    if (!good) continue;
    const __m512i p = position ? _mm512_loadu_si512(position + i)
                               : _mm512_add_epi32(_mm512_set1_epi32(first + static_cast<int32_t>(i)), steps);
    _mm512_storeu_ps(scores + size, _mm512_maskz_compress_ps(good, s));
    _mm512_storeu_si512(positions + size, _mm512_maskz_compress_epi32(good, p));
    size += __builtin_popcount(good);
  }
  return collect_tail(score, position, first, i, count, bar, scores, positions, size);
}
#endif

}  // namespace

template <class T>
template <Isa>
const ScanEngine<T> ScanEngine<T>::compiled{sparsekd::prepare<T>, sparsekd::collect<T>};
template const ScanEngine<float> ScanEngine<float>::compiled<kIsa>;
template const ScanEngine<double> ScanEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
