// Convolution as a gather: an output is its bias plus the sum, over the nonzeros of its channel, of value
// times an input at a fixed offset from where the output reads. fprop is one such call, dgrad one for each
// phase of the stride, on the transposed weight; plan.cc has made the lists of offsets.
//
// Lanes are images: a packed pixel holds one channel of 16 images in float, of 8 in double, so a nonzero is
// one broadcast and aligned multiply-adds wherever it lies. Tiles are kTilePixels pixels of an output row,
// or of several rows that are narrow. The tile of one channel, eight vectors at most, stays in registers
// over the nonzeros that the channel has in one block of input channels; between blocks the sums of all
// channels wait in a buffer. Rows of the input are packed once a chunk, into a window that rolls down the
// map.
//
// The load ports limit the speed: a single channel loads an input for every multiply-add, so blocks are cut
// to keep what a tile reads of them in L1. A panel of up to four channels shares each load and is limited by
// the multipliers instead.
//
// Tests: test_convolution (core_tests.cc) compares every instruction set with scalar.cc, test_nonfinite and
// test_far_reach (border_tests.cc) cover padding and what lies beyond it, test_schedule how the work is cut.
#include "core/engine.inl"

#include "core/conv/engine.h"

namespace sparsekd {
namespace {

constexpr int kVectors = static_cast<int>(kPixelBytes) / kVectorBytes;  // vectors to a pixel
// Eight independent accumulators hide the latency of two fused multiply-adds a cycle.
constexpr int kAccumulators = 8;
constexpr int kTilePixels = kAccumulators / kVectors;

#include "core/conv/pack.inl"

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

// All output channels of the part, for one tile whose first window pixel is x.
template <class T, class Shape>
void compute_tile(const GatherCall<T>& call, const char* x, int64_t begin, int64_t end, T* tile) {
  const GatherPlan& plan = *call.plan;
  const RowEntry* entries = plan.entries.data();
  const int64_t blocks = static_cast<int64_t>(plan.block_begin.size()) - 1;
  const bool whole = begin == 0 && end == call.out.c;
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
      const int32_t from = entries[e].begin, count = entries[e + 1].begin - from;
      const int64_t channel = entries[e].out_channel;
      const T* start = b > 0 ? nullptr : call.bias ? call.bias + channel : zeros;
      T* acc = tile + (channel - begin) * (Shape::kBytes / sizeof(T));
      const int32_t* const offset = plan.offset.data() + from;
      const T* const value = call.values + from;
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

// A rolling window of packed rows. Rows lie one after another so that an offset reaches any of them; when the
// buffer is full the rows still needed move to its front.
template <class T>
class RollingWindow {
 public:
  RollingWindow(const Window& shape, int64_t output_rows, int64_t extra_span) : shape_(shape) {
    const int64_t step = shape.rows.step, span = shape.rows.span + extra_span;
    const int64_t ahead = step < span ? 2 * step : 0;  // without overlap there is nothing to keep
    const int64_t whole = (output_rows - 1) * step + span;
    const int64_t fitting = kBufferBytes / max64(1, shape.row_bytes());
    capacity_ = max64(span, min64(whole, max64(fitting, span + ahead)));
    span_ = span;
    data_ = static_cast<char*>(scratch(Scratch::kWindow, capacity_ * shape.row_bytes()));
  }

  // Makes rows [begin, begin + span) of the window available and returns the address of the first.
  const char* advance(const View4<const T>& in, const Lane<const T>* lanes, int64_t begin) {
    const int64_t end = begin + span_, row_bytes = shape_.row_bytes();
    if (end - first_ > capacity_ || begin < first_) {
      const int64_t keep = begin < first_ ? 0 : max64(0, packed_ - begin);
      if (keep) std::memmove(data_, data_ + (begin - first_) * row_bytes, keep * row_bytes);
      first_ = begin;
      packed_ = begin + keep;
    }
    packed_ = max64(packed_, begin);
    for (; packed_ < end; ++packed_)
      pack_row(in, shape_, lanes, packed_, reinterpret_cast<T*>(data_ + (packed_ - first_) * row_bytes));
    return data_ + (begin - first_) * row_bytes;
  }
  void restart(int64_t begin) { first_ = packed_ = begin; }

  // Only the rows in use must stay in the caches; a longer buffer just moves rows less often.
  static constexpr int64_t kBufferBytes = int64_t{2} << 20;

 private:
  const Window shape_;
  int64_t capacity_, span_;
  char* data_;
  int64_t first_ = 0, packed_ = 0;
};

// Points the lanes of a group at their images; scale is how many rows of this tensor an output row is.
template <class T>
void point_lanes(const View4<T>& tensor, const Schedule& s, int64_t group, int64_t scale, Lane<T>* lanes) {
  constexpr int L = kLanes<T>;
  for (int lane = 0; lane < L; ++lane) {
    const int64_t v = group * L + lane, image = v / s.strips;
    const bool exists = image < tensor.n;
    lanes[lane].base = exists ? tensor.data + image * tensor.stride_n : nullptr;
    lanes[lane].row0 = v % s.strips * s.strip_rows * scale;
    lanes[lane].rows = tensor.h;
  }
}

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

// What one item of a gather works with.
template <class T>
struct GatherItem {
  const GatherCall<T>& call;
  const Lane<T>* target;
  int64_t begin, end;  // output channels
  T* tile;
  bool stream;
  Seen<T>& seen;
};

// One tile: outputs [h, h + Rows) x [w, w + Cols), whose window rows start at `row`.
template <class T, int Rows, int Cols>
void run_tile(const GatherItem<T>& item, const char* row, int64_t h, int64_t w) {
  using Shape = Tile<T, Rows, Cols>;
  const int64_t at = w * item.call.plan->window.cols.step * kPixelBytes;
  compute_tile<T, Shape>(item.call, row + at, item.begin, item.end, item.tile);
  item.seen.add(item.tile, (item.end - item.begin) * Shape::kCount);
  for (int r = 0; r < Rows; ++r)
    store_tile(item.call.out, item.stream, item.target, h + r, w, Cols, item.begin, item.end, Shape::kPixels,
               item.tile + r * Cols * kLanes<T>);
}

// Calls the tile of `cols` columns; cols <= Cols.
template <class T, int Rows, int Cols>
void run_width(const GatherItem<T>& item, const char* row, int64_t h, int64_t w, int64_t cols) {
  if (cols == Cols) return run_tile<T, Rows, Cols>(item, row, h, w);
  if constexpr (Cols > 1) run_width<T, Rows, Cols - 1>(item, row, h, w, cols);
}

// Tiles of a row have nearly equal widths: 14 pixels are two times seven, not eight, four and two.
template <class T>
void run_row(const GatherItem<T>& item, const char* row, int64_t h) {
  const int64_t width = item.call.out.w, tiles = (width + kTilePixels - 1) / kTilePixels;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t w = width * i / tiles;
    run_width<T, 1, kTilePixels>(item, row, h, w, width * (i + 1) / tiles - w);
  }
}

// Rows narrower than half a tile are taken several at a time.
template <class T, int Rows = kTilePixels>
void run_rows(const GatherItem<T>& item, const char* row, int64_t h, int64_t rows) {
  if (rows == 1) return run_row(item, row, h);
  if constexpr (Rows > 1) {
    if (rows == Rows) return run_width<T, Rows, kTilePixels / Rows>(item, row, h, 0, item.call.out.w);
    run_rows<T, Rows / 2>(item, row, h, rows);
  }
}

// How many rows of this width make a tile: a power of two, of `rows` that there are.
inline int64_t tile_rows(int64_t width, int64_t rows) {
  int64_t together = 1;
  while (2 * together * width <= kTilePixels && 2 * together <= rows) together *= 2;
  return together;
}

// The rows and channels of one item, and the lanes that read and write them.
template <class T>
struct GatherPlace {
  int64_t begin, end, h0, h1;
  Lane<const T> source[kLanes<T>];
  Lane<T> target[kLanes<T>];

