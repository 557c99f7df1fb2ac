// Products of two batches at the nonzeros of a sparse matrix. Part of engine.cc.
//
// Eight nonzeros of a row go together: the left row of a tile is loaded once for them, each of their eight
// sums is one vector over the whole tile, and the lanes of all eight are added up by one transposition.
// Every multiply-add loads one input, and these loads limit the speed; both batches are packed, about 8 MiB
// at a time, so that they come from a cache. Threads take parts of the rows with equally many nonzeros and
// add the tiles in order, so results do not depend on the threads. Tests: test_layer (linear_tests.cc).

// out[u] += the sum of the elements of sum[u], for u < 8.
template <class T, int B>
inline void add_elements(const Vec<T, B>* sum, T* out) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4 && B >= 32) {
    __m256 s[8];
    for (int u = 0; u < 8; ++u) {
      if constexpr (B == 64) {
        __m256 half[2];
        std::memcpy(half, &sum[u], 64);
        s[u] = half[0] + half[1];
      } else {
        s[u] = (__m256)sum[u];
      }
    }
    const auto quarter = [](__m256 a, __m256 b, __m256 c, __m256 d) {
      const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
      const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
      return _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
    };
    const __m256 low = quarter(s[0], s[1], s[2], s[3]), high = quarter(s[4], s[5], s[6], s[7]);
    const __m256 total = _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
    _mm256_storeu_ps(out, _mm256_loadu_ps(out) + total);
    return;
  }
#endif
  for (int u = 0; u < 8; ++u) {
    T total = T(0);
    for (int i = 0; i < B / static_cast<int>(sizeof(T)); ++i) total += sum[u][i];
    out[u] += total;
  }
}

// out[u] += the product of the left row with input col[u], for u < 8.
template <class T, int Bytes>
inline void add_products(const T* left, const T* right, const int32_t* col, T* out) {
  constexpr int B = Shape<Bytes>::B, N = Shape<Bytes>::N * Shape<Bytes>::Passes;
  using V = Vec<T, B>;
  const V* const g = reinterpret_cast<const V*>(left);
  V sum[8];
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) {
    const V* const x =
        reinterpret_cast<const V*>(reinterpret_cast<const char*>(right) + int64_t{col[u]} * Bytes);
    sum[u] = g[0] * x[0];
#pragma GCC unroll 16
    for (int i = 1; i < N; ++i) sum[u] += g[i] * x[i];
  }
  add_elements<T, B>(sum, out);
}

// Adds what one tile contributes to the nonzeros of rows [begin, end); left holds these rows, packed.
template <class T, int Bytes>
void sddmm_tile(const SddmmCall<T>& call, int64_t begin, int64_t end, const T* left, const T* right) {
  constexpr int L = Bytes / static_cast<int>(sizeof(T));
  const Blocks& blocks = *call.blocks;
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t r = begin; r < end; ++r) {
      const T* const row = left + r * L;
      int64_t k = blocks.begin(b)[r];
      const int64_t last = blocks.end(b)[r];
      for (; k + 8 <= last; k += 8) add_products<T, Bytes>(row, right, blocks.col + k, call.out + k);
      if (k == last) continue;
      int32_t col[8];  // the rest, filled up with copies of the last
      T out[8] = {};
      for (int64_t u = 0; u < 8; ++u) col[u] = blocks.col[min64(k + u, last - 1)];
      add_products<T, Bytes>(row, right, col, out);
      for (int64_t u = 0; k + u < last; ++u) call.out[k + u] += out[u];
    }
}

template <class T>
void sddmm(const SddmmCall<T>& call) {
  constexpr int64_t kPackedBytes = int64_t{8} << 20;  // of both sides, so that they stay in a shared cache
  const Tiles tiles = cut_batch(call.left.rows, sizeof(T));
  const int64_t rows = call.left.cols, inputs = call.right.cols, count = tiles.count();
  const int64_t together = max64(1, min64(count, kPackedBytes / ((rows + inputs) * kWideBytes)));
  const int64_t parts = call.threads > 1 ? 4 * call.threads : 1, pieces = call.threads;
  char* const packed = static_cast<char*>(scratch(Scratch::kWindow, (rows + inputs) * together * kWideBytes));
  for (int64_t t0 = 0; t0 < count; t0 += together) {
    const int64_t t1 = min64(count, t0 + together);
    const auto at = [&](int64_t tile, int64_t column) {
      const int64_t begin = tile_offset(tiles, tile), bytes = tile_offset(tiles, tile + 1) - begin;
      return reinterpret_cast<T*>(packed + (rows + inputs) * (begin - tile_offset(tiles, t0)) +
                                  column * bytes);
    };
    auto fill = [&](int64_t slot) {
      const int64_t tile = t0 + slot / pieces, piece = slot % pieces;
      with_tile<T>(tiles, tile, [&](auto width, int64_t first) {
        constexpr int L = decltype(width)::bytes / static_cast<int>(sizeof(T));
        pack<T, L>(call.left, first, rows * piece / pieces, rows * (piece + 1) / pieces, at(tile, 0));
        pack<T, L>(call.right, first, inputs * piece / pieces, inputs * (piece + 1) / pieces, at(tile, rows));
      });
    };
    share(call.threads, (t1 - t0) * pieces, fill);
    auto run = [&](int64_t part) {
      const int64_t begin = part_begin(*call.blocks, part, parts),
                    end = part_begin(*call.blocks, part + 1, parts);
      const int32_t* const crow = call.blocks->crow;
      if (t0 == 0) std::memset(call.out + crow[begin], 0, (crow[end] - crow[begin]) * sizeof(T));
      for (int64_t tile = t0; tile < t1; ++tile)
        with_tile<T>(tiles, tile, [&](auto width, int64_t) {
          sddmm_tile<T, decltype(width)::bytes>(call, begin, end, at(tile, 0), at(tile, rows));
        });
    };
    share(call.threads, parts, run);
  }
}
