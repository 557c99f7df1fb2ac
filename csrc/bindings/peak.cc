#include "core/peak/peak.h"

#include <pybind11/pybind11.h>

#include <string>

#include "core/error.h"

namespace py = pybind11;

namespace sparsekd {
namespace {

void check_run(int threads, double seconds) {
  if (threads < 1 || threads > 1024)
    throw ShapeError("threads: expected 1 to 1024, got " + std::to_string(threads));
  if (!(seconds > 0 && seconds <= 10))
    throw ShapeError("seconds: expected more than 0 and at most 10, got " + std::to_string(seconds));
}

}  // namespace

void bind_peak(py::module_& m) {
  m.def(
      "peak_flops",
      [](int threads, double seconds) {
        check_run(threads, seconds);
        py::gil_scoped_release release;
        return peak_flops(threads, seconds);
      },
      py::arg("threads"), py::arg("seconds") = 0.2);
  m.def(
      "read_bandwidth",
      [](int64_t bytes, int threads, double seconds) {
        check_run(threads, seconds);
        constexpr int64_t kMost = int64_t{1} << 32;
        if (bytes < 1 || bytes > kMost / threads)
          throw ShapeError("bytes: expected 1 to 2^32 over all threads, got " + std::to_string(bytes));
        py::gil_scoped_release release;
        return read_bandwidth(bytes, threads, seconds);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("seconds") = 0.2);
}

}  // namespace sparsekd
