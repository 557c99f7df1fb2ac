// The gather and the weight gradient on blocked maps (core/blocked/map.h). Part of engine.cc.
//
// The heart is the same as for ordinary tensors: windows of packed rows, tiles in registers, lists of
// nonzeros. What differs is the way in and out. A row is packed by copying lines, normalised or led back
// through a BatchNorm on the way; a tile is stored line by line, after the residual addition, the gate of a
// ReLU and the sums that the next BatchNorm needs. So no pass over a map is made for a BatchNorm alone.
//
// Both gradients come from one window of the output gradient: row by row, first the weight gradient of a
// strip, then the input gradient of a tile, while the rows are in the caches. Sums are kept by lane in T over
// the rows of one group of images, and added up in double after that, so lanes without an image are left out.
//
// Tests: blocked_tests.cc compares every instruction set with scalar.cc and plain loops in double.

// A tile of two rows reads fewer inputs than one of the same size in one row.
constexpr TileShape kBlockedTile{kTilePixels > 1 ? 2 : 1, kTilePixels > 1 ? kTilePixels / 2 : 1};

inline int64_t blocked_tile_rows(int64_t width, int64_t rows) {
  const int64_t narrow = tile_rows(width, rows);
  return narrow > 1 || rows < kBlockedTile.rows ? narrow : kBlockedTile.rows;
}

// What the results of one item have been summed up to: three pixels for each channel, lane by lane.
template <class T>
struct LaneSums {
  T *sums, *centre;
  bool fresh = true;  // the first tile sets the centre

  explicit LaneSums(int64_t channels) {
    const int64_t count = channels * 3 * kLanes<T>;
    sums = static_cast<T*>(scratch(Scratch::kSums, (count + channels) * sizeof(T)));
    centre = sums + count;
    std::memset(sums, 0, (count + channels) * sizeof(T));
  }

  // Adds the lanes of images to what a place has for channels [begin, end) of `channels`. Returns whether
  // all sums are finite.
  bool add_to(const PlaceSums& place_sums, int64_t place, int64_t channels, int64_t begin, int64_t end,
              int64_t lanes) const {
    double finite = 0;
    for (int64_t ch = begin; ch < end; ++ch) {
      const int64_t at = place * channels + ch;
      place_sums.centre[at] = centre[ch - begin];
      for (int64_t i = 0; i < 3; ++i) {
        const T* const lane = sums + ((ch - begin) * 3 + i) * kLanes<T>;
        double total = 0;
        for (int64_t l = 0; l < lanes; ++l) total += lane[l];
        place_sums.sums[at * 3 + i] += total;
        finite += total - total;
      }
    }
    return finite == 0;
  }
};

// Where a tile lies in the result, in elements of its first channel, and in the residual, or nowhere.
struct TilePlace {
  int count;
  int64_t at[kTilePixels], residual[kTilePixels];
};

