// What an instruction set must provide: each of the four passes over one slot's share of the maps.
#pragma once
#include "core/engine.h"
#include "core/norm/norm.h"

namespace sparsekd {

// The passes walk rows. In channels_last a row is a few pixels with all their channels, enough for a dozen
// vectors however few the channels are; the last row may be short. Otherwise it is one plane. A column is
// what has coefficients and sums of its own: column c of a row belongs to channel c % channels.
inline int64_t elements(const Maps& m) { return m.images * m.channels * m.pixels; }
inline int64_t columns(const Maps& m) {
  constexpr int64_t kWide = 256;
  const bool narrow = m.channels_last && m.channels > 0 && m.channels < kWide;
  return narrow ? kWide / m.channels * m.channels : m.channels;
}
inline int64_t row_width(const Maps& m) { return m.channels_last ? columns(m) : m.pixels; }
// Maps without elements have no rows: the width of one may be zero.
inline int64_t rows(const Maps& m) {
  return elements(m) ? (elements(m) + row_width(m) - 1) / row_width(m) : 0;
}

struct Range {
  int64_t begin, end;  // rows
};

// Moments of one slot, [columns] each; a column without elements in the range has count 0.
struct Moments {
  double *count, *mean, *squares;  // squares: sum of squared deviations from the mean
};

// `stream` writes past the caches, for maps that would not stay in them.

// y = act((x - mean) * scale + shift + residual); coefficients are [columns]
template <class T>
struct ApplyPass {
  const T *x, *residual, *mean, *scale, *shift;
  bool relu, stream;
  T* y;
};

// Where the gradient of a ReLU comes from.
enum class Mask { kNone, kRecomputed, kStored };

// sum += dz, dot += dz * (x - mean), where dz is grad behind the mask; a stored mask also writes dz.
template <class T>
struct ReducePass {
  const T *grad, *x, *y, *mean, *scale, *shift;
  Mask mask;
  bool stream;
  T* dz;
  double *sum, *dot;  // [columns]
};

// dx = scale * dz + slope * (x - mean) + offset; the mask is never a stored one.
template <class T>
struct SpreadPass {
  const T *grad, *x, *mean, *scale, *shift, *slope, *offset;
  Mask mask;
  bool stream;
  T* dx;
};

template <class T>
struct NormEngine {
  void (*moments)(const Maps&, Range, const T* x, const Moments&);
  void (*apply)(const Maps&, Range, const ApplyPass<T>&);
  void (*reduce)(const Maps&, Range, const ReducePass<T>&);
  void (*spread)(const Maps&, Range, const SpreadPass<T>&);

  template <Isa>
  static const NormEngine compiled;
};

}  // namespace sparsekd
