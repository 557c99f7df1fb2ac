// Dense weight gradients by tiles against plain loops, and the best positions against a full sort.
#include <memory>

#include "core/cpu.h"
#include "core/error.h"
#include "core/grow/dense_wgrad.h"
#include "core/grow/largest.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

WeightTile random_tile(const ConvGeometry& g) {
  const int64_t ins = g.in_channels / g.groups;
  WeightTile t{pick(0, g.out_channels), 0, pick(0, ins), 0};
  t.rows = pick(0, g.out_channels - t.row);
  t.channels = pick(0, ins - t.channel);
  return t;
}

template <class T>
void test_tiles(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    const ConvGeometry g = random_geometry();
    const Tensor<T> grad(g.batch, g.out_channels, g.out_h, g.out_w, static_cast<int>(pick(0, 2)), false);
    const Tensor<T> x(g.batch, g.in_channels, g.in_h, g.in_w, static_cast<int>(pick(0, 2)), false);
    const WeightTile tile = random_tile(g);
    std::vector<T> expected(tile.rows * tile.channels * g.kernel_h * g.kernel_w, T(1));  // both add to this
    const std::vector<T> start = expected;
    scalar::conv_wgrad_tile(g, grad.read(), x.read(), tile, expected.data());
    for (Isa isa : available_isas()) {
      set_isa(isa_name(isa));
      std::vector<T> first;
      for (int threads : {1, 1, 2, 5}) {
        std::vector<T> out = start;
        conv_wgrad_tile(g, grad.read(), x.read(), tile, out.data(), threads);
        const double bound =
            std::sqrt(1.0 + g.batch * g.out_h * g.out_w) * std::numeric_limits<T>::epsilon() * 8;
        check(largest_difference(out, expected) <= bound, describe(g, isa_name(isa), 1, threads) + " tile");
        if (first.empty()) first = out;
        if (threads == 1) check(out == first, "the same bits every time");
      }
    }
    set_isa("auto");
  }
}

void test_tile_limits() {
  ConvGeometry g{};
  g.batch = g.kernel_h = g.kernel_w = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  g.in_h = g.in_w = g.groups = 2;
  g.in_channels = 6;
  g.out_channels = 4;
  complete_geometry(g);
  const Tensor<float> grad(1, 4, 2, 2, 0, false), x(1, 6, 2, 2, 0, false);
  std::vector<float> out(100);
  for (const WeightTile& wrong : {WeightTile{0, 5, 0, 1}, WeightTile{-1, 1, 0, 1}, WeightTile{0, 1, 2, 2},
                                  WeightTile{0, 1, 0, -1}, WeightTile{5, 0, 0, 1}})
    check_throws<ShapeError>([&] { conv_wgrad_tile(g, grad.read(), x.read(), wrong, out.data(), 1); },
                             "tile");
}

// Offers all scores in rectangles of random sizes, in a random order.
template <class T>
std::vector<int64_t> by_rectangles(const std::vector<T>& score, const std::shared_ptr<const Structure>& kept,
                                   int64_t k, int threads, bool magnitude) {
  LargestK<T> best(kept, k, threads);
  const int64_t high = pick(1, kept->rows), wide = pick(1, kept->cols);
  struct Corner {
    int64_t row, col;
  };
  std::vector<Corner> corners;
  for (int64_t row = 0; row < kept->rows; row += high)
    for (int64_t col = 0; col < kept->cols; col += wide) corners.push_back({row, col});
  std::shuffle(corners.begin(), corners.end(), rng);
  for (const Corner& at : corners) {
    const int64_t rows = std::min(high, kept->rows - at.row), cols = std::min(wide, kept->cols - at.col);
    std::vector<T> tile;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) tile.push_back(score[(at.row + r) * kept->cols + at.col + c]);
    best.offer(tile.data(), at.row, rows, at.col, cols, magnitude);
  }
  return best.positions();
}

template <class T>
void test_largest(int rounds, int64_t most_rows, int64_t most_cols) {
  for (int i = 0; i < rounds; ++i) {
    const int64_t rows = pick(1, most_rows), cols = pick(1, most_cols);
    const Csr csr = random_csr(rows, cols, i % 5 ? 0.3 : i % 10 / 5);  // now and then empty or full
    const auto kept = std::make_shared<const Structure>(csr.crow.data(), rows + 1, csr.col.data(),
                                                        static_cast<int64_t>(csr.col.size()), rows, cols);
    std::vector<T> score(rows * cols);
    const int64_t distinct = i % 4 == 0 ? 0 : i % 2 ? 3 : 1000000;  // all equal, many ties, few
    for (T& v : score) v = static_cast<T>(pick(-distinct, distinct));
    std::vector<char> taken(rows * cols, 0);
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t n = csr.crow[r]; n < csr.crow[r + 1]; ++n) taken[r * cols + csr.col[n]] = 1;
    std::vector<int64_t> free;
    for (int64_t p = 0; p < rows * cols; ++p)
      if (taken[p])
        score[p] = std::numeric_limits<T>::quiet_NaN();  // never looked at
      else
        free.push_back(p);
    const int64_t k = pick(0, static_cast<int64_t>(free.size()));
    const bool magnitude = pick(0, 1);
    const auto rank = [&](int64_t p) { return magnitude ? std::fabs(score[p]) : score[p]; };
    std::vector<int64_t> expected = free;
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int64_t a, int64_t b) { return rank(a) > rank(b); });
    expected.resize(k);
    std::sort(expected.begin(), expected.end());
    const int threads = static_cast<int>(pick(1, 4));
    check(by_rectangles(score, kept, k, threads, magnitude) == expected, "growth equals a full sort");
    if (!free.empty()) {
      score[free.back()] = std::numeric_limits<T>::quiet_NaN();
      check_throws<std::domain_error>([&] { by_rectangles(score, kept, k, threads, magnitude); }, "NaN");
    }
    check_throws<ShapeError>([&] { LargestK<T>(kept, static_cast<int64_t>(free.size()) + 1, 1); }, "free");
    LargestK<T> best(kept, 0, 1);
    check_throws<ShapeError>([&] { best.offer(score.data(), 0, rows, 1, cols, false); }, "rectangle");
  }
}

}  // namespace

void test_growth() {
  test_tiles<float>(120);
  test_tiles<double>(60);
  test_tile_limits();
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    test_largest<float>(100, 30, 40);
    test_largest<float>(10, 200, 700);
    test_largest<double>(10, 200, 700);
  }
  set_isa("auto");
}
