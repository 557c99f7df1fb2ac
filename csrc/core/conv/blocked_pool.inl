// Pooling on blocked maps. Part of engine.cc.
//
// A vector is a pixel of a channel in several images, so windows are walked without any shuffle. Forward, an
// output row is computed at a time, from the rows of its windows; backward, an input row, from the rows of
// gradients whose windows hold it. Rows are independent, so threads share them in any way.
//
// Tests: pool_tests.cc compares every instruction set with plain loops.

// Indices [first, last) of windows, or of their rows, that lie in what is asked for.
struct Span {
  int64_t first, last;
};

// Rows of the window of output o that the map has.
inline Span taps_of(int64_t o, int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
  const int64_t top = o * stride - pad;
  return {max64(0, -top), min64(kernel, size - top)};
}

// Outputs whose windows hold row y.
inline Span outputs_of(int64_t y, int64_t kernel, int64_t stride, int64_t pad, int64_t outputs) {
  const int64_t past = y + pad - kernel;  // the last that ends before y starts at or above it
  return {past < 0 ? 0 : past / stride + 1, min64(outputs, (y + pad) / stride + 1)};
}

// The largest of a window so far, and the number of its tap.
template <class T>
struct Largest {
  using Index = decltype(Vec<T>{} > Vec<T>{});
  Vec<T> value;
  Index tap;

  // The first one counts wherever it is, also where all are -infinity.
  explicit Largest(const T* at, int64_t number) : value(load_vector(at)), tap(Index{} + index(number)) {}
  void see(const T* at, int64_t number) {
    const Vec<T> v = load_vector(at);
    const Index more = (v > value) | (v != v);
    value = more ? v : value;
    tap = more ? Index{} + index(number) : tap;
  }
  static auto index(int64_t number) {
    return static_cast<std::remove_reference_t<decltype(Index{}[0])>>(number);
  }
};

// One window of one channel: where its first tap would lie, whether or not the map has it.
template <class T>
struct PoolWindow {
  const T* origin;
  int64_t row;  // elements from one row to the next
  Span down, across;

  Largest<T> largest(int64_t kernel_w) const {
    constexpr int64_t L = kLanes<T>;
    Largest<T> best(origin + down.first * row + across.first * L, down.first * kernel_w + across.first);
    for (int64_t r = down.first; r < down.last; ++r)
      for (int64_t c = across.first; c < across.last; ++c)
        best.see(origin + r * row + c * L, r * kernel_w + c);
    return best;
  }
};

// The windows of output row o in a group of images.
template <class T>
struct PoolRow {
  const blocked::Pooling& pool;
  const BlockedMap<const T>& x;
  int64_t group, o;

  PoolWindow<T> window(int64_t ch, int64_t out_w, int64_t v) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t top = o * pool.stride_h - pool.pad_h, left = out_w * pool.stride_w - pool.pad_w;
    const T* const map = x.data + group * x.h * x.row_elements();
    return {map + top * x.row_elements() + (ch * x.w + left) * L + v, x.row_elements(),
            taps_of(o, pool.kernel_h, pool.stride_h, pool.pad_h, x.h),
            taps_of(out_w, pool.kernel_w, pool.stride_w, pool.pad_w, x.w)};
  }
};

// Calls run(channel, output column, element of the lanes) for the vectors of a row.
template <class T, class F>
void for_vectors(int64_t channels, int64_t width, F run) {
  constexpr int64_t L = kLanes<T>, N = kVectorBytes / static_cast<int64_t>(sizeof(T));
  for (int64_t ch = 0; ch < channels; ++ch)
    for (int64_t w = 0; w < width; ++w)
      for (int64_t v = 0; v < L; v += N) run(ch, w, v);
}

