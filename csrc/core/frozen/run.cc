// Runs a plan: the nodes in turn, on one group of images per thread, or on the rows and tiles of one group
// after the other where there are fewer groups than threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/frozen/plan.h"
#include "core/parallel.h"

namespace sparsekd::frozen {
namespace {

class Run {
 public:
  Run(const Plan& plan, Workspace& memory, int threads) : plan_(plan), memory_(memory), threads_(threads) {}

  void operator()(const std::vector<const float*>& in, const std::vector<float*>& out, int64_t first) {
    const Network& network = plan_.network();
    size_t input = 0;
    auto chain = plan_.chains().begin();
    for (size_t i = 0; i < network.nodes().size(); ++i) {
      const Node& node = network.nodes()[i];
      if (chain != plan_.chains().end() && chain->first == i) {
        const Chain& own = *chain++;
        if (threads_ == 1) {
          run_chain(own);
          i = own.last - 1;
          continue;
        }
      }
      switch (node.kind) {
        case Kind::kInput:
        case Kind::kTokens:
          read(i, in[input] + first * network.input_length(input));
          ++input;
          break;
        case Kind::kProduct:
          product(i);
          break;
        case Kind::kPointwise:
          pointwise(i);
          break;
        case Kind::kMaxPool:
        case Kind::kMeanPool:
          pool(i);
          break;
        case Kind::kLayerNorm:
          layer_norm(i);
          break;
        case Kind::kAttention:
          attention(i);
          break;
        case Kind::kGate:
          gate(i);
          break;
        default:
          flatten(i);
      }
    }
    for (size_t i = 0; i < out.size(); ++i)
      write(network.outputs()[i], out[i] + first * network.output_length(i));
  }

 private:
  const Node& node(size_t i) const { return plan_.network().nodes()[i]; }
  const Step& step(size_t i) const { return plan_.steps()[i]; }
  const Grid& grid(size_t i) const { return plan_.grids()[step(i).grid]; }
  // The first pixel of channel c.
  float* at(size_t i, int64_t c = 0) const {
    return memory_.data() + plan_.start(step(i).slot) + c * grid(i).length;
  }

  // Calls body(channel) for all of them, on all threads.
  template <class F>
  void channels(int64_t count, int64_t elements, F body) {
    const int workers = useful_threads(threads_, 0, elements);
    auto part = [&](int slot) {
      for (int64_t c = count * slot / workers; c < count * (slot + 1) / workers; ++c) body(c);
    };
    parallel(workers, workers, part);
  }

  // Calls body(row of pixels, image, channel, y) for every row of a map.
  template <class F>
  void rows(size_t i, F body) {
    const Shape& s = node(i).shape;
    const Grid& g = grid(i);
    channels(s.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
      for (int64_t n = 0; n < plan_.images(); ++n)
        for (int64_t y = 0; y < s.height; ++y) body(at(i, c) + g.image(n) + y * g.stride, n, c, y);
    });
  }

  void read(size_t i, const float* from) {
    const Shape& s = node(i).shape;
    const bool tokens = node(i).kind == Kind::kTokens;
    rows(i, [&](float* to, int64_t n, int64_t c, int64_t y) {
      if (tokens)
        for (int64_t x = 0; x < s.width; ++x) to[x] = from[(n * s.width + x) * s.channels + c];
      else
        std::copy_n(from + ((n * s.channels + c) * s.height + y) * s.width, s.width, to);
    });
  }

