// Moving pixels between strided tensors and the packed form, whose lanes are images. Part of engine.cc.
//
// This is a transposition: eight neighbouring elements, channels in channels_last and pixels of a row in
// contiguous maps, of each of 16 images become eight packed pixels, in registers, 8 x 8 at a time. Maps that
// have neither stride 1 go element by element. It is limited by memory bandwidth, so in channels_last a
// float result leaves in whole cache lines, 16 channels of a pixel at once, past the caches if it would not
// stay in them.
//
// Tests: test_convolution (core_tests.cc) has contiguous maps, channels_last and neither, small batches,
// stride and dilation.

// One of the images computed together: where its data starts and which virtual row it begins at.
template <class T>
struct Lane {
  T* base;       // null: no image here
  int64_t row0;  // of the tensor, where the rows of this lane begin
  int64_t rows;  // of the tensor
};

template <class T>
constexpr int kLanes = static_cast<int>(kPixelBytes / sizeof(T));

// dst[i * dst_stride + lane] = src[lane][at + i] for N elements i; dst_stride counts elements.
template <class T, int N>
inline void interleave(const T* const* src, int64_t at, T* dst, int64_t dst_stride) {
  for (int lane = 0; lane < kLanes<T>; ++lane)
    for (int i = 0; i < N; ++i) dst[i * dst_stride + lane] = src[lane][at + i];
}

// dst[lane][at + i] = src[i * src_stride + lane] for N elements i. Stream: past the caches, for aligned runs
// of 16 floats whose memory nobody reads soon; spares reading each line before it is overwritten.
template <class T, int N, bool Stream = false>
inline void deinterleave(const T* src, int64_t src_stride, T* const* dst, int64_t at) {
  for (int lane = 0; lane < kLanes<T>; ++lane)
    for (int i = 0; i < N; ++i) dst[lane][at + i] = src[i * src_stride + lane];
}

#if defined(__AVX2__)
template <bool Stream>
inline void put(float* to, __m256 v) {
  if (Stream)
    _mm256_stream_ps(to, v);
  else
    _mm256_storeu_ps(to, v);
}

template <>
inline void interleave<float, 4>(const float* const* src, int64_t at, float* dst, int64_t dst_stride) {
  for (int lane = 0; lane < 16; lane += 4) {
    __m128 a = _mm_loadu_ps(src[lane] + at), b = _mm_loadu_ps(src[lane + 1] + at);
    __m128 c = _mm_loadu_ps(src[lane + 2] + at), d = _mm_loadu_ps(src[lane + 3] + at);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_store_ps(dst + lane, a);
    _mm_store_ps(dst + dst_stride + lane, b);
    _mm_store_ps(dst + 2 * dst_stride + lane, c);
    _mm_store_ps(dst + 3 * dst_stride + lane, d);
  }
}

template <>
inline void deinterleave<float, 4>(const float* src, int64_t src_stride, float* const* dst, int64_t at) {
  for (int lane = 0; lane < 16; lane += 4) {
    __m128 a = _mm_load_ps(src + lane), b = _mm_load_ps(src + src_stride + lane);
    __m128 c = _mm_load_ps(src + 2 * src_stride + lane), d = _mm_load_ps(src + 3 * src_stride + lane);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(dst[lane] + at, a);
    _mm_storeu_ps(dst[lane + 1] + at, b);
    _mm_storeu_ps(dst[lane + 2] + at, c);
    _mm_storeu_ps(dst[lane + 3] + at, d);
  }
}

template <>
inline void interleave<float, 8>(const float* const* src, int64_t at, float* dst, int64_t dst_stride) {
  for (int half = 0; half < 16; half += 8) {
    __m256 r[8];
    for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(src[half + j] + at);
    transpose8(r);
    for (int j = 0; j < 8; ++j) _mm256_store_ps(dst + j * dst_stride + half, r[j]);
  }
}

template <>
inline void deinterleave<float, 8>(const float* src, int64_t src_stride, float* const* dst, int64_t at) {
  for (int half = 0; half < 16; half += 8) {
    __m256 r[8];
    for (int j = 0; j < 8; ++j) r[j] = _mm256_load_ps(src + j * src_stride + half);
    transpose8(r);
    for (int j = 0; j < 8; ++j) _mm256_storeu_ps(dst[half + j] + at, r[j]);
  }
}

