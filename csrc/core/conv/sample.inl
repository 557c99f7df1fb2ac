// The weight gradient at the nonzeros of one strip of positions: each is the sum of an output gradient times
// the input at the offset of the nonzero. Part of engine.cc.
//
// In a strip the nonzeros of a channel in one block of input channels go in groups of up to 10, each with a
// vector of its own that stays in registers over the strip; one load of the gradient serves the group. Only
// then are the lanes of each vector added up, with AVX2 those of eight vectors at once. In a panel of
// channels the loads of the input are shared too, by up to kPanelSums vectors in all. As in the gather,
// single channels load an input for every multiply-add and are limited by the load ports.

// Nonzeros taken together. More share a load of the gradient, but each keeps an address in a general
// register, and addresses that do not fit there cost a vector register and a move at every use.
template <int Outs>
constexpr int kMostSampled = Outs == 1                ? 10
                             : Outs * 8 <= kPanelSums ? 8
                                                      : kPanelSums / Outs;

// Calls f(0) to f(N - 1). GCC unrolls a loop that is in no other loop only after it has decided which arrays
// become registers; with this one, arrays of sums do.
template <int N, class F>
__attribute__((always_inline)) inline void unrolled(F f) {
  if constexpr (N > 1) unrolled<N - 1>(f);
  f(N - 1);
}

#if defined(__AVX2__)
#if SPARSEKD_VECTOR_BYTES == 64 && defined(__AVX512F__)
// The sums of the elements of Count <= 8 vectors; what follows them is arbitrary. Each step adds the halves
// of two vectors into one, until a quarter of it holds what is left of one vector, or of two.
template <int Count>
inline __m256 add_eight(const Vec<float>* sum) {
  constexpr int Low = 0x44, High = 0xEE, Even = 0x88, Odd = 0xDD;  // quarters (0, 1), (2, 3), (0, 2), (1, 3)
  constexpr int Pairs = (Count + 1) / 2, Fours = (Count + 3) / 4;
  __m512 pair[Pairs], four[Fours];
  unrolled<Pairs>([&](int i) __attribute__((always_inline)) {
    const __m512 a = (__m512)sum[2 * i], b = (__m512)sum[2 * i + 1 < Count ? 2 * i + 1 : 2 * i];
    pair[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, Low), _mm512_shuffle_f32x4(a, b, High));
  });
  unrolled<Fours>([&](int i) __attribute__((always_inline)) {
    const __m512 a = pair[2 * i], b = pair[2 * i + 1 < Pairs ? 2 * i + 1 : 2 * i];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, Even), _mm512_shuffle_f32x4(a, b, Odd));
  });
  const __m512 a = four[0], b = four[Fours - 1];
  const __m512 halves = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 all = _mm512_add_ps(halves, _mm512_permute_ps(halves, 0x4E));
  const __m512i order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13));
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all));
}
#else
// The sums of the elements of Count <= 8 vectors, then zeros. Eight horizontal sums at once cost about as
// much as one done lane by lane.
template <int Count>
inline __m256 add_eight(const Vec<float>* sum) {
  __m256 s[8];
  unrolled<8>([&](int u) __attribute__((always_inline)) {
    if (u >= Count) {
      s[u] = _mm256_setzero_ps();
      return;
    }
#if SPARSEKD_VECTOR_BYTES == 64
    __m256 half[2];
    std::memcpy(half, &sum[u], sizeof(half));
    s[u] = _mm256_add_ps(half[0], half[1]);
#else
    s[u] = (__m256)sum[u];
#endif
  });
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
#endif

// out[u] += more[u] for u < Count.
template <int Count>
inline void add_to(float* out, __m256 more) {
  if constexpr (Count == 8) {
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), more));
  } else {
#if defined(__AVX512VL__)
    constexpr __mmask8 mask = (1 << Count) - 1;
    _mm256_mask_storeu_ps(out, mask, _mm256_add_ps(_mm256_maskz_loadu_ps(mask, out), more));
#else
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(Count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    _mm256_maskstore_ps(out, mask, _mm256_add_ps(_mm256_maskload_ps(out, mask), more));
#endif
  }
}

// total[u] = the sum of the elements of sum[u] for u < Count; writes up to seven elements more.
template <int Count, int First = 0>
inline void add_all(const Vec<float>* sum, float* total) {
  _mm256_storeu_ps(total + First, add_eight < Count - First<8 ? Count - First : 8>(sum + First));
  if constexpr (First + 8 < Count) add_all<Count, First + 8>(sum, total);
}
#endif

// out[o * next + u] += the sum of the elements of sum[o * Count + u].
template <class T, int Outs, int Count>
inline void add_sums(const Vec<T>* sum, T* out, int64_t next) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float) && Outs == 1) {
    constexpr int Some = Count < 8 ? Count : 8;
    add_to<Some>(out, add_eight<Some>(sum));
    if constexpr (Count > 8) add_to<Count - 8>(out + 8, add_eight<Count - 8>(sum + 8));
    return;
  } else if constexpr (sizeof(T) == sizeof(float)) {
    float total[Outs * Count + 8];  // of all channels, so that no sum of eight is left unused
    add_all<Outs * Count>(sum, total);
    for (int o = 0; o < Outs; ++o) add_to<Count>(out + o * next, _mm256_loadu_ps(total + o * Count));
    return;
  }
#endif
  constexpr int W = kVectorBytes / static_cast<int>(sizeof(T));
  unrolled<Outs * Count>([&](int u) __attribute__((always_inline)) {
    const Vec<T> lanes = sum[u];
    T total = T(0);
    for (int i = 0; i < W; ++i) total += lanes[i];
    out[u / Count * next + u % Count] += total;
  });
}

