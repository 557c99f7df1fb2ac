#include "core/linear/linear.h"

#include <algorithm>

#include "core/linear/engine.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

enum class Plan : int64_t { kLinearRows = 100, kLinearTranspose, kLinearWay };
std::vector<int64_t> plan_key(Plan plan, int64_t block) { return {static_cast<int64_t>(plan), block}; }

// Inputs to a block: they come from L1 or close to it, but longer lists hide more of what a list costs.
int64_t block_size(const Structure& s, bool transposed) {
  constexpr int64_t kShortestList = 64;
  return block_columns(s, transposed, 2 * cache_sizes().l1d, kWideBytes, kShortestList);
}

std::shared_ptr<const Blocks> rows_plan(const Structure& s) {
  const int64_t block = block_size(s, false);
  return s.plan<Blocks>(plan_key(Plan::kLinearRows, block), [&] { return row_blocks(s, block); });
}

// How to multiply with the transpose: by rows of the matrix where these come in panels and its columns do
// not, so that the rows of the transpose would share no loads.
struct Way {
  bool by_rows;
  int64_t bytes() const { return sizeof(Way); }
};

std::shared_ptr<const Way> way_plan(const Structure& s) {
  return s.plan<Way>({static_cast<int64_t>(Plan::kLinearWay)}, [&] {
    const TileSize tile = tile_size(s, 1, 1);
    return std::make_shared<Way>(Way{tile.rows % kPanelRows == 0 && tile.channels % kPanelRows != 0});
  });
}

}  // namespace

Tiles cut_batch(int64_t batch, int64_t element_bytes) {
  const int64_t bytes = batch * element_bytes, rest = bytes % kWideBytes;
  Tiles tiles{bytes / kWideBytes, 0, 0};
  if (rest > 2 * kMiddleBytes) {
    ++tiles.wide;
  } else {
    tiles.middle = rest / kMiddleBytes + (rest % kMiddleBytes > kNarrowBytes);
    tiles.narrow = rest > tiles.middle * kMiddleBytes;
  }
  return tiles;
}

int64_t part_begin(const Blocks& blocks, int64_t part, int64_t parts) {
  constexpr int64_t kRow = 8;  // what a row costs besides its nonzeros
  const int64_t wanted = (blocks.crow[blocks.rows] + kRow * blocks.rows) * part / parts;
  int64_t low = 0, high = blocks.rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (blocks.crow[middle] + kRow * middle < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return panel_cut(low, blocks.rows);
}

template <class T>
void linear_fprop(const Structure& s, View2<const T> x, const T* values, const T* bias, View2<T> y,
                  int threads) {
  if (y.rows == 0 || y.cols == 0) return;
  const Isa isa = current_isa();
  if (isa == Isa::kScalar) return scalar::linear_fprop(s, x, values, bias, y);
  const auto blocks = rows_plan(s);
  engine<LinearEngine<T>>(isa).spmm({x, y, blocks.get(), values, bias, threads});
}

template <class T>
void linear_dgrad(const Structure& s, View2<const T> grad, const T* values, View2<T> dx, int threads) {
  if (dx.rows == 0 || dx.cols == 0) return;
  const Isa isa = current_isa();
  if (isa == Isa::kScalar) return scalar::linear_dgrad(s, grad, values, dx);
  const LinearEngine<T>& kernels = engine<LinearEngine<T>>(isa);
  if (way_plan(s)->by_rows) {
    const auto blocks = rows_plan(s);
    return kernels.spmm_transposed({grad, dx, blocks.get(), values, nullptr, threads});
  }
  const int64_t block = block_size(s, true);
  const auto plan =
      s.plan<Transpose>(plan_key(Plan::kLinearTranspose, block), [&] { return transpose(s, block); });
  T* const ordered = static_cast<T*>(scratch(Scratch::kValues, s.nnz * sizeof(T)));
  const int32_t* const slot = plan->slot.data();
  auto order = [&](int part) {
    for (int64_t k = s.nnz * part / threads; k < s.nnz * (part + 1) / threads; ++k)
      ordered[k] = values[slot[k]];
  };
  parallel(threads, threads, order);
  kernels.spmm({grad, dx, &plan->blocks, ordered, nullptr, threads});
}

template <class T>
void linear_wgrad(const Structure& s, View2<const T> grad, View2<const T> x, T* dvalues, int threads) {
  if (s.nnz == 0) return;
  if (x.rows == 0) return std::fill(dvalues, dvalues + s.nnz, T(0));
  const Isa isa = current_isa();
  if (isa == Isa::kScalar) return scalar::linear_wgrad(s, grad, x, dvalues);
  const auto blocks = rows_plan(s);
  engine<LinearEngine<T>>(isa).sddmm({grad, x, blocks.get(), dvalues, threads});
}

#define SPARSEKD_INSTANTIATE(T)                                                                       \
  template void linear_fprop<T>(const Structure&, View2<const T>, const T*, const T*, View2<T>, int); \
  template void linear_dgrad<T>(const Structure&, View2<const T>, const T*, View2<T>, int);           \
  template void linear_wgrad<T>(const Structure&, View2<const T>, View2<const T>, T*, int);
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)
#undef SPARSEKD_INSTANTIATE

}  // namespace sparsekd
