// Linear layers: every engine against the plain loops.
#include <cstring>
#include <type_traits>

#include "core/cpu.h"
#include "core/linear/engine.h"
#include "core/linear/linear.h"
#include "harness.h"

using namespace sparsekd;

namespace {

// A random matrix with contiguous rows, contiguous columns, or gaps between its elements; the gaps hold NaN.
template <class T>
struct Matrix {
  std::vector<T> data;
  View2<T> view;
  Matrix(int64_t rows, int64_t cols, int64_t layout, bool poison)
      : data(rows * cols * (layout == 2 ? 6 : 1), std::numeric_limits<T>::quiet_NaN()) {
    view = {data.data(), rows, cols, cols, 1};
    if (layout == 1) view.stride_row = 1, view.stride_col = rows;
    if (layout == 2) view.stride_row = 6 * cols, view.stride_col = 3;
    if (poison) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) view.at(r, c) = static_cast<T>(uniform());
  }
  View2<const T> read() const { return {view.data, view.rows, view.cols, view.stride_row, view.stride_col}; }
  std::vector<T> packed() const {
    std::vector<T> all;
    for (int64_t r = 0; r < view.rows; ++r)
      for (int64_t c = 0; c < view.cols; ++c) all.push_back(view.at(r, c));
    return all;
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

template <class T>
void test_layer(int64_t batch, int64_t in, int64_t out, const Csr& csr) {
  const double tolerance = std::is_same_v<T, float> ? 2e-5 : 1e-12;
  const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), out, in);
  std::vector<T> values(s.nnz), bias(out);
  for (auto* v : {&values, &bias})
    for (T& e : *v) e = static_cast<T>(uniform());
  const T* const b = pick(0, 1) ? bias.data() : nullptr;
  const Matrix<T> x(batch, in, pick(0, 2), false), grad(batch, out, pick(0, 2), false);
  Matrix<T> y0(batch, out, 0, true), dx0(batch, in, 0, true);
  std::vector<T> dv0(s.nnz);
  scalar::linear_fprop<T>(s, x.read(), values.data(), b, y0.view);
  scalar::linear_dgrad<T>(s, grad.read(), values.data(), dx0.view);
  scalar::linear_wgrad<T>(s, grad.read(), x.read(), dv0.data());
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    std::vector<T> results[2];
    for (auto& result : results) {  // the second time with other threads: not a bit may change
      const int threads = static_cast<int>(pick(1, 5));
      Matrix<T> y(batch, out, pick(0, 2), true), dx(batch, in, pick(0, 2), true);
      std::vector<T> dv(s.nnz, std::numeric_limits<T>::quiet_NaN());
      linear_fprop<T>(s, x.read(), values.data(), b, y.view, threads);
      linear_dgrad<T>(s, grad.read(), values.data(), dx.view, threads);
      linear_wgrad<T>(s, grad.read(), x.read(), dv.data(), threads);
      const std::string what = std::string(isa_name(isa)) + " " + std::to_string(batch) + " x " +
                               std::to_string(in) + " x " + std::to_string(out) + " nnz " +
                               std::to_string(s.nnz) + " threads " + std::to_string(threads);
      check(largest_difference(y.packed(), y0.packed()) <= tolerance, "linear fprop " + what);
      check(largest_difference(dx.packed(), dx0.packed()) <= tolerance, "linear dgrad " + what);
      check(largest_difference(dv, dv0) <= tolerance, "linear wgrad " + what);
      for (const std::vector<T>& part : {y.packed(), dx.packed(), dv})
        result.insert(result.end(), part.begin(), part.end());
    }
    check(same_bits(results[0], results[1]), "linear results depend on the threads");
  }
  set_isa("auto");
}

template <class T>
void test_layer(int64_t batch, int64_t in, int64_t out, double density) {
  test_layer<T>(batch, in, out, any_csr(out, in, 1, density));
}

// Rows that share their columns, columns that do not: the input gradient goes by rows.
template <class T>
void test_shared_rows(int64_t batch, int64_t in, int64_t out, double density) {
  const int64_t rows[] = {4, 8, 12, 16, 32}, channels[] = {1, 2, 3};
  test_layer<T>(batch, in, out, random_tiles(out, in, 1, rows[pick(0, 4)], channels[pick(0, 2)], density));
}