template <class T>
void blocked_pool(const BlockedPool<T>& call) {
  constexpr int64_t L = kLanes<T>;
  const blocked::Pooling& pool = call.pool;
  const BlockedMap<T>& y = call.y;
  const T share_of_one = T(1) / static_cast<T>(pool.kernel_h * pool.kernel_w);
  for_places(call.schedule, call.threads, [&](int64_t, int64_t group, int64_t h0, int64_t h1) {
    for (int64_t o = h0; o < h1; ++o) {
      const PoolRow<T> row{pool, call.x, group, o};
      T* const out = y.row(group, o);
      if (!pool.average) {
        for_vectors<T>(y.channels, y.w, [&](int64_t ch, int64_t w, int64_t v) {
          *reinterpret_cast<Vec<T>*>(out + (ch * y.w + w) * L + v) =
              row.window(ch, w, v).largest(pool.kernel_w).value;
        });
        continue;
      }
      // Row by row of the input, which is how it lies in memory; sums of sums round less, too.
      std::memset(out, 0, y.row_elements() * sizeof(T));
      const Span down = row.window(0, 0, 0).down;
      for (int64_t r = down.first; r < down.last; ++r)
        for_vectors<T>(y.channels, y.w, [&](int64_t ch, int64_t w, int64_t v) {
          const PoolWindow<T> window = row.window(ch, w, v);
          Vec<T> sum{};
          for (int64_t c = window.across.first; c < window.across.last; ++c)
            sum += load_vector(window.origin + r * window.row + c * L);
          Vec<T>& to = *reinterpret_cast<Vec<T>*>(out + (ch * y.w + w) * L + v);
          to += sum * share_of_one;
        });
    }
  });
}

// Adds to row h of dx what the gradients of output row o give it.
template <class T>
void pool_gradient_row(const BlockedPoolBackward<T>& call, int64_t group, int64_t o, int64_t h, T* dx) {
  constexpr int64_t L = kLanes<T>;
  const blocked::Pooling& pool = call.pool;
  const PoolRow<T> row{pool, call.x, group, o};
  const int64_t r = h - (o * pool.stride_h - pool.pad_h), width = call.grad.w;
  const T* const grad = call.grad.row(group, o);
  const T share_of_one = T(1) / static_cast<T>(pool.kernel_h * pool.kernel_w);
  for_vectors<T>(call.x.channels, width, [&](int64_t ch, int64_t w, int64_t v) {
    const Vec<T> g = load_vector(grad + (ch * width + w) * L + v);
    const PoolWindow<T> window = row.window(ch, w, v);
    T* const to = dx + (ch * call.x.w + w * pool.stride_w - pool.pad_w) * L + v;
    if (pool.average) {
      for (int64_t c = window.across.first; c < window.across.last; ++c)
        *reinterpret_cast<Vec<T>*>(to + c * L) += g * share_of_one;
      return;
    }
    const Largest<T> best = window.largest(pool.kernel_w);
    for (int64_t c = window.across.first; c < window.across.last; ++c)
      *reinterpret_cast<Vec<T>*>(to + c * L) +=
          best.tap == Largest<T>::index(r * pool.kernel_w + c) ? g : Vec<T>{};
  });
}

template <class T>
void blocked_pool_backward(const BlockedPoolBackward<T>& call) {
  const blocked::Pooling& pool = call.pool;
  const blocked::Result<T>& y = call.dx;
  const BlockedGate<T> gate{y.out.data, y, call.schedule, call.sums, call.threads, call.finite};
  summed_rows(y, call.schedule, call.sums, call.threads, call.finite, [&](int64_t at, LaneSums<T>& own) {
    const int64_t row = at / y.out.row_elements(), group = row / y.out.h, h = row % y.out.h;
    T* const dx = y.out.data + at;
    std::memset(dx, 0, y.out.row_elements() * sizeof(T));
    const Span outputs = outputs_of(h, pool.kernel_h, pool.stride_h, pool.pad_h, call.grad.h);
    for (int64_t o = outputs.first; o < outputs.last; ++o) pool_gradient_row(call, group, o, h, dx);
    if (y.gate == blocked::Gate::kStored) return gate_row<T, true, false>(gate, at, own);
    if (y.sum == blocked::Sum::kGradient) return gate_row<T, false, false>(gate, at, own);
  });
}
