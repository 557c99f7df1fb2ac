// The four passes of BatchNorm over maps: moments, apply, reduce and spread (engine.h).
//
// All are limited by memory bandwidth, and each reads and writes an element once. There is no tile: a vector
// is loaded, combined with the coefficients of its channels, and stored or added to a sum. In channels_last
// neighbours are channels, and coefficients and sums of a row, more than 128 columns, wait in L1; in
// contiguous maps they are those of one channel, and each of its sums is two vectors in registers. Sums of
// 64 rows, or 64 vectors of a plane, are kept in T and then added to doubles, so that large maps keep their
// precision.
//
// What helps with memory: asking for lines 4 KiB ahead, stores past the caches where a map would not stay in
// them, and, in apply and spread, going from the last rows to the first, since the pass before has just left
// the last ones in the caches.
//
// Tests: norm_tests.cc compares every instruction set, layout and number of threads with loops in double.
#include "core/engine.inl"

#include "core/norm/engine.h"

#define SPARSEKD_INLINE __attribute__((always_inline))

namespace sparsekd {
namespace {

constexpr int64_t kAheadBytes = 4096;  // the hardware's own prefetchers alone: twice as slow backward
constexpr int64_t kBlock = 64;         // rows, or vectors of a plane, that are summed in T before a double

// A run of neighbouring elements as one vector, wherever it lies in memory. Passed as a tag: template
// arguments lose the attributes of a vector type.
template <class T, int Bytes>
struct Run {
  typedef T type __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int64_t lanes = Bytes / sizeof(T);

  static type load(const T* from) { return *reinterpret_cast<const type*>(from); }
  // For maps, which come from memory in order: asks for what is needed in a while.
  static type fetch(const T* from) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
    return load(from);
  }
  static void store(T* to, type value) { *reinterpret_cast<type*>(to) = value; }
  // Past the caches, where the address allows: a line that is written whole need not be read first.
  static void stream(T* to, type value) {
#if defined(__SSE2__)
    if (reinterpret_cast<uintptr_t>(to) % Bytes == 0) {
      float* at = reinterpret_cast<float*>(to);
#if defined(__AVX512F__)
      if constexpr (Bytes == 64) return _mm512_stream_ps(at, reinterpret_cast<__m512>(value));
#endif
#if defined(__AVX__)
      if constexpr (Bytes == 32) return _mm256_stream_ps(at, reinterpret_cast<__m256>(value));
#endif
      if constexpr (Bytes == 16) return _mm_stream_ps(at, reinterpret_cast<__m128>(value));
    }
#endif
    store(to, value);
  }
  // NaN passes the gate, as in torch.
  static type rectify(type gate, type value) { return gate <= type{} ? type{} : value; }
};

// Calls body(Run, i) for runs that cover [0, count): whole vectors, then smaller ones.
template <class T, class F>
inline void each_run(int64_t count, F body) {
  using Whole = Run<T, kVectorBytes>;
  int64_t i = 0;
  for (; i + Whole::lanes <= count; i += Whole::lanes) body(Whole{}, i);
  const auto once = [&](auto run) SPARSEKD_INLINE {
    if (i + run.lanes <= count) {
      body(run, i);
      i += run.lanes;
    }
  };
  if constexpr (kVectorBytes > 32) once(Run<T, 32>{});
  if constexpr (kVectorBytes > 16) once(Run<T, 16>{});
  for (; i < count; ++i) body(Run<T, sizeof(T)>{}, i);
}

// A coefficient of the channel: neighbours in memory are neighbouring channels, or pixels of one channel.
template <bool Last, class R, class T>
inline typename R::type coefficient(const T* of, int64_t channel) {
  if constexpr (Last)
    return R::load(of + channel);
  else
    return typename R::type{} + of[channel];
}

// Calls body(Run, column)(element) for the whole range, blocks from last to first: the pass before has just
// read the last ones, and they are still in the caches.
template <bool Last, class T, class F>
inline void each_element(const Maps& maps, Range range, F body) {
  constexpr int64_t kGroup = Last ? 256 : 16;  // rows; long runs suit the prefetchers
  const int64_t width = row_width(maps), total = elements(maps);
  for (int64_t end = range.end; end > range.begin; end -= kGroup)
    for (int64_t row = end - kGroup > range.begin ? end - kGroup : range.begin; row < end; ++row) {
      const int64_t first = row * width, channel = Last ? 0 : row % maps.channels;
      each_run<T>(min64(width, total - first),
                  [=](auto run, int64_t c) SPARSEKD_INLINE { body(run, Last ? c : channel)(first + c); });
    }
}

// first[c] and second[c] += what term(Run, column)(element, first, second) adds, over rows of channels.
template <class T, class F>
inline void sum_rows(const Maps& maps, Range range, T* first, T* second, F term) {
  const int64_t width = row_width(maps), total = elements(maps);
  for (int64_t row = range.begin; row < range.end; ++row)
    each_run<T>(min64(width, total - row * width), [=](auto run, int64_t c) SPARSEKD_INLINE {
      using R = decltype(run);
      typename R::type a = R::load(first + c), b = R::load(second + c);
      term(run, c)(row * width + c, a, b);
      R::store(first + c, a);
      R::store(second + c, b);
    });
}

// The same over a run of one channel's pixels, into one sum each.
template <class T, class F>
inline void sum_run(int64_t begin, int64_t count, int64_t channel, double* first, double* second, F term) {
  using Whole = Run<T, kVectorBytes>;
  constexpr int kChains = 2;  // independent sums, because an addition takes several cycles
  constexpr int64_t kStep = kChains * Whole::lanes;
  typename Whole::type a[kChains] = {}, b[kChains] = {};
  const auto at = term(Whole{}, channel);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int k = 0; k < kChains; ++k) at(begin + i + k * Whole::lanes, a[k], b[k]);
  for (int k = 1; k < kChains; ++k) a[0] += a[k], b[0] += b[k];
  T x = 0, y = 0;
  for (int64_t lane = 0; lane < Whole::lanes; ++lane) x += a[0][lane], y += b[0][lane];
  each_run<T>(count - i, [&](auto run, int64_t p) SPARSEKD_INLINE {
    typename decltype(run)::type u{}, v{};
    term(run, channel)(begin + i + p, u, v);
    for (int64_t lane = 0; lane < run.lanes; ++lane) x += u[lane], y += v[lane];
  });
  *first = x;
  *second = y;
}

