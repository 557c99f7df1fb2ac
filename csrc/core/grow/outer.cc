// Sums of outer products, the kernels of dense_wgrad.cc: a block of output channels times a block of input
// channels, over many positions.
//
// The sums stay in registers over all positions of a chunk: two vectors of output channels (one where there
// are few) times eight input channels with AVX-512, times four otherwise; that is 16 accumulators of 32
// registers or 8 of 16. A position is two vector loads and a broadcast for each input channel, for twice as
// many multiply-adds as broadcasts, so the multipliers limit the speed and not the loads. Packing transposes
// channels of a map into blocks in registers, square blocks of one vector's length. Tests: test_tiles
// (growth_tests.cc).
#include "core/grow/outer.h"

#include "core/engine.inl"

namespace sparsekd {
namespace {

// Two vectors of output channels times these input channels are the accumulators: 16 of 32 registers with
// AVX-512, else 8 of 16. Both hide the latency of two fused multiply-adds a cycle.
constexpr int kChannelBlock = kVectorBytes == 64 ? 8 : 4;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vec = typename VectorOf<T, W>::type;

template <class V, class T>
inline void load(V& v, const T* at) {
  std::memcpy(&v, at, sizeof(v));
}
template <class V, class T>
inline void store(T* at, const V& v) {
  std::memcpy(at, &v, sizeof(v));
}

template <class T, int V>
void multiply(const Walk& walk, const T* g, const T* x, T* sum) {
  constexpr int L = kLanes<T>, X = kChannelBlock, G = V * L;
  Vec<T, L> acc[X][V];
  for (int j = 0; j < X; ++j)
    for (int v = 0; v < V; ++v) load(acc[j][v], sum + j * G + v * L);
  for (int64_t n = 0; n < walk.images; ++n)
    for (int64_t r = 0; r < walk.rows; ++r) {
      const T* gp = g + n * walk.g_image + r * walk.g_row;
      const T* xp = x + n * walk.x_image + r * walk.x_row;
      for (int64_t c = 0; c < walk.cols; ++c, gp += G, xp += walk.x_col) {
        Vec<T, L> gradient[V];
        for (int v = 0; v < V; ++v) load(gradient[v], gp + v * L);
#pragma GCC unroll 8
        for (int j = 0; j < X; ++j)
          for (int v = 0; v < V; ++v) acc[j][v] += gradient[v] * xp[j];
      }
    }
  for (int j = 0; j < X; ++j)
    for (int v = 0; v < V; ++v) store(sum + j * G + v * L, acc[j][v]);
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using type = Lanes<I...>;
};

// Swaps the S x S blocks beside the diagonal, for all blocks of 2S x 2S.
template <int S, class V, int... I>
inline void swap_blocks(V* r, Lanes<I...>) {
  constexpr int W = sizeof...(I);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const V a = r[i], b = r[i + S];
    r[i] = __builtin_shufflevector(a, b, (I & S ? W + I - S : I)...);
    r[i + S] = __builtin_shufflevector(a, b, (I & S ? W + I : I + S)...);
  }
}

template <class T, int W>
inline void transpose(Vec<T, W>* r) {
  using All = typename LanesUpTo<W>::type;
  if constexpr (W > 8) swap_blocks<8>(r, All{});
  if constexpr (W > 4) swap_blocks<4>(r, All{});
  if constexpr (W > 2) swap_blocks<2>(r, All{});
  swap_blocks<1>(r, All{});
}

// One block of B channels in vectors of W; `channels` of them exist.
template <class T, int B, int W>
inline void pack_block(const T* src, int64_t stride_c, int64_t stride_p, int64_t channels, int64_t pixels,
                       T* dst) {
  int64_t p = 0;
  if (stride_p == 1 && channels == B)
    for (; p + W <= pixels; p += W)
      for (int first = 0; first < B; first += W) {
        Vec<T, W> r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) load(r[i], src + (first + i) * stride_c + p);
        transpose<T, W>(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(dst + (p + i) * B + first, r[i]);
      }
  constexpr int64_t kTogether = 16;  // pixels of one channel may share a cache line
  for (; p < pixels; p += kTogether) {
    const int64_t end = p + kTogether < pixels ? p + kTogether : pixels;
    for (int64_t i = 0; i < B; ++i)
      for (int64_t q = p; q < end; ++q)
        dst[q * B + i] = i < channels ? src[i * stride_c + q * stride_p] : T(0);
  }
}

template <class T, int B, int W>
void pack(const T* src, int64_t stride_c, int64_t stride_p, int64_t channels, int64_t pixels, T* dst,
          int64_t block_stride) {
  const int64_t full = channels / B;
  if (stride_c == 1) {
    for (int64_t p = 0; p < pixels; ++p)  // along memory; each block is a stream of its own
      for (int64_t block = 0; block < full; ++block)
        std::memcpy(dst + block * block_stride + p * B, src + p * stride_p + block * B, B * sizeof(T));
  } else {
    for (int64_t block = 0; block < full; ++block)
      pack_block<T, B, W>(src + block * B * stride_c, stride_c, stride_p, B, pixels,
                          dst + block * block_stride);
  }
  if (const int64_t rest = channels - full * B)
    pack_block<T, B, W>(src + full * B * stride_c, stride_c, stride_p, rest, pixels,
                        dst + full * block_stride);
}

}  // namespace

template <class T>
template <Isa>
const OuterEngine<T> OuterEngine<T>::compiled{
    {kLanes<T>, sparsekd::pack<T, kLanes<T>, kLanes<T>>, sparsekd::multiply<T, 1>},
    {2 * kLanes<T>, sparsekd::pack<T, 2 * kLanes<T>, kLanes<T>>, sparsekd::multiply<T, 2>},
    kChannelBlock,
    sparsekd::pack<T, kChannelBlock, kChannelBlock>};
template const OuterEngine<float> OuterEngine<float>::compiled<kIsa>;
template const OuterEngine<double> OuterEngine<double>::compiled<kIsa>;

}  // namespace sparsekd