template <class T, blocked::Gate gate, blocked::Sum sum, bool Stream>
void finish_channels(const blocked::Result<T>& y, const TilePlace& place, int64_t begin, int64_t end,
                     const T* tile, LaneSums<T>& to) {
  using blocked::Gate;
  using blocked::Sum;
  constexpr int64_t L = kLanes<T>, N = kVectorBytes / static_cast<int64_t>(sizeof(T));
  const int64_t line = y.out.w * L, every = y.residual_every,
                residual_line = (y.out.w + every - 1) / every * L;
  for (int64_t ch = begin; ch < end; ++ch, tile += place.count * L) {
    T* const sums = to.sums + (ch - begin) * 3 * L;
    Vec<T> mean{}, scale{}, shift{}, other_mean{};
    if constexpr (sum == Sum::kMoments) {
      if (to.fresh) to.centre[ch - begin] = tile[0];
      mean = to.centre[ch - begin] - mean;
    }
    if constexpr (sum == Sum::kGradient) mean = y.mean[ch] - mean;
    BranchAt<T> branch;
    if constexpr (gate == Gate::kJoined) branch = {y.branch, ch};
    if constexpr (gate == Gate::kNormalised || gate == Gate::kJoined) {
      scale = y.scale[ch] - scale;
      shift = y.shift[ch] - shift;
    }
    const bool other = sum == Sum::kGradient && y.other;
    if (other) other_mean = y.other_mean[ch] - other_mean;
    for (int64_t v = 0; v < L; v += N) {
      Vec<T> first{}, second{}, third{};
      for (int p = 0; p < place.count; ++p) {
        Vec<T> value = load_vector(tile + p * L + v);
        const int64_t at = place.at[p] + ch * line + v;
        if (y.residual && place.residual[p] >= 0)
          value += load_vector(y.residual + place.residual[p] + ch * residual_line + v);
        Vec<T> away{};
        if constexpr (sum == Sum::kGradient) away = load_vector(y.normed + at) - mean;
        if constexpr (gate == Gate::kNormalised) value = rectified(away * scale + shift, value);
        if constexpr (gate == Gate::kJoined) value = rectified(away * scale + shift + branch(at), value);
        if constexpr (gate == Gate::kStored) value = rectified(load_vector(y.active + at), value);
        store_vector<Stream>(y.out.data + at, value);
        if constexpr (sum == Sum::kMoments) {
          away = value - mean;
          first += away;
          second += away * away;
        }
        if constexpr (sum == Sum::kGradient) {
          first += value;
          second += value * away;
          if (other) third += value * (load_vector(y.other + at) - other_mean);
        }
      }
      if constexpr (sum != Sum::kNothing) {
        *reinterpret_cast<Vec<T>*>(sums + v) += first;
        *reinterpret_cast<Vec<T>*>(sums + L + v) += second;
        if (other) *reinterpret_cast<Vec<T>*>(sums + 2 * L + v) += third;
      }
    }
  }
  to.fresh = false;
}

// What one item does with its tiles.
template <class T>
struct Finish {
  const blocked::Result<T>& y;
  const GatherPlan& plan;
  int64_t group, begin, end;
  bool stream;
  LaneSums<T>& sums;
  Seen<T>& seen;

  // Results [h, h + rows) x [w, w + cols) of the plan.
  void operator()(int64_t h, int64_t w, int rows, int cols, const T* tile) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t every = y.residual_every, residual_h = (y.out.h + every - 1) / every,
                  residual_w = (y.out.w + every - 1) / every;
    TilePlace place{rows * cols, {}, {}};
    for (int p = 0; p < place.count; ++p) {
      const int64_t row = (h + p / cols) * plan.every_h + plan.first_h;
      const int64_t col = (w + p % cols) * plan.every_w + plan.first_w;
      place.at[p] = ((group * y.out.h + row) * y.out.channels * y.out.w + col) * L;
      place.residual[p] =
          row % every || col % every
              ? -1
              : ((group * residual_h + row / every) * y.out.channels * residual_w + col / every) * L;
    }
    using blocked::Gate;
    using blocked::Sum;
    if (y.sum == Sum::kMoments) return run<Gate::kOpen, Sum::kMoments>(place, tile);
    if (y.gate == Gate::kNormalised) return run<Gate::kNormalised, Sum::kGradient>(place, tile);
    if (y.gate == Gate::kJoined) return run<Gate::kJoined, Sum::kGradient>(place, tile);
    if (y.gate == Gate::kStored) return run<Gate::kStored, Sum::kGradient>(place, tile);
    if (y.sum == Sum::kGradient) return run<Gate::kOpen, Sum::kGradient>(place, tile);
    seen.add(tile, (end - begin) * place.count * kVectors);
    run<Gate::kOpen, Sum::kNothing>(place, tile);
  }

 private:
  template <blocked::Gate gate, blocked::Sum sum>
  void run(const TilePlace& place, const T* tile) const {
    if (stream)
      finish_channels<T, gate, sum, true>(y, place, begin, end, tile, sums);
    else
      finish_channels<T, gate, sum, false>(y, place, begin, end, tile, sums);
  }
};

