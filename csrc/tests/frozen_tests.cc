// Frozen networks against an interpreter of plain loops in double precision: random lists of nodes of every
// kind, every instruction set, groups of images and threads.
#include <utility>

#include "core/cpu.h"
#include "core/frozen/network.h"
#include "tests/harness.h"

using namespace sparsekd;
using namespace sparsekd::frozen;

namespace {

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return x > 0 || std::isnan(x) ? x : 0;
    case Activation::kRelu6:
      return std::isnan(x) ? x : std::min(std::max(x, 0.0), 6.0);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return x * 0.5 * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::kHardswish:
      return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kHardsigmoid:
      return std::isnan(x) ? x : std::min(std::max(x + 3, 0.0), 6.0) / 6;
    default:
      return x;
  }
}

// The map of one image: [channels][height][width].
using Image = std::vector<double>;

Image computed(const std::vector<Node>& nodes, size_t i, const std::vector<Image>& maps) {
  const Node& node = nodes[i];
  const Shape& o = node.shape;
  const Shape& s = nodes[node.inputs[0]].shape;
  const Image& x = maps[node.inputs[0]];
  const Window& w = node.window;
  Image y(o.channels * o.pixels());
  for (int64_t c = 0; c < o.channels; ++c)
    for (int64_t p = 0; p < o.height; ++p)
      for (int64_t q = 0; q < o.width; ++q) {
        const int64_t at = (c * o.height + p) * o.width + q;
        // Calls run(element of channel `from`, tap) for the pixels of the window that there are.
        const auto taps = [&](int64_t from, auto run) {
          for (int64_t t = 0; t < w.kernel[0] * w.kernel[1]; ++t) {
            const int64_t r = p * w.stride[0] + t / w.kernel[1] * w.dilation[0] - w.padding[0];
            const int64_t l = q * w.stride[1] + t % w.kernel[1] * w.dilation[1] - w.padding[1];
            if (r >= 0 && r < s.height && l >= 0 && l < s.width)
              run(x[(from * s.height + r) * s.width + l], t);
          }
        };
        double sum = 0;
        if (node.kind == Kind::kProduct) {
          const int64_t count = w.kernel[0] * w.kernel[1];
          const int64_t first = c / (o.channels / w.groups) * (s.channels / w.groups);
          if (!node.bias.empty()) sum = node.bias[c];
          for (int32_t k = node.crow[c]; k < node.crow[c + 1]; ++k)
            taps(first + node.col[k] / count, [&](double v, int64_t t) {
              if (t == node.col[k] % count) sum += v * node.values[k];
            });
        } else if (node.kind == Kind::kPointwise) {
          sum = node.scale.empty() ? x[at] : x[at] * node.scale[c] + node.bias[c];
        } else if (node.kind == Kind::kMaxPool) {
          sum = -HUGE_VAL;
          taps(c, [&](double v, int64_t) { sum = v > sum || std::isnan(v) ? v : sum; });
        } else if (node.kind == Kind::kMeanPool && w.kernel[0] == 0) {
          for (int64_t k = 0; k < s.pixels(); ++k) sum += x[c * s.pixels() + k] / s.pixels();
        } else if (node.kind == Kind::kMeanPool) {
          int64_t count = 0;
          taps(c, [&](double v, int64_t) { sum += v, ++count; });
          sum /= node.count_padding ? w.kernel[0] * w.kernel[1] : count;
        } else if (node.kind == Kind::kLayerNorm) {
          double mean = 0, square = 0;
          const auto of = [&](int64_t k) { return x[(k * s.height + p) * s.width + q]; };
          for (int64_t k = 0; k < s.channels; ++k) mean += of(k) / s.channels;
          for (int64_t k = 0; k < s.channels; ++k) square += (of(k) - mean) * (of(k) - mean) / s.channels;
          sum = (of(c) - mean) / std::sqrt(square + node.values[0]) * node.scale[c] + node.bias[c];
        } else if (node.kind == Kind::kAttention) {
          const int64_t width = o.channels / w.groups, first = c / width * width;
          double total = 0;
          for (int64_t j = 0; j < s.width; ++j) {
            double score = 0;
            if (node.inputs.size() == 2) {
              const Shape& m = nodes[node.inputs[1]].shape;
              const int64_t head = m.channels == 1 ? 0 : c / width, query = m.height == 1 ? 0 : q;
              score = maps[node.inputs[1]][(head * m.height + query) * m.width + j];
            }
            for (int64_t d = first; d < first + width; ++d)
              score += x[d * s.width + q] * x[(o.channels + d) * s.width + j] /
                       std::sqrt(static_cast<double>(width));
            total += std::exp(score);
            sum += std::exp(score) * x[(2 * o.channels + c) * s.width + j];
          }
          sum /= total;
        } else if (node.kind == Kind::kGate) {
          sum = x[at] * maps[node.inputs[1]][c];
        } else if (node.kind == Kind::kSequence) {
          const int64_t pixel = q - (o.width - s.pixels());
          sum = node.bias[c * o.width + q] + (pixel < 0 ? 0 : x[c * s.pixels() + pixel]);
        } else {
          sum = x[c];  // kFlatten
        }
        const bool adds = node.kind == Kind::kProduct || node.kind == Kind::kPointwise;
        if (adds && node.inputs.size() == 2) sum += maps[node.inputs[1]][at];
        y[at] = adds ? activated(node.activation, sum) : sum;
      }
  return y;
}

