// Packing windows from blocked maps, and what reads such maps elsewhere: vectors, branches, streamed stores.
// Part of engine.cc.
//
// A row is packed by copying lines. What a norm and a residual addition would have made of them, or the way
// of a gradient back through a norm, is computed on the way.
//
// Tests: blocked_tests.cc.

// Whether a map has left the caches when somebody reads it.
template <class Map>
bool leaves_caches(const Map& map) {
  constexpr int64_t kLeast = int64_t{1} << 20;
  return map.elements() * static_cast<int64_t>(sizeof(*map.data)) > kLeast;
}

// NaN passes, as it does in torch.
template <class V>
inline V rectified(V gate, V value) {
  return gate <= V{} ? V{} : value;
}

template <class T>
inline Vec<T> load_vector(const T* at) {
  return *reinterpret_cast<const Vec<T>*>(at);
}

// A branch at one channel; one without coefficients gets some that change nothing.
template <class T>
struct BranchAt {
  const T* map = nullptr;
  Vec<T> mean{}, scale{}, shift{};
  bool relu = false;

  BranchAt() = default;
  BranchAt(const blocked::Branch<T>& b, int64_t ch) : map(b.map), relu(b.relu) {
    scale = T(1) - scale;
    if (!b.mean) return;
    mean = b.mean[ch] - mean;
    scale = b.scale[ch] - Vec<T>{};
    shift = b.shift[ch] - shift;
  }
  Vec<T> operator()(int64_t i) const {
    const Vec<T> value = (load_vector(map + i) - mean) * scale + shift;
    return relu ? rectified(value, value) : value;
  }
};

template <bool Stream, class T>
inline void store_vector(T* to, Vec<T> value) {
#if defined(__SSE2__)
  if constexpr (Stream) {
    float* const at = reinterpret_cast<float*>(to);
#if SPARSEKD_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return _mm512_stream_ps(at, (__m512)value);
#elif SPARSEKD_VECTOR_BYTES == 64
    __m256 half[2];
    std::memcpy(half, &value, sizeof(half));
    _mm256_stream_ps(at, half[0]);
    return _mm256_stream_ps(at + 8, half[1]);
#elif SPARSEKD_VECTOR_BYTES == 32
    return _mm256_stream_ps(at, (__m256)value);
#else
    return _mm_stream_ps(at, (__m128)value);
#endif
  }
#endif
  *reinterpret_cast<Vec<T>*>(to) = value;
}

// Columns [begin, begin + count) of a window row from row y of the operand.
template <class T, blocked::Read read>
void pack_blocked_columns(const blocked::Operand<T>& in, const Window& w, int64_t group, int64_t y,
                          int64_t begin, int64_t count, T* dst) {
  constexpr int64_t L = kLanes<T>, N = kVectorBytes / static_cast<int64_t>(sizeof(T));
  const ColumnRange present(w, in.map.w, begin, count);
  const bool far = leaves_caches(in.map);
  const int64_t width = in.map.w, near = w.cols.near * L, row = in.map.row(group, y) - in.map.data;
  for (int64_t ch = 0; ch < w.channels; ++ch) {
    T* const line = dst + (ch * w.pitch + begin) * L;
    if (present.first > 0) std::memset(line, 0, present.first * kPixelBytes);
    if (present.last < count) std::memset(line + present.last * L, 0, (count - present.last) * kPixelBytes);
    const int64_t at = row + (ch * width + w.cols.at(begin)) * L;
    Vec<T> mean{}, scale{}, shift{}, slope{};
    if constexpr (read != blocked::Read::kPlain) {
      mean = in.mean[ch] - mean;
      scale = in.scale[ch] - scale;
      shift = in.shift[ch] - shift;
    }
    if constexpr (read == blocked::Read::kGradient) slope = in.slope[ch] - slope;
    BranchAt<T> branch;
    if constexpr (read == blocked::Read::kJoined) branch = {in.branch, ch};
    for (int64_t c = present.first; c < present.last; ++c)
      for (int64_t v = 0; v < L; v += N) {
        const int64_t i = at + c * near + v;
        Vec<T> x = load_vector(in.map.data + i);
        if (far && v == 0) fetch_after(in.map.data + i);
        if constexpr (read == blocked::Read::kNormalised || read == blocked::Read::kJoined) {
          x = (x - mean) * scale + shift;
          if constexpr (read == blocked::Read::kJoined) {
            x += branch(i);
            if (far && v == 0) fetch_after(in.branch.map + i);
          }
          if (in.relu) x = rectified(x, x);
        }
        if constexpr (read == blocked::Read::kGradient) {
          x = x * scale + ((load_vector(in.normed + i) - mean) * slope + shift);
          if (far && v == 0) fetch_after(in.normed + i);
        }
        *reinterpret_cast<Vec<T>*>(line + c * L + v) = x;
      }
  }
}