  void write(size_t i, float* to) {
    const Shape& s = node(i).shape;
    const bool tokens = plan_.network().tokens(static_cast<int32_t>(i));
    rows(i, [&](const float* from, int64_t n, int64_t c, int64_t y) {
      if (tokens)
        for (int64_t x = 0; x < s.width; ++x) to[(n * s.width + x) * s.channels + c] = from[x];
      else
        std::copy_n(from, s.width, to + ((n * s.channels + c) * s.height + y) * s.width);
    });
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

  // Copies every phase of the stride into channels of its own, padding included.
  void split(size_t i) {
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
      const Taken taken(x0, step, s.width, to.stride);  // the others are padding
      float* out = copy + c * to.length;
      for (int64_t n = 0; n < plan_.images(); ++n)
        for (int64_t row = 0; row < to.rows; ++row, out += to.stride) {
          const int64_t y = row * w.stride[0] + phase_y - w.padding[0];
          const bool inside = y >= 0 && y < s.height;
          const int64_t begin = inside ? taken.begin : 0, end = inside ? taken.end : 0;
          const float* const in = at(input, channel) + from.image(n) + y * from.stride + x0;
          for (int64_t x = 0; x < begin; ++x) out[x] = 0;
          if (begin < end) take(in + step * begin, step, end - begin, out + begin);
          for (int64_t x = end; x < to.stride; ++x) out[x] = 0;
        }
    });
  }

  // The pieces of vectors [begin, end), and what kernels add pixels to.
  static const float* pack(const Step& s, int64_t channels, const float* in, int64_t begin, int64_t end) {
    float* to = static_cast<float*>(scratch(Scratch::kTile, channels * s.packed_step * sizeof(float)));
    const float* const packed = to - begin * kLanes;
    const auto copy = engine<FrozenEngine>().copy;
    for (int64_t c = 0; c < channels; ++c, in += s.map_step, to += s.packed_step)
      for (const Piece& piece : s.pieces)
        copy(in + piece.from + begin * kLanes, end - begin + piece.vectors, to + piece.to);
    return packed;
  }

  ProductCall call_of(size_t i) const {
    const Node& n = node(i);
    const Step& s = step(i);
    const Grid& g = grid(i);
    ProductCall call{};
    call.panels = s.panels.data();
    call.list = plan_.list();
    call.bias = s.bias.data();
    call.in = s.phases.direct ? at(n.inputs[0]) : memory_.data() + plan_.start(s.phases.slot);
    call.out = at(i);
    if (n.inputs.size() == 2) call.residual = at(n.inputs[1]);
    call.out_stride = call.residual_stride = g.length;
    call.inside = g.inside.data();
    call.activation = n.activation;
    call.last_panel = static_cast<int64_t>(s.panels.size());
    return call;
  }

  void tile(size_t i, ProductCall call, int64_t t) const {
    const Step& s = step(i);
    call.begin = grid(i).vectors * t / s.tiles;
    call.end = grid(i).vectors * (t + 1) / s.tiles;
    if (!s.pieces.empty())
      call.in = pack(s, node(node(i).inputs[0]).shape.channels, call.in, call.begin, call.end);
    engine<FrozenEngine>().product(call);
  }

  void product(size_t i) {
    const Step& s = step(i);
    if (!s.phases.direct) split(i);
    const ProductCall call = call_of(i);
    const int64_t products = static_cast<int64_t>(node(i).values.size()) * grid(i).vectors * kLanes;
    const int workers = useful_threads(threads_, products, 0);
    const int64_t cuts = static_cast<int64_t>(s.cuts.size()) - 1;
    int64_t parts = workers == 1 || s.tiles >= 4 * workers ? 1 : cuts;
    while (!s.pieces.empty() && parts / 2 >= workers) parts /= 2;  // each of them packs the tile
    auto piece = [&](int64_t slot) {
      const int64_t cut = cuts / parts * (slot % parts);
      ProductCall own = call;
      own.first_panel = s.cuts[cut];
      own.last_panel = s.cuts[cut + cuts / parts];
      tile(i, own, slot / parts);
    };
    share(workers, s.tiles * parts, piece);
  }

  void run_chain(const Chain& chain) {
    std::vector<ProductCall> calls;
    for (size_t i = chain.first; i < chain.last; ++i) calls.push_back(call_of(i));
    const int64_t tiles = step(chain.first).tiles;
    const int64_t turns = tiles + *std::max_element(chain.lag.begin(), chain.lag.end());
    for (int64_t turn = 0; turn < turns; ++turn)
      for (size_t k = 0; k < calls.size(); ++k) {
        const int64_t t = turn - chain.lag[k];
        if (t >= 0 && t < tiles) tile(chain.first + k, calls[k], t);
      }
  }

