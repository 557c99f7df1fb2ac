// A weight scattered and gathered again, against a loop over its dense form.
#include "core/densify.h"
#include "core/error.h"
#include "tests/harness.h"

using namespace sparsekd;

namespace {

template <class T>
void test_round_trip() {
  for (int i = 0; i < 60; ++i) {
    const int64_t rows = pick(0, 40), taps = pick(1, 9), channels = pick(1, 400), cols = taps * channels;
    const Csr csr = random_csr(rows, cols, i % 3 ? 0.3 : i % 2);
    const Structure s(csr.crow.data(), rows + 1, csr.col.data(), static_cast<int64_t>(csr.col.size()), rows,
                      cols);
    std::vector<T> values(s.nnz), dense(rows * cols, T(77)), expected(rows * cols, T(0)), back(s.nnz, T(77));
    for (T& v : values) v = static_cast<T>(pick(1, 1000));
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t k = s.crow[r]; k < s.crow[r + 1]; ++k)
        expected[r * cols + s.col[k] % taps * channels + s.col[k] / taps] = values[k];
    const int threads = static_cast<int>(pick(1, 5));
    scatter_weight(s, values.data(), taps, dense.data(), threads);
    gather_weight(s, dense.data(), taps, back.data(), threads);
    check(dense == expected, "scatter puts every value in its place and zeros elsewhere");
    check(back == values, "gather finds every value again");
  }
}

}  // namespace

void test_densify() {
  test_round_trip<int16_t>();
  test_round_trip<float>();
  test_round_trip<double>();
  const Csr csr = random_csr(2, 6, 1);
  const Structure s(csr.crow.data(), 3, csr.col.data(), 12, 2, 6);
  std::vector<float> values(12), dense(12);
  for (int64_t taps : {0, 4, -1})
    check_throws<ShapeError>([&] { scatter_weight(s, values.data(), taps, dense.data(), 1); }, "taps");
}
