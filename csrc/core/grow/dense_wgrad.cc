// A tile of the dense weight gradient: output channels times input channels times all taps.
//
// A chunk of positions, images or rows of one, at most 1024 and what half of L2 holds, is packed into blocks
// of channels. Then every pair of blocks runs through outer.cc for every tap, whose sums stay in registers
// over the chunk. Padding is never packed: a tap visits only the positions whose input exists. The
// multipliers limit the speed, and chunks are long enough that loading and storing the sums does not.
//
// Threads take parts of the positions, each with sums of its own that are added in order, and beyond two
// threads pieces of the tile. So results depend on the number of threads, but not on scheduling. Tests:
// test_tiles (growth_tests.cc) compares with the plain loops below, test_tile_limits has tiles that leave
// the weight.
#include "core/grow/dense_wgrad.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/grow/outer.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

constexpr double kMaxChunkBytes = 1LL << 31;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
  Span part(int64_t index, int64_t parts) const {
    return {begin + size() * index / parts, begin + size() * (index + 1) / parts};
  }
};

// Output positions in `all` whose input position out * stride + shift lies in [0, in).
Span within(Span all, int64_t shift, int64_t stride, int64_t in) {
  const int64_t begin = shift < 0 ? ceil_div(-shift, stride) : 0;
  const int64_t end = in - shift <= 0 ? 0 : ceil_div(in - shift, stride);
  return {std::max(all.begin, begin), std::min(all.end, end)};
}

template <class T>
View4<const T> channels_of(View4<const T> view, Span channels) {
  view.data += channels.begin * view.stride_c;
  view.c = channels.size();
  return view;
}

// A 1x1 kernel without padding reads every stride-th position only: a smaller map with stride 1.
template <class T>
void subsample(ConvGeometry& g, View4<const T>& x) {
  if (g.kernel_h != 1 || g.kernel_w != 1 || g.pad_top || g.pad_bottom || g.pad_left || g.pad_right) return;
  x.stride_h *= g.stride_h;
  x.stride_w *= g.stride_w;
  x.h = g.in_h = g.out_h;
  x.w = g.in_w = g.out_w;
  g.stride_h = g.stride_w = 1;
}

// One factor of a product: channels of a tensor, packed into blocks for one chunk of positions at a time.
template <class T>
struct Factor {
  View4<const T> view;
  int64_t block;
  typename OuterEngine<T>::Pack pack;
  int64_t blocks = ceil_div(view.c, block);
  int64_t panel = 0;  // elements from one packed block to the next
  T* panels = nullptr;

  int64_t row() const { return view.w * block; }  // elements of a packed row
  double row_bytes() const { return static_cast<double>(blocks) * row() * sizeof(T); }

  void pack_rows(Span images, Span rows) const {
    const bool runs_on = view.stride_h == view.w * view.stride_w;  // the next row follows this one
    const int64_t together = runs_on ? rows.size() : 1;
    T* to = panels;
    for (int64_t n = images.begin; n < images.end; ++n)
      for (int64_t h = rows.begin; h < rows.end; h += together, to += together * row())
        pack(view.at(n, 0, h, 0), view.stride_c, view.stride_w, view.c, together * view.w, to, panel);
  }
};

// The sums over some positions of output gradients times inputs, for channels of one group, in one thread.
template <class T>
class Product {
 public:
  Product(const ConvGeometry& geometry, const View4<const T>& grad, const View4<const T>& x,
          const OuterEngine<T>& k, const typename OuterEngine<T>::Rows& rows)
      : g_(geometry),
        grad_{grad, rows.block, rows.pack},
        x_{x, k.channel_block, k.pack_channels},
        multiply_(rows.multiply) {}