  void pointwise(size_t i) {
    const Node& n = node(i);
    const Grid& g = grid(i);
    const int64_t count = n.shape.channels;
    const int workers = useful_threads(threads_, 0, count * g.vectors * kLanes);
    auto part = [&](int slot) {
      const int64_t first = count * slot / workers, end = count * (slot + 1) / workers;
      PointwiseCall call{};
      call.in = at(n.inputs[0], first);
      if (n.inputs.size() == 2) call.other = at(n.inputs[1], first);
      if (!n.scale.empty()) call.scale = n.scale.data() + first, call.shift = n.bias.data() + first;
      call.out = at(i, first);
      call.channels = end - first;
      call.vectors = g.vectors;
      call.in_stride = call.other_stride = call.out_stride = g.length;
      call.inside = g.inside.data();
      call.activation = n.activation;
      engine<FrozenEngine>().pointwise(call);
    };
    parallel(workers, workers, part);
  }

  void layer_norm(size_t i) {
    const Node& n = node(i);
    const Grid& g = grid(i);
    const int workers = useful_threads(threads_, 0, 2 * n.shape.channels * g.vectors * kLanes);
    auto part = [&](int slot) {
      LayerNormCall call{};
      call.in = at(n.inputs[0]);
      call.scale = n.scale.data();
      call.shift = n.bias.data();
      call.out = at(i);
      call.channels = n.shape.channels;
      call.in_stride = call.out_stride = g.length;
      call.begin = g.vectors * slot / workers;
      call.end = g.vectors * (slot + 1) / workers;
      call.inside = g.inside.data();
      call.eps = n.values[0];
      engine<FrozenEngine>().layer_norm(call);
    };
    parallel(workers, workers, part);
  }

  void attention(size_t i) {
    const Node& n = node(i);
    const Grid& g = grid(i);
    const int64_t heads = n.window.groups, width = n.shape.channels / heads, tokens = n.shape.width;
    const int64_t slots = plan_.images() * heads;
    const int workers = useful_threads(threads_, 2 * slots * tokens * tokens * width, 0);
    auto part = [&](int worker) {
      AttentionCall call{};
      call.weights = static_cast<float*>(scratch(Scratch::kTile, tokens * kAttentionQueries * sizeof(float)));
      call.tokens = tokens;
      call.width = width;
      call.in_stride = call.out_stride = g.length;
      call.scale = 1.0f / std::sqrt(static_cast<float>(width));
      for (int64_t s = slots * worker / workers; s < slots * (worker + 1) / workers; ++s) {
        const int64_t first = s % heads * width, image = g.image(s / heads);
        call.q = at(n.inputs[0], first) + image;
        call.k = at(n.inputs[0], n.shape.channels + first) + image;
        call.v = at(n.inputs[0], 2 * n.shape.channels + first) + image;
        call.out = at(i, first) + image;
        if (n.inputs.size() == 2) {
          const size_t m = n.inputs[1];
          call.mask = at(m, node(m).shape.channels == 1 ? 0 : s % heads) + grid(m).image(s / heads);
          call.mask_stride = node(m).shape.height == 1 ? 0 : grid(m).stride;
        }
        engine<FrozenEngine>().attention(call);
      }
    };
    parallel(workers, workers, part);
  }

  void gate(size_t i) {
    const size_t first = node(i).inputs[0], second = node(i).inputs[1];
    rows(i, [&](float* to, int64_t image, int64_t c, int64_t y) {
      const float factor = at(second, c)[grid(second).image(image)];
      const float* const from = at(first, c) + grid(first).image(image) + y * grid(first).stride;
      for (int64_t x = 0; x < node(i).shape.width; ++x) to[x] = from[x] * factor;
    });
  }

