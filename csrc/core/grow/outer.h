// What an instruction set must provide for dense weight gradients: packing channels into blocks, and sums of
// outer products of two packed blocks.
#pragma once
#include <cstdint>

#include "core/engine.h"

namespace sparsekd {

// Positions at which a block of the output gradient meets a block of the input. Strides count elements.
struct Walk {
  int64_t images, rows, cols;
  int64_t g_image, g_row;  // columns of g lie one block apart
  int64_t x_image, x_row, x_col;
};

template <class T>
struct OuterEngine {
  // dst[block * block_stride + p * B + i] = src[(block * B + i) * stride_c + p * stride_p] for `pixels`
  // pixels p and all blocks of B channels; the last block is filled up with zeros.
  using Pack = void (*)(const T* src, int64_t stride_c, int64_t stride_p, int64_t channels, int64_t pixels,
                        T* dst, int64_t block_stride);
  // sum [X][G] += over all positions, x [X] times g [G].
  using Multiply = void (*)(const Walk&, const T* g, const T* x, T* sum);

  struct Rows {
    int64_t block;  // G
    Pack pack;
    Multiply multiply;
  };
  Rows narrow, wide;      // one vector of output channels to a block, or two
  int64_t channel_block;  // X
  Pack pack_channels;

  template <Isa>
  static const OuterEngine compiled;
};

}  // namespace sparsekd