// A strip of positions: `rows` rows of `cols` pixels, of the packed gradient and of the window.
struct Strip {
  const char *grad, *x;
  int64_t rows, cols;
  int64_t grad_row, grad_channel, x_row, x_step;  // bytes
};

// Sums of every nonzero, which positions use in turn: few nonzeros alone would wait for the latency of
// theirs.
template <int Outs, int Count>
constexpr int kSets = Outs * Count * kVectors <= 2               ? 4
                      : Outs * Count * kVectors <= kAccumulators ? 2
                                                                 : 1;

// Has a vector that several multiply-adds use read from memory once, where GCC would read it for each.
template <class V>
__attribute__((always_inline)) inline void keep_in_register([[maybe_unused]] V& vector) {
#if SPARSEKD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif SPARSEKD_VECTOR_BYTES == 32 && defined(__AVX2__)
  asm("" : "+x"(vector));
#endif
}

// sum[o * Count + u] += gradient of channel o * input u, for one position.
template <class T, int Outs, int Count>
__attribute__((always_inline)) inline void add_position(const char* g, int64_t channel, const char* const* x,
                                                        int64_t at, Vec<T>* sum) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Vec<T> gradient[Outs];
#pragma GCC unroll 4
    for (int o = 0; o < Outs; ++o) {
      gradient[o] = load<T>(g + o * channel + v * kVectorBytes);
      if constexpr (Outs > 1 && Count > 1) keep_in_register(gradient[o]);
    }
#pragma GCC unroll 16
    for (int u = 0; u < Count; ++u) {
      Vec<T> in = load<T>(x[u] + at + v * kVectorBytes);
      if constexpr (Outs > 1) keep_in_register(in);
#pragma GCC unroll 4
      for (int o = 0; o < Outs; ++o) sum[o * Count + u] += gradient[o] * in;
    }
  }
}

// out[o * next + u] += the sum over the strip for nonzeros u of Outs output channels that share a list.
// Inputs of neighbouring positions lie Step bytes apart (x_step, if Step is 0): a constant folds into the
// addresses, and one index serves gradient and inputs.
template <class T, int Outs, int Count, int64_t Step>
__attribute__((noinline)) void sample(const Strip& strip, const int32_t* offset, T* out, int64_t next) {
  constexpr int Sums = Outs * Count, Sets = kSets<Outs, Count>, Turn = Outs == 1 && Sets == 1 ? 2 : Sets;
  static_assert(Step == 0 || Step == kPixelBytes);
  const int64_t step = Step ? Step : strip.x_step;
  Vec<T> sum[Sets][Sums] = {};
  for (int64_t r = 0; r < strip.rows; ++r) {
    const char* const g = strip.grad + r * strip.grad_row;
    const char* const row = strip.x + r * strip.x_row;
    const char* x[Count];
#pragma GCC unroll 16
    for (int u = 0; u < Count; ++u) x[u] = row + offset[u];
    const int64_t end = strip.cols * kPixelBytes;
    int64_t at = 0, x_at = 0;
    for (; at + Turn * kPixelBytes <= end; at += Turn * kPixelBytes, x_at += Turn * step)
#pragma GCC unroll 4
      for (int i = 0; i < Turn; ++i)
        add_position<T, Outs, Count>(g + at + i * kPixelBytes, strip.grad_channel, x,
                                     (Step ? at : x_at) + i * step, sum[i % Sets]);
    for (; at < end; at += kPixelBytes, x_at += step)
      add_position<T, Outs, Count>(g + at, strip.grad_channel, x, Step ? at : x_at, sum[0]);
  }
  if constexpr (Sets > 1)
    unrolled<(Sets - 1) * Sums>(
        [&](int i) __attribute__((always_inline)) { sum[0][i % Sums] += sum[1 + i / Sums][i % Sums]; });
  add_sums<T, Outs, Count>(sum[0], out, next);
}

template <class T, int Outs, int64_t Step, int Count = kMostSampled<Outs>>
inline void sample_few(const Strip& strip, const int32_t* offset, int64_t count, T* out, int64_t next) {
  if (count == Count) return sample<T, Outs, Count, Step>(strip, offset, out, next);
  if constexpr (Count > 1) sample_few<T, Outs, Step, Count - 1>(strip, offset, count, out, next);
}

// Groups of nearly equal size: a last group of one or two would cost as much as one of eight.
template <class T, int Outs>
inline void sample_list(const Strip& strip, const int32_t* offset, int64_t count, T* out, int64_t next) {
  for (int64_t groups = (count + kMostSampled<Outs> - 1) / kMostSampled<Outs>; groups > 0; --groups) {
    const int64_t some = count / groups;
    if (strip.x_step == kPixelBytes)
      sample_few<T, Outs, kPixelBytes>(strip, offset, some, out, next);
    else
      sample_few<T, Outs, 0>(strip, offset, some, out, next);
    offset += some;
    out += some;
    count -= some;
  }
}

// The list of a panel of `outs` channels, whose values stand `next` apart. Not inlined, so that the loops
// over single channels stay as tight as without it.
template <class T, int Outs = kPanelRows>
__attribute__((noinline)) void sample_panel(int outs, const Strip& strip, const int32_t* offset,
                                            int64_t count, T* out, int64_t next) {
  if (outs == Outs) return sample_list<T, Outs>(strip, offset, count, out, next);
  if constexpr (Outs > 2) sample_panel<T, Outs / 2>(outs, strip, offset, count, out, next);
}
