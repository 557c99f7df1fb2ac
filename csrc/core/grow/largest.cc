// The k best of many scores without sorting them.
//
// A buffer keeps the candidates, k and half as many more (at least 4096), behind a bar that at least k of
// them reach. Once it is full, the bar rises to about the score of rank k, taken from a sample of 512 with
// three standard deviations to spare; what falls below is dropped. So one compare soon rejects most scores
// (scan.cc), and reading them takes the time. Only at the end are the candidates near the k-th compared with
// each other, by score and then position, so the chosen set depends on nothing but the scores. Each thread
// has a buffer of its own.
//
// Tests: test_largest (growth_tests.cc) compares with a full sort: ties, rectangles in any order, NaN.
#include "core/grow/largest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/grow/scan.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

template <class T>
struct Candidate {
  T score;
  int32_t position;
};

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
    int64_t nan = engine<ScanEngine<T>>().prepare(value, count, magnitude, score);
    for (; col < last && *col < from + count; ++col) {
      T& taken = score[*col - from];
      nan -= taken != taken;
      taken = std::numeric_limits<T>::quiet_NaN();
    }
    if (nan) return false;
    best.offer(score, count, static_cast<int32_t>(row * kept.cols + from));
  }
  return true;
}

}  // namespace

template <class T>
void BestK<T>::offer(const T* score, int64_t count, int32_t first) {
  make_room(count);
  size_ += engine<ScanEngine<T>>().collect(score, nullptr, first, count, bar_, scores_.data() + size_,
                                           positions_.data() + size_);
}

template <class T>
void BestK<T>::offer(const BestK& other) {
  make_room(other.size_);
  size_ += engine<ScanEngine<T>>().collect(other.scores_.data(), other.positions_.data(), 0, other.size_,
                                           bar_, scores_.data() + size_, positions_.data() + size_);
}

template <class T>
void BestK<T>::make_room(int64_t count) {
  const int64_t full = k_ + std::max<int64_t>(k_ / 2, 4096);
  if (size_ + count > full && size_ > k_ && !raise_bar()) settle();
  const int64_t needed = size_ + count + kScanSlack;
  if (needed <= static_cast<int64_t>(scores_.size())) return;
  scores_.resize(needed + size_ / 2);
  positions_.resize(needed + size_ / 2);
}

// About the score that `rank` of the candidates reach, from a sample of them.
template <class T>
T BestK<T>::sampled(double rank) const {
  constexpr int64_t kSample = 512;
  T sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = scores_[i * size_ / kSample];
  T* const at = sample + std::clamp<int64_t>(std::lround(rank / size_ * kSample), 0, kSample - 1);
  std::nth_element(sample, at, sample + kSample, [](T a, T b) { return a > b; });
  return *at;
}

// Three standard deviations of a sampled rank near k.
double margin(int64_t k, int64_t size) {
  const double share = static_cast<double>(k) / size;
  return 3 * std::sqrt(share * (1 - share) / 512) * size + size / 512.0;
}

// Drops most of what is not among the k best, in linear time. False, and nothing done, where the sample
// misleads or too many are equal.
template <class T>
bool BestK<T>::raise_bar() {
  const T bar = sampled(k_ + margin(k_, size_));
  int64_t reach = 0;
  for (int64_t i = 0; i < size_; ++i) reach += scores_[i] >= bar;
  if (reach < k_ || reach > size_ - size_ / 16) return false;
  bar_ = bar;
  size_ = engine<ScanEngine<T>>().collect(scores_.data(), positions_.data(), 0, size_, bar, scores_.data(),
                                          positions_.data());
  return true;
}

template <class T>
void BestK<T>::settle() {
  if (size_ <= k_) return;
  raise_bar();
  // Only those near the k-th have to be compared with each other.
  const T safe = sampled(k_ - margin(k_, size_));
  int64_t chosen = 0;
  for (int64_t i = 0; i < size_; ++i) chosen += scores_[i] > safe;
  const T sure = chosen <= k_ ? safe : std::numeric_limits<T>::infinity();
  std::vector<Candidate<T>> close;
  chosen = 0;
  for (int64_t i = 0; i < size_; ++i) {
    if (!(scores_[i] > sure)) {
      close.push_back({scores_[i], positions_[i]});
      continue;
    }
    scores_[chosen] = scores_[i];
    positions_[chosen++] = positions_[i];
  }
  if (chosen < k_) {
    std::nth_element(close.begin(), close.begin() + (k_ - chosen - 1), close.end(), better<T>);
    bar_ = std::max(bar_, close[k_ - chosen - 1].score);
  }
  for (int64_t i = 0; chosen < k_; ++i, ++chosen) {
    scores_[chosen] = close[i].score;
    positions_[chosen] = close[i].position;
  }
  size_ = k_;
}

template <class T>
LargestK<T>::LargestK(std::shared_ptr<const Structure> kept, int64_t k, int threads)
    : kept_(std::move(kept)), k_(k), mutex_(std::make_unique<std::mutex>()) {
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
  const std::lock_guard<std::mutex> guard(*mutex_);
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
  {
    const std::lock_guard<std::mutex> guard(*mutex_);
    for (const BestK<T>& part : best_) all.offer(part);
  }
  all.settle();
  // A bit for each position sorts them faster than comparisons do.
  std::vector<uint64_t> chosen(kept_->rows * kept_->cols / 64 + 1);
  for (const int32_t position : all) chosen[position / 64] |= uint64_t{1} << position % 64;
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
