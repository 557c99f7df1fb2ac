// Results that are not finite, computed anew term by term.
//
// The engines multiply zeros with whatever meets them: an input of the padding with its weight, an output
// gradient of a strip that has ended with the input below it. Of finite numbers that adds nothing. But
// infinity times zero is NaN, and NaN never leaves a sum, so a result without it is right, and one with it is
// looked at again here: only positions inside the maps count.
#pragma once
#include "core/conv/conv.h"

namespace sparsekd::exact {

// Each computes again what is not finite in its result, in double; a sum that has become NaN is not finished.
// So a training whose numbers are all NaN costs a term or two for each result.
template <class T>
void conv_fprop(const ConvGeometry&, const Structure&, View4<const T> x, const T* values, const T* bias,
                View4<T> y, int threads);
template <class T>
void conv_dgrad(const ConvGeometry&, const Structure&, View4<const T> grad, const T* values, View4<T> dx,
                int threads);
// Looks at every gradient; there are few of them next to what they are summed up from.
template <class T>
void conv_wgrad(const ConvGeometry&, const Structure&, View4<const T> grad, View4<const T> x, T* dvalues,
                int threads);

}  // namespace sparsekd::exact
