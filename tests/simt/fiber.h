// One stack for each thread of a launch, and the jump from one to another. Nothing here knows of blocks or barriers.
#pragma once
#include <boost/context/fiber.hpp>
#include <cstddef>
#include <functional>

namespace simt {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Makes this fiber run `body` when it is first switched to. `body` returns the fiber that goes on when it has ended.
  void start(std::function<Fiber*()> body);
  /// Where its stack begins; it grows down from there.
  const void* stack_top() const { return static_cast<const char*>(stack_) + stack_bytes_; }
  /// From this fiber, which is running, to another. Returns when somebody switches back.
  void switch_to(Fiber& next);

 private:
  struct Stacks;
  void arrived(boost::context::fiber&& from);

  boost::context::fiber context_;  // of this fiber while it does not run
  void* stack_ = nullptr;          // lower end and size, which AddressSanitizer must know before it is entered
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace simt