template <class T>
inline T* buffer(Scratch purpose, int64_t count) {
  return static_cast<T*>(scratch(purpose, count * sizeof(T)));
}

// Moments are sums of d and d * d, where d is the distance from a centre that follows the data block by
// block: never far from it, the squares lose nothing in T. Doubles carry the sums over to the distance from
// one shift, and finish() turns them into moments.
inline void finish(double shift, double& count, double& mean, double& squares) {
  const double sum = mean, spread = squares - sum * sum / count;
  mean = shift + sum / count;
  squares = spread < 0 ? 0 : spread;  // NaN stays
}

template <class T>
void moments_rows(const Maps& maps, Range range, const T* x, const Moments& out) {
  const int64_t width = row_width(maps);
  T* centre = buffer<T>(Scratch::kTile, 3 * width);
  T *first = centre + width, *second = first + width;
  const auto block = [&](Range rows) {
    std::memset(first, 0, 2 * width * sizeof(T));
    sum_rows(maps, rows, first, second, [=](auto run, int64_t c) SPARSEKD_INLINE {
      using R = decltype(run);
      const typename R::type from = R::load(centre + c);
      return [=](int64_t i, auto& a, auto& b) SPARSEKD_INLINE {
        const typename R::type d = R::fetch(x + i) - from;
        a += d;
        b += d * d;
      };
    });
  };
  // Only the last row of all may be short of columns, and it is summed by itself.
  const int64_t held = elements(maps) - range.begin * width;
  const int64_t last = min64(range.end, range.begin + held / width);
  const int64_t ahead = min64(last, range.begin + kBlock);
  std::memset(centre, 0, width * sizeof(T));
  std::memcpy(centre, x + range.begin * width, min64(width, held) * sizeof(T));
  if (last > range.begin) block({range.begin, ahead});
  double* shift = buffer<double>(Scratch::kPartial, width);
  for (int64_t c = 0; c < width; ++c) {
    if (last > range.begin) centre[c] += first[c] / static_cast<T>(ahead - range.begin);
    shift[c] = centre[c];
    out.count[c] = out.mean[c] = out.squares[c] = 0;
  }
  for (int64_t begin = range.begin, end; begin < range.end; begin = end) {
    end = begin < last ? min64(last, begin + kBlock) : range.end;
    const int64_t columns = begin < last ? width : held % width;
    const T rows = static_cast<T>(end - begin);
    block({begin, end});
    for (int64_t c = 0; c < columns; ++c) {
      const double away = centre[c] - shift[c], d = first[c];
      out.count[c] += rows;
      out.mean[c] += rows * away + d;
      out.squares[c] += second[c] + away * (2 * d + rows * away);
      centre[c] += first[c] / rows;
    }
  }
  for (int64_t c = 0; c < width; ++c)
    if (out.count[c] > 0) finish(shift[c], out.count[c], out.mean[c], out.squares[c]);
}