Activation any_activation() { return static_cast<Activation>(pick(0, 7)); }

// A node that reads earlier ones, or one that Network refuses because a window does not fit.
Node any_node(const std::vector<Node>& nodes) {
  Node node;
  const auto input = static_cast<int32_t>(pick(0, static_cast<int64_t>(nodes.size()) - 1));
  const Shape& s = nodes[input].shape;
  node.inputs = {input};
  node.kind = static_cast<Kind>(pick(2, 10));
  Window& w = node.window;
  const bool windowed =
      node.kind == Kind::kProduct || node.kind == Kind::kMaxPool || node.kind == Kind::kMeanPool;
  for (int axis = 0; windowed && axis < 2; ++axis) {
    w.kernel[axis] = pick(1, 4);
    w.stride[axis] = pick(0, 1) ? 1 : pick(1, 3);
    w.dilation[axis] = pick(1, 2);
    w.padding[axis] = pick(0, 1) ? w.dilation[axis] * (w.kernel[axis] - 1) / 2 : pick(0, 3);
    if (node.kind != Kind::kProduct)
      w.padding[axis] = std::min(w.padding[axis], (w.dilation[axis] * (w.kernel[axis] - 1) + 1) / 2);
  }
  if (node.kind == Kind::kProduct) {
    node.activation = any_activation();
    if (s.channels % 2 == 0 && pick(0, 2) == 0) w.groups = 2;
    const int64_t rows = pick(1, 12) * w.groups, taps = w.kernel[0] * w.kernel[1];
    const double densities[] = {0, 0.1, 0.5, 1};
    const Csr csr = any_csr(rows, s.channels / w.groups, taps, densities[pick(0, 3)]);
    node.crow = csr.crow;
    node.col = csr.col;
    if (pick(0, 2) == 0) {
      for (int64_t r = 0; r < rows; ++r) node.scale.push_back(static_cast<float>(uniform()) / 128);
      for (size_t k = 0; k < csr.col.size(); ++k) node.codes.push_back(static_cast<int8_t>(pick(-128, 127)));
    } else {
      for (size_t k = 0; k < csr.col.size(); ++k) node.values.push_back(static_cast<float>(uniform()));
    }
    if (pick(0, 1))
      for (int64_t r = 0; r < rows; ++r) node.bias.push_back(static_cast<float>(uniform()));
  } else if (node.kind == Kind::kPointwise) {
    node.activation = any_activation();
    for (int64_t c = 0; pick(0, 3) && c < s.channels; ++c) {
      node.scale.resize(s.channels, 0.5f);
      node.bias.resize(s.channels, -0.25f);
      node.scale[c] = static_cast<float>(uniform());
    }
  } else if (node.kind == Kind::kLayerNorm) {
    node.values = {0.1f};
    for (int64_t c = 0; c < s.channels; ++c) {
      node.scale.push_back(static_cast<float>(uniform()));
      node.bias.push_back(static_cast<float>(uniform()));
    }
  } else if (node.kind == Kind::kAttention) {
    w.groups = s.channels % 3 == 0 && pick(0, 1) ? s.channels / 3 : 1;
  } else if (node.kind == Kind::kSequence) {
    const int64_t tokens = s.pixels() + pick(0, 2);
    for (int64_t k = 0; k < s.channels * tokens; ++k) node.bias.push_back(static_cast<float>(uniform()));
  } else if (node.kind == Kind::kMeanPool) {
    if (pick(0, 3) == 0) w = Window(), w.kernel[0] = w.kernel[1] = 0;
    node.count_padding = pick(0, 1);
  }
  return node;
}