// Both halves of a cache line one after the other, as streaming needs.
template <bool Stream>
inline void deinterleave_lines(const float* src, int64_t src_stride, float* const* dst, int64_t at) {
  for (int half = 0; half < 16; half += 8) {
    __m256 r[8], q[8];
    for (int j = 0; j < 8; ++j) r[j] = _mm256_load_ps(src + j * src_stride + half);
    transpose8(r);
    for (int j = 0; j < 8; ++j) q[j] = _mm256_load_ps(src + (8 + j) * src_stride + half);
    transpose8(q);
    for (int j = 0; j < 8; ++j) {
      put<Stream>(dst[half + j] + at, r[j]);
      put<Stream>(dst[half + j] + at + 8, q[j]);
    }
  }
}
template <>
inline void deinterleave<float, 16, false>(const float* src, int64_t src_stride, float* const* dst,
                                           int64_t at) {
  deinterleave_lines<false>(src, src_stride, dst, at);
}
template <>
inline void deinterleave<float, 16, true>(const float* src, int64_t src_stride, float* const* dst,
                                          int64_t at) {
  deinterleave_lines<true>(src, src_stride, dst, at);
}
#endif

// Which of `count` columns of a window row from `begin` on, evenly spaced in the input, are not padding:
// [first, last).
struct ColumnRange {
  int64_t first, last;
  ColumnRange(const Window& w, int64_t inputs, int64_t begin, int64_t count) {
    const int64_t lo = w.cols.at(begin), near = w.cols.near, left = inputs - lo;
    first = min64(lo < 0 ? (-lo + near - 1) / near : 0, count);
    last = max64(first, left <= 0 ? 0 : min64(count, (left + near - 1) / near));
  }
};

// Fills `count` columns of a window row from `begin` on, which lie evenly spaced in the input; those of the
// padding become zeros. A lane without a row has no src; `whole` says that there is none.
template <class T>
void pack_columns(const View4<const T>& in, const Window& w, const T* const* src, bool whole, int64_t begin,
                  int64_t count, T* dst) {
  constexpr int L = kLanes<T>;
  const int64_t lo = w.cols.at(begin), near = w.cols.near;
  const auto [first, last] = ColumnRange(w, in.w, begin, count);
  dst += begin * L;
  for (int64_t ch = 0; ch < w.channels; ++ch) {
    T* line = dst + ch * w.pitch * L;
    if (first > 0) std::memset(line, 0, first * kPixelBytes);
    if (last < count) std::memset(line + last * L, 0, (count - last) * kPixelBytes);
  }
  const auto element = [&](int64_t ch, int64_t c) {
    const int64_t at = ch * in.stride_c + (lo + c * near) * in.stride_w;
    T* pixel = dst + (ch * w.pitch + c) * L;
    for (int lane = 0; lane < L; ++lane) pixel[lane] = src[lane] ? src[lane][at] : T(0);
  };
  const int64_t blocked = w.channels / 8 * 8;
  if (whole && in.stride_c == 1) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = (lo + c * near) * in.stride_w;
      for (int64_t ch = 0; ch < blocked; ch += 8)
        interleave<T, 8>(src, at + ch, dst + (ch * w.pitch + c) * L, w.pitch * L);
      for (int64_t ch = blocked; ch < w.channels; ++ch) element(ch, c);
    }
  } else if (whole && in.stride_w * near == 1) {
    for (int64_t ch = 0; ch < w.channels; ++ch) {
      int64_t c = first;
      const int64_t at = ch * in.stride_c + lo;
      T* line = dst + ch * w.pitch * L;
      for (; c + 8 <= last; c += 8) interleave<T, 8>(src, at + c, line + c * L, L);
      for (; c + 4 <= last; c += 4) interleave<T, 4>(src, at + c, line + c * L, L);
      for (; c < last; ++c) element(ch, c);
    }
  } else {
    for (int64_t ch = 0; ch < w.channels; ++ch)
      for (int64_t c = first; c < last; ++c) element(ch, c);
  }
}

