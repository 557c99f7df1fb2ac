// The weight gradient at the nonzeros: each is the sum over images and positions of an output gradient times
// the input at the offset of the nonzero. Part of engine.cc.
//
// A strip of up to 32 positions (16 where an output reads one pixel) is packed, gradient and input. In it
// the nonzeros of a channel in one block of input channels go in groups of up to 12, each with a vector of
// its own that stays in registers over the strip; one load of the gradient serves the group. Only then are
// the lanes of each vector added up, with AVX2 those of eight vectors at once. In a panel of channels the
// loads of the input are shared too, by up to kPanelSums vectors in all.
//
// As in the gather, single channels load an input for every multiply-add and are limited by the load ports,
// and blocks of input channels are cut for L1. Each thread has its own array of sums; they are added in a
// fixed order. Tests: test_convolution (core_tests.cc) compares with scalar.cc and expects the same bits
// from a second run.

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

// One group of lanes, chunk of rows and range of output channels, and the lanes that read them.
template <class T>
struct WgradPlace {
  int64_t begin, end, h0, h1;
  View4<const T> grad;
  Window grad_window;
  Lane<const T> x_lanes[kLanes<T>], grad_lanes[kLanes<T>];

  WgradPlace(const WgradCall<T>& call, const Schedule& s, int64_t group, int64_t chunk, int64_t begin,
             int64_t end)
      : begin(begin), end(end), grad(call.grad) {
    h0 = chunk * s.chunk_rows;
    h1 = min64(s.strip_rows, h0 + s.chunk_rows);
    grad.data += begin * grad.stride_c;
    grad.c = end - begin;
    grad_window.channels = grad.c;
    grad_window.width = grad_window.pitch = grad.w;
    point_lanes(call.x, s, group, call.plan->window.rows.stride, x_lanes);
    point_lanes(grad, s, group, 1, grad_lanes);
    for (Lane<const T>& lane : grad_lanes) lane.rows = min64(lane.rows, lane.row0 + s.strip_rows);
  }
};

// All nonzeros of the channels, block by block, for one strip of rows cut into pieces that fit L1.
template <class T>
void sample_strip(const WgradCall<T>& call, const WgradPlace<T>& place, const Strip& strip, T* out) {
  const WgradPlan& plan = *call.plan;
  const int64_t blocks = plan.blocks;
  const int64_t pieces = (strip.cols + plan.piece_cols - 1) / plan.piece_cols;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t w = strip.cols * i / pieces;
    Strip piece = strip;
    piece.cols = strip.cols * (i + 1) / pieces - w;
    piece.x += w * strip.x_step;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t ch = place.begin; ch < place.end; ch += plan.panel_rows[ch]) {
        const int32_t* begin = plan.list_begin.data() + ch * blocks + b;
        piece.grad = strip.grad + (ch - place.begin) * strip.grad_channel + w * kPixelBytes;
        const int32_t* const list = plan.offset.data() + begin[0];
        const int32_t count = begin[1] - begin[0];
        if (plan.panel_rows[ch] > 1)
          sample_panel(plan.panel_rows[ch], piece, list, count, out + begin[0], begin[blocks] - begin[0]);
        else
          sample_list<T, 1>(piece, list, count, out + begin[0], 0);
      }
  }
}

// Adds the contribution of one place to out [nnz].
template <class T>
void wgrad_item(const WgradCall<T>& call, const WgradPlace<T>& place, T* out) {
  const Window& window = call.plan->window;
  const int64_t rows_left = place.h1 - place.h0, step = window.rows.step;
  // Rows taken together need all the rows of the window between them.
  const int64_t buffered = RollingWindow<T>::kBufferBytes / window.row_bytes() / step;
  const int64_t together =
      max64(1, min64(min64(rows_left, call.plan->strip_pixels / place.grad.w), 1 + buffered));
  const int64_t grad_row = place.grad_window.row_bytes();
  char* packed = static_cast<char*>(scratch(Scratch::kGradient, together * grad_row));
  RollingWindow<T> rows(window, rows_left, (together - 1) * step);
  rows.restart(place.h0 * step);
  for (int64_t h = place.h0, count; h < place.h1; h += count) {
    count = min64(together, place.h1 - h);
    Strip strip{nullptr,
                rows.advance(call.x, place.x_lanes, h * step),
                count,
                place.grad.w,
                grad_row,
                place.grad.w * kPixelBytes,
                step * window.row_bytes(),
                window.cols.step * kPixelBytes};
    for (int64_t r = 0; r < count; ++r)
      pack_row(place.grad, place.grad_window, place.grad_lanes, h + r,
               reinterpret_cast<T*>(packed + r * grad_row));
    strip.grad = packed;
    sample_strip(call, place, strip, out);
  }
}

template <class T>
void wgrad(const WgradCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.grad.n, call.grad.h, call.grad.c, window.rows.span - window.rows.step,
                                   kLanes<T>, call.threads, 2);
  const int64_t places = s.groups * s.chunks, nnz = call.weight->nnz;
  const int32_t* crow = call.weight->crow.data();
  // Which items share a sum depends on the number of threads alone, and the sums are added in order.
  const int64_t sums = s.parts > 1 ? places : min64(call.threads, places);
  T* partial = static_cast<T*>(scratch(Scratch::kPartial, sums * nnz * sizeof(T)));
  auto work = [&](int slot) {
    const int64_t sum = slot / s.parts, part = slot % s.parts;
    const int64_t begin = panel_cut(call.grad.c * part / s.parts, call.grad.c),
                  end = panel_cut(call.grad.c * (part + 1) / s.parts, call.grad.c);
    T* out = partial + sum * nnz;
    std::memset(out + crow[begin], 0, (crow[end] - crow[begin]) * sizeof(T));
    for (int64_t place = places * sum / sums; place < places * (sum + 1) / sums; ++place)
      wgrad_item(call, WgradPlace<T>(call, s, place / s.chunks, place % s.chunks, begin, end), out);
  };
  parallel(call.threads, static_cast<int>(sums * s.parts), work);

  auto reduce = [&](int slot) {
    for (int64_t k = nnz * slot / call.threads; k < nnz * (slot + 1) / call.threads; ++k) {
      T total = partial[k];
      for (int64_t i = 1; i < sums; ++i) total += partial[i * nnz + k];
      call.dvalues[k] = total;
    }
  };
  parallel(nnz > 4096 ? call.threads : 1, call.threads, reduce);
}