template <class T>
void moments_planes(const Maps& maps, Range range, const T* x, const Moments& out) {
  constexpr int64_t kRun = kBlock * kVectorBytes / sizeof(T);
  double* shift = buffer<double>(Scratch::kTile, 2 * maps.channels);
  double* centre = shift + maps.channels;
  for (int64_t c = 0; c < maps.channels; ++c) out.count[c] = out.mean[c] = out.squares[c] = 0;
  double d, dd;
  const auto run = [&](int64_t begin, int64_t count, int64_t c, T from) {
    sum_run<T>(begin, count, c, &d, &dd, [=](auto run, int64_t) SPARSEKD_INLINE {
      return [=](int64_t i, auto& a, auto& b) SPARSEKD_INLINE {
        const auto distance = decltype(run)::fetch(x + i) - from;
        a += distance;
        b += distance * distance;
      };
    });
  };
  for (int64_t plane = range.begin; plane < range.end; ++plane) {
    const int64_t c = plane % maps.channels, begin = plane * maps.pixels, end = begin + maps.pixels;
    if (out.count[c] == 0) {
      const int64_t ahead = min64(maps.pixels, kRun);
      run(begin, ahead, c, x[begin]);
      shift[c] = centre[c] = static_cast<T>(x[begin] + d / static_cast<double>(ahead));
    }
    for (int64_t i = begin; i < end; i += kRun) {
      const double count = static_cast<double>(min64(kRun, end - i)), away = centre[c] - shift[c];
      run(i, min64(kRun, end - i), c, static_cast<T>(centre[c]));
      out.count[c] += count;
      out.mean[c] += count * away + d;
      out.squares[c] += dd + away * (2 * d + count * away);
      centre[c] = static_cast<T>(centre[c] + d / count);
    }
  }
  for (int64_t c = 0; c < maps.channels; ++c)
    if (out.count[c] > 0) finish(shift[c], out.count[c], out.mean[c], out.squares[c]);
}

template <class T>
void moments(const Maps& maps, Range range, const T* x, const Moments& out) {
  maps.channels_last ? moments_rows(maps, range, x, out) : moments_planes(maps, range, x, out);
}

// Bodies take the pointers by value: a store through one could otherwise change the others, for all the
// compiler knows.
template <bool Last, bool Added, bool Relu, class T>
void apply_maps(const Maps& maps, Range range, const ApplyPass<T>& pass) {
  const ApplyPass<T> a = pass;
  each_element<Last, T>(maps, range, [=](auto run, int64_t c) SPARSEKD_INLINE {
    using R = decltype(run);
    const auto mean = coefficient<Last, R>(a.mean, c), scale = coefficient<Last, R>(a.scale, c),
               shift = coefficient<Last, R>(a.shift, c);
    return [=](int64_t i) SPARSEKD_INLINE {
      typename R::type y = (R::fetch(a.x + i) - mean) * scale + shift;
      if constexpr (Added) y += R::fetch(a.residual + i);
      if constexpr (Relu) y = R::rectify(y, y);
      a.stream ? R::stream(a.y + i, y) : R::store(a.y + i, y);
    };
  });
}

template <bool Last, class T>
void apply_in(const Maps& maps, Range range, const ApplyPass<T>& a) {
  if (a.residual)
    a.relu ? apply_maps<Last, true, true>(maps, range, a) : apply_maps<Last, true, false>(maps, range, a);
  else
    a.relu ? apply_maps<Last, false, true>(maps, range, a) : apply_maps<Last, false, false>(maps, range, a);
}

template <class T>
void apply(const Maps& maps, Range range, const ApplyPass<T>& a) {
  maps.channels_last ? apply_in<true>(maps, range, a) : apply_in<false>(maps, range, a);
  if (a.stream) finish_streams();
}

