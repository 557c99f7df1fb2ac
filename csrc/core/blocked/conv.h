// Weight-sparse convolution on blocked maps, with the work of the BatchNorms around it done on the way: what
// a convolution reads is normalised while it is packed, and what it computes is summed up for the next norm
// while it is in registers. See block.h for how a residual block is made of these.
//
// Results are the same bit for bit for the same inputs, instruction set and number of threads. Each function
// says whether everything it computed is finite. Where not, zeros that stand for padding may have met an
// infinite weight or gradient, and the caller computes again with conv.h, which knows the borders.
#pragma once
#include <cstdint>
#include <vector>

#include "core/blocked/map.h"
#include "core/conv/conv.h"

namespace sparsekd::blocked {

enum class Read {
  kPlain,       // map
  kNormalised,  // (map - mean) * scale + shift, rectified if `relu`
  kJoined,      // (map - mean) * scale + shift + branch, rectified if `relu`: the end of a residual block
  kGradient,    // map * scale + (normed - mean) * slope + shift: the gradient through a BatchNorm of `normed`
};

// What is added where a residual block ends: map, or (map - mean) * scale + shift where there are
// coefficients, rectified if `relu`. The map has the shape of what it is added to.
template <class T>
struct Branch {
  const T* map = nullptr;
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;
  bool relu = false;
};

// What a convolution takes in. Coefficients are one for each channel.
template <class T>
struct Operand {
  Read read = Read::kPlain;
  BlockedMap<const T> map;
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;
  bool relu = false;
  const T *normed = nullptr, *slope = nullptr;  // kGradient; normed has the shape of map
  Branch<T> branch;                             // kJoined
};

enum class Sum {
  kNothing,
  kMoments,   // mean and variance of the results
  kGradient,  // of g and g * (normed - mean), for one norm or two
};
enum class Gate {
  kOpen,
  kNormalised,  // the ReLU behind (normed - mean) * scale + shift
  kJoined,      // the ReLU behind (normed - mean) * scale + shift + branch
  kStored,      // the ReLU whose result is `active`
};

// What becomes of a result: residual added, gated, stored, summed up, in this order.
template <class T>
struct Result {
  BlockedMap<T> out;
  const T* residual = nullptr;  // of out's channels;
  int64_t residual_every = 1;   // one for each so many rows and columns, nothing for the others
  Gate gate = Gate::kOpen;
  Sum sum = Sum::kNothing;
  const T* active = nullptr;                    // of out's shape, as are the next two
  const T *normed = nullptr, *other = nullptr;  // the maps whose norms get the gradient
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr, *other_mean = nullptr;
  Branch<T> branch;
};

// For each channel. kMoments: mean, variance. kGradient: the sum of g, of g * (normed - mean) and of
// g * (other - other_mean).
struct ChannelSums {
  std::vector<double> first, second, third;
};

// x, values [nnz], bias [Co] or null -> y
template <class T>
bool conv_forward(const ConvGeometry&, const Structure&, const Operand<T>& x, const T* values, const T* bias,
                  const Result<T>& y, ChannelSums* sums, int threads);

// grad, x, values -> dvalues [nnz], and dx unless null. `compact`: dx has the shape of grad, for a kernel of
// one tap without padding; it is zero between.
template <class T>
bool conv_backward(const ConvGeometry&, const Structure&, const Operand<T>& grad, const Operand<T>& x,
                   const T* values, T* dvalues, const Result<T>* dx, bool compact, ChannelSums* sums,
                   int threads);

// Between layers: y = main + other (none if its map has no data), with the ReLU or without; what a residual
// block ends with, where its reader does not do this on the way.
template <class T>
bool join(const Operand<T>& main, const Operand<T>& other, bool relu, const Result<T>& y, ChannelSums* sums,
          int threads);

// y = grad behind y's gate, kStored or kOpen (then y stays as it is), and the sums.
template <class T>
bool gate(const T* grad, const Result<T>& y, ChannelSums* sums, int threads);

// Into the layout, and out of it.
template <class T>
void enter(const View4<const T>& x, const BlockedMap<T>& y, int threads);
template <class T>
void leave(const BlockedMap<const T>& x, const View4<T>& y, int threads);

// Whether convolutions can run on blocked maps: windows that it would not pay to pack are refused. Their
// plans are made on the way, several at a time.
bool supported(const std::vector<std::pair<const ConvGeometry*, const Structure*>>&, int threads);
bool compact_supported(const ConvGeometry&);

}  // namespace sparsekd::blocked
