#include "core/grow_topk.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/parallel.h"

namespace sparsekd {
namespace {

template <class T>
struct Candidate {
  T score;
  int64_t position;
};

// Strict order: better score first, then lower position.
template <class T>
bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.score > b.score || (a.score == b.score && a.position < b.position);
}

// Keeps the k best of a stream in a buffer of at least 2k: when it is full, a selection in linear time
// shrinks it to k and raises the bar that later candidates must pass, so most of a layer costs one
// comparison each. All memory is taken up front: nothing may throw inside a parallel region.
template <class T>
class BestK {
 public:
  explicit BestK(int64_t k) : k_(k), capacity_(k + std::max<int64_t>(k, 1024)) { kept_.reserve(capacity_); }

  void offer(T score, int64_t position) {
    const Candidate<T> candidate{score, position};
    if (full_ && !better(candidate, bar_)) return;
    kept_.push_back(candidate);
    if (static_cast<int64_t>(kept_.size()) == capacity_) shrink();
  }
  void shrink() {
    if (static_cast<int64_t>(kept_.size()) <= k_) return;
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), better<T>);
    kept_.resize(k_);
    bar_ = kept_[k_ - 1];
    full_ = true;
  }
  const std::vector<Candidate<T>>& kept() const { return kept_; }

 private:
  int64_t k_, capacity_;
  std::vector<Candidate<T>> kept_;
  Candidate<T> bar_{};
  bool full_ = false;
};

// Offers every position of the row outside the structure; false when a score is NaN.
template <class T>
bool scan_row(const T* score, const Structure& kept, int64_t row, BestK<T>& best) {
  const int64_t base = row * kept.cols;
  int64_t from = 0;
  const auto scan_gap = [&](int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      const T value = score[base + c];
      if (value != value) return false;
      best.offer(value, base + c);
    }
    return true;
  };
  for (int32_t k = kept.crow[row]; k < kept.crow[row + 1]; ++k) {
    if (!scan_gap(kept.col[k])) return false;
    from = kept.col[k] + 1;
  }
  return scan_gap(kept.cols);
}

}  // namespace

template <class T>
std::vector<int64_t> grow_topk(const T* score, const Structure& kept, int64_t k, int threads) {
  const int64_t free = kept.rows * kept.cols - kept.nnz;
  if (k < 0 || k > free)
    throw ShapeError("k: expected 0 <= k <= " + std::to_string(free) + " free positions, got " +
                     std::to_string(k));
  if (k == 0) return {};
  const int slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, kept.rows)));
  std::vector<BestK<T>> best;
  best.reserve(slots);
  for (int slot = 0; slot < slots; ++slot) best.emplace_back(k);
  std::vector<char> nan(slots, 0);
  auto scan = [&](int slot) {
    const int64_t begin = kept.rows * slot / slots, end = kept.rows * (slot + 1) / slots;
    for (int64_t row = begin; row < end && !nan[slot]; ++row)
      nan[slot] = !scan_row(score, kept, row, best[slot]);
  };
  parallel(slots, slots, scan);
  if (std::find(nan.begin(), nan.end(), 1) != nan.end())
    throw std::domain_error("score: NaN among the candidates for growth");

  BestK<T> all(k);
  for (BestK<T>& part : best) {
    part.shrink();
    for (const Candidate<T>& c : part.kept()) all.offer(c.score, c.position);
  }
  all.shrink();
  std::vector<int64_t> positions;
  positions.reserve(k);
  for (const Candidate<T>& c : all.kept()) positions.push_back(c.position);
  std::sort(positions.begin(), positions.end());
  return positions;
}

template std::vector<int64_t> grow_topk<float>(const float*, const Structure&, int64_t, int);
template std::vector<int64_t> grow_topk<double>(const double*, const Structure&, int64_t, int);

}  // namespace sparsekd
