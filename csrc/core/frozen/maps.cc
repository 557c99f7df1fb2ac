#include "core/frozen/maps.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace sparsekd::frozen {
namespace {

// Where the first pixel of a row of an image lies that a caller gives or takes.
int64_t first_of(const Shape& s, bool tokens, int64_t image, int64_t c, int64_t y) {
  return tokens ? image * s.width * s.channels + c : ((image * s.channels + c) * s.height + y) * s.width;
}

// Columns [begin, end) of a result, at most `columns`, whose tap at x * stride + x0 is a pixel of a row of
// `width`.
struct Taken {
  int64_t begin, end;
  Taken(int64_t x0, int64_t stride, int64_t width, int64_t columns)
      : begin(x0 < 0 ? std::min((stride - 1 - x0) / stride, columns) : 0),
        end(width > x0 ? std::min((width - 1 - x0) / stride + 1, columns) : begin) {
    end = std::max(begin, end);
  }
};

}  // namespace

// Calls f of the engine for `count` pixels, `step` pixels apart in `in`.
template <class F>
void Maps::along(F f, const float* in, int64_t step, int64_t count, float* out) const {
  if (unit_ == 1 || step == 1) return f(in, step, count * unit_, out);
  for (int64_t x = 0; x < count; ++x) f(in + x * step * unit_, 1, unit_, out + x * unit_);
}

void Maps::read(size_t i, const float* from) const {
  const Shape& s = node(i).shape;
  const bool tokens = node(i).kind == Kind::kTokens;
  const int64_t step = tokens ? s.channels : 1;  // from pixel to pixel
  rows(i, [&](float* to, int64_t n, int64_t c, int64_t y) {
    for (int64_t lane = 0; lane < unit_; ++lane) {
      const float* const row = from + first_of(s, tokens, n * unit_ + lane, c, y);
      for (int64_t x = 0; x < s.width; ++x) to[x * unit_ + lane] = row[x * step];
    }
  });
}

void Maps::write(size_t i, float* to) const {
  const Shape& s = node(i).shape;
  const bool tokens = plan_.network().tokens(static_cast<int32_t>(i));
  const int64_t step = tokens ? s.channels : 1;
  rows(i, [&](const float* from, int64_t n, int64_t c, int64_t y) {
    for (int64_t lane = 0; lane < unit_; ++lane) {
      float* const row = to + first_of(s, tokens, n * unit_ + lane, c, y);
      for (int64_t x = 0; x < s.width; ++x) row[x * step] = from[x * unit_ + lane];
    }
  });
}

void Maps::split(size_t i) const {
  const Window& w = node(i).window;
  const size_t input = node(i).inputs[0];
  const Shape& s = node(input).shape;
  const Grid &from = grid(input), &to = grid(i);
  const Phases& phases = step(i).phases;
  float* const copy = memory_.data() + plan_.start(phases.slot);
  const int64_t each = phases.count[0] * phases.count[1];
  const auto take = engine<FrozenEngine>().take;
  channels(s.channels * each, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
    const int64_t channel = c / each, phase_y = c % each / phases.count[1], phase_x = c % phases.count[1];
    const int64_t x0 = phase_x - w.padding[1], step = w.stride[1];
    const Taken taken(x0, step, s.width, to.stride / unit_);  // the others are padding
    float* out = copy + c * to.length;
    for (int64_t n = 0; n < plan_.planes(); ++n)
      for (int64_t row = 0; row < to.rows; ++row, out += to.stride) {
        const int64_t y = row * w.stride[0] + phase_y - w.padding[0];
        const bool inside = y >= 0 && y < s.height;
        const int64_t begin = inside ? taken.begin : 0, end = inside ? taken.end : 0;
        const float* const in = at(input, channel) + from.image(n) + y * from.stride;
        std::fill(out, out + begin * unit_, 0.0f);
        if (begin < end)
          along(take, in + (step * begin + x0) * unit_, step, end - begin, out + begin * unit_);
        std::fill(out + end * unit_, out + to.stride, 0.0f);
      }
  });
}

void Maps::gate(size_t i) const {
  const size_t first = node(i).inputs[0], second = node(i).inputs[1];
  rows(i, [&](float* to, int64_t image, int64_t c, int64_t y) {
    const float* const factor = at(second, c) + grid(second).image(image);
    const float* const from = at(first, c) + grid(first).image(image) + y * grid(first).stride;
    for (int64_t x = 0; x < node(i).shape.width * unit_; x += unit_)
      for (int64_t lane = 0; lane < unit_; ++lane) to[x + lane] = from[x + lane] * factor[lane];
  });
}

