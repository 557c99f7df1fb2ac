// What an instruction set provides for linear layers; every field of a call is checked before it is made.
#pragma once
#include <cstdint>

#include "core/engine.h"
#include "core/linear/linear.h"
#include "core/linear/plan.h"

namespace sparsekd {

// out[n, r] = bias[r] + sum over the nonzeros k of row r of values[k] * in[n, col[k]].
template <class T>
struct SpmmCall {
  View2<const T> in;
  View2<T> out;
  const Blocks* blocks;
  const T* values;  // in the order of blocks->col
  const T* bias;    // one for each output, or null
  int threads;
};

// out[k] = sum over n of left[n, r] * right[n, col[k]] for the nonzeros k of every row r.
template <class T>
struct SddmmCall {
  View2<const T> left, right;
  const Blocks* blocks;
  T* out;
  int threads;
};

template <class T>
struct LinearEngine {
  void (*spmm)(const SpmmCall<T>&);
  // Multiply with the transpose, given the blocks of the matrix itself and no bias:
  // out[n, c] = sum over the nonzeros k of column c of values[k] * in[n, row of k].
  void (*spmm_transposed)(const SpmmCall<T>&);
  void (*sddmm)(const SddmmCall<T>&);

  template <Isa>
  static const LinearEngine compiled;
};

// A tile is up to kWideBytes of batch rows, computed together: one input of a packed tile holds that many
// bytes, one element for each batch row. What is left of a batch goes into narrower tiles.
constexpr int kWideBytes = 256, kMiddleBytes = 64, kNarrowBytes = 16;

struct Tiles {
  int64_t wide, middle, narrow;
  int64_t count() const { return wide + middle + narrow; }
};
Tiles cut_batch(int64_t batch, int64_t element_bytes);

// The first row of part `part` of `parts`, so that parts take about the same time.
int64_t part_begin(const Blocks&, int64_t part, int64_t parts);

}  // namespace sparsekd
