// Runs a plan: the nodes in turn, on one group of images per thread, or on the rows and tiles of one group
// after the other where there are fewer groups than threads.
#include <algorithm>
#include <cmath>

#include "core/frozen/maps.h"
#include "core/parallel.h"

namespace sparsekd::frozen {
namespace {

class Run : Maps {
 public:
  using Maps::Maps;

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
        case Kind::kSequence:
          sequence(i);
          break;
        default:
          flatten(i);
      }
    }
    for (size_t i = 0; i < out.size(); ++i)
      write(network.outputs()[i], out[i] + first * network.output_length(i));
  }

 private:
  // The pieces of vectors [begin, end) of channels [first, last), and what kernels add pixels to.
  static const float* pack(const Step& s, const float* in, int64_t first, int64_t last, int64_t begin,
                           int64_t end) {
    float* to = static_cast<float*>(scratch(Scratch::kTile, s.block * s.packed_step * sizeof(float)));
    const float* const packed = to - first * s.packed_step - begin * kLanes;
    const auto copy = engine<FrozenEngine>().copy;
    in += first * s.map_step;
    for (int64_t c = first; c < last; ++c, in += s.map_step, to += s.packed_step)
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
    return call;
  }

  // Parts [from, to) of the panels, on a map of one pixel.
  void dots(size_t i, ProductCall call, int64_t from, int64_t to) const {
    const Step& s = step(i);
    const int64_t channels = node(node(i).inputs[0]).shape.channels;
    float* const x = static_cast<float*>(scratch(Scratch::kTile, channels * sizeof(float)));
    for (int64_t c = 0; c < channels; ++c) x[c] = call.in[c * s.map_step];
    call.in = x;
    call.scale = node(i).scale.data();
    call.first_panel = s.cuts[0][from];
    call.last_panel = s.cuts[0][to];
    engine<FrozenEngine>().dots(call);
  }

  // Parts [from, to) of the panels.
  void tile(size_t i, ProductCall call, int64_t t, int64_t from = 0, int64_t to = kParts) const {
    const Step& s = step(i);
    if (s.coded) return dots(i, call, from, to);
    call.begin = grid(i).vectors * t / s.tiles;
    call.end = grid(i).vectors * (t + 1) / s.tiles;
    const float* const in = call.in;
    const int64_t channels = node(node(i).inputs[0]).shape.channels;
    for (size_t b = 0; b < s.cuts.size(); ++b) {
      const auto& cuts = s.cuts[b];
      const int64_t first = static_cast<int64_t>(b) * s.block;
      if (!s.pieces.empty())
        call.in = pack(s, in, first, std::min(channels, first + s.block), call.begin, call.end);
      call.first_panel = cuts[from];
      call.last_panel = cuts[to];
      call.starts = b == 0;
      call.ends = b + 1 == s.cuts.size();
      engine<FrozenEngine>().product(call);
    }
  }

  void product(size_t i) {
    const Step& s = step(i);
    if (!s.phases.direct) split(i);
    const ProductCall call = call_of(i);
    const int64_t products = static_cast<int64_t>(node(i).values.size()) * grid(i).vectors * kLanes;
    const int workers = useful_threads(threads_, products, 0);
    int64_t parts = workers == 1 || s.tiles >= 4 * workers ? 1 : kParts;
    while (!s.pieces.empty() && parts / 2 >= workers) parts /= 2;  // each of them packs the tile
    auto piece = [&](int64_t slot) {
      const int64_t each = kParts / parts, part = slot % parts;
      tile(i, call, slot / parts, part * each, (part + 1) * each);
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
