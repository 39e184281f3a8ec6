// How threads divide items of work among themselves, where one may be held up: by another program on its core, by
// slower memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace awq::core {

/// Items [0, count) in equal shares of neighbours, one a thread: each thread reads what it always reads, in order. It
/// takes a quarter of what is left of its share at a time, and when nothing is, it helps with the shares after its own.
class Shares {
 public:
  static constexpr std::int64_t kMost = 64;   // shares; threads beyond have one together
  static constexpr std::int64_t kVisits = 4;  // shares a thread looks at, which their owners feel

  Shares(std::int64_t count, std::int64_t threads) : shares_(std::clamp<std::int64_t>(threads, 1, kMost)) {
    for (std::int64_t i = 0; i < shares_; ++i) {
      share_[i].next.store(count * i / shares_, std::memory_order_relaxed);
      share_[i].end = count * (i + 1) / shares_;
    }
  }

  /// Calls run(begin, end) for pieces until nothing is left of the share of `thread` and of those it helps with. When
  /// this has returned for every thread, run has for every item, once each.
  template <class Run>
  void work(std::int64_t thread, const Run& run) noexcept {
    for (std::int64_t i = 0; i < std::min(shares_, kVisits); ++i) {
      Share& share = share_[(thread + i) % shares_];
      std::int64_t begin = share.next.load(std::memory_order_relaxed);
      while (begin < share.end) {
        const std::int64_t left = share.end - begin, end = begin + (shares_ == 1 ? left : (left + 3) / 4);
        if (!share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        run(begin, end);
        begin = share.next.load(std::memory_order_relaxed);
      }
    }
  }

 private:
  struct alignas(64) Share {  // a line each, so that owners do not wait for each other
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };
  std::int64_t shares_;
  Share share_[kMost];
};

}  // namespace awq::core
