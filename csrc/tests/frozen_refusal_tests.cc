// Lists of nodes that must not become a frozen network.
#include "core/frozen/network.h"
#include "tests/harness.h"

using namespace sparsekd;
using namespace sparsekd::frozen;

void test_frozen_refusals() {
  Node input;
  input.shape = {2, 3, 3};
  Node product;
  product.kind = Kind::kProduct;
  product.inputs = {0};
  product.crow = {0, 1};
  product.col = {1};
  product.values = {1.0f};
  const auto refuse = [&](auto spoil, const std::string& text) {
    Node node = product;
    spoil(node);
    check_throws<std::invalid_argument>([&] { Network({input, node}, {1}); }, text);
  };
  refuse([](Node& n) { n.col = {2}; }, "node 1: ");
  refuse([](Node& n) { n.col = {-1}; }, "node 1: ");
  refuse([](Node& n) { n.crow = {0, 2}; }, "node 1: ");
  refuse([](Node& n) { n.crow = {}; }, "node 1: crow");
  refuse([](Node& n) { n.values = {}; }, "node 1: col");
  refuse([](Node& n) { n.bias = {1, 2}; }, "node 1: bias");
  refuse([](Node& n) { n.codes = {1}; }, "node 1: values: expected them, or codes");
  refuse([](Node& n) { n.scale = {1}; }, "node 1: values: expected them, or codes");
  refuse([](Node& n) { n.values = {}, n.codes = {1}, n.scale = {1, 2}; }, "node 1: scale");
  refuse([](Node& n) { n.values = {}, n.codes = {1, 2}, n.scale = {1}; }, "node 1: col");
  refuse([](Node& n) { n.inputs = {1}; }, "node 1: inputs: expected earlier nodes");
  refuse([](Node& n) { n.inputs = {-1}; }, "node 1: inputs: expected earlier nodes");
  refuse([](Node& n) { n.inputs = {0, 0}; }, "node 1: inputs: expected a second map");
  refuse([](Node& n) { n.inputs = {}; }, "node 1: inputs: wrong number");
  refuse([](Node& n) { n.window.kernel[1] = 0; }, "node 1: window");
  refuse([](Node& n) { n.window.kernel[0] = 4; }, "node 1: window: the kernel is larger");
  refuse([](Node& n) { n.window.padding[0] = -1; }, "node 1: window");
  refuse([](Node& n) { n.window.groups = 0; }, "node 1: groups");
  refuse([](Node& n) { n.window.groups = 3; }, "node 1: groups");
  refuse([](Node& n) { n.kind = static_cast<Kind>(99); }, "node 1: kind");
  refuse([](Node& n) { n.kind = Kind::kLayerNorm; }, "node 1: scale");
  refuse([](Node& n) { n.kind = Kind::kAttention; }, "node 1: inputs: expected tokens");
  refuse([](Node& n) { n.kind = Kind::kGate; }, "node 1: inputs: wrong number");
  refuse([](Node& n) { n.kind = Kind::kGate, n.inputs = {0, 0}; },
         "node 1: inputs: expected a second map of one");
  refuse([](Node& n) { n.kind = Kind::kSequence; }, "node 1: bias: expected 2 channels of 9 tokens");
  refuse([](Node& n) { n.kind = Kind::kSequence, n.bias.resize(16); }, "node 1: bias: expected 2 channels");
  refuse([](Node& n) { n.kind = Kind::kSequence, n.bias.resize(19); }, "node 1: bias: expected 2 channels");
  refuse([](Node& n) { n.activation = static_cast<Activation>(-1); }, "node 1: activation");
  Node tokens, mask, attention;
  tokens.kind = Kind::kTokens;
  tokens.shape = {6, 1, 5};
  attention.kind = Kind::kAttention;
  attention.inputs = {0, 1};
  attention.window.groups = 2;
  for (const Shape shape : {Shape{3, 1, 5}, Shape{1, 4, 5}, Shape{1, 5, 4}, Shape{2, 5, 6}}) {
    mask.shape = shape;
    check_throws<ShapeError>([&] { Network({tokens, mask, attention}, {2}); },
                             "node 2: inputs: expected a mask");
  }
  check_throws<ShapeError>([&] { Network({input}, {1}); }, "outputs");
  check_throws<ShapeError>([&] { Network({input}, {}); }, "network");
  input.shape = {1 << 19, 1 << 19, 1};
  check_throws<ShapeError>([&] { Network({input}, {0}); }, "node 0: shape");
}
