// Which weights to grow: the k best-scoring positions outside a structure (RigL, arXiv 1911.11134, section
// 3).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/structure.h"

namespace sparsekd {

// A position of the flat weight and its score. Better is the larger score, then the lower position.
template <class T>
struct Candidate {
  T score;
  int32_t position;
};

// Keeps at least the k best of a stream. Once more than that have come, a bar that k of them reach turns most
// of what follows away with one comparison.
template <class T>
class BestK {
 public:
  explicit BestK(int64_t k) : k_(k) {}
  // Scores of `count` consecutive positions; NaN is never taken.
  void offer(const T* score, int64_t count, int64_t position);
  void offer(const BestK& other);
  // Leaves exactly the k best, or all where there are fewer.
  void settle();
  const Candidate<T>* begin() const { return kept_.data(); }
  const Candidate<T>* end() const { return kept_.data() + size_; }

 private:
  void make_room(int64_t count);
  bool raise_bar();

  int64_t k_, size_ = 0;
  std::vector<Candidate<T>> kept_;  // its first size_ entries
  T bar_;
  bool has_bar_ = false;
};

// Merges scores that come as rectangles of the weight, in any order, into the k best outside `kept`.
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
  std::vector<BestK<T>> best_;  // one for each thread
};

}  // namespace sparsekd
