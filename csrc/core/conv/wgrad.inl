// Part of engine.inl: the weight gradient at the nonzeros. A few nonzeros of one output channel keep one
// accumulator each over a strip of positions, so one gradient load serves all of them.

template <class T, int Count>
inline void add_sums(const Vec<T>* sum, T* out) {
  constexpr int W = kVectorBytes / static_cast<int>(sizeof(T));
  for (int u = 0; u < Count; ++u) {
    T total = T(0);
    for (int i = 0; i < W; ++i) total += sum[u][i];
    out[u] += total;
  }
}

#if defined(__AVX512F__) || (defined(__AVX2__) && SPARSEKD_VECTOR_BYTES == 32)
// Eight horizontal sums at once cost about as much as one done lane by lane.
template <>
inline void add_sums<float, 8>(const Vec<float>* sum, float* out) {
  __m256 s[8];
  for (int u = 0; u < 8; ++u) {
#if SPARSEKD_VECTOR_BYTES == 64
    const __m512 v = (__m512)sum[u];
    s[u] = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    s[u] = (__m256)sum[u];
#endif
  }
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  const __m256 total = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), total));
}
#endif

// A strip of positions: `rows` rows of `cols` pixels, of the packed gradient and of the window.
struct Strip {
  const char *grad, *x;
  int64_t rows, cols;
  int64_t grad_row, x_row, x_step;  // bytes
};

template <class T, int Count>
inline void sample(const Strip& strip, const int32_t* offset, T* out) {
  Vec<T> sum[Count];
  for (int u = 0; u < Count; ++u) sum[u] = Vec<T>{};
  for (int64_t r = 0; r < strip.rows; ++r) {
    const char* g = strip.grad + r * strip.grad_row;
    const char* x[Count];
    for (int u = 0; u < Count; ++u) x[u] = strip.x + r * strip.x_row + offset[u];
    for (int64_t c = 0, at = 0; c < strip.cols; ++c, g += kPixelBytes, at += strip.x_step)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> gradient = load<T>(g + v * kVectorBytes);
#pragma GCC unroll 8
        for (int u = 0; u < Count; ++u) sum[u] += gradient * load<T>(x[u] + at + v * kVectorBytes);
      }
  }
  add_sums<T, Count>(sum, out);
}

template <class T>
void sample_channel(const Strip& strip, const int32_t* offset, int64_t count, T* out) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) sample<T, 8>(strip, offset + k, out + k);
  if (k + 4 <= count) {
    sample<T, 4>(strip, offset + k, out + k);
    k += 4;
  }
  for (; k < count; ++k) sample<T, 1>(strip, offset + k, out + k);
}

// Adds the contribution of one group of lanes and chunk of rows, channels [begin, end), to out [nnz].
template <class T>
void wgrad_item(const WgradCall<T>& call, const Schedule& s, int64_t group, int64_t chunk, int64_t begin,
                int64_t end, T* out) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kStripPixels = 32;  // long enough that summing the accumulators up costs little
  const Window& window = call.plan->window;
  const int32_t *crow = call.weight->crow.data(), *offset = call.plan->offset.data();
  const int64_t h0 = chunk * s.chunk_rows, h1 = min64(s.strip_rows, h0 + s.chunk_rows);

  View4<const T> grad = call.grad;
  grad.data += begin * grad.stride_c;
  grad.c = end - begin;
  Window grad_window;
  grad_window.channels = grad.c;
  grad_window.span_h = 1;
  grad_window.cols = grad_window.pitch = grad.w;

  Lane<const T> x_lanes[L], grad_lanes[L];
  point_lanes(call.x, s, group, window.step_h, x_lanes);
  point_lanes(grad, s, group, 1, grad_lanes);
  for (int lane = 0; lane < L; ++lane)
    grad_lanes[lane].rows = min64(grad_lanes[lane].rows, grad_lanes[lane].row0 + s.strip_rows);

  // Rows taken together need all the input rows between them, so a long stride allows fewer.
  const int64_t buffered = RollingWindow<T>::kBufferBytes / window.row_bytes() / window.step_h;
  const int64_t together = max64(1, min64(min64(h1 - h0, kStripPixels / grad.w), 1 + buffered));
  const int64_t grad_row = grad_window.row_bytes();
  char* packed = static_cast<char*>(scratch(Scratch::kGradient, together * grad_row));
  RollingWindow<T> rows(window, h1 - h0, (together - 1) * window.step_h);
  rows.restart(h0 * window.step_h + window.lo_h);
  for (int64_t h = h0; h < h1; h += together) {
    const int64_t count = min64(together, h1 - h);
    Strip strip{nullptr,
                rows.advance(call.x, x_lanes, h * window.step_h + window.lo_h),
                count,
                grad.w,
                grad_row,
                window.step_h * window.row_bytes(),
                window.step_w * kPixelBytes};
    for (int64_t r = 0; r < count; ++r)
      pack_row(grad, grad_window, grad_lanes, h + r, reinterpret_cast<T*>(packed + r * grad_row));
    for (int64_t ch = begin; ch < end; ++ch) {
      strip.grad = packed + (ch - begin) * grad.w * kPixelBytes;
      sample_channel(strip, offset + crow[ch], crow[ch + 1] - crow[ch], out + crow[ch]);
    }
  }
}

template <class T>
void wgrad(const WgradCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.grad.n, call.grad.h, call.grad.c,
                                   max64(0, window.span_h - window.step_h), kLanes<T>, call.threads, 2);
  const int64_t places = s.groups * s.chunks, nnz = call.weight->nnz;
  const int32_t* crow = call.weight->crow.data();
  // Which items share a sum depends on the number of threads alone, and the sums are added in order.
  const int64_t sums = s.parts > 1 ? places : min64(call.threads, places);
  T* partial = static_cast<T*>(scratch(Scratch::kPartial, sums * nnz * sizeof(T)));
  auto work = [&](int slot) {
    const int64_t sum = slot / s.parts, part = slot % s.parts;
    const int64_t begin = call.grad.c * part / s.parts, end = call.grad.c * (part + 1) / s.parts;
    T* out = partial + sum * nnz;
    std::memset(out + crow[begin], 0, (crow[end] - crow[begin]) * sizeof(T));
    for (int64_t place = places * sum / sums; place < places * (sum + 1) / sums; ++place)
      wgrad_item(call, s, place / s.chunks, place % s.chunks, begin, end, out);
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
