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

#include "core/conv/ahead.inl"
#include "core/conv/pack.inl"
#include "core/conv/tile.inl"

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
  RollingWindow<T> rows(Scratch::kWindow, window, place.h1 - place.h0, (together - 1) * step);
  rows.restart(place.h0 * step);
  const Lists<T> lists{*call.plan, call.values, call.bias};
  const bool stream = streams(call.out);
  Seen<T> seen;
  for (int64_t h = place.h0, count; h < place.h1; h += count) {
    count = place.h1 - h >= together ? together : 1;
    const char* const x =
        rows.advance(h * step, [&](int64_t row, T* to) { pack_row(call.in, window, place.source, row, to); });
    for_tiles<T>(count, call.out.w, [&](auto shape, int64_t w) {
      using Shape = decltype(shape);
      compute_tile<T, Shape>(lists, x + w * window.cols.step * kPixelBytes, place.begin, place.end, tile);
      seen.add(tile, (place.end - place.begin) * Shape::kCount);
      for (int r = 0; r < Shape::kRows; ++r)
        store_tile(call.out, stream, place.target, h + r, w, Shape::kCols, place.begin, place.end,
                   Shape::kPixels, tile + r * Shape::kCols * kLanes<T>);
    });
  }
  if (stream) finish_streams();
  if (!seen.finite()) __atomic_store_n(call.finite, false, __ATOMIC_RELAXED);
}

template <class T>
void gather(const GatherCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.out.n, call.out.h, call.out.c, window.rows.span - window.rows.step,
                                   kLanes<T>, kLanes<T>, call.threads, 4);
  auto run = [&](int64_t item) { gather_item(call, GatherPlace<T>(call, s, item)); };
  share(call.threads, s.groups * s.chunks * s.parts, run);
}

// Each needs what the ones before it have.
#include "core/conv/sample.inl"
//
#include "core/conv/wgrad.inl"
//
#include "core/conv/blocked_pack.inl"
//
#include "core/conv/blocked.inl"
//
#include "core/conv/blocked_maps.inl"
//
#include "core/conv/blocked_pool.inl"

}  // namespace

template <class T>
template <Isa>
const ConvEngine<T> ConvEngine<T>::compiled{{1, kTilePixels},
                                            kBlockedTile,
                                            sparsekd::gather<T>,
                                            sparsekd::wgrad<T>,
                                            sparsekd::blocked_forward<T>,
                                            sparsekd::blocked_backward<T>,
                                            sparsekd::blocked_join<T>,
                                            sparsekd::blocked_gate<T>,
                                            sparsekd::blocked_pool<T>,
                                            sparsekd::blocked_pool_backward<T>,
                                            sparsekd::blocked_enter<T>,
                                            sparsekd::blocked_leave<T>};
template const ConvEngine<float> ConvEngine<float>::compiled<kIsa>;
template const ConvEngine<double> ConvEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
