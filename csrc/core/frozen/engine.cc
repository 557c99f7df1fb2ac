// The product of a sparse weight with maps whose pixels lie in a row, see engine.h.
//
// The sums of a row for a tile of pixels stay in registers over all its nonzeros: a nonzero is one broadcast
// and one multiply-add with a vector from memory for each vector of the tile. How fast these vectors come is
// the limit: two in a cycle from L1, one in one and a half from L2, and half as many where they lie across
// cache lines, for which the caller copies taps to the left and right. Rows with equal lists, as dense layers
// and blocks have, are computed four at a time, and an input is loaded once for all of them. The caller
// chooses tiles, and blocks of channels, so that the inputs of one come from L1, or L2 at worst.
#include "core/engine.inl"

#include <array>
#include <type_traits>
#include <utility>

#include "core/frozen/engine.h"

namespace sparsekd::frozen {
namespace {

constexpr int kBytes = kVectorBytes;
constexpr int kFloats = kBytes / 4;
constexpr int kLine = 64;
constexpr int64_t kAhead = 256;           // words of a list that are fetched before they are needed
constexpr int kParts = kLanes / kFloats;  // machine vectors in a vector of kLanes pixels
typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef float Loose __attribute__((vector_size(kBytes), aligned(4)));
typedef int32_t LooseInt __attribute__((vector_size(kBytes), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline Vec larger(Vec a, Vec b) { return a < b ? b : a; }  // a where b is not a number, or a is not
inline Vec smaller(Vec a, Vec b) { return b < a ? b : a; }

// e^x to two units in the last place, from e^-87.3 to infinity: 2^n by the exponent's bits, the rest by a
// polynomial.
inline Vec exponential(Vec x) {
  x = smaller(larger(x, Vec{} - 87.3f), Vec{} + 89.0f);  // e^89 overflows to infinity
  const Vec magic = Vec{} + 12582912.0f;                 // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
  return p * reinterpret_cast<Vec>(power);
}

// The error function to 1.5e-7, Abramowitz and Stegun 7.1.26.
inline Vec error_function(Vec x) {
  const Vec size = larger(x, -x);
  const Vec t = 1.0f / (size * 0.3275911f + 1.0f);
  Vec p = Vec{} + 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec y = 1.0f - p * t * exponential(-size * size);
  return x < Vec{} ? -y : y;
}

// Activations that only bound their argument are between these two; the others are called curved.
inline float lowest(Activation activation) {
  return activation == Activation::kRelu || activation == Activation::kRelu6 ? 0.0f : -__builtin_inff();
}
inline float highest(Activation activation) {
  return activation == Activation::kRelu6 ? 6.0f : __builtin_inff();
}
inline bool curved(Activation activation) { return activation >= Activation::kSilu; }

inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kRelu:
      return larger(x, Vec{});
    case Activation::kRelu6:
      return smaller(larger(x, Vec{}), Vec{} + 6.0f);
    case Activation::kSilu:
      return x / (1.0f + exponential(-x));
    case Activation::kGelu:
      return x * 0.5f * (1.0f + error_function(x * 0.70710678f));
    case Activation::kHardswish:
      return x * smaller(larger(x + 3.0f, Vec{}), Vec{} + 6.0f) * (1.0f / 6);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + exponential(-x));
    case Activation::kHardsigmoid:
      return smaller(larger(x + 3.0f, Vec{}), Vec{} + 6.0f) * (1.0f / 6);
    default:
      return x;
  }
}

inline void store(Vec value, const int32_t* inside, float* to) {
  *reinterpret_cast<Vec*>(to) =
      reinterpret_cast<Vec>(reinterpret_cast<Int>(value) & *reinterpret_cast<const LooseInt*>(inside));
}

// Panels [panel, end) of Rows rows each, over N machine vectors from pixel p on. Few sums alone would wait
// for the latency of one another: then several nonzeros at once have a set each.
template <int Rows, int N>
__attribute__((noinline)) void tile(const ProductCall& call, const Panel* panel, const Panel* end,
                                    int64_t p) {
  constexpr int kSums = Rows * N, kSets = kSums <= 2 ? 4 : kSums <= 6 ? 2 : 1, kWords = 1 + Rows;
  const float* const in = call.in + p;
  const int32_t* const inside = call.inside + p;
  const Vec low = Vec{} + lowest(call.activation), high = Vec{} + highest(call.activation);
  for (; panel != end; ++panel) {
    const int64_t row = panel->row;
    const float* list = call.list + panel->first;
    Vec sum[kSets][kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sum[0][i] = call.starts ? Vec{} + call.bias[row + i / N]
                              : *reinterpret_cast<const Vec*>(call.out + (row + i / N) * call.out_stride + p +
                                                              i % N * kFloats);
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) sum[s][i] = Vec{};
    }
    const auto add = [&](const float* word, Vec* into) __attribute__((always_inline)) {
      int32_t offset;
      __builtin_memcpy(&offset, word, sizeof offset);
      const float* const from = in + offset;
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const Vec x = load(from + i * kFloats);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) into[r * N + i] += word[1 + r] * x;
      }
    };
    if (panel + 1 != end) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < N; i += kLine / kBytes) {
          __builtin_prefetch(call.out + (panel[1].row + r) * call.out_stride + p + i * kFloats, 1);
          if (call.residual)
            __builtin_prefetch(call.residual + (panel[1].row + r) * call.residual_stride + p + i * kFloats);
        }
    }
    int64_t left = panel->count;
    for (; left >= kSets; left -= kSets, list += kSets * kWords) {
      __builtin_prefetch(list + kAhead);
#pragma GCC unroll 4
      for (int s = 0; s < kSets; ++s) add(list + s * kWords, sum[s]);
    }
    for (; left > 0; --left, list += kWords) add(list, sum[0]);
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) sum[0][i] += sum[s][i];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      float* const out = call.out + (row + r) * call.out_stride + p;
      if (!call.ends) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) *reinterpret_cast<Vec*>(out + i * kFloats) = sum[0][r * N + i];
        continue;
      }
      if (call.residual) {
        const float* const residual = call.residual + (row + r) * call.residual_stride + p;
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
          sum[0][r * N + i] += *reinterpret_cast<const Vec*>(residual + i * kFloats);
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        store(smaller(larger(sum[0][r * N + i], low), high), inside + i * kFloats, out + i * kFloats);
      if (curved(call.activation))
        for (int i = 0; i < N; ++i) {
          Vec* const y = reinterpret_cast<Vec*>(out + i * kFloats);
          store(apply(call.activation, *y), inside + i * kFloats,
                out + i * kFloats);  // a sigmoid of 0 is not 0
        }
    }
  }
}

