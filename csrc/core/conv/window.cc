#include "core/conv/window.h"

#include <algorithm>
#include <numeric>

namespace sparsekd {
namespace {

// A window wider than this is not worth packing (huge dilation on huge maps).
constexpr int64_t kMaxWindowBytes = int64_t{1} << 29;

}  // namespace

void Reach::add(int64_t tap) {
  if (empty) lo = hi = tap;
  empty = false;
  apart = std::gcd(apart, tap - lo);
  lo = std::min(lo, tap);
  hi = std::max(hi, tap);
}

WindowAxis make_axis(const Reach& taps, int64_t outputs, int64_t stride) {
  WindowAxis axis;
  axis.lo = taps.lo;
  axis.stride = stride;
  // Between one output and the next lie whole units, too; a single output has no next.
  axis.near = std::max<int64_t>(1, outputs > 1 ? std::gcd(taps.apart, stride) : taps.apart);
  axis.span = (taps.hi - taps.lo) / axis.near + 1;
  axis.step = std::min(axis.span, outputs > 1 ? stride / axis.near : 1);
  if (outputs > 1 && stride / axis.near > axis.span) {
    axis.run = axis.span;
    axis.far = stride;
  }
  return axis;
}

Window make_window(int64_t channels, const WindowAxis& rows, const WindowAxis& cols, int64_t out_w) {
  Window w;
  w.channels = channels;
  w.rows = rows;
  w.cols = cols;
  w.width = (out_w - 1) * cols.step + cols.span;
  w.pitch = w.width | 1;
  return w;
}

// By division: the product of three sizes of a view with stride 0 can exceed 64 bits.
bool fits(const Window& w) { return w.channels <= kMaxWindowBytes / kPixelBytes / w.pitch / w.rows.span; }

}  // namespace sparsekd
