// The heart of the gather: tiles of outputs that stay in registers over a list of nonzeros, and the window
// that they read. Part of engine.cc, which says how they work together.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
inline Vec<T> load(const char* at) {
  return *reinterpret_cast<const Vec<T>*>(at);
}

// A tile of outputs: Rows x Cols pixels of one channel, kept in registers over a list of nonzeros.
template <class T, int Rows, int Cols>
struct Tile {
  static constexpr int kRows = Rows, kCols = Cols;
  static constexpr int kPixels = Rows * Cols;
  static constexpr int kRowVectors = Cols * kVectors;
  static constexpr int kCount = kPixels * kVectors;
  static constexpr int64_t kBytes = kPixels * kPixelBytes;
};

// sum[out * Count + i] += value of output channel `out` * vector First + i of the tile, for Outs channels
// whose values stand `next` apart.
template <class T, class Shape, int Outs, int First, int Count>
__attribute__((always_inline)) inline void add_nonzero(const char* p, const T* value, int64_t next,
                                                       int64_t row_step, int64_t step, Vec<T>* sum) {
  constexpr int R = Shape::kRowVectors;
#pragma GCC unroll 8
  for (int n = 0; n < Count; ++n) {
    const int i = First + n;
    const Vec<T> in =
        load<T>(p + i / R * row_step + i % R / kVectors * step + i % R % kVectors * kVectorBytes);
#pragma GCC unroll 4
    for (int o = 0; o < Outs; ++o) sum[o * Count + n] += value[o * next] * in;
  }
}

// acc = (acc, or start everywhere) + sum of value * window pixel over a list of nonzeros, for vectors
// [First, First + Count) of Outs output channels that share the list; the values of one channel come after
// those of another. Pixels of a row lie Step bytes apart (step, if Step is 0), rows row_step.
template <class T, class Shape, int Outs, int First, int Count, int64_t Step>
__attribute__((always_inline)) inline void accumulate(const char* x, int64_t row_step, int64_t step,
                                                      const int32_t* offset, const T* value, int64_t count,
                                                      const T* start, T* tile) {
  // A tile with few vectors takes several nonzeros at once, each with accumulators of its own.
  constexpr int N = Outs * Count, Unroll = 2 * N > kAccumulators ? 1 : kAccumulators / N;
  if (Step) step = Step;  // a constant folds into the addresses
  Vec<T>* acc = reinterpret_cast<Vec<T>*>(tile) + First;
  Vec<T> sum[Unroll][N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i)
    sum[0][i] = start ? start[i / Count] - Vec<T>{} : acc[i / Count * Shape::kCount + i % Count];
#pragma GCC unroll 8
  for (int i = N; i < Unroll * N; ++i) sum[i / N][i % N] = Vec<T>{};
  int64_t k = 0;
  for (; k + Unroll <= count; k += Unroll)
#pragma GCC unroll 8
    for (int u = 0; u < Unroll; ++u)
      add_nonzero<T, Shape, Outs, First, Count>(x + offset[k + u], value + k + u, count, row_step, step,
                                                sum[u]);
  for (; k < count; ++k)
    add_nonzero<T, Shape, Outs, First, Count>(x + offset[k], value + k, count, row_step, step, sum[0]);
#pragma GCC unroll 8
  for (int i = N; i < Unroll * N; ++i) sum[0][i % N] += sum[i / N][i % N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) acc[i / Count * Shape::kCount + i % Count] = sum[0][i];
}

// All vectors of a tile from First on, as many at once as registers hold for so many channels.
template <class T, class Shape, int Outs, int64_t Step, int First = 0>
__attribute__((always_inline)) inline void accumulate_all(const char* x, int64_t row_step, int64_t step,
                                                          const int32_t* offset, const T* value,
                                                          int64_t count, const T* start, T* tile) {
  constexpr int V = Shape::kCount, kMost = Outs == 1 ? V : kPanelSums / Outs;
  constexpr int kPasses = (V - First + kMost - 1) / kMost, Count = (V - First) / kPasses;
  accumulate<T, Shape, Outs, First, Count, Step>(x, row_step, step, offset, value, count, start, tile);
  if constexpr (First + Count < V)
    accumulate_all<T, Shape, Outs, Step, First + Count>(x, row_step, step, offset, value, count, start, tile);
}

