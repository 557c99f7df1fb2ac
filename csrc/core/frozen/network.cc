#include "core/frozen/network.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/frozen/plan.h"
#include "core/structure.h"

namespace sparsekd::frozen {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;        // numbers in one map of an image, or in a weight
constexpr int64_t kMostPixels = int64_t{1} << 20;  // along an axis
constexpr int64_t kMostTap = 1024;                 // kernel, stride, padding, dilation

void require(bool ok, const std::string& what) {
  if (!ok) throw ShapeError(what);
}

void check_shape(const Shape& s) {
  require(s.channels >= 1 && s.channels < kMostPixels && s.height >= 1 && s.height < kMostPixels &&
              s.width >= 1 && s.width < kMostPixels && s.channels * s.height < kMost &&
              s.channels * s.height * s.width < kMost,
          "shape: expected channels, height and width of 1 or more, got " + std::to_string(s.channels) + "x" +
              std::to_string(s.height) + "x" + std::to_string(s.width));
}

Shape through(const Window& w, const Shape& in, int64_t channels) {
  int64_t size[2] = {in.height, in.width};
  for (int axis = 0; axis < 2; ++axis) {
    for (const int64_t value : {w.kernel[axis], w.stride[axis], w.dilation[axis]})
      require(value >= 1 && value <= kMostTap, "window: expected kernel, stride and dilation of 1 to 1024");
    require(w.padding[axis] >= 0 && w.padding[axis] <= kMostTap, "window: expected padding of 0 to 1024");
    const int64_t reach = w.dilation[axis] * (w.kernel[axis] - 1) + 1;
    const int64_t room = size[axis] + 2 * w.padding[axis] - reach;
    require(room >= 0, "window: the kernel is larger than the padded map");
    size[axis] = room / w.stride[axis] + 1;
  }
  return {channels, size[0], size[1]};
}

void check_finite_length(const std::vector<float>& values, int64_t length, const char* name) {
  require(values.empty() || static_cast<int64_t>(values.size()) == length,
          std::string(name) + ": expected " + std::to_string(length) + " numbers, got " +
              std::to_string(values.size()));
}

void check_product(Node& node, const Shape& in) {
  const Window& w = node.window;
  require(!node.crow.empty(), "crow: expected rows + 1 entries, got none");
  const int64_t rows = static_cast<int64_t>(node.crow.size()) - 1;
  require(rows >= 1 && w.groups >= 1 && in.channels % w.groups == 0 && rows % w.groups == 0,
          "groups: expected a divisor of input and output channels, got " + std::to_string(w.groups));
  node.shape = through(w, in, rows);
  const int64_t columns = in.channels / w.groups * w.kernel[0] * w.kernel[1];
  require(columns < kMost, "weight: too many columns");
  const bool coded = !node.scale.empty();
  require(coded ? node.values.empty() : node.codes.empty(), "values: expected them, or codes with a scale");
  check_finite_length(node.scale, rows, "scale");
  const auto nnz = static_cast<int64_t>(coded ? node.codes.size() : node.values.size());
  require(static_cast<int64_t>(node.col.size()) == nnz, "col: expected one for each of " +
                                                            std::to_string(nnz) + " values, got " +
                                                            std::to_string(node.col.size()));
  validate_csr(node.crow.data(), rows + 1, node.col.data(), nnz, rows, columns);
  check_finite_length(node.bias, rows, "bias");
  if (!coded) return;
  node.values.reserve(nnz);
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t k = node.crow[r]; k < node.crow[r + 1]; ++k)
      node.values.push_back(static_cast<float>(node.codes[k]) * node.scale[r]);
}

void check_pool(Node& node, const Shape& in) {
  const Window& w = node.window;
  require(w.groups == 1, "groups: a pool has none");
  node.shape = through(w, in, in.channels);
  for (int axis = 0; axis < 2; ++axis)
    require(w.padding[axis] <= (w.dilation[axis] * (w.kernel[axis] - 1) + 1) / 2,
            "padding: expected at most half of the kernel");
}

