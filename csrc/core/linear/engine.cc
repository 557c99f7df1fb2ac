// Products of a batch with a sparse matrix: with its rows (spmm.inl: fprop, and dgrad on the transpose),
// with its columns by way of the rows (spmm_transposed.inl: dgrad of panels), and with another batch at the
// nonzeros (sddmm.inl: wgrad).
//
// Lanes are rows of the batch. Tiles are 256 bytes of them, 64 floats or 32 doubles; what is left goes into
// tiles of 64 and 16 bytes. A tile is packed as [column][row of the batch], so a nonzero, whatever its
// column, is one run of aligned vectors: with AVX-512 four to a wide tile, with AVX2 eight, otherwise 16.
//
// Tests: test_layer (linear_tests.cc) compares every instruction set with scalar.cc, for batches that need
// every kind of tile, and expects the same bits from any number of threads; test_cut_batch and test_blocks
// check how work is cut.
#include "core/engine.inl"

#include "core/linear/engine.h"

namespace sparsekd {
namespace {

#include "core/linear/pack.inl"

// Eight independent sums hide the latency of two fused multiply-adds a cycle.
constexpr int kSums = 8;

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
using Vec = typename VectorOf<T, Bytes>::type;

// How the elements of one input of a tile are held for Rows outputs: N vectors of B bytes at a time, `Passes`
// times.
template <int Bytes, int Rows = 1>
struct Shape {
  static constexpr int B = Bytes < kVectorBytes ? Bytes : kVectorBytes;
  static constexpr int Most = Rows == 1 ? kSums : kPanelSums / Rows;
  static constexpr int N = Bytes / B < Most ? Bytes / B : Most >= 8 ? 8 : Most >= 4 ? 4 : 2;  // divides
  static constexpr int Passes = Bytes / (B * N);
  // Few vectors alone would wait for the latency of their sums: several nonzeros at once, each with its own.
  static constexpr int Unroll = kSums / (N * Rows) > 1 ? kSums / (N * Rows) : 1;
};

template <int Bytes>
struct Width {
  static constexpr int bytes = Bytes;
};

// Calls run(Width, first batch row) for tile number `tile`.
template <class T, class F>
inline void with_tile(const Tiles& tiles, int64_t tile, F run) {
  const int64_t middle = tile - tiles.wide, narrow = middle - tiles.middle;
  const int64_t wide_rows = tiles.wide * kWideBytes, middle_rows = tiles.middle * kMiddleBytes;
  constexpr int64_t size = sizeof(T);
  if (middle < 0)
    run(Width<kWideBytes>{}, tile * kWideBytes / size);
  else if (narrow < 0)
    run(Width<kMiddleBytes>{}, (wide_rows + middle * kMiddleBytes) / size);
  else
    run(Width<kNarrowBytes>{}, (wide_rows + middle_rows + narrow * kNarrowBytes) / size);
}

// Bytes of a packed input before tile number `tile`.
inline int64_t tile_offset(const Tiles& tiles, int64_t tile) {
  const int64_t wide = min64(tile, tiles.wide), middle = min64(tile - wide, tiles.middle);
  return wide * kWideBytes + middle * kMiddleBytes + (tile - wide - middle) * kNarrowBytes;
}

#include "core/linear/sddmm.inl"
#include "core/linear/spmm.inl"
#include "core/linear/spmm_transposed.inl"

}  // namespace

template <class T>
template <Isa>
const LinearEngine<T> LinearEngine<T>::compiled{sparsekd::spmm<T>, sparsekd::spmm_transposed<T>,
                                                sparsekd::sddmm<T>};
template const LinearEngine<float> LinearEngine<float>::compiled<kIsa>;
template const LinearEngine<double> LinearEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
