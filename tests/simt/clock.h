// Vector clocks: who knows what of whom. Two accesses are ordered if the later one's thread knows the earlier one's
// time; without that knowledge, which only barriers and waits hand on, no schedule that happened to be played proves
// anything. Lamport, "Time, Clocks, and the Ordering of Events", 1978; Mattern, 1989.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace simt {

/// A moment of one party: a thread, or a unit that works for it. who 0: nobody.
struct Epoch {
  std::uint32_t who = 0, when = 0;
};

/// One time for every party. Not changed once it is shared; threads that have met share one.
class Clock {
 public:
  Clock() = default;
  explicit Clock(std::size_t parties) : body_(new Body{1, std::vector<std::uint32_t>(parties)}) {}
  Clock(const Clock& other) : body_(other.body_) {
    if (body_ != nullptr) ++body_->references;
  }
  Clock(Clock&& other) noexcept : body_(std::exchange(other.body_, nullptr)) {}
  Clock& operator=(Clock other) noexcept {
    std::swap(body_, other.body_);
    return *this;
  }
  ~Clock() {
    if (body_ != nullptr && --body_->references == 0) delete body_;
  }

  explicit operator bool() const { return body_ != nullptr; }
  bool operator==(const Clock& other) const { return body_ == other.body_; }
  std::uint32_t operator[](std::uint32_t who) const { return body_->time[who]; }
  bool knows(Epoch e) const { return body_ != nullptr && body_->time[e.who] >= e.when; }

  Clock copy() const {
    Clock c;
    c.body_ = new Body{1, body_->time};
    return c;
  }
  /// Only of a clock that nobody else has.
  void raise(std::uint32_t who, std::uint32_t when) { body_->time[who] = std::max(body_->time[who], when); }
  void raise(const Clock& other) {
    for (std::size_t i = 0; i < body_->time.size(); ++i)
      body_->time[i] = std::max(body_->time[i], other.body_->time[i]);
  }
  bool covers(const Clock& other) const {
    for (std::size_t i = 0; i < body_->time.size(); ++i)
      if (body_->time[i] < other.body_->time[i]) return false;
    return true;
  }
  const void* identity() const { return body_; }

 private:
  struct Body {
    int references;
    std::vector<std::uint32_t> time;
  };
  Body* body_ = nullptr;
};

/// All that either knows. Threads that share a clock and learn the same thing share the result, too: the latest
/// answers are kept.
inline Clock join(const Clock& a, const Clock& b) {
  struct Answer {
    Clock a, b, result;
  };
  static std::array<Answer, 8> answers;
  static std::size_t oldest = 0;
  if (!b || a == b) return a;
  if (!a) return b;
  for (const Answer& answer : answers)
    if (answer.a == a && answer.b == b) return answer.result;
  Clock result;
  if (a.covers(b)) {
    result = a;
  } else if (b.covers(a)) {
    result = b;
  } else {
    result = a.copy();
    result.raise(b);
  }
  answers[oldest] = {a, b, result};
  oldest = (oldest + 1) % answers.size();
  return result;
}

/// What a party knows: `seen` of everything; `fenced` of what has been made visible to asynchronous copies and wgmma
/// (fence_async). Both leave out the party's own time.
struct Knowledge {
  Clock seen, fenced;

  void learn(const Knowledge& other) {
    seen = join(seen, other.seen);
    fenced = join(fenced, other.fenced);
  }
};

/// The sum of what those who arrive at a barrier know.
class Gathering {
 public:
  void add(const Knowledge& k, Epoch own, std::uint32_t own_fenced) {
    add(seen_, last_.seen, k.seen);
    seen_.raise(own.who, own.when);
    if (!k.fenced && own_fenced == 0) return;
    if (!fenced_) fenced_ = Clock(size_);
    if (k.fenced) add(fenced_, last_.fenced, k.fenced);
    fenced_.raise(own.who, own_fenced);
  }
  void raise(Epoch e) { seen_.raise(e.who, e.when); }
  /// The sum; begins anew.
  Knowledge take() {
    last_ = {};
    return {std::exchange(seen_, Clock()), std::exchange(fenced_, Clock())};
  }
  void start(std::size_t parties) {
    size_ = parties;
    if (!seen_) seen_ = Clock(parties);
  }

 private:
  static void add(Clock& sum, Clock& last, const Clock& clock) {
    if (last == clock || !clock) return;
    sum.raise(clock);
    last = clock;
  }
  std::size_t size_ = 0;
  Clock seen_, fenced_;
  Knowledge last_;
};

}  // namespace simt
