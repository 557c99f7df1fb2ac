// Layer norm and attention on tokens, whose channels are rows and whose tokens are lanes. Part of engine.cc.
//
// Nothing is added up across lanes: the scores of a tile of queries are computed with a key to a row, so that
// the softmax runs over rows as the layer norm does. Both products of attention read one operand as vectors
// of queries and the other as scalars, four rows at a time.

void layer_norm(const LayerNormCall& call) {
  constexpr int kAtOnce = 4;  // vectors: few passes over the rows of a tile, which L2 holds
  const auto run = [&](auto count, int64_t p) {
    constexpr int n = decltype(count)::value;
    Vec mean[n] = {}, square[n] = {};
    for (int64_t c = 0; c < call.channels; ++c)
      for (int i = 0; i < n; ++i) mean[i] += load(call.in + c * call.in_stride + p + i * kFloats);
    const float share = 1.0f / static_cast<float>(call.channels);
    for (int i = 0; i < n; ++i) mean[i] *= share;
    for (int64_t c = 0; c < call.channels; ++c)
      for (int i = 0; i < n; ++i) {
        const Vec x = load(call.in + c * call.in_stride + p + i * kFloats) - mean[i];
        square[i] += x * x;
      }
    for (int i = 0; i < n; ++i)
      for (int lane = 0; lane < kFloats; ++lane)
        square[i][lane] = 1.0f / __builtin_sqrtf(square[i][lane] * share + call.eps);
    for (int64_t c = 0; c < call.channels; ++c)
      for (int i = 0; i < n; ++i) {
        const Vec x = load(call.in + c * call.in_stride + p + i * kFloats) - mean[i];
        store(x * square[i] * call.scale[c] + call.shift[c], call.inside + p + i * kFloats,
              call.out + c * call.out_stride + p + i * kFloats);
      }
  };
  int64_t p = call.begin * kLanes;
  const int64_t end = call.end * kLanes;
  for (; p + kAtOnce * kFloats <= end; p += kAtOnce * kFloats) run(std::integral_constant<int, kAtOnce>{}, p);
  for (; p < end; p += kFloats) run(std::integral_constant<int, 1>{}, p);
}

constexpr int kQueries = kAttentionQueries / kFloats;  // machine vectors of a tile

// to[row] = sum over k of scalars[row * row_step + k * step] * from[k * from_stride], for rows [0, rows) of
// kQueries vectors each; scalars are read four rows at a time.
template <int Rows>
inline void attention_rows(const float* scalars, int64_t row_step, int64_t step, const float* from,
                           int64_t from_stride, int64_t count, float* to, int64_t to_stride) {
  Vec sum[Rows][kQueries] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kQueries; ++i) {
      const Vec x = load(from + k * from_stride + i * kFloats);
      for (int r = 0; r < Rows; ++r) sum[r][i] += scalars[r * row_step + k * step] * x;
    }
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < kQueries; ++i) *reinterpret_cast<Vec*>(to + r * to_stride + i * kFloats) = sum[r][i];
}

// Scales the scores of queries [first, first + queries), and adds the mask.
void mask_scores(const AttentionCall& call, int64_t first, int64_t queries) {
  for (int64_t j = 0; j < call.tokens; ++j) {
    float* const row = call.weights + j * kAttentionQueries;
    const float* const mask = call.mask + first * call.mask_stride + j;
    for (int64_t q = 0; q < queries; ++q) row[q] = row[q] * call.scale + mask[q * call.mask_stride];
  }
}

void attention(const AttentionCall& call) {
  constexpr int kRows = kBytes == 64 ? 8 : kBytes == 32 ? 2 : 1;
  float* const weights = call.weights;
  alignas(64) float block[kRows * kAttentionQueries];
  for (int64_t i = 0; i < call.tokens; i += kAttentionQueries) {
    int64_t j = 0;
    for (; j + kRows <= call.tokens; j += kRows)
      attention_rows<kRows>(call.k + j, 1, call.in_stride, call.q + i, call.in_stride, call.width,
                            weights + j * kAttentionQueries, kAttentionQueries);
    for (; j < call.tokens; ++j)
      attention_rows<1>(call.k + j, 1, call.in_stride, call.q + i, call.in_stride, call.width,
                        weights + j * kAttentionQueries, kAttentionQueries);
    const int64_t queries = min64(kAttentionQueries, call.tokens - i);
    if (call.mask) mask_scores(call, i, queries);
    for (int q = 0; q < kQueries; ++q) {
      Vec* const row = reinterpret_cast<Vec*>(weights + q * kFloats);
      constexpr int64_t next = kQueries;
      const float scale = call.mask ? 1.0f : call.scale;
      Vec most = row[0], sum = {};
      for (j = 1; j < call.tokens; ++j) most = larger(row[j * next], most);
      if (call.mask) most = larger(most, Vec{} - __FLT_MAX__);  // all of them may be minus infinity
      for (j = 0; j < call.tokens; ++j) {
        const Vec away = (row[j * next] - most) * scale;
        Vec weight = exponential(away);
        if (call.mask) weight = away < Vec{} - __FLT_MAX__ ? Vec{} : weight;
        sum += row[j * next] = weight;
      }
      Vec share = 1.0f / sum;
      if (call.mask) share = sum == Vec{} ? Vec{} : share;
      for (j = 0; j < call.tokens; ++j) row[j * next] *= share;
    }
    const auto write = [&](int64_t d, int rows) {
      for (int r = 0; r < rows; ++r)
        __builtin_memcpy(call.out + (d + r) * call.out_stride + i, block + r * kAttentionQueries,
                         static_cast<size_t>(queries) * sizeof(float));
    };
    int64_t d = 0;
    for (; d + kRows <= call.width; d += kRows) {
      attention_rows<kRows>(call.v + d * call.in_stride, call.in_stride, 1, weights, kAttentionQueries,
                            call.tokens, block, kAttentionQueries);
      write(d, kRows);
    }
    for (; d < call.width; ++d) {
      attention_rows<1>(call.v + d * call.in_stride, call.in_stride, 1, weights, kAttentionQueries,
                        call.tokens, block, kAttentionQueries);
      write(d, 1);
    }
  }
}
