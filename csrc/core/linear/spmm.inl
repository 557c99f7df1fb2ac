// The product of a batch with the rows of a sparse matrix. Part of engine.cc.
//
// The sums of one output for a tile of the batch stay in registers over the nonzeros that the row has in one
// block of columns: a wide tile is four vectors with AVX-512, of which two nonzeros at a time have one set
// each, eight with AVX2, and eight in each of two passes with 16-byte vectors. A nonzero is one broadcast
// and as many multiply-adds. A panel of rows shares the loads of the input, with up to kPanelSums sums.
//
// The load ports limit the speed, as a single row loads an input for every multiply-add; blocks of columns
// are cut so that inputs come from L1 or close to it. Threads take whole tiles, or, where there are few,
// parts of the rows with equally many nonzeros. No sum is shared, so results do not depend on the threads.
// Tests: test_layer (linear_tests.cc).

// sums[row] = (start[row] if given, else sums[row]) + the products of one list, for Rows rows that share it
// and whose values stand `next` apart.
template <class T, int Bytes, int Rows>
__attribute__((always_inline)) inline void add_rows(const T* x, const int32_t* col, const T* value,
                                                    int64_t next, int64_t count, const T* start, T* sums) {
  using S = Shape<Bytes, Rows>;
  constexpr int B = S::B, N = S::N, U = S::Unroll, All = Bytes / B;
  using V = Vec<T, B>;
  for (int pass = 0; pass < S::Passes; ++pass) {
    const char* const from = reinterpret_cast<const char*>(x) + pass * N * B;
    V* const to = reinterpret_cast<V*>(sums) + pass * N;
    V sum[U][Rows * N];
#pragma GCC unroll 32
    for (int i = 0; i < Rows * N; ++i) sum[0][i] = start ? V{} + start[i / N] : to[i / N * All + i % N];
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 8
      for (int i = 0; i < Rows * N; ++i) sum[u][i] = V{};
    const auto add = [&](int64_t k, V* into) __attribute__((always_inline)) {
      const V* const in = reinterpret_cast<const V*>(from + int64_t{col[k]} * Bytes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V element = in[i];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) into[r * N + i] += value[r * next + k] * element;
      }
    };
    int64_t k = 0;
    for (; k + U <= count; k += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) add(k + u, sum[u]);
    for (; k < count; ++k) add(k, sum[0]);
#pragma GCC unroll 32
    for (int i = 0; i < Rows * N; ++i) {
      for (int u = 1; u < U; ++u) sum[0][i] += sum[u][i];
      to[i / N * All + i % N] = sum[0][i];
    }
  }
}

// A panel of `rows` outputs. Not inlined: single rows, which unstructured weights have alone, keep the
// tighter loop without it.
template <class T, int Bytes, int Rows = kPanelRows>
__attribute__((noinline)) void add_panel(int rows, const T* x, const int32_t* col, const T* value,
                                         int64_t next, int64_t count, const T* start, T* sums) {
  if (rows == Rows) return add_rows<T, Bytes, Rows>(x, col, value, next, count, start, sums);
  if constexpr (Rows > 2) add_panel<T, Bytes, Rows / 2>(rows, x, col, value, next, count, start, sums);
}

// Outputs [begin, end) of the tile whose packed inputs are x.
template <class T, int Bytes>
void spmm_tile(const SpmmCall<T>& call, int64_t first, int64_t begin, int64_t end, const T* x) {
  constexpr int L = Bytes / static_cast<int>(sizeof(T));
  constexpr int64_t kTogether = 256;  // outputs written at once, see unpack
  const Blocks& blocks = *call.blocks;
  const T zeros[kPanelRows] = {};
  // With one block the sums of a few outputs are finished and gone before the next begin.
  const int64_t held = blocks.count > 1 ? end - begin : min64(kTogether, end - begin);
  T* const sums = static_cast<T*>(scratch(Scratch::kTile, held * Bytes));
  const bool stream = begin % 16 == 0 && streams(call.out);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int32_t *from = blocks.begin(b), *to = blocks.end(b);
    for (int64_t r0 = begin; r0 < end; r0 += kTogether) {
      const int64_t r1 = min64(end, r0 + kTogether);
      T* const group = sums + (blocks.count > 1 ? r0 - begin : 0) * L;
      for (int64_t r = r0; r < r1; r += blocks.panel_rows[r]) {
        T* const row = group + (r - r0) * L;
        const T* const start = b > 0 ? nullptr : call.bias ? call.bias + r : zeros;
        const int32_t* const col = blocks.col + from[r];
        const T* const value = call.values + from[r];
        if (blocks.panel_rows[r] > 1)
          add_panel<T, Bytes>(blocks.panel_rows[r], x, col, value, from[r + 1] - from[r], to[r] - from[r],
                              start, row);
        else
          add_rows<T, Bytes, 1>(x, col, value, 0, to[r] - from[r], start, row);
      }
      if (b + 1 < blocks.count) continue;
      if (stream)
        unpack<T, L, true>(group, call.out, first, r0, r1);
      else
        unpack<T, L, false>(group, call.out, first, r0, r1);
    }
  }
  if (stream) finish_streams();
}

// Packs the inputs and calls run(Width, first batch row, part, parts, packed inputs) for all parts of the
// outputs of every tile.
template <class T, class F>
void for_each_tile(const SpmmCall<T>& call, F run) {
  const Tiles tiles = cut_batch(call.in.rows, sizeof(T));
  const int64_t count = tiles.count(), inputs = call.in.cols;
  if (count % call.threads == 0 || count >= 4 * call.threads) {
    auto whole = [&](int64_t slot) {
      with_tile<T>(tiles, slot, [&](auto width, int64_t first) {
        constexpr int bytes = decltype(width)::bytes, L = bytes / static_cast<int>(sizeof(T));
        T* const x = static_cast<T*>(scratch(Scratch::kWindow, inputs * bytes));
        pack<T, L>(call.in, first, 0, inputs, x);
        run(width, first, 0, 1, x);
      });
    };
    return share(call.threads, count, whole);
  }
  // Too few tiles to share them out: all threads work on each, so they pack the inputs first.
  char* const packed = static_cast<char*>(scratch(Scratch::kWindow, inputs * tile_offset(tiles, count)));
  const int64_t parts = call.threads;
  const auto at = [&](int64_t tile) {
    return reinterpret_cast<T*>(packed + inputs * tile_offset(tiles, tile));
  };
  auto fill = [&](int64_t slot) {
    const int64_t tile = slot / parts, part = slot % parts;
    with_tile<T>(tiles, tile, [&](auto width, int64_t first) {
      constexpr int L = decltype(width)::bytes / static_cast<int>(sizeof(T));
      pack<T, L>(call.in, first, inputs * part / parts, inputs * (part + 1) / parts, at(tile));
    });
  };
  share(call.threads, count * parts, fill);
  auto piece = [&](int64_t slot) {
    const int64_t tile = slot / parts, part = slot % parts;
    with_tile<T>(tiles, tile, [&](auto width, int64_t first) { run(width, first, part, parts, at(tile)); });
  };
  share(call.threads, count * parts, piece);
}

template <class T>
void spmm(const SpmmCall<T>& call) {
  for_each_tile(call, [&](auto width, int64_t first, int64_t part, int64_t parts, const T* x) {
    const int64_t begin = part_begin(*call.blocks, part, parts);
    spmm_tile<T, decltype(width)::bytes>(call, first, begin, part_begin(*call.blocks, part + 1, parts), x);
  });
}
