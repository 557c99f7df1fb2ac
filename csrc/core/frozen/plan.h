// How a frozen network runs on a number of images at once: where maps lie, and each weight as distances.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/frozen/network.h"

namespace sparsekd::frozen {

// How maps of one height and width lie in memory. A channel has `lead` zeros, then for each image `rows` rows
// of `stride` floats, of which the first height x width are pixels and the rest zeros, then zeros up to
// `length`.
struct Grid {
  int64_t height, width;
  int64_t rows, stride, lead, length;
  int64_t vectors;              // from the first pixel to the last, of kLanes floats
  std::vector<int32_t> inside;  // [vectors * kLanes] all bits where there is a pixel

  int64_t image(int64_t n) const { return n * rows * stride; }
};

// Memory that starts at a 64-byte boundary, all zeros.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float*) const;
  };
  std::unique_ptr<float, Free> data_;
};

// What a thread, or several on the same images, computes in. Borders stay zero from one call to the next.
using Workspace = std::vector<Buffer>;

// How a product or pool takes its input: as it lies, or through a copy that has the pixels of every phase of
// the stride in channels of their own, padding included.
struct Phases {
  bool direct = true;
  int64_t count[2] = {1, 1};  // of phases that some tap reads
  int32_t slot = -1;          // of the copy
};

struct Step {
  int32_t grid, slot;  // of the result
  // Of a product:
  Phases phases;
  std::vector<int32_t> offset;  // in the order of the node's columns
  std::vector<float> bias;      // zeros where the node has none
  std::vector<uint8_t> panel_rows;
  int64_t tiles = 1;              // of pixels
  std::vector<int64_t> row_cuts;  // parts of the rows with equally many nonzeros
};

class Plan {
 public:
  Plan(const Network&, int64_t images);

  int64_t images() const { return images_; }
  const Network& network() const { return network_; }
  const std::vector<Grid>& grids() const { return grids_; }
  const std::vector<Step>& steps() const { return steps_; }

  // A workspace for as long as the pointer lives; as many are kept as were ever used at once.
  std::shared_ptr<Workspace> workspace() const;

 private:
  struct Slot {
    int32_t grid;
    int64_t channels;
  };
  void choose_grids();
  void choose_slots();
  void make_lists(const Node&, Step&) const;

  const Network& network_;
  const int64_t images_;
  std::vector<Grid> grids_;
  std::vector<Slot> slots_;
  std::vector<Step> steps_;
  mutable std::mutex lock_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;
};

// How many images are best computed together.
int64_t best_group(const Network&, int64_t batch, int threads);

// Runs `groups` times plan.images() images from image `first` on.
void run_groups(const Plan&, const std::vector<const float*>& in, const std::vector<float*>& out,
                int64_t first, int64_t groups, int threads);

}  // namespace sparsekd::frozen