  // sums [row blocks][channel blocks][taps][channel block][row block] +=
  void add(Span images, Span rows, T* sums) {
    cut(images, rows);
    for (int64_t n = images.begin; n < images.end; n += chunk_images_)
      for (int64_t h = rows.begin; h < rows.end; h += chunk_rows_) {
        images_ = {n, std::min(n + chunk_images_, images.end)};
        out_rows_ = {h, std::min(h + chunk_rows_, rows.end)};
        in_rows_ = {std::max<int64_t>(0, h * g_.stride_h - g_.pad_top),
                    std::min(g_.in_h, (out_rows_.end - 1) * g_.stride_h - g_.pad_top +
                                          (g_.kernel_h - 1) * g_.dilation_h + 1)};
        grad_.pack_rows(images_, out_rows_);
        x_.pack_rows(images_, in_rows_);
        T* sum = sums;
        for (int64_t row_block = 0; row_block < grad_.blocks; ++row_block)
          for (int64_t channel_block = 0; channel_block < x_.blocks; ++channel_block)
            for (int64_t kh = 0; kh < g_.kernel_h; ++kh)
              for (int64_t kw = 0; kw < g_.kernel_w; ++kw, sum += grad_.block * x_.block)
                multiply(row_block, channel_block, kh, kw, sum);
      }
  }

 private:
  // Chooses a chunk, whole images or rows of one, that stays in half of the second-level cache.
  void cut(Span images, Span rows) {
    constexpr double kLongest = 1024;  // positions; more save no more loads and stores of sums
    const double row_bytes = grad_.row_bytes() + x_.row_bytes() * g_.stride_h;
    const double in_l2 = cache_sizes().l2 / 2 / row_bytes;
    const auto fitting = static_cast<int64_t>(std::clamp(std::min(kLongest / g_.out_w, in_l2), 1.0, 1e9));
    chunk_rows_ = std::min(fitting, rows.size());
    chunk_images_ =
        chunk_rows_ < rows.size() ? 1 : std::clamp<int64_t>(fitting / rows.size(), 1, images.size());
    const int64_t reach = (g_.kernel_h - 1) * g_.dilation_h + 1 - g_.stride_h;
    const int64_t in_rows = std::min(g_.in_h, chunk_rows_ * g_.stride_h + std::max<int64_t>(0, reach));
    if (chunk_images_ * (chunk_rows_ * grad_.row_bytes() + in_rows * x_.row_bytes()) > kMaxChunkBytes)
      throw UnsupportedError("x: maps of " + std::to_string(g_.in_h) + " x " + std::to_string(g_.in_w) +
                             " with " + std::to_string(g_.in_channels) + " channels are too large to pack");
    // One cache line more, or blocks a power of two apart would all want the same cache sets.
    constexpr int64_t kLine = 64 / sizeof(T);
    grad_.panel = chunk_images_ * chunk_rows_ * grad_.row() + kLine;
    x_.panel = chunk_images_ * in_rows * x_.row() + kLine;
    const int64_t elements = grad_.blocks * grad_.panel + x_.blocks * x_.panel;
    grad_.panels = static_cast<T*>(scratch(Scratch::kPanels, elements * sizeof(T)));
    x_.panels = grad_.panels + grad_.blocks * grad_.panel;
  }

  void multiply(int64_t row_block, int64_t channel_block, int64_t kh, int64_t kw, T* sum) const {
    const int64_t shift_h = kh * g_.dilation_h - g_.pad_top, shift_w = kw * g_.dilation_w - g_.pad_left;
    const Span rows = within(out_rows_, shift_h, g_.stride_h, g_.in_h);
    const Span cols = within({0, g_.out_w}, shift_w, g_.stride_w, g_.in_w);
    if (!rows.size() || !cols.size()) return;
    Walk walk{images_.size(),
              rows.size(),
              cols.size(),
              out_rows_.size() * grad_.row(),
              grad_.row(),
              in_rows_.size() * x_.row(),
              g_.stride_h * x_.row(),
              g_.stride_w * x_.block};
    if (walk.cols * grad_.block == walk.g_row && walk.cols * walk.x_col == walk.x_row) {
      walk.cols *= walk.rows;
      walk.g_row *= walk.rows;
      walk.x_row *= walk.rows;
      walk.rows = 1;
      if (walk.g_row == walk.g_image && walk.x_row == walk.x_image) {
        walk.cols *= walk.images;
        walk.images = 1;
      }
    }
    const int64_t out = (rows.begin - out_rows_.begin) * g_.out_w + cols.begin;
    const int64_t in =
        (rows.begin * g_.stride_h + shift_h - in_rows_.begin) * g_.in_w + cols.begin * g_.stride_w + shift_w;
    multiply_(walk, grad_.panels + row_block * grad_.panel + out * grad_.block,
              x_.panels + channel_block * x_.panel + in * x_.block, sum);
  }

