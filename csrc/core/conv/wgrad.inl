// The weight gradient at the nonzeros, summed over images and positions. Part of engine.cc.
//
// A strip of up to 32 positions (16 where an output reads one pixel) is packed, gradient and input, and
// sample.inl adds its share to the sums. Blocks of input channels are cut for L1. Each thread has its own
// array of sums; they are added in a fixed order. Tests: test_convolution (core_tests.cc) compares with
// scalar.cc and expects the same bits from a second run.

// One group of lanes, chunk of rows and range of output channels, and the lanes that read them.
template <class T>
struct WgradPlace {
  int64_t begin, end, h0, h1;
  View4<const T> grad;
  Window grad_window;
  Lane<const T> x_lanes[kLanes<T>], grad_lanes[kLanes<T>];

  WgradPlace(const WgradCall<T>& call, const Schedule& s, int64_t group, int64_t chunk, int64_t begin,
             int64_t end)
      : begin(begin), end(end), grad(call.grad) {
    h0 = chunk * s.chunk_rows;
    h1 = min64(s.strip_rows, h0 + s.chunk_rows);
    grad.data += begin * grad.stride_c;
    grad.c = end - begin;
    grad_window.channels = grad.c;
    grad_window.width = grad_window.pitch = grad.w;
    point_lanes(call.x, s, group, call.plan->window.rows.stride, x_lanes);
    point_lanes(grad, s, group, 1, grad_lanes);
    for (Lane<const T>& lane : grad_lanes) lane.rows = min64(lane.rows, lane.row0 + s.strip_rows);
  }
};

// All nonzeros of channels [first, last), block by block, for one strip of rows cut into pieces that fit L1.
template <class T>
void sample_strip(const WgradPlan& plan, int64_t first, int64_t last, const Strip& strip, T* out,
                  Ahead* ahead = nullptr) {
  const int64_t blocks = plan.blocks;
  const int64_t pieces = (strip.cols + plan.piece_cols - 1) / plan.piece_cols;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t w = strip.cols * i / pieces;
    Strip piece = strip;
    piece.cols = strip.cols * (i + 1) / pieces - w;
    piece.x += w * strip.x_step;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t ch = first; ch < last; ch += plan.panel_rows[ch]) {
        const int32_t* begin = plan.list_begin.data() + ch * blocks + b;
        if (ahead) ahead->fetch_some();
        piece.grad = strip.grad + (ch - first) * strip.grad_channel + w * kPixelBytes;
        const int32_t* const list = plan.offset.data() + begin[0];
        const int32_t count = begin[1] - begin[0];
        if (plan.panel_rows[ch] > 1)
          sample_panel(plan.panel_rows[ch], piece, list, count, out + begin[0], begin[blocks] - begin[0]);
        else
          sample_list<T, 1>(piece, list, count, out + begin[0], 0);
      }
  }
}

// Adds the contribution of one place to out [nnz].
template <class T>
void wgrad_item(const WgradCall<T>& call, const WgradPlace<T>& place, T* out) {
  const Window& window = call.plan->window;
  const int64_t rows_left = place.h1 - place.h0, step = window.rows.step;
  // Rows taken together need all the rows of the window between them.
  const int64_t buffered = RollingWindow<T>::kBufferBytes / window.row_bytes() / step;
  const int64_t together =
      max64(1, min64(min64(rows_left, call.plan->strip_pixels / place.grad.w), 1 + buffered));
  const int64_t grad_row = place.grad_window.row_bytes();
  char* packed = static_cast<char*>(scratch(Scratch::kGradient, together * grad_row));
  RollingWindow<T> rows(Scratch::kWindow, window, rows_left, (together - 1) * step);
  rows.restart(place.h0 * step);
  const auto pack = [&](int64_t row, T* to) { pack_row(call.x, window, place.x_lanes, row, to); };
  for (int64_t h = place.h0, count; h < place.h1; h += count) {
    count = min64(together, place.h1 - h);
    Strip strip{nullptr,
                rows.advance(h * step, pack),
                count,
                place.grad.w,
                grad_row,
                place.grad.w * kPixelBytes,
                step * window.row_bytes(),
                window.cols.step * kPixelBytes};
    for (int64_t r = 0; r < count; ++r)
      pack_row(place.grad, place.grad_window, place.grad_lanes, h + r,
               reinterpret_cast<T*>(packed + r * grad_row));
    strip.grad = packed;
    sample_strip(*call.plan, place.begin, place.end, strip, out);
  }
}

// dvalues = the sum of what add(place, part, sum) adds to sum [nnz] for every place; a part adds to the
// values of its output channels only. Which places share a sum depends on the number of threads alone, and
// the sums are added in order.
template <class T, class F>
void sum_places(const Schedule& s, const Structure& weight, int threads, T* dvalues, F add) {
  const int64_t places = s.groups * s.chunks, nnz = weight.nnz;
  const int32_t* crow = weight.crow.data();
  const int64_t sums = s.parts > 1 ? places : min64(threads, places);
  T* partial = static_cast<T*>(scratch(Scratch::kPartial, sums * nnz * sizeof(T)));
  auto work = [&](int slot) {
    const int64_t sum = slot / s.parts, part = slot % s.parts;
    const int64_t begin = panel_cut(weight.rows * part / s.parts, weight.rows),
                  end = panel_cut(weight.rows * (part + 1) / s.parts, weight.rows);
    T* out = partial + sum * nnz;
    std::memset(out + crow[begin], 0, (crow[end] - crow[begin]) * sizeof(T));
    for (int64_t place = places * sum / sums; place < places * (sum + 1) / sums; ++place)
      add(place, part, out);
  };
  parallel(threads, static_cast<int>(sums * s.parts), work);

  auto reduce = [&](int slot) {
    for (int64_t k = nnz * slot / threads; k < nnz * (slot + 1) / threads; ++k) {
      T total = partial[k];
      for (int64_t i = 1; i < sums; ++i) total += partial[i * nnz + k];
      dvalues[k] = total;
    }
  };
  parallel(nnz > 4096 ? threads : 1, threads, reduce);
}

template <class T>
void wgrad(const WgradCall<T>& call) {
  const Window& window = call.plan->window;
  const Schedule s = schedule_rows(call.grad.n, call.grad.h, call.grad.c, window.rows.span - window.rows.step,
                                   kLanes<T>, kLanes<T>, call.threads, 2);
  sum_places(s, *call.weight, call.threads, call.dvalues, [&](int64_t place, int64_t part, T* sum) {
    const int64_t begin = panel_cut(call.grad.c * part / s.parts, call.grad.c),
                  end = panel_cut(call.grad.c * (part + 1) / s.parts, call.grad.c);
    wgrad_item(call, WgradPlace<T>(call, s, place / s.chunks, place % s.chunks, begin, end), sum);
  });
}