  GatherPlace(const GatherCall<T>& call, const Schedule& s, int64_t item) {
    const int64_t part = item % s.parts, chunk = item / s.parts % s.chunks, group = item / s.parts / s.chunks;
    begin = panel_cut(call.out.c * part / s.parts, call.out.c);
    end = panel_cut(call.out.c * (part + 1) / s.parts, call.out.c);
    h0 = chunk * s.chunk_rows;
    h1 = min64(s.strip_rows, h0 + s.chunk_rows);
    point_lanes(call.in, s, group, call.plan->window.rows.stride, source);
    point_lanes(call.out, s, group, 1, target);
    // A strip ends where the next begins, also when the image has more rows.
    for (Lane<T>& lane : target) lane.rows = min64(lane.rows, lane.row0 + s.strip_rows);
  }
};

template <class T>
void gather_item(const GatherCall<T>& call, const GatherPlace<T>& place) {
  const Window& window = call.plan->window;
  T* tile = static_cast<T*>(scratch(Scratch::kTile, (place.end - place.begin) * kTilePixels * kPixelBytes));
  const int64_t step = window.rows.step, together = tile_rows(call.out.w, place.h1 - place.h0);
  RollingWindow<T> rows(window, place.h1 - place.h0, (together - 1) * step);
  rows.restart(place.h0 * step);
  Seen<T> seen;
  const GatherItem<T> item{call, place.target, place.begin, place.end, tile, streams(call.out), seen};
  for (int64_t h = place.h0, count; h < place.h1; h += count) {
    count = place.h1 - h >= together ? together : 1;
    run_rows(item, rows.advance(call.in, place.source, h * step), h, count);
  }
  if (item.stream) finish_streams();
  if (!seen.finite()) __atomic_store_n(call.finite, false, __ATOMIC_RELAXED);
}

template <class T>
void gather(const GatherCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.out.n, call.out.h, call.out.c, window.rows.span - window.rows.step,
                                   kLanes<T>, call.threads, 4);
  auto run = [&](int64_t item) { gather_item(call, GatherPlace<T>(call, s, item)); };
  share(call.threads, s.groups * s.chunks * s.parts, run);
}

#include "core/conv/sample.inl"
#include "core/conv/wgrad.inl"

}  // namespace

template <class T>
template <Isa>
const ConvEngine<T> ConvEngine<T>::compiled{kTilePixels, sparsekd::gather<T>, sparsekd::wgrad<T>};
template const ConvEngine<float> ConvEngine<float>::compiled<kIsa>;
template const ConvEngine<double> ConvEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