// A panel of `outs` channels. Not inlined: single channels, which unstructured weights have alone, keep the
// tighter loop without it.
template <class T, class Shape, int Outs = kPanelRows>
__attribute__((noinline)) void accumulate_panel(int outs, const char* x, int64_t row_step, int64_t step,
                                                const int32_t* offset, const T* value, int64_t count,
                                                const T* start, T* tile) {
  if (outs == Outs) {
    if (step == kPixelBytes)
      accumulate_all<T, Shape, Outs, kPixelBytes>(x, row_step, step, offset, value, count, start, tile);
    else
      accumulate_all<T, Shape, Outs, 0>(x, row_step, step, offset, value, count, start, tile);
  } else if constexpr (Outs > 2) {
    accumulate_panel<T, Shape, Outs / 2>(outs, x, row_step, step, offset, value, count, start, tile);
  }
}

// First entry of a block whose output channel is at least `channel`.
inline int32_t lower_entry(const RowEntry* entries, int32_t begin, int32_t end, int64_t channel) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (entries[middle].out_channel < channel)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The lists of a plan, with the values in their order.
template <class T>
struct Lists {
  const GatherPlan& plan;
  const T* values;
  const T* bias;           // one for each output channel, or null
  Ahead* ahead = nullptr;  // fetches between lists
};

// Output channels [begin, end) of one tile whose first window pixel is x.
template <class T, class Shape>
__attribute__((noinline)) void compute_tile(const Lists<T>& lists, const char* x, int64_t begin, int64_t end,
                                            T* tile) {
  const GatherPlan& plan = lists.plan;
  const RowEntry* entries = plan.entries.data();
  const int64_t blocks = static_cast<int64_t>(plan.block_begin.size()) - 1;
  const bool whole = begin == 0 && end == plan.out_channels;
  const int64_t row_step = plan.window.rows.step * plan.window.row_bytes();
  const int64_t step = plan.window.cols.step * kPixelBytes;
  const T zeros[kPanelRows] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t e = plan.block_begin[b], last = plan.block_begin[b + 1];
    if (!whole) {
      const int32_t stop = last;
      e = lower_entry(entries, e, stop, begin);
      last = lower_entry(entries, e, stop, end);
    }
    for (; e < last; ++e) {
      if (lists.ahead) lists.ahead->fetch_some();
      const int32_t from = entries[e].begin, count = entries[e + 1].begin - from;
      const int64_t channel = entries[e].out_channel;
      const T* start = b > 0 ? nullptr : lists.bias ? lists.bias + channel : zeros;
      T* acc = tile + (channel - begin) * (Shape::kBytes / sizeof(T));
      const int32_t* const offset = plan.offset.data() + from;
      const T* const value = lists.values + from;
      if (entries[e].rows > 1)
        accumulate_panel<T, Shape>(entries[e].rows, x, row_step, step, offset, value, count / entries[e].rows,
                                   start, acc);
      else if (step == kPixelBytes)
        accumulate_all<T, Shape, 1, kPixelBytes>(x, row_step, step, offset, value, count, start, acc);
      else
        accumulate_all<T, Shape, 1, 0>(x, row_step, step, offset, value, count, start, acc);
    }
  }
}

// Calls run(Tile<T, Rows, cols>) ; cols <= Cols.
template <class T, int Rows, int Cols, class F>
inline void with_width(int64_t cols, F& run) {
  if (cols == Cols) return run(Tile<T, Rows, Cols>{});
  if constexpr (Cols > 1) with_width<T, Rows, Cols - 1>(cols, run);
}