  // Over rows first, which is a run of floats, then along the row.
  void windows(size_t i, float start, bool mean) {
    const Window& w = node(i).window;
    const size_t input = node(i).inputs[0];
    const Shape &s = node(input).shape, &o = node(i).shape;
    const Grid &from = grid(input), &to = grid(i);
    const auto combine = mean ? engine<FrozenEngine>().sum : engine<FrozenEngine>().larger;
    std::vector<Taken> taken;
    for (int64_t tap = 0; tap < w.kernel[1]; ++tap)
      taken.emplace_back(tap * w.dilation[1] - w.padding[1], w.stride[1], s.width, o.width);
    channels(o.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
      float* const line = static_cast<float*>(scratch(Scratch::kTile, s.width * sizeof(float)));
      for (int64_t n = 0; n < plan_.images(); ++n)
        for (int64_t y = 0; y < o.height; ++y) {
          float* const out = at(i, c) + to.image(n) + y * to.stride;
          std::fill_n(line, s.width, start);
          int64_t rows = 0;
          for (int64_t tap = 0; tap < w.kernel[0]; ++tap) {
            const int64_t source = y * w.stride[0] + tap * w.dilation[0] - w.padding[0];
            if (source < 0 || source >= s.height) continue;
            ++rows;
            const float* const in = at(input, c) + from.image(n) + source * from.stride;
            combine(in, 1, s.width, line);
          }
          std::fill_n(out, o.width, start);
          for (int64_t tap = 0; tap < w.kernel[1]; ++tap) {
            const int64_t x0 = tap * w.dilation[1] - w.padding[1], step = w.stride[1];
            const auto [begin, end] = taken[tap];
            combine(line + begin * step + x0, step, end - begin, out + begin);
          }
          for (int64_t x = 0; mean && x < o.width; ++x) out[x] /= counted(i, rows, x);
        }
    });
  }

  // How many pixels a window of a mean counts that has `rows` rows inside of the map.
  float counted(size_t i, int64_t rows, int64_t x) const {
    const Window& w = node(i).window;
    if (node(i).count_padding) return static_cast<float>(w.kernel[0] * w.kernel[1]);
    int64_t columns = 0;
    for (int64_t tap = 0; tap < w.kernel[1]; ++tap) {
      const int64_t source = x * w.stride[1] + tap * w.dilation[1] - w.padding[1];
      columns += source >= 0 && source < node(node(i).inputs[0]).shape.width;
    }
    return static_cast<float>(rows * columns);
  }

  void pool(size_t i) {
    if (node(i).kind == Kind::kMaxPool) return windows(i, -std::numeric_limits<float>::infinity(), false);
    if (node(i).window.kernel[0] > 0) return windows(i, 0.0f, true);
    const size_t input = node(i).inputs[0];
    const Shape& s = node(input).shape;
    const Grid &from = grid(input), &to = grid(i);
    channels(s.channels, plan_.images() * s.channels * s.pixels(), [&](int64_t c) {
      for (int64_t n = 0; n < plan_.images(); ++n) {
        double sum = 0;
        for (int64_t y = 0; y < s.height; ++y) {
          const float* const in = at(input, c) + from.image(n) + y * from.stride;
          float row = 0;
          for (int64_t x = 0; x < s.width; ++x) row += in[x];
          sum += row;
        }
        at(i, c)[to.image(n)] = static_cast<float>(sum / static_cast<double>(s.pixels()));
      }
    });
  }

  void flatten(size_t i) {
    const size_t input = node(i).inputs[0];
    const Shape& s = node(input).shape;
    const Grid& to = grid(i);
    rows(input, [&](const float* from, int64_t n, int64_t c, int64_t y) {
      for (int64_t x = 0; x < s.width; ++x) at(i, (c * s.height + y) * s.width + x)[to.image(n)] = from[x];
    });
  }

  const Plan& plan_;
  Workspace& memory_;
  const int threads_;
};

}  // namespace

void run_groups(const Plan& plan, const std::vector<const float*>& in, const std::vector<float*>& out,
                int64_t first, int64_t groups, int threads) {
  // Enough groups run side by side; fewer in turn, each on all threads.
  const int inner = groups < threads ? threads : 1;
  auto one = [&](int64_t group) {
    const auto memory = plan.workspace();
    Run(plan, *memory, inner)(in, out, first + group * plan.images());
  };
  share(groups < threads ? 1 : threads, groups, one);
}

}  // namespace sparsekd::frozen
