// Moving rows of a batch between strided matrices and packed tiles, which hold for each column the elements
// of L batch rows. Part of engine.cc.
//
// Where rows are contiguous this transposes blocks of 8 x 8 in registers, where columns are it copies, and
// otherwise it goes element by element. It is limited by memory bandwidth, and on the way out by the
// associativity of L1, since rows often lie a power of two apart. So 256 outputs are written at a time, in
// whole cache lines, past the caches if the result would not stay in them. Tests: test_layer
// (linear_tests.cc) has matrices of all three kinds.

// dst[j * dst_stride + i] = src[i * src_stride + j] for i, j < 8.
template <class T>
inline void transpose_block(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    __m256 r[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
    transpose8(r);
    for (int j = 0; j < 8; ++j) _mm256_storeu_ps(dst + j * dst_stride, r[j]);
    return;
  }
#endif
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 8; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
}

// Packs columns [begin, end) of the rows from `first` on; rows past the last count as zeros.
template <class T, int L>
void pack(const View2<const T>& m, int64_t first, int64_t begin, int64_t end, T* tile) {
  const T* from = m.data + first * m.stride_row;
  const int64_t rows = min64(L, m.rows - first);
  if (m.stride_row == 1 && rows == L) {
    for (int64_t c = begin; c < end; ++c) std::memcpy(tile + c * L, from + c * m.stride_col, L * sizeof(T));
    return;
  }
  int64_t row = 0;
  if (m.stride_col == 1)
    for (; row + 8 <= rows; row += 8) {
      int64_t c = begin;
      for (; c + 8 <= end; c += 8)
        transpose_block(from + row * m.stride_row + c, m.stride_row, tile + c * L + row, L);
      for (; c < end; ++c)
        for (int i = 0; i < 8; ++i) tile[c * L + row + i] = from[(row + i) * m.stride_row + c];
    }
  for (int64_t c = begin; c < end && row < L; ++c)
    for (int64_t i = row; i < L; ++i)
      tile[c * L + i] = i < rows ? from[i * m.stride_row + c * m.stride_col] : T(0);
}

// Whether to write a result past the caches: too large to survive there, and in whole lines. This spares
// reading each line before it is overwritten.
template <class T>
bool streams([[maybe_unused]] const View2<T>& m) {
#if defined(__AVX2__)
  return sizeof(T) == sizeof(float) && m.stride_col == 1 && m.stride_row % 16 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 64 == 0 &&
         outgrows_caches(m.rows * m.cols * static_cast<int64_t>(sizeof(T)));
#else
  return false;
#endif
}

// dst[i * dst_stride + j] = src[j * src_stride + i] for i < 8, j < 16: eight cache lines, each at once.
template <class T, bool Stream>
inline void transpose_lines(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
#if defined(__AVX2__)
  if constexpr (Stream && sizeof(T) == 4) {
    __m256 low[8], high[8];
    for (int j = 0; j < 8; ++j) low[j] = _mm256_loadu_ps(src + j * src_stride);
    for (int j = 0; j < 8; ++j) high[j] = _mm256_loadu_ps(src + (8 + j) * src_stride);
    transpose8(low);
    transpose8(high);
    for (int i = 0; i < 8; ++i) {
      _mm256_stream_ps(dst + i * dst_stride, low[i]);
      _mm256_stream_ps(dst + i * dst_stride + 8, high[i]);
    }
    return;
  }
#endif
  transpose_block(src, src_stride, dst, dst_stride);
  transpose_block(src + 8 * src_stride, src_stride, dst + 8, dst_stride);
}

// Writes columns [begin, end), packed in `tile` from its start, to the rows from `first` on that exist. Runs
// of many columns matter where rows lie a power of two apart: few lines of one cache set are under way at
// once.
template <class T, int L, bool Stream>
void unpack(const T* tile, const View2<T>& m, int64_t first, int64_t begin, int64_t end) {
  T* to = m.data + first * m.stride_row + begin * m.stride_col;
  const int64_t rows = min64(L, m.rows - first), cols = end - begin;
  if (m.stride_row == 1 && rows == L) {
    for (int64_t c = 0; c < cols; ++c) std::memcpy(to + c * m.stride_col, tile + c * L, L * sizeof(T));
    return;
  }
  int64_t row = 0;
  if (m.stride_col == 1)
    for (; row + 8 <= rows; row += 8) {
      T* const lines = to + row * m.stride_row;
      int64_t c = 0;
      for (; c + 16 <= cols; c += 16)
        transpose_lines<T, Stream>(tile + c * L + row, L, lines + c, m.stride_row);
      for (; c < cols; ++c)
        for (int i = 0; i < 8; ++i) lines[i * m.stride_row + c] = tile[c * L + row + i];
    }
  for (int64_t c = 0; c < cols && row < rows; ++c)
    for (int64_t i = row; i < rows; ++i) to[i * m.stride_row + c * m.stride_col] = tile[c * L + i];
}