// Most machine vectors of a tile: sums, one input and one weight fit the registers.
constexpr int kWidest = kBytes == 64 ? 16 : 8;
constexpr int kPanelWidest = kBytes == 64 ? 6 : 2;

using Tile = void (*)(const ProductCall&, const Panel*, const Panel*, int64_t);
template <int Rows, int... N>
constexpr std::array<Tile, sizeof...(N)> tiles(std::integer_sequence<int, N...>) {
  return {tile<Rows, N + 1>...};
}

// Panels of Rows rows over vectors [begin, end) of kLanes pixels, in as few tiles as there can be, equally
// wide.
template <int Rows, int Most>
inline void across(const ProductCall& call, const Panel* panel, const Panel* last) {
  static constexpr auto widths = tiles<Rows>(std::make_integer_sequence<int, Most>{});
  const int64_t vectors = (call.end - call.begin) * kParts, count = (vectors + Most - 1) / Most;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = vectors * i / count, to = vectors * (i + 1) / count;
    widths[to - from - 1](call, panel, last, call.begin * kLanes + from * kFloats);
  }
}

void product(const ProductCall& call) {
  const Panel* const end = call.panels + call.last_panel;
  for (const Panel* panel = call.panels + call.first_panel; panel < end;) {
    const Panel* last = panel + 1;
    while (last < end && last->rows == panel->rows) ++last;
    if (panel->rows == 4)
      across<4, kPanelWidest>(call, panel, last);
    else if (panel->rows == 2)
      across<2, kPanelWidest * 2>(call, panel, last);
    else
      across<1, kWidest>(call, panel, last);
    panel = last;
  }
}

