// Passes over blocked maps that no convolution does on its way: into the layout and out of it, the joining of
// two branches, and a gradient's way into a block whose consumer has not prepared it. Part of engine.cc.
//
// Each reads and writes an element once, row by row, and is limited by memory bandwidth. Tests:
// blocked_tests.cc.

// Calls run(place, group, first row, end of rows) for every place of a schedule.
template <class F>
void for_places(const Schedule& s, int threads, F run) {
  auto item = [&](int64_t place) {
    const int64_t h0 = place % s.chunks * s.chunk_rows;
    run(place, place / s.chunks, h0, min64(s.strip_rows, h0 + s.chunk_rows));
  };
  share(threads, s.groups * s.chunks, item);
}

// A row of the layout is a row of a window without padding.
inline Window row_window(int64_t channels, int64_t width) {
  Window w;
  w.channels = channels;
  w.width = w.pitch = width;
  return w;
}

template <class T>
void blocked_enter(const View4<const T>& in, const BlockedMap<T>& out, int threads) {
  const Schedule s = schedule_rows(in.n, in.h, in.c, 0, kLanes<T>, 1, threads, 4);
  const Window window = row_window(in.c, in.w);
  for_places(s, threads, [&](int64_t, int64_t group, int64_t h0, int64_t h1) {
    Lane<const T> lanes[kLanes<T>];
    point_lanes(in, s, group, 1, lanes);
    for (int64_t y = h0; y < h1; ++y) pack_row(in, window, lanes, y, out.row(group, y));
  });
}

template <class T>
void blocked_leave(const BlockedMap<const T>& in, const View4<T>& out, int threads) {
  const Schedule s = schedule_rows(out.n, out.h, out.c, 0, kLanes<T>, 1, threads, 4);
  const bool stream = streams(out);
  for_places(s, threads, [&](int64_t, int64_t group, int64_t h0, int64_t h1) {
    Lane<T> lanes[kLanes<T>];
    point_lanes(out, s, group, 1, lanes);
    for (int64_t y = h0; y < h1; ++y)
      store_tile(out, stream, lanes, y, 0, out.w, 0, out.c, out.w, in.row(group, y));
    if (stream) finish_streams();
  });
}

// An operand of a join at one channel; a plain one has coefficients that change nothing.
template <class T>
struct Affine {
  const T *map, *normed = nullptr;
  Vec<T> mean{}, scale{}, shift{}, slope{};
  bool relu = false;
  BranchAt<T> branch;
  Affine(const blocked::Operand<T>& in, int64_t ch) : map(in.map.data) {
    scale = T(1) - scale;
    if (in.read == blocked::Read::kPlain) return;
    mean = in.mean[ch] - mean;
    scale = in.scale[ch] - Vec<T>{};
    shift = in.shift[ch] - shift;
    if (in.read != blocked::Read::kGradient) {
      relu = in.relu;
      if (in.read == blocked::Read::kJoined) branch = {in.branch, ch};
      return;
    }
    slope = in.slope[ch] - slope;
    normed = in.normed;
  }
  Vec<T> operator()(int64_t i) const {
    if (normed) return load_vector(map + i) * scale + ((load_vector(normed + i) - mean) * slope + shift);
    Vec<T> value = (load_vector(map + i) - mean) * scale + shift;
    if (branch.map) value += branch(i);
    return relu ? rectified(value, value) : value;
  }
};

