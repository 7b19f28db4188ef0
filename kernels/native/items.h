// Items of work, shared out among the threads of a team.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

#include "native/memory.h"

namespace {

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

inline Range part_of(int64_t size, int64_t parts, int64_t i) {
  return {i * size / parts, (i + 1) * size / parts};
}

inline Range part_of(Range whole, int64_t parts, int64_t i) {
  const Range part = part_of(whole.size(), parts, i);
  return {whole.begin + part.begin, whole.begin + part.end};
}

// Each thread takes the items of its own part, in their order, then those that others have not come to. So
// neighbouring items, and the same ones of the next loop, mostly stay with a thread: processors whose cores
// share a cache in groups move memory between the groups several times slower than within one.
class Items {
 public:
  Items(int64_t count, int most_threads) : count_(count), taken_(most_threads) {}

  // f(item) for each, by the threads of a team, which wait for each other at the end.
  template <class F>
  void each(const F& f) const {
    const int threads = omp_get_num_threads();
    for (int turn = 0; turn < threads; ++turn) {
      const int owner = (omp_get_thread_num() + turn) % threads;
      const Range own = part_of(count_, threads, owner);
      for (;;) {
        const int64_t item =
            own.begin + taken_[owner].count.fetch_add(1, std::memory_order_relaxed);
        if (item >= own.end) break;
        f(item);
      }
    }
#pragma omp barrier
  }

 private:
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  int64_t count_;
  Memory<Taken> taken_;
};

}  // namespace
