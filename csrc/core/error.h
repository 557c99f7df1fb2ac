// Errors of core; the bindings translate each into the class of the same name in sparsekd.errors.
#pragma once
#include <stdexcept>

namespace sparsekd {

struct TopologyError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct UnsupportedError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace sparsekd