// Whether the second input of a node fits what it computes from the first, `in`.
void check_second(const Node& node, const Shape& other, const Shape& in) {
  const Shape& own = node.shape;
  if (node.kind == Kind::kAttention)
    require((other.channels == 1 || other.channels == node.window.groups) &&
                (other.height == 1 || other.height == in.width) && other.width == in.width,
            "inputs: expected a mask of 1 or heads times 1 or tokens times tokens");
  else if (node.kind == Kind::kGate)
    require(other.channels == own.channels && other.pixels() == 1,
            "inputs: expected a second map of one number for each channel");
  else
    require(other.channels == own.channels && other.same_pixels(own),
            "inputs: expected a second map of the result's shape");
}

size_t arity(const Node& node) {
  switch (node.kind) {
    case Kind::kInput:
    case Kind::kTokens:
      return 0;
    case Kind::kProduct:
    case Kind::kPointwise:
    case Kind::kAttention:
      return node.inputs.size() == 2 ? 2 : 1;
    case Kind::kGate:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

Node decode(const int32_t* record) {
  Node node;
  node.kind = static_cast<Kind>(record[0]);
  node.activation = static_cast<Activation>(record[1]);
  node.count_padding = record[2] != 0;
  for (int i = 3; i < 5; ++i)
    if (record[i] >= 0) node.inputs.push_back(record[i]);
  for (int axis = 0; axis < 2; ++axis) {
    node.window.kernel[axis] = record[5 + axis];
    node.window.stride[axis] = record[7 + axis];
    node.window.padding[axis] = record[9 + axis];
    node.window.dilation[axis] = record[11 + axis];
  }
  node.window.groups = record[13];
  node.shape = {record[14], record[15], record[16]};
  return node;
}

Network::Network(std::vector<Node> nodes, std::vector<int32_t> outputs)
    : nodes_(std::move(nodes)), outputs_(std::move(outputs)), tokens_(nodes_.size(), 0) {
  const auto check = [&](int32_t index) {
    Node& node = nodes_[index];
    require(node.kind >= Kind::kInput && node.kind < Kind::kCount, "kind: unknown");
    require(node.activation >= Activation::kNone && node.activation < Activation::kCount,
            "activation: unknown");
    require(node.inputs.size() == arity(node), "inputs: wrong number of them");
    for (const int32_t input : node.inputs)
      require(input >= 0 && input < index, "inputs: expected earlier nodes, got " + std::to_string(input));
    const Shape* const in = node.inputs.empty() ? nullptr : &nodes_[node.inputs[0]].shape;
    const bool of_tokens = in && tokens_[node.inputs[0]];
    switch (node.kind) {
      case Kind::kTokens:
        require(node.shape.height == 1, "shape: tokens have height 1");
        inputs_.push_back(index);
        break;
      case Kind::kInput:
        inputs_.push_back(index);
        break;
      case Kind::kProduct:
        check_product(node, *in);
        products_ += static_cast<int64_t>(node.values.size()) * node.shape.pixels();
        break;
      case Kind::kPointwise:
        node.shape = *in;
        require(node.scale.empty() == node.bias.empty(), "scale: goes with a shift");
        check_finite_length(node.scale, in->channels, "scale");
        check_finite_length(node.bias, in->channels, "shift");
        break;
      case Kind::kMaxPool:
      case Kind::kMeanPool:
        if (node.kind == Kind::kMeanPool && node.window.kernel[0] == 0)
          node.shape = {in->channels, 1, 1};
        else
          check_pool(node, *in);
        break;
      case Kind::kLayerNorm:
        node.shape = *in;
        require(node.values.size() == 1, "values: expected eps");
        require(
            static_cast<int64_t>(node.scale.size()) == in->channels && node.bias.size() == node.scale.size(),
            "scale, shift: expected one for each channel");
        break;
      case Kind::kAttention: {
        const int64_t heads = node.window.groups;
        require(of_tokens, "inputs: expected tokens");
        require(heads >= 1 && in->channels % (3 * heads) == 0,
                "groups: expected heads that divide a third of the channels, got " + std::to_string(heads));
        node.shape = {in->channels / 3, 1, in->width};
        break;
      }
      case Kind::kGate:
        node.shape = *in;
        break;
      case Kind::kSequence: {
        const auto length = static_cast<int64_t>(node.bias.size());
        require(length % in->channels == 0 && length / in->channels >= in->pixels(),
                "bias: expected " + std::to_string(in->channels) + " channels of " +
                    std::to_string(in->pixels()) + " tokens or more, got " + std::to_string(length) +
                    " numbers");
        node.shape = {in->channels, 1, length / in->channels};
        break;
      }
      default:
        node.shape = {in->channels * in->pixels(), 1, 1};
    }
    check_shape(node.shape);
    if (node.inputs.size() == 2) check_second(node, nodes_[node.inputs[1]].shape, *in);
    const bool flat = node.kind == Kind::kFlatten || node.shape.height > 1;
    const bool makes_tokens = node.kind == Kind::kTokens || node.kind == Kind::kSequence;
    tokens_[index] = makes_tokens || (of_tokens && !flat);
  };
  for (size_t i = 0; i < nodes_.size(); ++i) {
    try {
      check(static_cast<int32_t>(i));
    } catch (const ShapeError& e) {
      throw ShapeError("node " + std::to_string(i) + ": " + e.what());
    } catch (const TopologyError& e) {
      throw TopologyError("node " + std::to_string(i) + ": " + e.what());
    }
  }
  if (inputs_.empty() || outputs_.empty()) throw ShapeError("network: expected an input and an output");
  for (const int32_t output : outputs_)
    if (output < 0 || output >= static_cast<int32_t>(nodes_.size()))
      throw ShapeError("outputs: expected nodes, got " + std::to_string(output));
}

Network::~Network() = default;

int64_t Network::input_length(size_t index) const {
  const Shape& s = nodes_[inputs_[index]].shape;
  return s.channels * s.pixels();
}

int64_t Network::output_length(size_t index) const {
  const Shape& s = nodes_[outputs_[index]].shape;
  return s.channels * s.pixels();
}

std::shared_ptr<const Plan> Network::plan(int64_t together) const {
  constexpr size_t kPlans = 4;
  const std::lock_guard<std::mutex> hold(lock_);
  const auto at =
      std::find_if(plans_.begin(), plans_.end(), [&](auto& p) { return p->images() == together; });
  std::shared_ptr<const Plan> found = at != plans_.end() ? *at : std::make_shared<Plan>(*this, together);
  if (at != plans_.end()) plans_.erase(at);
  if (plans_.size() == kPlans) plans_.erase(plans_.begin());
  plans_.push_back(found);
  return found;
}

void Network::run(const std::vector<const float*>& in, const std::vector<float*>& out, int64_t batch,
                  int threads, int64_t together) const {
  if (in.size() != inputs_.size() || out.size() != outputs_.size())
    throw ShapeError("network: expected " + std::to_string(inputs_.size()) + " inputs and " +
                     std::to_string(outputs_.size()) + " outputs");
  if (batch < 0 || threads < 1 || together < 0) throw ShapeError("network: expected a batch and threads");
  for (int64_t done = 0; done < batch;) {
    // Whole groups first; what is left has a plan of its own.
    const int64_t size =
        std::min(batch - done, together ? together : best_group(*this, batch - done, threads));
    const int64_t groups = (batch - done) / size;
    run_groups(*plan(size), in, out, done, groups, threads);
    done += groups * size;
  }
}

}  // namespace sparsekd::frozen