// Appends a map that a node of two inputs can have as its second: a mean for a gate, a mask for attention.
void give_second(std::vector<Node>& nodes, Node& node) {
  const Shape& s = nodes[node.inputs[0]].shape;
  Node second;
  if (node.kind == Kind::kGate) {
    second.kind = Kind::kMeanPool;
    second.inputs = node.inputs;
    second.window.kernel[0] = second.window.kernel[1] = 0;
    second.shape = {s.channels, 1, 1};
  } else if (node.kind == Kind::kAttention && pick(0, 1)) {
    second.shape = {pick(0, 1) ? 1 : node.window.groups, pick(0, 1) ? 1 : s.width, s.width};
  } else {
    return;
  }
  node.inputs.push_back(static_cast<int32_t>(nodes.size()));
  nodes.push_back(second);
}

// Appends what fits; `nodes` is what Network made of the list so far, with all shapes.
std::vector<Node> any_network(int64_t length) {
  std::vector<Node> nodes;
  for (int64_t i = pick(0, 3) ? 1 : 2; i > 0; --i) {
    Node input;
    input.kind = Kind::kInput;
    input.shape = {pick(1, 9), pick(1, 11), pick(1, 20)};
    if (pick(0, 2) == 0) input.kind = Kind::kTokens, input.shape = {3 * pick(1, 5), 1, pick(1, 40)};
    nodes.push_back(input);
  }
  while (static_cast<int64_t>(nodes.size()) < length) {
    const size_t before = nodes.size();
    Node next = any_node(nodes);
    give_second(nodes, next);
    nodes.push_back(next);
    Node& last = nodes.back();
    const auto index = static_cast<int32_t>(nodes.size()) - 1;
    try {
      const Network so_far(nodes, {index});
      last = so_far.nodes().back();
      if (!last.codes.empty()) last.values.clear();
      if (last.kind != Kind::kProduct && last.kind != Kind::kPointwise) continue;
      for (int32_t other = index - 1; other >= 0; --other) {
        const Shape& s = nodes[other].shape;
        if (s.channels != last.shape.channels || !s.same_pixels(last.shape) || pick(0, 1)) continue;
        last.inputs.push_back(other);
        break;
      }
    } catch (const ShapeError&) {
      nodes.resize(before);
    }
  }
  return nodes;
}

void check_network(const char* isa, const std::vector<Node>& nodes, int64_t batch, int64_t together,
                   int threads) {
  std::vector<int32_t> outputs{static_cast<int32_t>(nodes.size()) - 1};
  while (pick(0, 1)) outputs.push_back(static_cast<int32_t>(pick(0, static_cast<int64_t>(nodes.size()) - 1)));
  const Network network(nodes, outputs);
  std::vector<std::vector<float>> in, out;
  std::vector<const float*> from;
  std::vector<float*> to;
  for (size_t i = 0; i < network.inputs().size(); ++i) {
    in.emplace_back(batch * network.input_length(i));
    for (float& v : in.back()) v = static_cast<float>(uniform());
    from.push_back(in.back().data());
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    out.emplace_back(batch * network.output_length(i), std::numeric_limits<float>::quiet_NaN());
    to.push_back(out.back().data());
  }
  std::string name = std::string("frozen ") + isa + " batch " + std::to_string(batch) + " together " +
                     std::to_string(together) + " threads " + std::to_string(threads) + " kinds";
  for (const Node& node : nodes) name += " " + std::to_string(static_cast<int>(node.kind));
  network.run(from, to, batch, threads, together);
  // Twice: nothing of the first call may be left between the pixels.
  network.run(from, to, batch, threads, together);
  double difference = 0;
  for (int64_t n = 0; n < batch; ++n) {
    std::vector<Image> maps;
    size_t input = 0;
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Node& node = network.nodes()[i];
      if (!node.inputs.empty()) {
        maps.push_back(computed(network.nodes(), i, maps));
        continue;
      }
      const Shape& s = node.shape;
      const float* x = from[input] + n * network.input_length(input);
      Image image(s.channels * s.pixels());
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t p = 0; p < s.pixels(); ++p)
          image[c * s.pixels() + p] =
              node.kind == Kind::kTokens ? x[p * s.channels + c] : x[c * s.pixels() + p];
      maps.push_back(image);
      ++input;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Shape& s = network.nodes()[outputs[i]].shape;
      const Image& right = maps[outputs[i]];
      double scale = 1;
      for (const double v : right)
        if (std::isfinite(v)) scale = std::max(scale, std::fabs(v));
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t p = 0; p < s.pixels(); ++p) {
          const int64_t at = network.tokens(outputs[i]) ? p * s.channels + c : c * s.pixels() + p;
          const double ours = out[i][n * network.output_length(i) + at], theirs = right[c * s.pixels() + p];
          // A window in the middle of dilated padding has no pixel; what comes of it is not a number.
          if (std::isnan(theirs) ? std::isnan(ours) : ours == theirs) continue;
          const double d = std::fabs(ours - theirs) / scale;
          difference = d <= difference ? difference : d;
        }
    }
  }
  check(difference < 2e-5, name + " difference " + std::to_string(difference));
}