// A map of one pixel, whose weights are codes: lanes are nonzeros of a row.
void dots(const ProductCall& call) {
  for (int64_t k = call.first_panel; k < call.last_panel; ++k) {
    const Panel& panel = call.panels[k];
    const float* word = call.list + panel.first;
    Vec sum{};
    int64_t left = panel.count;
    for (; left >= kFloats; left -= kFloats, word += kFloats) {
      __builtin_prefetch(word + kAhead);
      Int words;
      __builtin_memcpy(&words, word, sizeof words);
      Vec x;
      for (int i = 0; i < kFloats; ++i) x[i] = call.in[words[i] & (kMostCoded - 1)];
      sum += __builtin_convertvector(words >> 24, Vec) * x;
    }
    float y = 0;
    for (int i = 0; i < kFloats; ++i) y += sum[i];
    for (; left > 0; --left, ++word) {
      int32_t one;
      __builtin_memcpy(&one, word, sizeof one);
      y += static_cast<float>(one >> 24) * call.in[one & (kMostCoded - 1)];
    }
    y = y * call.scale[panel.row] + call.bias[panel.row];
    if (call.residual) y += call.residual[panel.row * call.residual_stride];
    call.out[panel.row * call.out_stride] = apply(call.activation, Vec{} + y)[0];
  }
}

void copy(const float* in, int64_t vectors, float* out) {
  for (int64_t i = 0; i < vectors * kLanes; i += kFloats) *reinterpret_cast<Vec*>(out + i) = load(in + i);
}

// The strides that occur are constants to the compiler, which then loads vectors and picks from them.
template <class Combine>
inline void along(const float* in, int64_t step, int64_t count, float* __restrict__ out, Combine combine) {
  if (step == 1)
    for (int64_t x = 0; x < count; ++x) out[x] = combine(out[x], in[x]);
  else if (step == 2)
    for (int64_t x = 0; x < count; ++x) out[x] = combine(out[x], in[2 * x]);
  else
    for (int64_t x = 0; x < count; ++x) out[x] = combine(out[x], in[step * x]);
}

void take(const float* in, int64_t step, int64_t count, float* out) {
  along(in, step, count, out, [](float, float b) { return b; });
}

void larger_of(const float* in, int64_t step, int64_t count, float* out) {
  along(in, step, count, out, [](float a, float b) { return b > a || b != b ? b : a; });
}

void sum_of(const float* in, int64_t step, int64_t count, float* out) {
  along(in, step, count, out, [](float a, float b) { return a + b; });
}

void pointwise(const PointwiseCall& call) {
  const int64_t pixels = call.vectors * kLanes;
  for (int64_t c = 0; c < call.channels; ++c) {
    const float* const in = call.in + c * call.in_stride;
    const float* const other = call.other ? call.other + c * call.other_stride : nullptr;
    float* const out = call.out + c * call.out_stride;
    const float scale = call.scale ? call.scale[c] : 1.0f, shift = call.shift ? call.shift[c] : 0.0f;
    for (int64_t p = 0; p < pixels; p += kFloats) {
      Vec y = *reinterpret_cast<const Vec*>(in + p) * scale + shift;
      if (other) y += *reinterpret_cast<const Vec*>(other + p);
      store(apply(call.activation, y), call.inside + p, out + p);
    }
  }
}

#include "core/frozen/transformer.inl"

}  // namespace

template <Isa>
const FrozenEngine FrozenEngine::compiled{frozen::product,   frozen::dots,       frozen::copy,
                                          frozen::take,      frozen::larger_of,  frozen::sum_of,
                                          frozen::pointwise, frozen::layer_norm, frozen::attention};
template const FrozenEngine FrozenEngine::compiled<kIsa>;

}  // namespace sparsekd::frozen