  ConvGeometry g_;
  Factor<T> grad_, x_;
  typename OuterEngine<T>::Multiply multiply_;
  int64_t chunk_images_, chunk_rows_;
  Span images_, out_rows_, in_rows_;  // of the chunk at hand
};

// How threads share a product: pieces of the tile, cut along its longer side where blocks end, times parts of
// the positions. Two parts need no thread to pack what another one packs; more would need more sums.
struct Sharing {
  int64_t row_pieces = 1, channel_pieces = 1, parts;
  Sharing(int64_t row_blocks, int64_t channel_blocks, int64_t positions, int threads) {
    (row_blocks > channel_blocks ? row_pieces : channel_pieces) =
        std::clamp<int64_t>(threads / 2, 1, std::max(row_blocks, channel_blocks));
    parts = std::clamp<int64_t>(threads / (row_pieces * channel_pieces), 1, positions);
  }
};

// out [grad.c, x.c * taps] of the given pitch += the product over all positions.
template <class T>
void add_product(const ConvGeometry& g, const View4<const T>& grad, const View4<const T>& x, T* out,
                 int64_t pitch, int threads) {
  const OuterEngine<T>& k = engine<OuterEngine<T>>();
  const auto& rows = grad.c > k.narrow.block ? k.wide : k.narrow;
  const int64_t row_blocks = ceil_div(grad.c, rows.block), channel_blocks = ceil_div(x.c, k.channel_block);
  const int64_t taps = g.kernel_h * g.kernel_w, block = rows.block * k.channel_block;
  const bool by_image = g.batch > 1;
  const Sharing sharing(row_blocks, channel_blocks, by_image ? g.batch : g.out_h, threads);
  const int64_t size = row_blocks * channel_blocks * taps * block;
  T* sums = static_cast<T*>(scratch(Scratch::kSums, sharing.parts * size * sizeof(T)));

  const auto row_span = [&](int64_t piece) { return Span{0, row_blocks}.part(piece, sharing.row_pieces); };
  const auto channel_span = [&](int64_t piece) {
    return Span{0, channel_blocks}.part(piece, sharing.channel_pieces);
  };
  // Pieces lie one after the other.
  const auto piece_at = [&](int64_t piece) {
    return sharing.row_pieces > 1 ? row_span(piece).begin * channel_blocks * taps * block
                                  : channel_span(piece).begin * row_blocks * taps * block;
  };
  const int64_t pieces = sharing.row_pieces * sharing.channel_pieces;
  auto multiply = [&](int slot) {
    const int64_t piece = slot / sharing.parts, part = slot % sharing.parts;
    const Span r = row_span(sharing.row_pieces > 1 ? piece : 0);
    const Span c = channel_span(sharing.row_pieces > 1 ? 0 : piece);
    const Span images{0, g.batch}, out_rows{0, g.out_h};
    T* to = sums + part * size + piece_at(piece);
    std::memset(to, 0, r.size() * c.size() * taps * block * sizeof(T));
    Product<T>(g, channels_of(grad, {r.begin * rows.block, std::min(r.end * rows.block, grad.c)}),
               channels_of(x, {c.begin * k.channel_block, std::min(c.end * k.channel_block, x.c)}), k, rows)
        .add(by_image ? images.part(part, sharing.parts) : images,
             by_image ? out_rows : out_rows.part(part, sharing.parts), to);
  };
  parallel(threads, static_cast<int>(pieces * sharing.parts), multiply);

  auto store = [&](int slot) {
    const Span share = Span{0, grad.c}.part(slot, threads);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Span r = row_span(sharing.row_pieces > 1 ? piece : 0);
      const Span c = channel_span(sharing.row_pieces > 1 ? 0 : piece);
      const int64_t channels = std::min(c.end * k.channel_block, x.c) - c.begin * k.channel_block;
      for (int64_t row = std::max(share.begin, r.begin * rows.block);
           row < std::min(share.end, r.end * rows.block); ++row) {
        const T* from = sums + piece_at(piece) + (row / rows.block - r.begin) * c.size() * taps * block +
                        row % rows.block;
        T* to = out + row * pitch + c.begin * k.channel_block * taps;
        for (int64_t channel = 0; channel < channels; ++channel)
          for (int64_t tap = 0; tap < taps; ++tap, ++to) {
            const T* sum = from + ((channel / k.channel_block * taps + tap) * k.channel_block +
                                   channel % k.channel_block) *
                                      rows.block;
            for (int64_t part = 0; part < sharing.parts; ++part) *to += sum[part * size];
          }
      }
    }
  };
  parallel(threads, threads, store);
}

}  // namespace