void check_any_network(const char* isa) {
  const int64_t batches[] = {0, 1, 2, 5, 17, 35};  // the last two with interleaved images
  const int64_t batch = batches[pick(0, 5)], together = pick(0, 1) ? 0 : pick(0, 2) ? pick(1, 6) : kLanes;
  const std::vector<Node> nodes = any_network(pick(2, 14));
  check_network(isa, nodes, batch, together, static_cast<int>(pick(1, 3)));
}

// A product of the last node, whose results are about as large as its inputs.
Node product_after(const std::vector<Node>& nodes, int64_t channels, int64_t kernel, int64_t padding,
                   double density) {
  const auto last = static_cast<int32_t>(nodes.size()) - 1;
  Node node;
  node.kind = Kind::kProduct;
  node.activation = any_activation();
  node.inputs = {last};
  for (int axis = 0; axis < 2; ++axis) {
    node.window.kernel[axis] = kernel;
    node.window.padding[axis] = padding;
    node.window.dilation[axis] = kernel > 1 ? std::max<int64_t>(1, 2 * padding / (kernel - 1)) : 1;
  }
  const int64_t inputs = Network(nodes, {last}).nodes().back().shape.channels;
  const Csr csr = any_csr(channels, inputs, kernel * kernel, density);
  node.crow = csr.crow;
  node.col = csr.col;
  for (size_t k = 0; k < csr.col.size(); ++k)
    node.values.push_back(static_cast<float>(uniform() / std::sqrt(inputs * kernel * kernel * density)));
  return node;
}

// Inputs that do not fit L1, so that products run in blocks of channels: rows without nonzeros in some block,
// rows of one list, strides, residuals; on pixels in a row and on interleaved images.
void check_blocks(const char* isa) {
  Node input;
  input.shape = {cache_sizes().l1d / 192, 6, 5};  // nine lines a channel at the least: three blocks
  std::vector<Node> nodes{input};
  const auto add = [&](int64_t channels, int64_t kernel, int64_t padding, double density) -> Node& {
    nodes.push_back(product_after(nodes, channels, kernel, padding, density));
    return nodes.back();
  };
  add(pick(90, 110), 3, 1, pick(0, 1) ? 0.1 : 1.0);
  add(input.shape.channels, 3, 1, 0.2).inputs.push_back(0);
  add(pick(30, 90), 3, pick(0, 2), 0.3).window.stride[pick(0, 1)] = 2;
  Node mean;
  mean.kind = Kind::kMeanPool;
  mean.inputs = {static_cast<int32_t>(nodes.size()) - 1};
  mean.window.kernel[0] = mean.window.kernel[1] = 0;
  nodes.push_back(mean);
  Node& last = add(pick(50, 90), 1, 0, 0.4);  // few pixels: its list has codes
  last.scale.assign(last.crow.size() - 1, 0.01f);
  for (const float value : std::exchange(last.values, {}))
    last.codes.push_back(static_cast<int8_t>(127 * value));
  const int64_t together = pick(0, 1) ? kLanes : pick(1, 3);
  check_network(isa, nodes, together + pick(0, 1), together, static_cast<int>(pick(1, 3)));
}

// Maps that do not fit L2 together, so that products run tile by tile: residual blocks, whose maps take turns
// in the same memory while taps of every direction still read it.
void check_chain(const char* isa) {
  constexpr int64_t kHeight = 40, kWidth = 43;
  const int64_t channels = cache_sizes().l2 / 16 / (kHeight * kWidth) + 1;
  Node input;
  input.shape = {channels, kHeight, kWidth};
  std::vector<Node> nodes{input};
  const auto product = [&](int64_t kernel, int64_t padding, double density) {
    return product_after(nodes, channels, kernel, padding, density);
  };
  for (int block = 0; block < 3; ++block) {
    const auto first = static_cast<int32_t>(nodes.size()) - 1;
    const double few = 2.0 / static_cast<double>(channels);
    nodes.push_back(product(1, 0, few));
    nodes.push_back(product(3, block == 1 ? 4 : 1, block == 2 ? 5 * few : few));  // the last is packed
    nodes.push_back(product(1, 0, few));
    nodes.back().inputs.push_back(first);
  }
  check_network(isa, nodes, 2, pick(1, 2), 1);
}

}  // namespace

void test_frozen() {
  for (const Isa isa : available_isas()) {
    if (isa == Isa::kScalar) continue;
    set_isa(isa_name(isa));
    for (int i = 0; i < 400; ++i) check_any_network(isa_name(isa));
    check_chain(isa_name(isa));
    for (int i = 0; i < 8; ++i) check_blocks(isa_name(isa));
  }
  set_isa("auto");
}
