// Rows of maps that are packed next, fetched into the second-level cache while products are computed. Part of
// engine.cc.
//
// Maps lie in memory when they are read again, and one core waits for most of what packing takes; the
// processor fetches ahead by itself, but not past the end of a page. Between two lists of products a few
// lines of the next rows are asked for, so that memory and multipliers work at the same time. What is left
// when the products are done is fetched while rows are packed (kPackAhead).

// Into the second-level cache, which can wait for more lines at a time than the first.
inline void fetch(const char* at) { __builtin_prefetch(at, 0, 2); }

// While the line at `at` is packed; the row that follows in memory is the next to be packed.
constexpr int64_t kPackAhead = 4096;  // bytes
template <class T>
inline void fetch_after(const T* at) {
  fetch(reinterpret_cast<const char*>(at) + kPackAhead);
}

class Ahead {
 public:
  // Forgets what was not asked for in time.
  void restart() { count_ = current_ = 0, bytes_ = 0; }
  void add(const void* from, int64_t bytes) {
    const char* const at = static_cast<const char*>(from);
    ranges_[count_++] = {at, at + bytes};
    bytes_ += bytes;
  }
  // So many times fetch_some is called.
  void share(int64_t calls) { some_ = min64(kMost, bytes_ / (calls * kPixelBytes) + 1) * kPixelBytes; }

  __attribute__((always_inline)) void fetch_some() {
    if (current_ == count_) return;
    Range& range = ranges_[current_];
    const char* const end = range.at + some_;
    for (const char* at = range.at; at < end; at += kPixelBytes) fetch(at);
    range.at = end;
    if (end >= range.end) ++current_;
  }

 private:
  struct Range {
    const char *at, *end;
  };
  static constexpr int64_t kMost = 4;  // lines at once; more would wait for each other
  Range ranges_[5];                    // two maps of the gradient, two of the input, the residual
  int count_ = 0, current_ = 0;
  int64_t bytes_ = 0, some_ = 0;
};