// Fills one window row with row `row` of the window of every lane; a lane that lacks it has zeros.
template <class T>
void pack_row(const View4<const T>& in, const Window& w, const Lane<const T>* lanes, int64_t row, T* dst) {
  constexpr int L = kLanes<T>;
  const T* src[L];
  int present = 0;
  for (int lane = 0; lane < L; ++lane) {
    const int64_t real = lanes[lane].row0 + w.rows.at(row);
    const bool exists = lanes[lane].base && real >= 0 && real < lanes[lane].rows;
    src[lane] = exists ? lanes[lane].base + real * in.stride_h : nullptr;
    present += exists;
  }
  if (!present) {
    std::memset(dst, 0, w.row_bytes());
    return;
  }
  const int64_t run = min64(w.cols.run, w.width);
  for (int64_t c = 0; c < w.width; c += run) pack_columns(in, w, src, present == L, c, run, dst);
}

// Whether a result may be streamed: large enough not to survive in the caches, in whole lines.
template <class T>
bool streams([[maybe_unused]] const View4<T>& out) {
#if defined(__AVX2__)
  constexpr int64_t line = kPixelBytes / sizeof(T);
  return sizeof(T) == sizeof(float) && out.stride_c == 1 && out.stride_w % line == 0 &&
         out.stride_h % line == 0 && out.stride_n % line == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % kPixelBytes == 0 &&
         outgrows_caches(out.n * out.c * out.h * out.w * static_cast<int64_t>(sizeof(T)));
#else
  return false;
#endif
}

// Pixels of a tile whose lanes all have an image: channels [begin, end), `channel` elements apart.
template <class T, bool Stream>
void store_channels(const T* tile, int64_t channel, T* const* dst, int64_t at, int64_t begin, int64_t end) {
  int64_t ch = begin;
  for (; ch + 16 <= end; ch += 16)
    deinterleave<T, 16, Stream>(tile + (ch - begin) * channel, channel, dst, at + ch);
  for (; ch + 8 <= end; ch += 8) deinterleave<T, 8>(tile + (ch - begin) * channel, channel, dst, at + ch);
  for (; ch < end; ++ch)
    for (int lane = 0; lane < kLanes<T>; ++lane) dst[lane][at + ch] = tile[(ch - begin) * channel + lane];
}

// Writes pixels [channels begin..end)[pixels][lane] of a tile to columns ow... of row `row` of every lane
// that has it; from one channel to the next the tile advances by `tile_pixels`.
template <class T>
void store_tile(const View4<T>& out, bool stream, const Lane<T>* lanes, int64_t row, int64_t ow,
                int64_t pixels, int64_t begin, int64_t end, int64_t tile_pixels, const T* tile) {
  constexpr int L = kLanes<T>;
  T* dst[L];
  int present = 0;
  for (int lane = 0; lane < L; ++lane) {
    const int64_t real = lanes[lane].row0 + row;
    const bool exists = lanes[lane].base && real < lanes[lane].rows;
    dst[lane] = exists ? lanes[lane].base + real * out.stride_h + ow * out.stride_w : nullptr;
    present += exists;
  }
  const int64_t channel = tile_pixels * L;  // elements from one channel of the tile to the next
  if (present == L && out.stride_c == 1) {
    for (int64_t p = 0; p < pixels; ++p)
      if (stream && begin % 16 == 0)
        store_channels<T, true>(tile + p * L, channel, dst, p * out.stride_w, begin, end);
      else
        store_channels<T, false>(tile + p * L, channel, dst, p * out.stride_w, begin, end);
    return;
  }
  const bool planar = present == L && out.stride_w == 1;
  for (int64_t ch = begin; ch < end; ++ch, tile += channel) {
    const int64_t at = ch * out.stride_c;
    int64_t p = 0;
    if (planar) {
      for (; p + 8 <= pixels; p += 8) deinterleave<T, 8>(tile + p * L, L, dst, at + p);
      for (; p + 4 <= pixels; p += 4) deinterleave<T, 4>(tile + p * L, L, dst, at + p);
    }
    for (; p < pixels; ++p)
      for (int lane = 0; lane < L; ++lane)
        if (dst[lane]) dst[lane][at + p * out.stride_w] = tile[p * L + lane];
  }
}