// Every batch row lies in exactly one tile, and a tile never starts behind the batch.
void test_cut_batch() {
  for (int64_t bytes : {4, 8})
    for (int64_t batch = 0; batch < 300; ++batch) {
      const Tiles t = cut_batch(batch, bytes);
      const int64_t held = t.wide * kWideBytes + t.middle * kMiddleBytes + t.narrow * kNarrowBytes;
      const int64_t last = t.narrow ? kNarrowBytes : t.middle ? kMiddleBytes : kWideBytes;
      check(held >= batch * bytes && held - last < std::max<int64_t>(1, batch * bytes),
            "tiles cover a batch of " + std::to_string(batch));
    }
}

void test_blocks() {
  for (int i = 0; i < 50; ++i) {
    const int64_t rows = pick(1, 30), cols = pick(1, 60), block = pick(1, 70);
    const Csr csr = any_csr(rows, cols, 1, pick(0, 2) ? 0.2 : 1);
    const Structure s(csr.crow.data(), csr.crow.size(), csr.col.data(), csr.col.size(), rows, cols);
    const auto blocks = row_blocks(s, block);
    bool inside = true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < blocks->count; ++b) {
        inside &= blocks->begin(b)[r] == (b ? blocks->end(b - 1)[r] : s.crow[r]);
        for (int32_t k = blocks->begin(b)[r]; k < blocks->end(b)[r]; ++k) inside &= s.col[k] / block == b;
      }
    for (int64_t r = 0; r < rows; ++r) inside &= blocks->end(blocks->count - 1)[r] == s.crow[r + 1];
    check(inside, "blocks cut every row where the columns cross");
    const int64_t parts = pick(1, 9);
    for (int64_t part = 0; part < parts; ++part)
      check(part_begin(*blocks, part, parts) <= part_begin(*blocks, part + 1, parts), "parts are in order");
    check(part_begin(*blocks, 0, parts) == 0 && part_begin(*blocks, parts, parts) == rows,
          "parts cover rows");
    bool whole = true;  // no part begins inside a panel
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t r = 0; r < rows; r += blocks->panel_rows[r]) {
        const int64_t begin = part_begin(*blocks, part, parts);
        whole &= begin <= r || begin >= r + blocks->panel_rows[r];
      }
    check(whole, "parts are made of whole panels");
  }
}

}  // namespace

void test_linear() {
  test_cut_batch();
  test_blocks();
  const double densities[] = {0, 0.05, 0.15, 1};
  for (int i = 0; i < 120; ++i) {
    const int64_t batch = i < 70 ? i : pick(70, 300), in = pick(0, 50), out = pick(0, 50);
    test_layer<float>(batch, in, out, densities[pick(0, 3)]);
    if (i % 2) test_layer<double>(batch, in, out, densities[pick(0, 3)]);
  }
  // Enough work for several threads, with and without a tile for each.
  for (int64_t batch : {17, 33, 64, 65, 100, 128, 130, 300, 520}) {
    test_layer<float>(batch, 201, 150, 0.3);
    test_layer<double>(batch, 97, 203, 0.3);
  }
  for (int i = 0; i < 60; ++i) {
    const int64_t batch = pick(1, i % 2 ? 70 : 600), in = pick(1, 100), out = pick(1, 100);
    test_shared_rows<float>(batch, in, out, densities[pick(0, 3)]);
    if (i % 2) test_shared_rows<double>(batch, in, out, densities[pick(0, 3)]);
  }
  for (int64_t batch : {33, 130, 520}) {
    test_shared_rows<float>(batch, 4001, 48, 0.1);
    test_shared_rows<float>(batch, 2008, 32, 0.02);
    test_shared_rows<double>(batch, 1501, 50, 0.1);
  }
  // Wide enough for several blocks, and for several groups of tiles in the weight gradient.
  test_layer<float>(70, 4000, 40, 0.05);
  test_layer<float>(70, 40, 4000, 0.05);
  test_layer<double>(9, 3000, 30, 0.1);
  test_layer<float>(200, 9000, 6, 0.02);
}
