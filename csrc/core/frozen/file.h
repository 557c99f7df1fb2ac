// Files of frozen networks, as sparsekd/frozen/files.py writes them: safetensors, and in its metadata the
// shapes of inputs and outputs and the hash of all tensors.
#pragma once
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "core/frozen/network.h"

namespace sparsekd::frozen {

struct File {
  std::unique_ptr<const Network> network;
  std::vector<std::vector<int64_t>> inputs, outputs;  // shapes as the model has them, without the batch
};

// Throws ShapeError or TopologyError where the bytes are anything else than a whole file of a network.
File read_file(std::string_view bytes);

}  // namespace sparsekd::frozen