template <class T, bool Stream>
void join_row(const BlockedJoin<T>& call, int64_t row, LaneSums<T>& to) {
  constexpr int64_t L = kLanes<T>, N = kVectorBytes / static_cast<int64_t>(sizeof(T));
  const int64_t width = call.y.out.w * L;
  const bool summed = call.y.sum == blocked::Sum::kMoments;
  for (int64_t ch = 0; ch < call.y.out.channels; ++ch) {
    const int64_t at = row + ch * width;
    const Affine<T> main(call.main, ch), other(call.other, ch);
    if (to.fresh) to.centre[ch] = call.main.map.data[at];
    const Vec<T> centre = to.centre[ch] - Vec<T>{};
    Vec<T> first[kVectors] = {}, second[kVectors] = {};
    for (int64_t p = 0; p < width; p += L)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t i = at + p + v * N;
        Vec<T> value = main(i);
        if (call.other.map.data) value += other(i);
        if (call.relu) value = rectified(value, value);
        store_vector<Stream>(call.y.out.data + i, value);
        const Vec<T> away = value - centre;
        first[v] += away;
        second[v] += away * away;
      }
    for (int v = 0; summed && v < kVectors; ++v) {
      T* const sums = to.sums + ch * 3 * L + v * N;
      *reinterpret_cast<Vec<T>*>(sums) += first[v];
      *reinterpret_cast<Vec<T>*>(sums + L) += second[v];
    }
  }
  to.fresh = false;
}

// The gradient behind the ReLU, which is stored only if there is one, and its sums.
template <class T, bool Gated, bool Stream>
void gate_row(const BlockedGate<T>& call, int64_t row, LaneSums<T>& to) {
  constexpr int64_t L = kLanes<T>, N = kVectorBytes / static_cast<int64_t>(sizeof(T));
  const blocked::Result<T>& y = call.y;
  const int64_t width = y.out.w * L;
  for (int64_t ch = 0; ch < y.out.channels; ++ch) {
    const int64_t at = row + ch * width;
    const Vec<T> mean = y.mean[ch] - Vec<T>{}, other_mean = y.other ? y.other_mean[ch] - Vec<T>{} : Vec<T>{};
    Vec<T> first[kVectors] = {}, second[kVectors] = {}, third[kVectors] = {};
    for (int64_t p = 0; p < width; p += L)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t i = at + p + v * N;
        Vec<T> value = load_vector(call.grad + i);
        if constexpr (Gated) {
          value = rectified(load_vector(y.active + i), value);
          store_vector<Stream>(y.out.data + i, value);
        }
        first[v] += value;
        second[v] += value * (load_vector(y.normed + i) - mean);
        if (y.other) third[v] += value * (load_vector(y.other + i) - other_mean);
      }
    for (int v = 0; v < kVectors; ++v) {
      T* const sums = to.sums + ch * 3 * L + v * N;
      *reinterpret_cast<Vec<T>*>(sums) += first[v];
      *reinterpret_cast<Vec<T>*>(sums + L) += second[v];
      *reinterpret_cast<Vec<T>*>(sums + 2 * L) += third[v];
    }
  }
}

// Calls run(element of the row, sums) for all rows and adds the sums to those of the places.
template <class T, class F>
void summed_rows(const blocked::Result<T>& y, const Schedule& s, const PlaceSums& sums, int threads,
                 bool* finite, F run) {
  for_places(s, threads, [&](int64_t place, int64_t group, int64_t h0, int64_t h1) {
    LaneSums<T> own(y.out.channels);
    for (int64_t h = h0; h < h1; ++h) run((group * y.out.h + h) * y.out.row_elements(), own);
    finish_streams();
    if (y.sum != blocked::Sum::kNothing)
      note(finite, own.add_to(sums, place, y.out.channels, 0, y.out.channels, y.out.lanes(group)));
  });
}

template <class T>
void blocked_join(const BlockedJoin<T>& call) {
  const bool stream = leaves_caches(call.y.out);
  summed_rows(call.y, call.schedule, call.sums, call.threads, call.finite,
              [&](int64_t row, LaneSums<T>& own) {
                stream ? join_row<T, true>(call, row, own) : join_row<T, false>(call, row, own);
              });
}

template <class T>
void blocked_gate(const BlockedGate<T>& call) {
  const bool stream = leaves_caches(call.y.out);
  summed_rows(call.y, call.schedule, call.sums, call.threads, call.finite,
              [&](int64_t row, LaneSums<T>& own) {
                if (call.y.gate == blocked::Gate::kOpen) return gate_row<T, false, false>(call, row, own);
                stream ? gate_row<T, true, true>(call, row, own) : gate_row<T, true, false>(call, row, own);
              });
}
