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
// `length`. Where images are interleaved, kLanes of them lie as one, whose pixels have kLanes floats.
struct Grid {
  int64_t height, width;
  int64_t rows, stride, lead, length;
  int64_t vectors;              // from the first pixel to the last, of kLanes floats
  std::vector<int32_t> inside;  // [vectors * kLanes] all bits where there is a pixel

  int64_t image(int64_t n) const { return n * rows * stride; }
};

// Memory that starts at a 64-byte boundary, all zeros; on huge pages where it is large.
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

// What a thread, or several on the same images, computes in: every slot after the other. Borders stay zero
// from one call to the next.
using Workspace = Buffer;

constexpr int64_t kParts = 8;  // of the panels of a product, for threads

// How a product or pool takes its input: as it lies, or through a copy that has the pixels of every phase of
// the stride in channels of their own, padding included.
struct Phases {
  bool direct = true;
  int64_t count[2] = {1, 1};  // of phases that some tap reads
  int32_t slot = -1;          // of the copy
};

// A part of a map that kernels read from a copy in which taps lie at multiples of kLanes, as loads across
// cache lines take twice as long: of every channel `vectors` more than a tile has.
struct Piece {
  int64_t from, to;  // of the first channel: distance in the map, float in the copy
  int64_t vectors;
};

struct Step {
  int32_t grid, slot;  // of the result
  // Of a product:
  Phases phases;
  int64_t before = 0, after = 0;           // how far taps reach from a pixel, if it reads the map as it lies
  std::vector<Piece> pieces;               // if tiles are packed
  int64_t map_step = 0, packed_step = 0;   // from channel to channel of the input, and of a packed tile
  std::vector<Panel> panels;               // of every block, those of equally many rows side by side
  std::vector<float> bias;                 // zeros where the node has none
  int64_t tiles = 1, width = 1;            // of pixels: how many, and vectors of the widest
  bool coded = false;                      // lists have codes, see engine.h
  int64_t words = 0;                       // of the lists
  int64_t block = 0;                       // channels of the input whose products are added up at once
  std::vector<std::vector<int64_t>> cuts;  // of every block, parts of the panels with equally many nonzeros
};

// Nodes [first, last), products on one grid whose maps would leave the caches between one and the next, run
// tile by tile: first + k computes tile t in turn t + lag[k], when the pixels that it reads are there and
// those that it overwrites have been read.
struct Chain {
  size_t first, last;
  std::vector<int64_t> lag;
};

class Plan {
 public:
  Plan(const Network&, int64_t images);

  int64_t images() const { return images_; }
  // Floats of a pixel: 1, or kLanes where images are interleaved. And how many images, or groups of them,
  // follow each other in a channel.
  int64_t unit() const { return unit_; }
  int64_t planes() const { return images_ / unit_; }
  const Network& network() const { return network_; }
  const std::vector<Grid>& grids() const { return grids_; }
  const std::vector<Step>& steps() const { return steps_; }
  const std::vector<Chain>& chains() const { return chains_; }
  const float* list() const { return list_.data(); }  // of all products, see engine.h
  // Where the first pixel of a slot's first channel lies in a workspace, a multiple of kLanes.
  int64_t start(int32_t slot) const { return slots_[slot].first + grids_[slots_[slot].grid].lead; }

  // A workspace for as long as the pointer lives; as many are kept as were ever used at once.
  std::shared_ptr<Workspace> workspace() const;

 private:
  struct Slot {
    int32_t grid;
    int64_t channels;
    int64_t first = 0;  // float of the workspace
  };
  void choose_grids();
  void choose_slots();
  std::vector<int64_t> taps(const Node&, const Step&) const;
  void make_panels(const Node&, Step&, std::vector<int32_t>& offsets) const;
  void make_lists();
  void cut_blocks(const Node&, Step&, const std::vector<int32_t>& offsets, float*& word) const;
  void make_chains();
  bool joins(const Chain&, int64_t words) const;

  const Network& network_;
  const int64_t images_, unit_;
  std::vector<Grid> grids_;
  std::vector<Slot> slots_;
  std::vector<Step> steps_;
  std::vector<Chain> chains_;
  Buffer list_{0};
  int64_t workspace_length_ = 0;
  mutable std::mutex lock_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;
};

// How many images are best computed together.
int64_t best_group(const Network&, int64_t batch, int threads);

// Runs `groups` times plan.images() images from image `first` on.
void run_groups(const Plan&, const std::vector<const float*>& in, const std::vector<float*>& out,
                int64_t first, int64_t groups, int threads);

}  // namespace sparsekd::frozen