// Rows [h, h + rows) of the results of a plan; the window row of the first is x.
template <class T>
void blocked_tiles(const Lists<T>& lists, const char* x, int64_t h, int64_t rows, int64_t together, T* tile,
                   const Finish<T>& finish) {
  const Window& window = lists.plan.window;
  const int64_t row_step = window.rows.step * window.row_bytes(), step = window.cols.step * kPixelBytes;
  for (int64_t r = 0, count; r < rows; r += count) {
    count = rows - r >= together ? together : 1;
    for_tiles<T>(count, lists.plan.out_w, [&](auto shape, int64_t w) {
      using Shape = decltype(shape);
      compute_tile<T, Shape>(lists, x + r * row_step + w * step, finish.begin, finish.end, tile);
      finish(h + r, w, Shape::kRows, Shape::kCols, tile);
    });
  }
}

// About how many lists blocked_tiles goes through for so many rows, by one of `parts`.
inline int64_t lists_of_rows(const GatherPlan& plan, int64_t rows, int64_t together, int64_t parts) {
  const int64_t cols = kTilePixels / together, tiles = (plan.out_w + cols - 1) / cols;
  return max64(1, static_cast<int64_t>(plan.entries.size()) * tiles * rows / (together * parts));
}

inline void note(bool* finite, bool all) {
  if (!all) __atomic_store_n(finite, false, __ATOMIC_RELAXED);
}

template <class T>
void blocked_forward(const BlockedForward<T>& call) {
  const Schedule& s = call.schedule;
  const Window& window = call.plan->window;
  const int64_t channels = call.y.out.channels, step = window.rows.step;
  const bool stream = leaves_caches(call.y.out);
  auto run = [&](int64_t item) {
    const int64_t part = item % s.parts, place = item / s.parts, group = place / s.chunks;
    const int64_t h0 = place % s.chunks * s.chunk_rows, h1 = min64(s.strip_rows, h0 + s.chunk_rows);
    const int64_t begin = panel_cut(channels * part / s.parts, channels),
                  end = panel_cut(channels * (part + 1) / s.parts, channels);
    const int64_t together = blocked_tile_rows(call.plan->out_w, h1 - h0);
    T* const tile = static_cast<T*>(scratch(Scratch::kTile, (end - begin) * kTilePixels * kPixelBytes));
    LaneSums<T> sums(end - begin);
    Seen<T> seen;
    const Finish<T> finish{call.y, *call.plan, group, begin, end, stream, sums, seen};
    RollingWindow<T> rows(Scratch::kWindow, window, h1 - h0, (together - 1) * step);
    rows.restart(h0 * step);
    const auto pack = [&](int64_t row, T* to) { pack_blocked(call.x, window, group, row, to); };
    Ahead ahead;
    for (int64_t h = h0, count; h < h1; h += count) {
      count = min64(together, h1 - h);
      const char* const x = rows.advance(h * step, pack);
      ahead.restart();
      fetch_rows(call.x, window, group, rows.packed(), together * step, ahead);
      fetch_residual(call.y, group, h + count, count, ahead);
      ahead.share(lists_of_rows(*call.plan, count, together, s.parts));
      blocked_tiles<T>({*call.plan, call.values, call.bias, &ahead}, x, h, count, together, tile, finish);
    }
    if (stream) finish_streams();
    const bool summed = call.y.sum == blocked::Sum::kNothing ||
                        sums.add_to(call.sums, place, channels, begin, end, call.y.out.lanes(group));
    note(call.finite, summed && seen.finite());
  };
  share(call.threads, s.groups * s.chunks * s.parts, run);
}

