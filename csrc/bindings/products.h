// The six products of a weight with dense operands: each checks types, shapes and lengths, then calls core
// without the GIL. Results are written in place.
#pragma once
#include "bindings/arrays.h"

namespace sparsekd {

namespace products {

// `bias` may be None.
void conv2d(const Array& x, const Array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const Array& y, const ConvOptions& options, int threads);
void conv2d_dgrad(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                  const Array& dx, const ConvOptions& options, int threads);
void conv2d_wgrad(const Array& grad, const Array& x, const Indices& crow, const Indices& col,
                  const Array& dvalues, const ConvOptions& options, int threads);

// Samples in any number of dimensions, without gaps where there are not two.
void linear(const Array& x, const Array& values, const Indices& crow, const Indices& col,
            const py::object& bias, const Array& y, int threads);
void linear_dgrad(const Array& grad, const Array& values, const Indices& crow, const Indices& col,
                  const Array& dx, int threads);
void linear_wgrad(const Array& grad, const Array& x, const Indices& crow, const Indices& col,
                  const Array& dvalues, int threads);

}  // namespace products

// Raises the class of sparsekd.errors that has the same name as the C++ error; rethrows any other.
void translate(std::exception_ptr pending);

}  // namespace sparsekd
