// The product of a batch with the transpose of a sparse matrix, row by row of the matrix itself, for
// matrices whose rows come in panels but whose columns do not. Part of engine.cc.
//
// A panel's rows of the batch stay in registers while its list is walked, up to 16 vectors with AVX-512 and
// 8 otherwise. For each column the panel adds all its products to the sum of that output, which waits in a
// buffer, before it writes it back. So a panel of four loads and stores a vector for four multiply-adds,
// where the rows of the transpose, which share nothing, load one for each. Threads take whole tiles or,
// where there are few, parts of the outputs. Tests: test_shared_rows (linear_tests.cc) makes such matrices.

// sums[col - begin] += the products of the left rows with a list, for Rows rows that share it and whose
// values stand `next` apart.
template <class T, int Bytes, int Rows>
__attribute__((always_inline)) inline void scatter_rows(const T* left, const int32_t* col, const T* value,
                                                        int64_t next, int64_t count, int64_t begin, T* sums) {
  using S = Shape<Bytes, Rows>;
  constexpr int B = S::B, N = S::N, All = Bytes / B;
  using V = Vec<T, B>;
  for (int pass = 0; pass < S::Passes; ++pass) {
    const V* const from = reinterpret_cast<const V*>(left) + pass * N;
    char* const to = reinterpret_cast<char*>(sums) + pass * N * B;
    V in[Rows * N];
#pragma GCC unroll 32
    for (int i = 0; i < Rows * N; ++i) in[i] = from[i / N * All + i % N];
    for (int64_t k = 0; k < count; ++k) {
      V* const sum = reinterpret_cast<V*>(to + (col[k] - begin) * Bytes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        V total = sum[i];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) total += value[r * next + k] * in[r * N + i];
        sum[i] = total;
      }
    }
  }
}

// What rows [0, matrix rows) of a packed tile add to outputs [begin, end), which lie in block b.
template <class T, int Bytes>
void scatter_tile(const SpmmCall<T>& call, int64_t first, int64_t b, int64_t begin, int64_t end,
                  const T* left) {
  constexpr int L = Bytes / static_cast<int>(sizeof(T));
  constexpr int64_t kTogether = 256;  // outputs written at once, see unpack
  const Blocks& blocks = *call.blocks;
  T* const sums = static_cast<T*>(scratch(Scratch::kTile, (end - begin) * Bytes));
  std::memset(sums, 0, (end - begin) * Bytes);
  const bool whole = begin == blocks.first_col(b) && end == blocks.first_col(b + 1);
  for (int64_t r = 0; r < blocks.rows; r += blocks.panel_rows[r]) {
    const int32_t *from = blocks.col + blocks.begin(b)[r], *to = blocks.col + blocks.end(b)[r];
    if (!whole) {
      while (from < to && *from < begin) ++from;
      while (from < to && to[-1] >= end) --to;
    }
    const int64_t at = from - blocks.col, next = blocks.crow[r + 1] - blocks.crow[r];
    const T *const in = left + r * L, *const value = call.values + at;
    switch (blocks.panel_rows[r]) {
      case 4:
        scatter_rows<T, Bytes, 4>(in, from, value, next, to - from, begin, sums);
        break;
      case 2:
        scatter_rows<T, Bytes, 2>(in, from, value, next, to - from, begin, sums);
        break;
      default:
        scatter_rows<T, Bytes, 1>(in, from, value, next, to - from, begin, sums);
    }
  }
  const bool stream = begin % 16 == 0 && streams(call.out);
  for (int64_t c = begin; c < end; c += kTogether) {
    const int64_t last = min64(end, c + kTogether);
    if (stream)
      unpack<T, L, true>(sums + (c - begin) * L, call.out, first, c, last);
    else
      unpack<T, L, false>(sums + (c - begin) * L, call.out, first, c, last);
  }
  if (stream) finish_streams();
}

template <class T>
void spmm_transposed(const SpmmCall<T>& call) {
  const Blocks& blocks = *call.blocks;
  for_each_tile(call, [&](auto width, int64_t first, int64_t part, int64_t parts, const T* left) {
    const auto cut = [&](int64_t i) { return i == parts ? blocks.cols : blocks.cols * i / parts / 16 * 16; };
    const int64_t from = cut(part), to = cut(part + 1);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t begin = max64(from, blocks.first_col(b)), end = min64(to, blocks.first_col(b + 1));
      if (begin < end) scatter_tile<T, decltype(width)::bytes>(call, first, b, begin, end, left);
    }
  });
}