template <Mask M, bool Last, class T>
void reduce_maps(const Maps& maps, Range range, const ReducePass<T>& pass) {
  const ReducePass<T> r = pass;
  const auto term = [=](auto run, int64_t c) SPARSEKD_INLINE {
    using R = decltype(run);
    const auto mean = coefficient<Last, R>(r.mean, c), scale = coefficient<Last, R>(r.scale, c),
               shift = coefficient<Last, R>(r.shift, c);
    return [=](int64_t i, auto& a, auto& b) SPARSEKD_INLINE {
      const typename R::type x = R::fetch(r.x + i) - mean;
      typename R::type g = R::fetch(r.grad + i);
      if constexpr (M == Mask::kRecomputed) g = R::rectify(x * scale + shift, g);
      if constexpr (M == Mask::kStored) {
        g = R::rectify(R::fetch(r.y + i), g);
        r.stream ? R::stream(r.dz + i, g) : R::store(r.dz + i, g);
      }
      a += g;
      b += g * x;
    };
  };
  if constexpr (Last) {
    const int64_t width = row_width(maps);
    T* first = buffer<T>(Scratch::kTile, 2 * width);
    T* second = first + width;
    for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
      std::memset(first, 0, 2 * width * sizeof(T));
      sum_rows(maps, {begin, min64(range.end, begin + kBlock)}, first, second, term);
      for (int64_t c = 0; c < width; ++c) r.sum[c] += first[c], r.dot[c] += second[c];
    }
  } else {
    constexpr int64_t kRun = kBlock * kVectorBytes / sizeof(T);
    for (int64_t plane = range.begin; plane < range.end; ++plane)
      for (int64_t p = 0, c = plane % maps.channels; p < maps.pixels; p += kRun) {
        double first, second;
        sum_run<T>(plane * maps.pixels + p, min64(kRun, maps.pixels - p), c, &first, &second, term);
        r.sum[c] += first;
        r.dot[c] += second;
      }
  }
  if (r.stream) finish_streams();
}

template <class T>
void reduce(const Maps& maps, Range range, const ReducePass<T>& r) {
  const bool last = maps.channels_last;
  for (int64_t c = 0; c < columns(maps); ++c) r.sum[c] = r.dot[c] = 0;
  switch (r.mask) {
    case Mask::kNone:
      return last ? reduce_maps<Mask::kNone, true>(maps, range, r)
                  : reduce_maps<Mask::kNone, false>(maps, range, r);
    case Mask::kRecomputed:
      return last ? reduce_maps<Mask::kRecomputed, true>(maps, range, r)
                  : reduce_maps<Mask::kRecomputed, false>(maps, range, r);
    case Mask::kStored:
      return last ? reduce_maps<Mask::kStored, true>(maps, range, r)
                  : reduce_maps<Mask::kStored, false>(maps, range, r);
  }
}

template <bool Last, bool Recompute, class T>
void spread_maps(const Maps& maps, Range range, const SpreadPass<T>& pass) {
  const SpreadPass<T> s = pass;
  each_element<Last, T>(maps, range, [=](auto run, int64_t c) SPARSEKD_INLINE {
    using R = decltype(run);
    const auto mean = coefficient<Last, R>(s.mean, c), scale = coefficient<Last, R>(s.scale, c),
               shift = coefficient<Last, R>(s.shift, c), slope = coefficient<Last, R>(s.slope, c),
               offset = coefficient<Last, R>(s.offset, c);
    return [=](int64_t i) SPARSEKD_INLINE {
      const typename R::type x = R::fetch(s.x + i) - mean;
      typename R::type g = R::fetch(s.grad + i);
      if constexpr (Recompute) g = R::rectify(x * scale + shift, g);
      const typename R::type dx = scale * g + slope * x + offset;
      s.stream ? R::stream(s.dx + i, dx) : R::store(s.dx + i, dx);
    };
  });
}

template <class T>
void spread(const Maps& maps, Range range, const SpreadPass<T>& s) {
  if (s.mask == Mask::kRecomputed)
    maps.channels_last ? spread_maps<true, true>(maps, range, s) : spread_maps<false, true>(maps, range, s);
  else
    maps.channels_last ? spread_maps<true, false>(maps, range, s) : spread_maps<false, false>(maps, range, s);
  if (s.stream) finish_streams();
}

}  // namespace

template <class T>
template <Isa>
const NormEngine<T> NormEngine<T>::compiled{sparsekd::moments<T>, sparsekd::apply<T>, sparsekd::reduce<T>,
                                            sparsekd::spread<T>};
template const NormEngine<float> NormEngine<float>::compiled<kIsa>;
template const NormEngine<double> NormEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
