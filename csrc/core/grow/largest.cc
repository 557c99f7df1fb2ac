#include "core/grow/largest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

constexpr int64_t kBlock = 16;  // scores turned away together

template <class T>
bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.score > b.score || (a.score == b.score && a.position < b.position);
}

// Offers columns [begin, end) of a row, the first of whose values is that of column `begin`. Columns of the
// structure get the score NaN, which is never taken; false when another score is NaN.
template <class T>
bool offer_row(const T* values, const Structure& kept, int64_t row, int64_t begin, int64_t end,
               bool magnitude, BestK<T>& best) {
  constexpr int64_t kChunk = 1024;  // stays in the first-level cache
  T score[kChunk];
  const int32_t* col = std::lower_bound(kept.col.data() + kept.crow[row],
                                        kept.col.data() + kept.crow[row + 1], static_cast<int32_t>(begin));
  const int32_t* const last = kept.col.data() + kept.crow[row + 1];
  for (int64_t from = begin; from < end; from += kChunk) {
    const int64_t count = std::min(kChunk, end - from);
    const T* value = values + (from - begin);
    int64_t nan = 0;
    for (int64_t i = 0; i < count; ++i) {
      score[i] = magnitude ? std::fabs(value[i]) : value[i];
      nan += score[i] != score[i];
    }
    for (; col < last && *col < from + count; ++col) {
      T& taken = score[*col - from];
      nan -= taken != taken;
      taken = std::numeric_limits<T>::quiet_NaN();
    }
    if (nan) return false;
    best.offer(score, count, row * kept.cols + from);
  }
  return true;
}

}  // namespace

template <class T>
void BestK<T>::offer(const T* score, int64_t count, int64_t position) {
  make_room(count);
  const T bar = has_bar_ ? bar_ : -std::numeric_limits<T>::infinity();
  Candidate<T>* kept = kept_.data();
  int64_t size = size_;
  for (int64_t from = 0; from < count; from += kBlock) {
    const int64_t to = std::min(from + kBlock, count);
    int any = 0;
    for (int64_t i = from; i < to; ++i) any |= score[i] >= bar;
    if (!any) continue;
    for (int64_t i = from; i < to; ++i) {  // written always, counted when good enough: no branch to predict
      kept[size] = {score[i], static_cast<int32_t>(position + i)};
      size += score[i] >= bar;
    }
  }
  size_ = size;
}

template <class T>
void BestK<T>::offer(const BestK& other) {
  make_room(other.size_);
  std::copy(other.begin(), other.end(), kept_.begin() + size_);
  size_ += other.size_;
}

// One entry more than asked for, for what is written but not counted.
template <class T>
void BestK<T>::make_room(int64_t count) {
  const int64_t full = k_ + std::max<int64_t>(k_ / 2, 4096);
  if (size_ + count > full && size_ > k_ && !raise_bar()) settle();
  if (size_ + count >= static_cast<int64_t>(kept_.size()))
    kept_.resize(size_ + count + std::max(count, size_ / 2) + 1);
}

// Drops most of what is not among the k best, in linear time: a sorted sample tells a bar that somewhat more
// than k candidates should reach. False, and nothing done, when fewer do.
template <class T>
bool BestK<T>::raise_bar() {
  constexpr int64_t kSample = 512;
  if (size_ <= 4 * kSample) return false;
  Candidate<T> sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = kept_[i * size_ / kSample];
  std::sort(sample, sample + kSample, better<T>);
  const double share = static_cast<double>(k_) / size_;
  const double margin = 3 * std::sqrt(kSample * share * (1 - share)) + 1;
  const Candidate<T> bar = sample[std::min<int64_t>(kSample - 1, std::lround(kSample * share + margin))];
  int64_t reach = 0;
  for (int64_t i = 0; i < size_; ++i) reach += !better(bar, kept_[i]);
  if (reach < k_ || reach > size_ - kSample) return false;
  int64_t to = 0;
  for (int64_t i = 0; i < size_; ++i) {
    const Candidate<T> candidate = kept_[i];
    kept_[to] = candidate;
    to += !better(bar, candidate);
  }
  size_ = reach;
  bar_ = bar.score;
  has_bar_ = true;
  return true;
}

template <class T>
void BestK<T>::settle() {
  if (size_ <= k_) return;
  raise_bar();
  if (k_ > 0 && size_ > k_) {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.begin() + size_, better<T>);
    bar_ = kept_[k_ - 1].score;
    has_bar_ = true;
  }
  size_ = k_;
}

template <class T>
LargestK<T>::LargestK(std::shared_ptr<const Structure> kept, int64_t k, int threads)
    : kept_(std::move(kept)), k_(k) {
  const int64_t free = kept_->rows * kept_->cols - kept_->nnz;
  if (k < 0 || k > free)
    throw ShapeError("k: expected 0 <= k <= " + std::to_string(free) + " free positions, got " +
                     std::to_string(k));
  if (kept_->rows * kept_->cols > std::numeric_limits<int32_t>::max())
    throw ShapeError("score: expected fewer than 2^31 positions");
  best_.assign(threads, BestK<T>(k));
}

template <class T>
void LargestK<T>::offer(const T* values, int64_t row, int64_t rows, int64_t col, int64_t cols,
                        bool magnitude) {
  const auto inside = [](int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && count >= 0 && begin <= size && count <= size - begin;
  };
  if (!inside(row, rows, kept_->rows) || !inside(col, cols, kept_->cols))
    throw ShapeError("tile: expected a rectangle of " + std::to_string(kept_->rows) + " x " +
                     std::to_string(kept_->cols) + " scores");
  std::atomic<bool> nan{false};
  const int threads = static_cast<int>(best_.size());
  auto scan = [&](int slot) {
    for (int64_t r = rows * slot / threads; r < rows * (slot + 1) / threads && !nan; ++r)
      if (!offer_row(values + r * cols, *kept_, row + r, col, col + cols, magnitude, best_[slot])) nan = true;
  };
  parallel(threads, threads, scan);
  if (nan) throw std::domain_error("score: NaN among the candidates for growth");
}

template <class T>
std::vector<int64_t> LargestK<T>::positions() const {
  BestK<T> all(k_);
  for (const BestK<T>& part : best_) all.offer(part);
  all.settle();
  // A bit for each position sorts them faster than comparisons do.
  std::vector<uint64_t> chosen(kept_->rows * kept_->cols / 64 + 1);
  for (const Candidate<T>& c : all) chosen[c.position / 64] |= uint64_t{1} << c.position % 64;
  std::vector<int64_t> positions;
  positions.reserve(all.end() - all.begin());
  for (size_t word = 0; word < chosen.size(); ++word)
    for (uint64_t bits = chosen[word]; bits; bits &= bits - 1)
      positions.push_back(static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits));
  return positions;
}

template class BestK<float>;
template class BestK<double>;
template class LargestK<float>;
template class LargestK<double>;

}  // namespace sparsekd
