// The engine, compiled once for each instruction set by generic.cc, avx2.cc and avx512.cc, which define
// SPARSEKD_ENGINE (its name) and SPARSEKD_VECTOR_BYTES.
//
// Everything here has internal linkage and instantiates no library template that could also be emitted
// elsewhere: a function compiled for AVX-512 must never be the one the linker keeps for everybody.
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/conv/engine.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

#include "core/conv/pack.inl"

constexpr int kVectorBytes = SPARSEKD_VECTOR_BYTES;
constexpr int kVectors = static_cast<int>(kPixelBytes) / kVectorBytes;  // vectors to a pixel
// Eight independent accumulators hide the latency of two fused multiply-adds a cycle.
constexpr int kAccumulators = 8;
constexpr int kTilePixels = kAccumulators / kVectors;

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

// tile[pixel] += sum of value * window pixel over a list of nonzeros. Pixels lie `step` bytes apart. A tile
// with few pixels takes several nonzeros at once, each with accumulators of its own.
template <class T, int Pixels>
inline void accumulate(const char* x, const int32_t* offset, const T* value, int64_t count, int64_t step,
                       T* tile) {
  constexpr int V = Pixels * kVectors;
  constexpr int Unroll = V >= kAccumulators ? 1 : kAccumulators / V;
  Vec<T>* acc = reinterpret_cast<Vec<T>*>(tile);
  Vec<T> sum[Unroll][V];
  for (int i = 0; i < V; ++i) sum[0][i] = acc[i];
  for (int u = 1; u < Unroll; ++u)
    for (int i = 0; i < V; ++i) sum[u][i] = Vec<T>{};
  int64_t k = 0;
  for (; k + Unroll <= count; k += Unroll)
#pragma GCC unroll 8
    for (int u = 0; u < Unroll; ++u) {
      const char* p = x + offset[k + u];
      const T v = value[k + u];
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i)
        sum[u][i] += v * load<T>(p + (i / kVectors) * step + (i % kVectors) * kVectorBytes);
    }
  for (; k < count; ++k) {
    const char* p = x + offset[k];
    const T v = value[k];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i)
      sum[0][i] += v * load<T>(p + (i / kVectors) * step + (i % kVectors) * kVectorBytes);
  }
  for (int i = 0; i < V; ++i) {
    for (int u = 1; u < Unroll; ++u) sum[0][i] += sum[u][i];
    acc[i] = sum[0][i];
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

// All output channels of the part, for one tile of pixels whose window pixel is x.
template <class T, int Pixels>
void compute_tile(const GatherCall<T>& call, const char* x, int64_t begin, int64_t end, T* tile) {
  constexpr int L = kLanes<T>;
  const GatherPlan& plan = *call.plan;
  for (int64_t ch = begin; ch < end; ++ch) {
    const T start = call.bias ? call.bias[ch] : T(0);
    for (int i = 0; i < Pixels * L; ++i) tile[(ch - begin) * Pixels * L + i] = start;
  }
  const RowEntry* entries = plan.entries.data();
  const int32_t* offset = plan.offset.data();
  const int64_t blocks = static_cast<int64_t>(plan.block_begin.size()) - 1;
  const bool whole = begin == 0 && end == call.out.c;
  const int64_t step = plan.window.step_w * kPixelBytes;
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t e = plan.block_begin[b], last = plan.block_begin[b + 1];
    if (!whole) {
      const int32_t stop = last;
      e = lower_entry(entries, e, stop, begin);
      last = lower_entry(entries, e, stop, end);
    }
    for (; e < last; ++e) {
      const int32_t from = entries[e].begin, to = entries[e + 1].begin;
      T* acc = tile + (entries[e].out_channel - begin) * Pixels * L;
      if (step == kPixelBytes)  // a constant lets the compiler fold it into the addresses
        accumulate<T, Pixels>(x, offset + from, call.values + from, to - from, kPixelBytes, acc);
      else
        accumulate<T, Pixels>(x, offset + from, call.values + from, to - from, step, acc);
    }
  }
}