// Both gradients of one place: the weight gradient of output channels [begin, end), the input gradient of its
// channels [first, last).
template <class T>
void blocked_backward_item(const BlockedBackward<T>& call, int64_t place, int64_t begin, int64_t end,
                           int64_t first, int64_t last, T* dvalues) {
  const Schedule& s = call.schedule;
  const WgradPlan& wgrad = *call.plan->wgrad;
  const Window &grad = call.plan->grad, &window = wgrad.window;
  const int64_t group = place / s.chunks, h0 = place % s.chunks * s.chunk_rows,
                h1 = min64(s.strip_rows, h0 + s.chunk_rows);
  const int64_t x_step = window.rows.step, height = call.grad.map.h, width = call.grad.map.w;
  const int64_t tile_rows = blocked_tile_rows(call.plan->dgrad.phases[0].out_w, h1 - h0);
  const int64_t strip_rows = max64(1, min64(wgrad.strip_pixels / width, h1 - h0));
  const int64_t together = max64(tile_rows, strip_rows / tile_rows * tile_rows);
  T* const tile = static_cast<T*>(scratch(Scratch::kTile, (last - first) * kTilePixels * kPixelBytes));
  LaneSums<T> sums(last - first);
  Seen<T> seen;
  RollingWindow<T> grads(Scratch::kGradient, grad, h1 - h0, together - 1);
  RollingWindow<T> inputs(Scratch::kWindow, window, h1 - h0, (together - 1) * x_step);
  grads.restart(h0);
  inputs.restart(h0 * x_step);
  const auto pack_grad = [&](int64_t row, T* to) { pack_blocked(call.grad, grad, group, row, to); };
  const auto pack_input = [&](int64_t row, T* to) { pack_blocked(call.x, window, group, row, to); };
  const bool stream = call.dx && leaves_caches(call.dx->out);
  int64_t lists = (end - begin) * wgrad.blocks * ((width + wgrad.piece_cols - 1) / wgrad.piece_cols) *
                  ((together + strip_rows - 1) / strip_rows);
  if (call.dx)
    for (const GatherPlan& phase : call.plan->dgrad.phases)
      lists += lists_of_rows(phase, together, tile_rows, s.parts);
  Ahead ahead;
  for (int64_t h = h0; h < h1; h += together) {
    const int64_t count = min64(together, h1 - h);
    const char* const g = grads.advance(h, pack_grad);
    ahead.restart();
    fetch_rows(call.grad, grad, group, grads.packed(), together, ahead);
    if (const int64_t rows = min64(h + count, height) - h; rows > 0) {
      const char* const x = inputs.advance(h * x_step, pack_input);
      fetch_rows(call.x, window, group, inputs.packed(), together * x_step, ahead);
      if (call.dx) fetch_residual(*call.dx, group, h + count, count, ahead);
      ahead.share(lists);
      for (int64_t r = 0; r < rows; r += strip_rows)
        sample_strip(
            wgrad, begin, end,
            Strip{
                g + (r - grad.rows.lo) * grad.row_bytes() + (begin * grad.pitch - grad.cols.lo) * kPixelBytes,
                x + r * x_step * window.row_bytes(), min64(strip_rows, rows - r), width, grad.row_bytes(),
                grad.pitch * kPixelBytes, x_step * window.row_bytes(), window.cols.step * kPixelBytes},
            dvalues, &ahead);
    }
    if (!call.dx) continue;
    const T* values = call.values;
    for (const GatherPlan& phase : call.plan->dgrad.phases) {
      const int64_t rows = min64(h + count, phase.out_h) - h;
      if (rows > 0)
        blocked_tiles<T>({phase, values, nullptr, &ahead}, g, h, rows, tile_rows, tile,
                         {*call.dx, phase, group, first, last, stream, sums, seen});
      values += phase.slot.size();
    }
  }
  if (stream) finish_streams();
  if (!call.dx) return;
  const blocked::Result<T>& dx = *call.dx;
  const bool summed = dx.sum == blocked::Sum::kNothing ||
                      sums.add_to(call.sums, place, dx.out.channels, first, last, dx.out.lanes(group));
  note(call.finite, summed && seen.finite());
}

template <class T>
void blocked_backward(const BlockedBackward<T>& call) {
  const Schedule& s = call.schedule;
  const int64_t outs = call.grad.map.channels, ins = call.x.map.channels;
  sum_places(s, *call.weight, call.threads, call.dvalues, [&](int64_t place, int64_t part, T* sum) {
    const auto cut = [&](int64_t of, int64_t i) { return panel_cut(of * i / s.parts, of); };
    blocked_backward_item(call, place, cut(outs, part), cut(outs, part + 1), cut(ins, part),
                          cut(ins, part + 1), sum);
  });
}