template <class T, blocked::Read read>
void pack_blocked_row(const blocked::Operand<T>& in, const Window& w, int64_t group, int64_t y, T* dst) {
  const int64_t run = min64(w.cols.run, w.width);
  for (int64_t c = 0; c < w.width; c += run) pack_blocked_columns<T, read>(in, w, group, y, c, run, dst);
}

// Row `row` of a window; zeros where the map has none, and in lanes without an image.
template <class T>
void pack_blocked(const blocked::Operand<T>& in, const Window& w, int64_t group, int64_t row, T* dst) {
  const int64_t y = w.rows.at(row), lanes = in.map.lanes(group);
  if (y < 0 || y >= in.map.h) {
    std::memset(dst, 0, w.row_bytes());
    return;
  }
  switch (in.read) {
    case blocked::Read::kPlain:
      pack_blocked_row<T, blocked::Read::kPlain>(in, w, group, y, dst);
      break;
    case blocked::Read::kNormalised:
      pack_blocked_row<T, blocked::Read::kNormalised>(in, w, group, y, dst);
      break;
    case blocked::Read::kJoined:
      pack_blocked_row<T, blocked::Read::kJoined>(in, w, group, y, dst);
      break;
    case blocked::Read::kGradient:
      pack_blocked_row<T, blocked::Read::kGradient>(in, w, group, y, dst);
      break;
  }
  if (lanes == kLanes<T>) return;
  for (int64_t ch = 0; ch < w.channels; ++ch)
    for (int64_t c = 0; c < w.width; ++c) {
      T* const pixel = dst + (ch * w.pitch + c) * kLanes<T>;
      for (int64_t lane = lanes; lane < kLanes<T>; ++lane) pixel[lane] = T(0);
    }
}

// Has the rows fetched that a window packs after the first `packed`, if they lie together in memory, from all
// maps that they are computed from.
template <class T>
void fetch_rows(const blocked::Operand<T>& in, const Window& w, int64_t group, int64_t packed, int64_t rows,
                Ahead& ahead) {
  const int64_t y = w.rows.at(packed);
  if (!leaves_caches(in.map) || y < 0 || w.rows.at(packed + rows - 1) != y + rows - 1) return;
  const int64_t at = in.map.row(group, y) - in.map.data,
                count = min64(rows * in.map.row_elements(), in.map.elements() - at);
  if (count <= 0) return;
  for (const T* const map : {in.map.data, in.read == blocked::Read::kGradient ? in.normed : nullptr,
                             in.read == blocked::Read::kJoined ? in.branch.map : nullptr})
    if (map) ahead.add(map + at, count * static_cast<int64_t>(sizeof(T)));
}

// The same for what is added to results from row h on.
template <class T>
void fetch_residual(const blocked::Result<T>& y, int64_t group, int64_t h, int64_t rows, Ahead& ahead) {
  if (!y.residual || y.residual_every > 1 || !leaves_caches(y.out)) return;
  const int64_t at = (group * y.out.h + h) * y.out.row_elements(),
                count = min64(rows * y.out.row_elements(), y.out.elements() - at);
  if (count > 0) ahead.add(y.residual + at, count * static_cast<int64_t>(sizeof(T)));
}