void check_tile(const ConvGeometry& g, const WeightTile& t) {
  const auto inside = [](int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && count >= 0 && begin <= size && count <= size - begin;
  };
  if (!inside(t.row, t.rows, g.out_channels) || !inside(t.channel, t.channels, g.in_channels / g.groups))
    throw ShapeError("tile: expected rows and channels of a weight of " + std::to_string(g.out_channels) +
                     " x " + std::to_string(g.in_channels / g.groups) + ", got rows " +
                     std::to_string(t.row) + " + " + std::to_string(t.rows) + " and channels " +
                     std::to_string(t.channel) + " + " + std::to_string(t.channels));
}

template <class T>
void conv_wgrad_tile(const ConvGeometry& geometry, View4<const T> grad, View4<const T> x,
                     const WeightTile& tile, T* out, int threads) {
  check_tile(geometry, tile);
  if (current_isa() == Isa::kScalar) return scalar::conv_wgrad_tile(geometry, grad, x, tile, out);
  if (!tile.rows || !tile.channels || !geometry.batch || !geometry.out_h || !geometry.out_w) return;
  ConvGeometry g = geometry;
  subsample(g, x);
  for (View4<const T>* view : {&grad, &x})
    if (view->w == 1) view->stride_w = view->stride_h;  // a column of pixels is packed like a row
  const int64_t outs = g.out_channels / g.groups, ins = g.in_channels / g.groups;
  const int64_t pitch = tile.channels * g.kernel_h * g.kernel_w;
  for (int64_t row = tile.row; row < tile.row + tile.rows;) {
    const int64_t group = row / outs, end = std::min(tile.row + tile.rows, (group + 1) * outs);
    const int64_t channel = group * ins + tile.channel;
    add_product<T>(g, channels_of(grad, {row, end}), channels_of(x, {channel, channel + tile.channels}),
                   out + (row - tile.row) * pitch, pitch, threads);
    row = end;
  }
}

namespace scalar {
template <class T>
void conv_wgrad_tile(const ConvGeometry& g, View4<const T> grad, View4<const T> x, const WeightTile& tile,
                     T* out) {
  const int64_t outs = g.out_channels / g.groups, ins = g.in_channels / g.groups;
  for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
    for (int64_t c = tile.channel; c < tile.channel + tile.channels; ++c)
      for (int64_t kh = 0; kh < g.kernel_h; ++kh)
        for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
          double sum = 0;
          for (int64_t n = 0; n < g.batch; ++n)
            for (int64_t h = 0; h < g.out_h; ++h)
              for (int64_t w = 0; w < g.out_w; ++w) {
                const int64_t ih = h * g.stride_h - g.pad_top + kh * g.dilation_h;
                const int64_t iw = w * g.stride_w - g.pad_left + kw * g.dilation_w;
                if (ih >= 0 && ih < g.in_h && iw >= 0 && iw < g.in_w)
                  sum += static_cast<double>(*grad.at(n, row, h, w)) * *x.at(n, row / outs * ins + c, ih, iw);
              }
          *out++ += static_cast<T>(sum);
        }
}
}  // namespace scalar

#define SPARSEKD_INSTANTIATE(T)                                                                            \
  template void conv_wgrad_tile<T>(const ConvGeometry&, View4<const T>, View4<const T>, const WeightTile&, \
                                   T*, int);                                                               \
  namespace scalar {                                                                                       \
  template void conv_wgrad_tile<T>(const ConvGeometry&, View4<const T>, View4<const T>, const WeightTile&, \
                                   T*);                                                                    \
  }
SPARSEKD_INSTANTIATE(float)
SPARSEKD_INSTANTIATE(double)

}  // namespace sparsekd
