// How the work on blocked maps is shared, and the sums that come out of it put together.
#pragma once
#include <algorithm>
#include <vector>

#include "core/blocked/conv.h"
#include "core/conv/engine.h"
#include "core/parallel.h"

namespace sparsekd::blocked {

// What the places have been summed up to, for one result.
template <class T>
class Places {
 public:
  Places(const Result<T>& y, const Schedule& s, int64_t rows)
      : y_(y),
        schedule_(s),
        rows_(rows),
        sums_(places() * y.out.channels * 3),
        centre_(places() * y.out.channels) {}

  PlaceSums out() { return {sums_.data(), centre_.data()}; }

  // In the order of the places, whoever has computed them.
  void finish(ChannelSums* to) const {
    const int64_t channels = y_.out.channels;
    for (auto* v : {&to->first, &to->second, &to->third}) v->assign(channels, 0);
    for (int64_t c = 0; c < channels; ++c) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t p = 0; p < places(); ++p) {
        const double* const sum = sums_.data() + (p * channels + c) * 3;
        if (y_.sum == Sum::kGradient) {
          to->first[c] += sum[0];
          to->second[c] += sum[1];
          to->third[c] += sum[2];
          continue;
        }
        const double more = static_cast<double>(pixels(p));
        if (more == 0) continue;
        const double own = sum[0] / more, total = count + more, away = centre_[p * channels + c] + own - mean;
        squares += std::max(0.0, sum[1] - sum[0] * own) + away * away * count * more / total;
        mean += away * more / total;
        count = total;
      }
      if (y_.sum == Sum::kMoments) {
        to->first[c] = mean;
        to->second[c] = squares / count;
      }
    }
  }

 private:
  int64_t places() const { return schedule_.groups * schedule_.chunks; }
  int64_t pixels(int64_t place) const {
    const int64_t h0 = place % schedule_.chunks * schedule_.chunk_rows,
                  h1 = std::min(rows_, h0 + schedule_.chunk_rows);
    return std::max<int64_t>(0, h1 - h0) * y_.out.w * y_.out.lanes(place / schedule_.chunks);
  }

  const Result<T>& y_;
  const Schedule& schedule_;
  const int64_t rows_;
  std::vector<double> sums_, centre_;
};

template <class T>
Schedule schedule(const BlockedMap<T>& map, int64_t rows, int64_t channels, int64_t halo, int threads,
                  int64_t chunks_per_thread) {
  return schedule_rows(map.images, rows, channels, halo, BlockedMap<T>::kLanes, 1, threads,
                       chunks_per_thread);
}

}  // namespace sparsekd::blocked