void Maps::sequence(size_t i) const {
  const size_t input = node(i).inputs[0];
  const Shape &s = node(input).shape, &o = node(i).shape;
  const Grid &from = grid(input), &to = grid(i);
  channels(o.channels, plan_.images() * o.channels * o.width, [&](int64_t c) {
    const float* const constant = node(i).bias.data() + c * o.width;
    for (int64_t n = 0; n < plan_.planes(); ++n) {
      float* out = at(i, c) + to.image(n);
      for (int64_t t = 0; t < o.width; ++t) std::fill_n(out + t * unit_, unit_, constant[t]);
      out += (o.width - s.pixels()) * unit_;
      const float* in = at(input, c) + from.image(n);
      for (int64_t y = 0; y < s.height; ++y, in += from.stride)
        for (int64_t x = 0; x < s.width * unit_; ++x) *out++ += in[x];
    }
  });
}

// Over rows first, which is a run of floats, then along the row.
void Maps::windows(size_t i, float start, bool mean) const {
  const Window& w = node(i).window;
  const size_t input = node(i).inputs[0];
  const Shape &s = node(input).shape, &o = node(i).shape;
  const Grid &from = grid(input), &to = grid(i);
  const auto combine = mean ? engine<FrozenEngine>().sum : engine<FrozenEngine>().larger;
  std::vector<Taken> taken;
  for (int64_t tap = 0; tap < w.kernel[1]; ++tap)
    taken.emplace_back(tap * w.dilation[1] - w.padding[1], w.stride[1], s.width, o.width);
  channels(o.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
    float* const line = static_cast<float*>(scratch(Scratch::kTile, s.width * unit_ * sizeof(float)));
    for (int64_t n = 0; n < plan_.planes(); ++n)
      for (int64_t y = 0; y < o.height; ++y) {
        float* const out = at(i, c) + to.image(n) + y * to.stride;
        std::fill_n(line, s.width * unit_, start);
        int64_t rows = 0;
        for (int64_t tap = 0; tap < w.kernel[0]; ++tap) {
          const int64_t source = y * w.stride[0] + tap * w.dilation[0] - w.padding[0];
          if (source < 0 || source >= s.height) continue;
          ++rows;
          const float* const in = at(input, c) + from.image(n) + source * from.stride;
          along(combine, in, 1, s.width, line);
        }
        std::fill_n(out, o.width * unit_, start);
        for (int64_t tap = 0; tap < w.kernel[1]; ++tap) {
          const int64_t x0 = tap * w.dilation[1] - w.padding[1], step = w.stride[1];
          const auto [begin, end] = taken[tap];
          along(combine, line + (begin * step + x0) * unit_, step, end - begin, out + begin * unit_);
        }
        for (int64_t x = 0; mean && x < o.width * unit_; ++x) out[x] /= counted(i, rows, x / unit_);
      }
  });
}

// How many pixels a window of a mean counts that has `rows` rows inside of the map.
float Maps::counted(size_t i, int64_t rows, int64_t x) const {
  const Window& w = node(i).window;
  if (node(i).count_padding) return static_cast<float>(w.kernel[0] * w.kernel[1]);
  int64_t columns = 0;
  for (int64_t tap = 0; tap < w.kernel[1]; ++tap) {
    const int64_t source = x * w.stride[1] + tap * w.dilation[1] - w.padding[1];
    columns += source >= 0 && source < node(node(i).inputs[0]).shape.width;
  }
  return static_cast<float>(rows * columns);
}

void Maps::pool(size_t i) const {
  if (node(i).kind == Kind::kMaxPool) return windows(i, -std::numeric_limits<float>::infinity(), false);
  if (node(i).window.kernel[0] > 0) return windows(i, 0.0f, true);
  const size_t input = node(i).inputs[0];
  const Shape& s = node(input).shape;
  const Grid &from = grid(input), &to = grid(i);
  channels(s.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
    for (int64_t n = 0; n < plan_.planes(); ++n) {
      double sum[kLanes] = {};
      for (int64_t y = 0; y < s.height; ++y) {
        const float* const in = at(input, c) + from.image(n) + y * from.stride;
        float row[kLanes] = {};
        for (int64_t x = 0; x < s.width * unit_; x += unit_)
          for (int64_t lane = 0; lane < unit_; ++lane) row[lane] += in[x + lane];
        for (int64_t lane = 0; lane < unit_; ++lane) sum[lane] += row[lane];
      }
      float* const mean = at(i, c) + to.image(n);
      for (int64_t lane = 0; lane < unit_; ++lane)
        mean[lane] = static_cast<float>(sum[lane] / static_cast<double>(s.pixels()));
    }
  });
}

void Maps::flatten(size_t i) const {
  const size_t input = node(i).inputs[0];
  const Shape& s = node(input).shape;
  const Grid& to = grid(i);
  rows(input, [&](const float* from, int64_t n, int64_t c, int64_t y) {
    for (int64_t x = 0; x < s.width; ++x)
      std::copy_n(from + x * unit_, unit_, at(i, (c * s.height + y) * s.width + x) + to.image(n));
  });
}

}  // namespace sparsekd::frozen
