// The weight gradient at the nonzeros of one strip of positions: each is the sum of an output gradient times
// the input at the offset of the nonzero. Part of engine.cc.
//
// In a strip the nonzeros of a channel in one block of input channels go in groups of up to 12, each with a
// vector of its own that stays in registers over the strip; one load of the gradient serves the group. Only
// then are the lanes of each vector added up, with AVX2 those of eight vectors at once. In a panel of
// channels the loads of the input are shared too, by up to kPanelSums vectors in all. As in the gather,
// single channels load an input for every multiply-add and are limited by the load ports.

// More accumulators share a gradient load among more nonzeros; these leave registers for the loads.
template <int Outs>
constexpr int kMostSampled = Outs == 1                ? 12
                             : Outs * 8 <= kPanelSums ? 8
                                                      : kPanelSums / Outs;

#if defined(__AVX2__)
// The sums of the elements of Count vectors, then zeros. Eight horizontal sums at once cost about as much as
// one done lane by lane.
template <int Count>
inline __m256 add_eight(const Vec<float>* sum) {
  __m256 s[8];
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) {
    if (u >= Count) {
      s[u] = _mm256_setzero_ps();
      continue;
    }
#if SPARSEKD_VECTOR_BYTES == 64 && defined(__AVX512F__)
    const __m512 v = (__m512)sum[u];
    s[u] = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif SPARSEKD_VECTOR_BYTES == 64
    __m256 half[2];
    std::memcpy(half, &sum[u], sizeof(half));
    s[u] = _mm256_add_ps(half[0], half[1]);
#else
    s[u] = (__m256)sum[u];
#endif
  }
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// out[u] += more[u] for u < Count.
template <int Count>
inline void add_to(float* out, __m256 more) {
  const __m256i mask =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(Count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_maskstore_ps(out, mask, _mm256_add_ps(_mm256_maskload_ps(out, mask), more));
}

// total[u] = the sum of the elements of sum[u] for u < Count.
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
  for (int u = 0; u < Outs * Count; ++u) {
    T total = T(0);
    for (int i = 0; i < W; ++i) total += sum[u][i];
    out[u / Count * next + u % Count] += total;
  }
}

// A strip of positions: `rows` rows of `cols` pixels, of the packed gradient and of the window.
struct Strip {
  const char *grad, *x;
  int64_t rows, cols;
  int64_t grad_row, grad_channel, x_row, x_step;  // bytes
};

// Positions taken at once: few nonzeros alone would wait for the latency of their sums.
template <int Sums>
constexpr int kSideBySide = Sums * kVectors <= 2   ? 4
                            : Sums * kVectors <= 4 ? 2
                                                   : 1;

// sum[o * Count + u] += gradient of channel o * input u, for one position.
template <class T, int Outs, int Count>
__attribute__((always_inline)) inline void add_position(const char* g, int64_t channel, const char* const* x,
                                                        int64_t at, Vec<T>* sum) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Vec<T> gradient[Outs];
#pragma GCC unroll 4
    for (int o = 0; o < Outs; ++o) gradient[o] = load<T>(g + o * channel + v * kVectorBytes);
#pragma GCC unroll 16
    for (int u = 0; u < Count; ++u) {
      const Vec<T> in = load<T>(x[u] + at + v * kVectorBytes);
#pragma GCC unroll 4
      for (int o = 0; o < Outs; ++o) sum[o * Count + u] += gradient[o] * in;
    }
  }
}

// out[o * next + u] += the sum over the strip for nonzeros u of Outs output channels that share a list.
template <class T, int Outs, int Count>
inline void sample(const Strip& strip, const int32_t* offset, T* out, int64_t next) {
  constexpr int Sums = Outs * Count, Side = kSideBySide<Sums>;
  Vec<T> sum[Side][Sums];
#pragma GCC unroll 32
  for (int i = 0; i < Side * Sums; ++i) sum[i / Sums][i % Sums] = Vec<T>{};
  for (int64_t r = 0; r < strip.rows; ++r) {
    const char* g = strip.grad + r * strip.grad_row;
    const char* row = strip.x + r * strip.x_row;
    const char* x[Count];
#pragma GCC unroll 16
    for (int u = 0; u < Count; ++u) x[u] = row + offset[u];
    int64_t c = 0, at = 0;
    for (; c + Side <= strip.cols; c += Side)
#pragma GCC unroll 4
      for (int i = 0; i < Side; ++i, g += kPixelBytes, at += strip.x_step)
        add_position<T, Outs, Count>(g, strip.grad_channel, x, at, sum[i]);
    for (; c < strip.cols; ++c, g += kPixelBytes, at += strip.x_step)
      add_position<T, Outs, Count>(g, strip.grad_channel, x, at, sum[0]);
  }
#pragma GCC unroll 32
  for (int i = Sums; i < Side * Sums; ++i) sum[0][i % Sums] += sum[i / Sums][i % Sums];
  add_sums<T, Outs, Count>(sum[0], out, next);
}

template <class T, int Outs, int Count = kMostSampled<Outs>>
inline void sample_few(const Strip& strip, const int32_t* offset, int64_t count, T* out, int64_t next) {
  if (count == Count) return sample<T, Outs, Count>(strip, offset, out, next);
  if constexpr (Count > 1) sample_few<T, Outs, Count - 1>(strip, offset, count, out, next);
}

// Groups of nearly equal size: a last group of one or two would cost as much as one of eight.
template <class T, int Outs>
inline void sample_list(const Strip& strip, const int32_t* offset, int64_t count, T* out, int64_t next) {
  for (int64_t groups = (count + kMostSampled<Outs> - 1) / kMostSampled<Outs>; groups > 0; --groups) {
    const int64_t some = count / groups;
    sample_few<T, Outs>(strip, offset, some, out, next);
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
