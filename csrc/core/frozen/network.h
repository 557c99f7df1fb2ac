// A frozen network: a list of nodes that compute maps from earlier ones, checked once, ready to run.
//
// Network(nodes) checks everything that comes from outside, so that a crafted list cannot make a kernel read
// or write where it must not: which nodes read which, all lengths, all indices. run() then checks only sizes
// of the images. Tests: frozen_tests.cc compares every kind of node with loops in double precision.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/frozen/engine.h"

namespace sparsekd::frozen {

enum class Kind : int32_t {
  kInput,      // images: [batch, channels, height, width]
  kTokens,     // tokens: [batch, width, channels], a map of height 1
  kProduct,    // activation(convolution or linear layer + bias + second input)
  kPointwise,  // activation(first * scale[c] + shift[c] + second)
  kMaxPool,
  kMeanPool,   // the mean of a window; of all pixels if there is no kernel
  kFlatten,    // [channels * height * width, 1, 1]
  kLayerNorm,  // of tokens, over their channels
  kAttention,  // of tokens: channels are queries, keys and values in that order, each of window.groups heads;
               // second input: a mask to be added to the scores, [1 or heads, 1 or queries, keys]
  kGate,       // first times second, which is one number for each channel
  kSequence,   // tokens: bias[c][t], plus the pixels of the input row by row as the last tokens
  kCount
};

struct Shape {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  bool same_pixels(const Shape& other) const { return height == other.height && width == other.width; }
};

// Of a convolution or pool; vertical, then horizontal.
struct Window {
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t groups = 1;
};

struct Node {
  Kind kind = Kind::kInput;
  std::vector<int32_t> inputs;  // earlier nodes
  Activation activation = Activation::kNone;
  Window window;
  Shape shape{};                   // of an input; computed for the others
  bool count_padding = true;       // kMeanPool: divides by the whole kernel at borders
  std::vector<int32_t> crow, col;  // kProduct: weight [rows, channels / groups * kernel] in compressed rows
  std::vector<float> values;       // kProduct; kLayerNorm: eps
  std::vector<int8_t> codes;       // kProduct: instead of values, which are these times the row's scale
  std::vector<float> scale;        // one for each channel; kPointwise, kProduct without codes: or none
  std::vector<float> bias;         // kProduct and, as a shift, the other two: one for each row, or none;
                                   // kSequence: [channels][tokens]
};

// A node as a row of numbers, for files: kind, activation, count_padding, first input, second input (-1:
// none), kernel, stride, padding, dilation (two each), groups, channels, height and width of an input. The
// lists of the node are not in it. What the numbers say is checked by Network.
constexpr int kRecord = 17;
Node decode(const int32_t* record);

class Plan;

class Network {
 public:
  // Throws ShapeError or TopologyError that begins with "node 3: ". `outputs` are nodes.
  Network(std::vector<Node> nodes, std::vector<int32_t> outputs);
  ~Network();

  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<int32_t>& inputs() const { return inputs_; }
  const std::vector<int32_t>& outputs() const { return outputs_; }

  // Floats of one image of an input or output in [0, size).
  int64_t input_length(size_t index) const;
  int64_t output_length(size_t index) const;

  // in[i] has `batch` images of input i, out[i] takes those of output i, each contiguous and in the form that
  // its kind says; outputs that are tokens, maps made of kTokens, are tokens again. Any number of callers at
  // once. `together` images are computed at a time, 0: as many as is thought best.
  void run(const std::vector<const float*>& in, const std::vector<float*>& out, int64_t batch, int threads,
           int64_t together = 0) const;

  bool tokens(int32_t node) const { return tokens_[node]; }
  int64_t products() const { return products_; }  // multiplications of an image

 private:
  std::shared_ptr<const Plan> plan(int64_t together) const;

  std::vector<Node> nodes_;
  std::vector<int32_t> inputs_, outputs_;
  std::vector<char> tokens_;
  int64_t products_ = 0;
  mutable std::mutex lock_;
  mutable std::vector<std::shared_ptr<const Plan>> plans_;  // few, most recently used last
};

}  // namespace sparsekd::frozen