// A rolling window of packed rows. Rows lie one after another so that an offset reaches any of them; when the
// buffer is full the rows still needed move to its front.
template <class T>
class RollingWindow {
 public:
  RollingWindow(const Window& shape, int64_t output_rows, int64_t extra_span) : shape_(shape) {
    const int64_t span = shape.span_h + extra_span;
    // Without overlap between one position and the next there is nothing to keep, however long the step.
    const int64_t ahead = shape.step_h < span ? 2 * shape.step_h : 0;
    const int64_t whole = (output_rows - 1) * shape.step_h + span;
    const int64_t fitting = kBufferBytes / max64(1, shape.row_bytes());
    capacity_ = max64(span, min64(whole, max64(fitting, span + ahead)));
    span_ = span;
    data_ = static_cast<char*>(scratch(Scratch::kWindow, capacity_ * shape.row_bytes()));
  }

  // Makes virtual rows [begin, begin + span) available and returns the address of the first.
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

// Points the lanes of a group at their images; scale is how many rows of this tensor a virtual output row is.
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

template <class T, int Pixels>
inline int64_t sweep(const GatherCall<T>& call, const Lane<T>* lanes, const char* row, int64_t h, int64_t ow,
                     int64_t begin, int64_t end, T* tile) {
  const int64_t step = call.plan->window.step_w * kPixelBytes;
  for (; ow + Pixels <= call.out.w; ow += Pixels) {
    compute_tile<T, Pixels>(call, row + ow * step, begin, end, tile);
    store_tile(call.out, lanes, h, ow, Pixels, begin, end, tile);
  }
  return ow;
}

template <class T>
void gather_item(const GatherCall<T>& call, const Schedule& s, int64_t item) {
  constexpr int L = kLanes<T>;
  const Window& window = call.plan->window;
  const int64_t part = item % s.parts, chunk = item / s.parts % s.chunks, group = item / s.parts / s.chunks;
  const int64_t begin = call.out.c * part / s.parts, end = call.out.c * (part + 1) / s.parts;
  const int64_t h0 = chunk * s.chunk_rows, h1 = min64(s.strip_rows, h0 + s.chunk_rows);
  Lane<const T> source[L];
  Lane<T> target[L];
  point_lanes(call.in, s, group, window.step_h, source);
  point_lanes(call.out, s, group, 1, target);
  // A strip ends where the next begins, also when the image has more rows.
  for (int lane = 0; lane < L; ++lane)
    target[lane].rows = min64(target[lane].rows, target[lane].row0 + s.strip_rows);
  T* tile = static_cast<T*>(scratch(Scratch::kTile, (end - begin) * kTilePixels * kPixelBytes));
  RollingWindow<T> rows(window, h1 - h0, 0);
  rows.restart(h0 * window.step_h + window.lo_h);
  for (int64_t h = h0; h < h1; ++h) {
    const char* row = rows.advance(call.in, source, h * window.step_h + window.lo_h);
    int64_t ow = sweep<T, kTilePixels>(call, target, row, h, 0, begin, end, tile);
    if constexpr (kTilePixels > 4) ow = sweep<T, 4>(call, target, row, h, ow, begin, end, tile);
    if constexpr (kTilePixels > 2) ow = sweep<T, 2>(call, target, row, h, ow, begin, end, tile);
    sweep<T, 1>(call, target, row, h, ow, begin, end, tile);
  }
}

template <class T>
void gather(const GatherCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.out.n, call.out.h, call.out.c,
                                   max64(0, window.span_h - window.step_h), kLanes<T>, call.threads, 4);
  const int64_t items = s.groups * s.chunks * s.parts;
  int64_t next = 0;
  // Items write disjoint outputs, so whoever is free may take the next.
  auto work = [&](int) {
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      gather_item(call, s, item);
    }
  };
  const int workers = static_cast<int>(min64(call.threads, items));
  parallel(workers, workers, work);
}

#include "core/conv/wgrad.inl"

}  // namespace

#define SPARSEKD_JOIN(a, b) a##b
#define SPARSEKD_EXPAND(a, b) SPARSEKD_JOIN(a, b)
extern const Engine SPARSEKD_EXPAND(engine_, SPARSEKD_ENGINE) = {kTilePixels, gather<float>, gather<double>,
                                                                 wgrad<float>, wgrad<double>};

}  // namespace sparsekd
