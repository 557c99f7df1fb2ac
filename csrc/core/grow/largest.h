// Which weights to grow: the k best-scoring positions outside a structure (RigL, arXiv 1911.11134, section
// 3).
#pragma once
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "core/structure.h"

namespace sparsekd {

// Keeps at least the k best of a stream: the larger scores, among equals the lower positions. Once more than
// that have come, a bar that k of them reach turns away most of what follows.
template <class T>
class BestK {
 public:
  explicit BestK(int64_t k) : k_(k) {}
  // Scores of `count` consecutive positions; NaN is never taken.
  void offer(const T* score, int64_t count, int32_t first);
  void offer(const BestK& other);
  // Leaves exactly the k best, or all where there are fewer.
  void settle();
  const int32_t* begin() const { return positions_.data(); }
  const int32_t* end() const { return positions_.data() + size_; }

 private:
  void make_room(int64_t count);
  bool raise_bar();
  T sampled(double rank) const;

  int64_t k_, size_ = 0;
  std::vector<T> scores_;  // their first size_ entries
  std::vector<int32_t> positions_;
  T bar_ = -std::numeric_limits<T>::infinity();
};

// Merges scores that come as rectangles of the weight, in any order, into the k best outside `kept`. Several
// threads may offer; one after the other gets in.
template <class T>
class LargestK {
 public:
  using Score = T;
  // Throws ShapeError when fewer than k positions are free.
  LargestK(std::shared_ptr<const Structure> kept, int64_t k, int threads);
  // The score of row r, column c is values[(r - row) * cols + c - col], or its magnitude. Throws ShapeError
  // when the rectangle leaves the weight, std::domain_error when the score of a free position is NaN.
  void offer(const T* values, int64_t row, int64_t rows, int64_t col, int64_t cols, bool magnitude);
  // The k best positions offered so far, ascending; equal scores go to the lower position.
  std::vector<int64_t> positions() const;

 private:
  std::shared_ptr<const Structure> kept_;
  int64_t k_;
  std::vector<BestK<T>> best_;         // one for each thread that scans
  std::unique_ptr<std::mutex> mutex_;  // of best_
};

}  // namespace sparsekd