// Calls run(tile, first column) for tiles that cover a row, or `rows` of them, a power of two: as many as
// tile_rows gives. Tiles have nearly equal widths: 14 pixels are two times seven, not eight, four and two.
template <class T, class F, int Rows = kTilePixels>
inline void for_tiles(int64_t rows, int64_t width, F run) {
  if (rows == Rows) {
    constexpr int Cols = kTilePixels / Rows;
    const int64_t tiles = (width + Cols - 1) / Cols;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t w = width * i / tiles;
      auto run_at = [&](auto tile) { run(tile, w); };
      with_width<T, Rows, Cols>(width * (i + 1) / tiles - w, run_at);
    }
  } else if constexpr (Rows > 1) {
    for_tiles<T, F, Rows / 2>(rows, width, run);
  }
}

// How many rows of this width make a tile: a power of two, of `rows` that there are.
inline int64_t tile_rows(int64_t width, int64_t rows) {
  int64_t together = 1;
  while (2 * together * width <= kTilePixels && 2 * together <= rows) together *= 2;
  return together;
}

// A rolling window of packed rows. Rows lie one after another so that an offset reaches any of them; when the
// buffer is full the rows still needed move to its front.
template <class T>
class RollingWindow {
 public:
  RollingWindow(Scratch purpose, const Window& shape, int64_t output_rows, int64_t extra_span)
      : row_bytes_(shape.row_bytes()) {
    const int64_t step = shape.rows.step, span = shape.rows.span + extra_span;
    const int64_t ahead = step < span ? 2 * step : 0;  // without overlap there is nothing to keep
    const int64_t whole = (output_rows - 1) * step + span;
    const int64_t fitting = kBufferBytes / max64(1, row_bytes_);
    capacity_ = max64(span, min64(whole, max64(fitting, span + ahead)));
    span_ = span;
    data_ = static_cast<char*>(scratch(purpose, capacity_ * row_bytes_));
  }

  // Makes rows [begin, begin + span) of the window available, by pack(row, address) where they are not yet,
  // and returns the address of the first.
  template <class F>
  const char* advance(int64_t begin, F pack) {
    const int64_t end = begin + span_;
    if (end - first_ > capacity_ || begin < first_) {
      const int64_t keep = begin < first_ ? 0 : max64(0, packed_ - begin);
      if (keep) std::memmove(data_, data_ + (begin - first_) * row_bytes_, keep * row_bytes_);
      first_ = begin;
      packed_ = begin + keep;
    }
    packed_ = max64(packed_, begin);
    for (; packed_ < end; ++packed_)
      pack(packed_, reinterpret_cast<T*>(data_ + (packed_ - first_) * row_bytes_));
    return data_ + (begin - first_) * row_bytes_;
  }
  // The first row that is not there yet.
  int64_t packed() const { return packed_; }
  void restart(int64_t begin) { first_ = packed_ = begin; }

  // Only the rows in use must stay in the caches; a longer buffer just moves rows less often.
  static constexpr int64_t kBufferBytes = int64_t{2} << 20;

 private:
  const int64_t row_bytes_;
  int64_t capacity_, span_;
  char* data_;
  int64_t first_ = 0, packed_ = 0;
};

// Sums of results on their way out, by which those that are not finite are noticed: what a sum has once met
// stays in it. Sums that overflow only look like it.
template <class T>
struct Seen {
  static constexpr int kSums = 4;
  Vec<T> sum[kSums] = {};

  void add(const T* tile, int64_t vectors) {
    const char* at = reinterpret_cast<const char*>(tile);
    Vec<T> more[kSums];
    for (int i = 0; i < kSums; ++i) more[i] = sum[i];
    int64_t v = 0;
    for (; v + kSums <= vectors; v += kSums, at += kSums * kVectorBytes)
      for (int i = 0; i < kSums; ++i) more[i] += load<T>(at + i * kVectorBytes);
    for (; v < vectors; ++v, at += kVectorBytes) more[0] += load<T>(at);
    for (int i = 0; i < kSums; ++i) sum[i] = more[i];
  }
  bool finite() const {
    T zero = T(0);
    for (const Vec<T>& s : sum)
      for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(T)); ++i) zero += s[i] - s[i];
    return zero == T(0);
  }
};
